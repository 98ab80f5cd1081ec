# in:  FineWeb-Edu's tokens, in shards
# out: weights/gpt2/RUN/fineweb-edu_MACHINE/, media/gpt2_MACHINE_loss.png


localrules:
    loss_curve_fineweb,


rule train_fineweb:
    """
    The distributed run of the write-up: GPT-2 on all devices of a machine, each with its part of every batch.

    On another machine it refuses. Checkpoints as in the other trainings: a killed run goes on, on as many ranks.
    """
    input:
        rules.fineweb_manifest.output,
    output:
        multiext(f"weights/gpt2/{RUN}/fineweb-edu_{{hardware}}/", "best.pt", "metrics.jsonl", "record.json"),
    log:
        "logs/train_fineweb_{hardware}.log",
    benchmark:
        "logs/train_fineweb_{hardware}.tsv"
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=240,
        mem_mb=lambda wildcards: 16000 * machine_settings(wildcards.hardware)["ranks"],
        nodes=lambda wildcards: allocation(wildcards.hardware, "nodes"),
        gpu=lambda wildcards: allocation(wildcards.hardware, "gpu"),
        gpu_model=lambda wildcards: allocation(wildcards.hardware, "gpu_model"),
        tasks=lambda wildcards: allocation(wildcards.hardware, "tasks"),
        # Otherwise the plugin would start a task for each GPU.
        tasks_per_gpu=0,
        cpus_per_task=lambda wildcards: allocation(wildcards.hardware, "cpus_per_task"),
        mpi=lambda wildcards: allocation(wildcards.hardware, "mpi"),
    params:
        launch=lambda wildcards: machine_launch(wildcards.hardware),
        folder=lambda wildcards, output: Path(output[0]).parent,
        tokens=lambda wildcards, input: Path(input[0]).parent,
        machine=lambda wildcards: machine_argument(wildcards.hardware),
        machine_settings=lambda wildcards: batch_settings(wildcards.hardware),
        config_file=lambda wildcards: training_file(wildcards.hardware),
        settings=lambda wildcards: deciding(training_file(wildcards.hardware)),
        overrides=[f"--set={pair}" for pair in config["fineweb"]["set"]],
    shell:
        f"{HEAR_THE_END}{{params.launch}} train gpt2"
        " --data {params.tokens:q}"
        " --folder {params.folder:q}"
        " --config {params.config_file:q}"
        " {params.overrides:q}"
        " --hardware {params.machine:q}"
        " --replace"
        " 2>&1 | tee -i {log:q}"


use rule loss_curve as loss_curve_fineweb with:
    input:
        multiext(f"weights/gpt2/{RUN}/fineweb-edu_{{hardware}}/", "record.json", "metrics.jsonl"),
        PUBLISHED,
    output:
        report(
            "media/gpt2_{hardware}_loss.png",
            caption="../report/loss_curve.rst",
            category="gpt-2",
            labels={"model": "gpt2 on {hardware}", "artifact": "loss curve"},
        ),
    log:
        "logs/loss_curve_fineweb_{hardware}.log",
    params:
        run_folder=lambda wildcards, input: Path(input[0]).parent,
