# in:  nothing (the network, once)
# out: resources/corpus.txt, resources/gpt2.tiktoken, resources/pretrained.txt


localrules:
    fetch_corpus,
    fetch_gpt2_ranks,
    fetch_pretrained,


rule fetch_corpus:
    """
    Bring the first corpus of the configured list that can be had, verified against its pinned hash.

    Only the fetch rules, here and in fineweb.smk, touch the network. What arrived stays in resources/, so that the next
    run asks nobody.
    """
    output:
        "resources/corpus.txt",
    log:
        "logs/fetch_corpus.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=10,
        mem_mb=500,
    params:
        names=config["corpus"],
    shell:
        "picogpt fetch --first {params.names:q}" " --folder resources" " --out {output:q}" " 2>&1 | tee -i {log:q}"


rule fetch_gpt2_ranks:
    """Bring the merges of GPT-2's tokenizer, verified; whichever source serves, they are the same bytes."""
    output:
        "resources/gpt2.tiktoken",
    log:
        "logs/fetch_gpt2_ranks.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=10,
        mem_mb=500,
    shell:
        "picogpt fetch gpt2-ranks" " --folder resources" " > {log:q} 2>&1"


rule fetch_pretrained:
    """
    Bring OpenAI's weights into the cache of the hub's client, and note whether they could be had.

    Where the hub cannot be reached everything else is made, and the rows of the pretrained model say so; they
    join at the next run that can reach it.
    """
    output:
        "resources/pretrained.txt",
    log:
        "logs/fetch_pretrained.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=60,
        mem_mb=1000,
    params:
        hub=hub_state(),
    shell:
        "picogpt fetch pretrained --status {output:q} 2>&1 | tee -i {log:q};" " echo {params.hub:q} >> {output:q}"
