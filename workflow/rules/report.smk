# in:  records, metrics and samples; config/published.csv; results/reference/
# out: media/*_loss.png, media/gpt2_MACHINE_throughput.png, results/summary.csv, results/report.md, results/report.html


report: "../report/workflow.rst"


localrules:
    loss_curve,
    throughput,
    summary,
    page,


# A relative path, so that nothing runs again when the clone is moved.
SOURCE = Path(os.path.relpath(ROOT))
BANNER = lambda wildcards: f"--banner={config['banner']}"  # a function, so that braces in it are no wildcards
PUBLISHED = str(SOURCE / "config/published.csv")
REFERENCES = sorted(map(str, (SOURCE / "results/reference").glob("*/*.json")))
RECORDS = [
    *expand(f"weights/{{model}}/{RUN}/record.json", model=MODELS),
    f"{GPT2}/record.json",
    *expand(
        "results/records/{measured}_{gpt2}_{dtype}.json",
        measured=["evaluate", "sampling"],
        gpt2=GPT2_MODELS,
        dtype=config["gpt2"]["dtypes"],
    ),
    *expand("results/records/sampling_gpt2_{streams}_streams.json", streams=PLAN["streams"]),
    *expand("results/records/hellaswag_{gpt2}.json", gpt2=GPT2_MODELS if PLAN["hellaswag"] else []),
    *expand("results/records/{name}.json", name=["weights", *PLAN["measured_rungs"]]),
]
RUN_FOLDERS = {
    **{model: f"weights/{model}/{RUN}" for model in MODELS},
    f"gpt2_{CORPUS}": GPT2,
    **{f"gpt2_{name}": f"weights/gpt2/{RUN}/fineweb-edu_{name}" for name in PLAN["machines"]},
}


DRAWN = [*MODELS, f"gpt2_{CORPUS}"]
TEXTS = [*expand("{model}_sample", model=DRAWN), *expand("{model}_untrained", model=MODELS)]


rule loss_curve:
    """Draw training and validation loss beside the published values, with every epoch and the best step marked."""
    input:
        lambda wildcards: multiext(f"{RUN_FOLDERS[wildcards.run]}/", "record.json", "metrics.jsonl"),
        PUBLISHED,
    output:
        report(
            "media/{run}_loss.png",
            caption="../report/loss_curve.rst",
            category="loss curves",
            labels={"model": "{run}"},
        ),
    log:
        "logs/loss_curve_{run}.log",
    wildcard_constraints:
        run="|".join(RUN_FOLDERS),
    priority: 90
    params:
        folder=lambda wildcards: RUN_FOLDERS[wildcards.run],
        banner=BANNER,
    shell:
        """
        picogpt report loss-curve \
            --run-folder {params.folder:q} \
            {params.banner:q} \
            --out {output:q} \
            >{log:q} 2>&1
        echo picogpt: to look at: {output:q}
        """


rule throughput:
    """
    Draw the training ladder of a machine beside the published values. If none of it is measured here, the reference records
    of that machine are drawn, and without these only the published values; the picture says which.
    """
    input:
        records=lambda wildcards: [path for path in RECORDS if f"/ladder/{wildcards.hardware}/" in path],
        references=lambda w: [path for path in REFERENCES if Path(path).name.startswith(f"ladder_{w.hardware}_")],
        published=PUBLISHED,
    output:
        report(
            "media/gpt2_{hardware}_throughput.png",
            caption="../report/throughput.rst",
            category="training ladder",
            labels={"machine": "{hardware}"},
        ),
    log:
        "logs/throughput_{hardware}.log",
    params:
        machine=lambda wildcards: machine(wildcards, "argument"),
        settings=lambda wildcards: machine(wildcards, "settings"),
        references=lambda wildcards, input: expand("--reference={path}", path=input.references),
        banner=BANNER,
    shell:
        "picogpt report throughput"
        " --hardware {params.machine:q}"
        " {input.records:q} {params.references:q}"
        " {params.banner:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"
        " && echo picogpt: to look at: {output:q}"


rule summary:
    """Put each published number beside the measured one, and say whether it was reproduced and why not."""
    input:
        records=RECORDS,
        trainings=long_trainings(f"weights/gpt2/{RUN}/fineweb-edu_{{name}}/record.json"),
        hub=hub_status,
        references=REFERENCES,
        published=PUBLISHED,
    output:
        report(
            "results/summary.csv", caption="../report/summary.rst", category="comparison", labels={"artifact": "table"}
        ),
    log:
        "logs/summary.log",
    priority: 90
    params:
        references=expand("--reference={path}", path=REFERENCES),
        banner=BANNER,
    shell:
        "picogpt report summary {input.records:q} {input.trainings:q}"
        " {params.references:q} {params.banner:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"
        " && echo picogpt: to look at: {output:q}"


rule page:
    """Fill in the write-up with the numbers, figures and samples of this run: as Markdown, and as one page to look at and to send."""
    input:
        summary="results/summary.csv",
        records=RECORDS,
        trainings=long_trainings(f"weights/gpt2/{RUN}/fineweb-edu_{{name}}/record.json"),
        hub=hub_status,
        samples=expand("media/{model}_sample.txt", model=DRAWN),
        untrained=expand("results/samples/{model}_untrained.txt", model=MODELS),
        probabilities=expand("results/samples/{text}.json", text=TEXTS),
        metrics=expand("{folder}/metrics.jsonl", folder=[RUN_FOLDERS[run] for run in DRAWN]),
        long_metrics=long_trainings(f"weights/gpt2/{RUN}/fineweb-edu_{{name}}/metrics.jsonl"),
        references=REFERENCES,
        figures=expand("media/{run}_loss.png", run=DRAWN),
        ladders=expand("media/gpt2_{hardware}_throughput.png", hardware=PLAN["machines"]),
        curves=long_trainings("media/gpt2_{name}_loss.png"),
        templates=expand(str(SOURCE / "workflow/report/{name}.j2"), name=["sentences", "report.{format}"]),
    output:
        report(
            "results/report.{format,md|html}",
            caption="../report/page.rst",
            category="comparison",
            labels={"artifact": "write-up, {format}"},
        ),
    log:
        "logs/page_{format}.log",
    priority: 90
    params:
        first_dtype=config["gpt2"]["dtypes"][0],
        banner=BANNER,
        records=lambda wildcards, input: expand("--record={path}", path=[*input.records, *input.trainings]),
        references=expand("--reference={path}", path=REFERENCES),
        machines=[f"--hardware={plan['argument']}" for plan in PLAN["machines"].values()],
        settings=[plan["settings"] for plan in PLAN["machines"].values()],
        samples=lambda wildcards, input: expand("--sample={path}", path=[*input.samples, *input.untrained]),
        metrics=lambda wildcards, input: expand("--metrics={path}", path=[*input.metrics, *input.long_metrics]),
        probabilities=lambda wildcards, input: expand("--probabilities={path}", path=input.probabilities),
    shell:
        "picogpt report page"
        " --template {input.templates[1]:q}"
        " --summary {input.summary:q}"
        " {params.records:q} {params.references:q}"
        " {params.machines:q}"
        " {params.samples:q} {params.probabilities:q}"
        " {params.metrics:q}"
        f" --set gpt2_media=gpt2_{CORPUS} --set first_dtype={{params.first_dtype}}"
        " {params.banner:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"
        " && echo picogpt: to look at: {output:q}"
