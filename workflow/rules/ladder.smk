# in:  GPT-2's tokens; the machines of config/hardware/; reference records
# out: results/records/ladder/MACHINE/RUNG.json, media/gpt2_MACHINE_throughput.png


localrules:
    throughput,


wildcard_constraints:
    hardware=r"[A-Za-z0-9_-]+",
    rung=r"[a-z0-9_]+",


rule bench_train:
    """
    One rung of the training ladder: a step of GPT-2 with every optimization up to this one, in a process of its own.

    On another device than the hardware file names it refuses, so that no number stands under a wrong name.
    """
    input:
        rules.tokenize_gpt2.output,
        before=lambda wildcards: rung_before(wildcards.hardware, wildcards.rung),
    output:
        "results/records/ladder/{hardware}/{rung}.json",
    log:
        "logs/bench_train_{hardware}_{rung}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=60,
        mem_mb=lambda wildcards: 12000 * machine_settings(wildcards.hardware)["ranks"],
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
        tokens=lambda wildcards, input: Path(input[0]).parent,
        file=lambda wildcards: machine_argument(wildcards.hardware),
        settings=lambda wildcards: rung_settings(wildcards.hardware, wildcards.rung),
        model=json.dumps(yaml.safe_load((SHIPPED / "../models/gpt2_cpu.yaml").read_text())["model"], sort_keys=True),
        overrides=[f"--set={pair}" for pair in config["ladder"]["set"]],
    shell:
        "{params.launch} bench train"
        " --hardware {params.file:q}"
        " --rung {wildcards.rung}"
        " --data {params.tokens:q}"
        " {params.overrides:q}"
        " --out {output:q}"
        " 2>&1 | tee -i {log:q}"


rule throughput:
    """
    Draw the ladder of a machine beside the published values.

    What is not measured here comes from the reference records, or is left out; the picture says which.
    """
    input:
        records=lambda wildcards: ladder_records(wildcards.hardware),
        references=lambda wildcards: ladder_references(wildcards.hardware),
        published=PUBLISHED,
    output:
        report(
            "media/gpt2_{hardware}_throughput.png",
            caption="../report/throughput.rst",
            category="training ladder",
            labels={"model": "gpt2", "artifact": "{hardware}"},
        ),
    log:
        "logs/throughput_{hardware}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=1000,
    params:
        file=lambda wildcards: machine_argument(wildcards.hardware),
        machine=lambda wildcards: json.dumps(machine_settings(wildcards.hardware), sort_keys=True),
        references=lambda wildcards, input: [f"--reference={path}" for path in input.references],
    shell:
        "picogpt report throughput"
        " --hardware {params.file:q}"
        " {input.records:q}"
        " {params.references:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"
