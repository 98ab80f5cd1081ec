from snakemake.utils import min_version, validate

min_version("9.19")


configfile: f"{workflow.current_basedir}/config/config.yaml"


validate(config, "config/config.schema.yaml")


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/tokenize.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/run.smk"


rule all:
    """Every artifact of the write-up."""
    default_target: True
    input:
        expand("media/{run}_loss.png", run=["char_bigram", "char_transformer", f"gpt2_{CORPUS}"]),
        "media/char_transformer_sample.txt",
        f"media/gpt2_{CORPUS}_sample.txt",
        expand("media/gpt2_{hardware}_throughput.png", hardware=PLAN["machines"]),
        "results/summary.csv",
        "results/report.md",
        "results/report.html",
