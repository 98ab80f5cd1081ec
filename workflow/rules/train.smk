# in:  token files
# out: weights/MODEL/RUN/, weights/gpt2/RUN/CORPUS/, weights/gpt2/RUN/fineweb-edu_MACHINE/: best.pt, metrics.jsonl, record.json
#
# A training keeps its checkpoints in the folder checkpoints/ there. They are not declared as outputs, because Snakemake
# deletes the outputs of a failed job: a job that was killed continues from its last checkpoint.

# SLURM sends SIGTERM to every process of a job. The trainer saves and ends; the shell and tee must outlive it.
WAIT_FOR_TRAINER = "trap '' TERM; "


rule train:
    """Minimize the cross-entropy of the next character, and keep the weights with the lowest validation loss."""
    input:
        rules.tokenize_char.output,
    output:
        multiext(f"weights/{{model}}/{RUN}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_{model}.log",
    # Cheap and interesting first: the bigram, the character transformer, GPT-2; then evaluation, benchmarks, the ladder.
    priority: lambda wildcards: 80 if wildcards.model == "char_bigram" else 70
    resources:
        **PLAN["resources"],
        machine=100,  # all of it: nothing runs beside what is timed
        mem_mb=8000,
    params:
        name=lambda wildcards: wildcards.model.replace("_", "-"),
        file=lambda wildcards: PLAN["models"][wildcards.model]["file"],
        settings=lambda wildcards: PLAN["models"][wildcards.model]["settings"],
        overrides=lambda wildcards: expand("--set={pair}", pair=config[wildcards.model]["set"]),
    shell:
        f"{WAIT_FOR_TRAINER}picogpt train {{params.name:q}}"
        " {params.file:q} {params.overrides:q}"
        f" --data {TOKENS}"
        f" --name {RUN}"
        " --replace"
        " 2>&1 | tee -i {log:q}"


rule train_gpt2:
    """
    GPT-2 with its 124 million parameters, from scratch on the same text: far too little text for so large a model,
    which begins to memorize it in the second epoch. On several GPUs each rank computes its share of every batch.
    """
    input:
        rules.tokenize_gpt2.output,
    output:
        multiext(f"{GPT2}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_gpt2.log",
    priority: 60
    resources:
        **PLAN["gpt2"]["resources"],
        machine=100,
        runtime=240,
        mem_mb=8000 * PLAN["gpt2"]["ranks"],
    params:
        launch=PLAN["gpt2"]["launch"],
        file=PLAN["models"]["gpt2"]["file"],
        settings=lambda wildcards: PLAN["models"]["gpt2"]["settings"],
        overrides=lambda wildcards: expand("--set={pair}", pair=config["gpt2"]["set"]),
    shell:
        f"{WAIT_FOR_TRAINER}{{params.launch}} train gpt2"
        " {params.file:q} {params.overrides:q}"
        f" --data {GPT2_TOKENS}"
        f" --folder {GPT2}"
        " --replace"
        " 2>&1 | tee -i {log:q}"


rule train_fineweb:
    """
    The distributed run of the write-up: GPT-2 on all devices of a machine, each rank with its share of every batch.
    On any other device the command fails. A run that was killed continues.
    """
    input:
        rules.fineweb_manifest.output,
    output:
        multiext(f"weights/gpt2/{RUN}/fineweb-edu_{{hardware}}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_fineweb_{hardware}.log",
    resources:
        **MACHINE_RESOURCES,
        machine=100,
        runtime=240,
        mem_mb=lambda wildcards: 16000 * machine(wildcards, "ranks"),
    params:
        launch=lambda wildcards: machine(wildcards, "launch"),
        machine=lambda wildcards: machine(wildcards, "argument"),
        file=lambda wildcards: machine(wildcards, "training")["file"],
        settings=lambda wildcards: machine(wildcards, "training")["settings"],
        overrides=lambda wildcards: expand("--set={pair}", pair=config["fineweb"]["set"]),
    shell:
        f"{WAIT_FOR_TRAINER}{{params.launch}} train gpt2"
        " {params.file:q} {params.overrides:q}"
        f" --data {FINEWEB}"
        f" --folder weights/gpt2/{RUN}/fineweb-edu_{{wildcards.hardware}}"
        " --hardware {params.machine:q}"
        " --replace"
        " 2>&1 | tee -i {log:q}"
