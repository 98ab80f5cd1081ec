# in:  records, metrics and samples
# out: media/*_loss.png, media/data_scaling.png, results/summary.csv, results/report.md


localrules:
    loss_curve,
    loss_curve_gpt2,
    data_scaling,
    summary,
    page,


RECORDS = [
    *expand(f"weights/{{model}}/{RUN}/record.json", model=MODELS),
    f"{GPT2}/record.json",
    *expand(f"weights/gpt2/{RUN}/fineweb-edu_{{hardware}}/record.json", hardware=DISTRIBUTED),
    *expand(
        "results/records/{measured}_{gpt2}_{dtype}.json",
        measured=["evaluate", "sampling"],
        gpt2=["gpt2", "gpt2-pretrained"],
        dtype=config["gpt2"]["dtypes"],
    ),
    "results/records/sampling_gpt2_streams.json",
    "results/records/weights.json",
    "results/records/data.json",
    *(path for name in MEASURED for path in ladder_records(name)),
]
REFERENCES = [local(path) for path in sorted(map(str, REFERENCE.glob("*/*.json")))]
SAMPLES = {
    f"{model}_{stage}": f"results/samples/{model}_{stage}.txt" for model in MODELS for stage in ("untrained", "trained")
}


rule loss_curve:
    """Draw how the losses fell, beside the published values, with every epoch and the best step marked."""
    input:
        multiext(f"weights/{{model}}/{RUN}/", "record.json", "metrics.jsonl"),
        PUBLISHED,
    output:
        report(
            "media/{model}_loss.png",
            caption="../report/loss_curve.rst",
            category="character models",
            labels={"model": "{model}", "artifact": "loss curve"},
        ),
    log:
        "logs/loss_curve_{model}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=1000,
    params:
        run_folder=lambda wildcards: f"weights/{wildcards.model}/{RUN}",
    shell:
        "picogpt report loss-curve" " --run-folder {params.run_folder:q}" " --out {output:q}" " > {log:q} 2>&1"


use rule loss_curve as loss_curve_gpt2 with:
    input:
        multiext(f"{GPT2}/", "record.json", "metrics.jsonl"),
        PUBLISHED,
    output:
        report(
            f"media/gpt2_{CORPUS}_loss.png",
            caption="../report/loss_curve.rst",
            category="gpt-2",
            labels={"model": "gpt2", "artifact": "loss curve"},
        ),
    log:
        "logs/loss_curve_gpt2.log",
    params:
        run_folder=lambda wildcards, input: Path(input[0]).parent,


rule data_scaling:
    """Draw how the cost of data grows: it should be a straight line on the left, and flat on the right."""
    input:
        "results/records/data.json",
    output:
        report(
            "media/data_scaling.png",
            caption="../report/data_scaling.rst",
            category="data",
            labels={"model": "all", "artifact": "cost of data"},
        ),
    log:
        "logs/data_scaling.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=1000,
    shell:
        "picogpt report data-scaling" " {input:q}" " --out {output:q}" " > {log:q} 2>&1"


rule summary:
    """Put each published number beside the measured one, and say whether it was reproduced and why not."""
    input:
        records=RECORDS,
        references=REFERENCES,
        published=PUBLISHED,
    output:
        report(
            "results/summary.csv",
            caption="../report/summary.rst",
            category="comparison",
            labels={"model": "all", "artifact": "table"},
        ),
    log:
        "logs/summary.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=500,
    params:
        references=[f"--reference={path}" for path in REFERENCES],
    shell:
        "picogpt report summary {input.records:q}" " {params.references:q}" " --out {output:q}" " > {log:q} 2>&1"


rule page:
    """Fill in the write-up with the numbers, figures and samples of this run."""
    input:
        summary="results/summary.csv",
        records=RECORDS,
        samples=SAMPLES.values(),
        references=REFERENCES,
        figures=[
            *expand("media/{model}_loss.png", model=[*MODELS, f"gpt2_{CORPUS}"]),
            "media/data_scaling.png",
            *expand("media/gpt2_{hardware}_throughput.png", hardware=HARDWARE),
            *expand("media/gpt2_{hardware}_loss.png", hardware=DISTRIBUTED),
        ],
        texts=["media/char_transformer_sample.txt", f"media/gpt2_{CORPUS}_sample.txt"],
        template=local(str(Path(workflow.basedir, "report/report.md.j2"))),
    output:
        report(
            "results/report.md",
            caption="../report/page.rst",
            category="comparison",
            labels={"model": "all", "artifact": "write-up"},
        ),
    log:
        "logs/page.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=500,
    params:
        gpt2_media=f"gpt2_{CORPUS}",
        first_dtype=config["gpt2"]["dtypes"][0],
        records=expand("--record={record}", record=RECORDS),
        references=[f"--reference={path}" for path in REFERENCES],
        hardware=[f"--hardware={machine_argument(name)}" for name in HARDWARE],
        machines=json.dumps([machine_settings(name) for name in HARDWARE], sort_keys=True),
        samples=expand(
            "--sample={pair}",
            pair=[f"{name}={path}" for name, path in SAMPLES.items()] + [f"gpt2=media/gpt2_{CORPUS}_sample.txt"],
        ),
    shell:
        "picogpt report page"
        " --template {input.template:q}"
        " --summary {input.summary:q}"
        " {params.records:q}"
        " {params.references:q}"
        " {params.hardware:q}"
        " {params.samples:q}"
        " --set gpt2_media={params.gpt2_media:q}"
        " --set first_dtype={params.first_dtype}"
        " --out {output:q}"
        " > {log:q} 2>&1"
