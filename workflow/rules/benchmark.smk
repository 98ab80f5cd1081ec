# in:  GPT-2 as trained here, and OpenAI's where the hub could be reached
# out: results/records/: what each knows, how fast it samples, what it weighs; how the cost of data grows


localrules:
    bench_weights,


rule evaluate:
    """
    The loss on the whole validation text, in the dtype in which the model would sample, and texts from given prompts.

    For weights in eight bits the difference to float32 is what they cost.
    """
    input:
        ckpt=lambda wildcards: gpt2_weights(wildcards.gpt2),
        tokens=rules.tokenize_gpt2.output,
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/evaluate_{gpt2}_{dtype}.json",
    log:
        "logs/evaluate_{gpt2}_{dtype}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=30,
        mem_mb=6000,
        gpu=1 if SIZE == "gpu" else 0,
        gpu_model=gpu_model() if SIZE == "gpu" else None,
        cpus_per_task=CPUS,
    params:
        model=lambda wildcards: gpt2_arguments(wildcards.gpt2),
        tokens=lambda wildcards, input: Path(input.tokens[0]).parent,
        prompts=[f"--prompt={prompt}" for prompt in config["gpt2"]["prompts"]],
        prompt_tokens=config["gpt2"]["prompt_tokens"],
    shell:
        "picogpt evaluate {params.model:q}"
        " --dtype {wildcards.dtype}"
        " --data {params.tokens:q}"
        " {params.prompts:q}"
        " -n {params.prompt_tokens}"
        " --out {output:q}"
        " > {log:q} 2>&1"


rule bench_sampling:
    """How many tokens a second one stream gets; nothing else runs meanwhile, and every run is listed."""
    input:
        ckpt=lambda wildcards: gpt2_weights(wildcards.gpt2),
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/sampling_{gpt2}_{dtype}.json",
    log:
        "logs/bench_sampling_{gpt2}_{dtype}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=30,
        mem_mb=4000,
        gpu=1 if SIZE == "gpu" else 0,
        gpu_model=gpu_model() if SIZE == "gpu" else None,
        cpus_per_task=CPUS,
    params:
        model=lambda wildcards: gpt2_arguments(wildcards.gpt2),
        dtype="{dtype}",
        tokens=config["gpt2"]["throughput_tokens"],
        runs=config["gpt2"]["throughput_runs"],
    shell:
        "picogpt bench sample {params.model:q}"
        " --dtype {params.dtype}"
        " -n {params.tokens}"
        " --runs {params.runs}"
        " --out {output:q}"
        " > {log:q} 2>&1"


use rule bench_sampling as bench_sampling_streams with:
    input:
        ckpt=f"{GPT2}/best.pt",
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/sampling_gpt2_streams.json",
    log:
        "logs/bench_sampling_gpt2_streams.log",
    params:
        model=[*gpt2_arguments("gpt2"), f"--batch-size={config['gpt2']['throughput_streams']}"],
        dtype=FAST_DTYPE,
        tokens=config["gpt2"]["throughput_tokens"],
        runs=config["gpt2"]["throughput_runs"],


rule bench_data:
    """
    How the cost of data grows: tokenizing with the cores, in turn with tiktoken's own; reading with the number of shards.
    """
    input:
        text=corpus_file(),
        ranks="resources/gpt2.tiktoken",
    output:
        "results/records/data.json",
    log:
        "logs/bench_data.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        machine=100,
        runtime=30,
        mem_mb=4000,
        cpus_per_task=CPUS,
    params:
        shards=[f"--shards={count}" for count in config["data"]["shards"]],
        characters=config["data"]["characters"],
        windows=config["data"]["windows"],
        runs=config["data"]["runs"],
    shell:
        "picogpt bench data"
        " --text {input.text:q}"
        " {params.shards:q}"
        " --characters {params.characters}"
        " --windows {params.windows}"
        " --runs {params.runs}"
        " --out {output:q}"
        " > {log:q} 2>&1"


rule bench_weights:
    """What the trained weights weigh on disk, beside OpenAI's."""
    input:
        ckpt=f"{GPT2}/best.pt",
        pretrained="resources/pretrained.txt",
        char=expand(f"weights/{{model}}/{RUN}/best.pt", model=MODELS),
    output:
        "results/records/weights.json",
    log:
        "logs/bench_weights.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=10,
        mem_mb=1000,
    params:
        char=lambda wildcards, input: [f"{Path(path).parts[1].replace('_', '-')}={path}" for path in input.char],
    shell:
        "picogpt bench weights"
        " {params.char:q}"
        " gpt2={input.ckpt:q}"
        " gpt2-pretrained=gpt2-pretrained"
        " --out {output:q}"
        " > {log:q} 2>&1"
