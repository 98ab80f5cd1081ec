# in:  token files
# out: weights/MODEL/RUN/: best.pt, metrics.jsonl, record.json


rule train:
    """
    Minimize the cross-entropy of the next character, and keep the weights that predict the validation text best.

    The training keeps its checkpoints in weights/MODEL/RUN/checkpoints/, which is no output: Snakemake deletes
    the outputs of a failed job, and a job that was killed goes on from its last checkpoint.
    """
    input:
        rules.tokenize_char.output,
    output:
        multiext(f"weights/{{model}}/{RUN}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_{model}.log",
    benchmark:
        "logs/train_{model}.tsv"
    conda:
        "../envs/picogpt.yaml"
    resources:
        # Timings are taken alone.
        machine=100,
        runtime=60,
        mem_mb=8000,
    params:
        run=RUN,
        tokens=lambda wildcards, input: Path(input[0]).parent,
        kind=lambda wildcards: wildcards.model.replace("_", "-"),
        config_file=lambda wildcards: settings_file(wildcards.model),
        settings=lambda wildcards: settings(wildcards.model),
        overrides=lambda wildcards: [f"--set={pair}" for pair in config[wildcards.model]["set"]],
    shell:
        "picogpt train {params.kind:q}"
        " --data {params.tokens:q}"
        " --run {params.run:q}"
        " --config {params.config_file:q}"
        " {params.overrides:q}"
        " --replace"
        " 2>&1 | tee -i {log:q}"
