# in:  nothing (the network, once a shard)
# out: weights/gpt2_tokenizer/RUN/fineweb-edu/: train-00000.bin, …, val.bin, manifest.json


localrules:
    fetch_fineweb,


FINEWEB = f"{GPT2_TOKENS}/fineweb-edu"
FINEWEB_SHARDS = [f"{number:05}" for number in range(config["fineweb"]["shards"])]


wildcard_constraints:
    shard=r"\d{5}",


rule fetch_fineweb:
    """
    Bring one shard of FineWeb-Edu, 2 GB of text, into the cache of the hub's client, and note where it lies.

    What was fetched is verified against its pinned hash; what broke off goes on where it stopped.
    """
    output:
        "resources/fineweb-edu/{shard}.txt",
    log:
        "logs/fetch_fineweb_{shard}.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=120,
        mem_mb=1000,
    shell:
        "picogpt fetch fineweb-edu" " --shard {wildcards.shard}" " > {output:q}" " 2> {log:q}"


rule tokenize_fineweb:
    """
    GPT-2's tokens of one shard, as a job of its own: a cluster does them side by side, and none needs the network.

    The text is streamed, so that the memory is the same whatever the size of the shard.
    """
    input:
        text="resources/fineweb-edu/{shard}.txt",
        ranks="resources/gpt2.tiktoken",
    output:
        f"{FINEWEB}/train-{{shard}}.bin",
    log:
        "logs/tokenize_fineweb_{shard}.log",
    conda:
        "../envs/picogpt.yaml"
    threads: 8
    resources:
        runtime=120,
        mem_mb=4000,
    params:
        shard="{shard}",
        folder=lambda wildcards, output: Path(output[0]).parent,
        flags="",
    shell:
        "picogpt tokenize fineweb-edu"
        " --shard {params.shard}"
        " --folder {params.folder:q}"
        " {params.flags}"
        " --threads {threads}"
        " > {log:q} 2>&1"


use rule tokenize_fineweb as tokenize_fineweb_first with:
    input:
        text="resources/fineweb-edu/00000.txt",
        ranks="resources/gpt2.tiktoken",
    output:
        multiext(f"{FINEWEB}/", "train-00000.bin", "val.bin"),
    log:
        "logs/tokenize_fineweb_00000.log",
    params:
        shard=0,
        folder=lambda wildcards, output: Path(output[0]).parent,
        flags=f"--val-documents {config['fineweb']['val_documents']}",


ruleorder: tokenize_fineweb_first > tokenize_fineweb


rule fineweb_manifest:
    """Read every token once, to know that it is what was written, and list the shards as one corpus."""
    input:
        expand(f"{FINEWEB}/train-{{shard}}.bin", shard=FINEWEB_SHARDS),
        f"{FINEWEB}/val.bin",
    output:
        f"{FINEWEB}/manifest.json",
    log:
        "logs/fineweb_manifest.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=30,
        mem_mb=2000,
    params:
        folder=lambda wildcards, output: Path(output[0]).parent,
        shards=len(FINEWEB_SHARDS),
    shell:
        "picogpt tokenize fineweb-edu" " --join {params.shards}" " --folder {params.folder:q}" " > {log:q} 2>&1"
