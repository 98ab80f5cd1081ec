from pathlib import Path

from snakemake.utils import min_version, validate

min_version("9.11")


configfile: str(Path(workflow.basedir, "config/config.yaml"))


validate(config, str(Path(workflow.basedir, "config/schemas/pipeline.schema.json")))


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/tokenize.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "media/char_bigram_loss.png",
        "media/char_transformer_loss.png",
        "media/char_transformer_sample.txt",
        "results/summary.csv",
        "results/report.md",
