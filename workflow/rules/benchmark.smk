# in:  GPT-2 as trained here, and OpenAI's where the hub gave it; GPT-2's tokens; the machines of config/hardware/
# out: results/records/: losses and texts, sampling speed, sizes of weight files; ladder/MACHINE/RUNG.json


localrules:
    bench_weights,


# The weights of each GPT-2, and how the command line names it. Where something is not here, or the device has no use for the
# dtype, --optional writes a record that says so.
GPT2_ARGUMENTS = {"gpt2": ["gpt2", f"--ckpt={GPT2}/best.pt"], "gpt2-pretrained": ["gpt2-pretrained"]}
gpt2_weights = lambda wildcards: f"{GPT2}/best.pt" if wildcards.gpt2 == "gpt2" else hub_status(wildcards)
gpt2_on_hub = lambda wildcards: "" if wildcards.gpt2 == "gpt2" else hub_answer("pretrained")


rule evaluate:
    """
    The loss on the whole validation text, in the dtype in which the model would sample, and continuations of prompts.
    The difference between float32 and eight-bit weights is what quantization costs.
    """
    input:
        weights=gpt2_weights,
        tokens=rules.tokenize_gpt2.output,
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/evaluate_{gpt2}_{dtype}.json",
    log:
        "logs/evaluate_{gpt2}_{dtype}.log",
    priority: 50
    resources:
        **PLAN["resources"],
        machine=100,
        mem_mb=6000,
    params:
        model=lambda wildcards: GPT2_ARGUMENTS[wildcards.gpt2],
        on_hub=gpt2_on_hub,
        options=lambda wildcards: [
            f"--dtype={wildcards.dtype}",
            f"--data={GPT2_TOKENS}",
            f"--num-tokens={config['gpt2']['prompt_tokens']}",
            *expand("--prompt={prompt}", prompt=config["gpt2"]["prompts"]),
        ],
    shell:
        "picogpt evaluate {params.model:q} --optional {params.options:q} --out {output:q} > {log:q} 2>&1"


use rule evaluate as hellaswag with:
    # How often the right one of four endings of a text is found, in float32. The items are a file that may be missing.
    input:
        weights=gpt2_weights,
        data=hub_status,
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/hellaswag_{gpt2}.json",
    log:
        "logs/hellaswag_{gpt2}.log",
    params:
        on_hub=lambda wildcards: [gpt2_on_hub(wildcards), hub_answer("hellaswag")],
        options=["--task=hellaswag"],


rule bench_sampling:
    """Tokens per second of one stream; nothing else runs meanwhile, and the record lists every run."""
    input:
        weights=gpt2_weights,
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/sampling_{gpt2}_{dtype}.json",
    log:
        "logs/bench_sampling_{gpt2}_{dtype}.log",
    priority: 40
    resources:
        **PLAN["resources"],
        machine=100,
    params:
        model=lambda wildcards: GPT2_ARGUMENTS[wildcards.gpt2],
        on_hub=gpt2_on_hub,
        dtype="{dtype}",
        tokens=config["gpt2"]["throughput_tokens"],
        runs=config["gpt2"]["throughput_runs"],
    shell:
        "picogpt bench sample {params.model:q} --optional"
        " --dtype {params.dtype} -n {params.tokens} --runs {params.runs}"
        " --out {output:q}"
        " > {log:q} 2>&1"


use rule bench_sampling as bench_sampling_streams with:
    input:
        weights=f"{GPT2}/best.pt",
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/sampling_gpt2_{streams}_streams.json",
    log:
        "logs/bench_sampling_gpt2_{streams}_streams.log",
    params:
        model=lambda wildcards: [*GPT2_ARGUMENTS["gpt2"], f"--batch-size={wildcards.streams}"],
        on_hub="",
        dtype=PLAN["fast_dtype"],


rule bench_weights:
    """Sizes of the trained weights on disk, beside OpenAI's."""
    input:
        bigram=f"weights/char_bigram/{RUN}/best.pt",
        transformer=f"weights/char_transformer/{RUN}/best.pt",
        gpt2=f"{GPT2}/best.pt",
        hub=hub_status,
    output:
        "results/records/weights.json",
    log:
        "logs/bench_weights.log",
    params:
        on_hub=lambda wildcards: hub_answer("pretrained"),
        pretrained=expand("{name}={name}", name=GPT2_MODELS[1:]),
    shell:
        "picogpt bench weights"
        " char-bigram={input.bigram:q}"
        " char-transformer={input.transformer:q}"
        " gpt2={input.gpt2:q}"
        " {params.pretrained:q}"
        " --out {output:q}"
        " > {log:q} 2>&1"


rule bench_train:
    """
    One rung of the training ladder: a step of GPT-2 with every optimization up to this one, in a process of its own.
    Rungs run in order, each after the one before it: the speed of a machine drifts, and neighbours must be comparable.
    The command fails on any other device than the hardware file names, so that no number is listed under a wrong name.
    """
    input:
        rules.tokenize_gpt2.output,
        before=lambda w: [f"results/records/ladder/{w.hardware}/{name}.json" for name in rung(w)["before"]],
    output:
        "results/records/ladder/{hardware}/{rung}.json",
    log:
        "logs/bench_train_{hardware}_{rung}.log",
    resources:
        **MACHINE_RESOURCES,
        machine=100,
        mem_mb=lambda wildcards: 12000 * machine(wildcards, "ranks"),
    params:
        launch=lambda wildcards: machine(wildcards, "launch"),
        machine=lambda wildcards: machine(wildcards, "argument"),
        settings=lambda wildcards: rung(wildcards)["settings"],
        model=PLAN["ladder_model"],
        overrides=lambda wildcards: expand("--set={pair}", pair=config["ladder"]["set"]),
    shell:
        "{params.launch} bench train"
        " --hardware {params.machine:q}"
        f" --rung {{wildcards.rung}} --data {GPT2_TOKENS}"
        " {params.overrides:q}"
        " --out {output:q}"
        " 2>&1 | tee -i {log:q}"
