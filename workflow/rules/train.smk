# in:  token files
# out: weights/MODEL/RUN/ and weights/gpt2/RUN/CORPUS/: best.pt, metrics.jsonl, record.json


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
        gpu=1 if SIZE == "gpu" else 0,
        gpu_model=gpu_model() if SIZE == "gpu" else None,
        cpus_per_task=CPUS,
    params:
        run=RUN,
        tokens=lambda wildcards, input: Path(input[0]).parent,
        kind=lambda wildcards: wildcards.model.replace("_", "-"),
        config_file=lambda wildcards: settings_file(wildcards.model),
        settings=lambda wildcards: settings(wildcards.model),
        overrides=lambda wildcards: [f"--set={pair}" for pair in config[wildcards.model]["set"]],
    shell:
        f"{HEAR_THE_END}picogpt train {{params.kind:q}}"
        " --data {params.tokens:q}"
        " --run {params.run:q}"
        " --config {params.config_file:q}"
        " {params.overrides:q}"
        " --replace"
        " 2>&1 | tee -i {log:q}"


rule train_gpt2:
    """
    GPT-2, all 124 million weights of it, from scratch on the same text: far too little text for so large a model,
    which learns it by heart at the second reading. Checkpoints as above. On several GPUs each one takes its part
    of every batch.
    """
    input:
        rules.tokenize_gpt2.output,
    output:
        multiext(f"{GPT2}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_gpt2.log",
    benchmark:
        "logs/train_gpt2.tsv"
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=240,
        mem_mb=8000 * RANKS,
        nodes=1,
        gpu=RANKS if SIZE == "gpu" else 0,
        gpu_model=gpu_model() if SIZE == "gpu" else None,
        cpus_per_task=CPUS * RANKS,
    params:
        folder=lambda wildcards, output: Path(output[0]).parent,
        tokens=lambda wildcards, input: Path(input[0]).parent,
        config_file=settings_file("gpt2"),
        settings=settings("gpt2"),
        overrides=[f"--set={pair}" for pair in config["gpt2"]["set"]],
    shell:
        f"{HEAR_THE_END}{launch(RANKS)} train gpt2"
        " --data {params.tokens:q}"
        " --folder {params.folder:q}"
        " --config {params.config_file:q}"
        " {params.overrides:q}"
        " --replace"
        " 2>&1 | tee -i {log:q}"
