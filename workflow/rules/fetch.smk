# in:  the network; these are the only rules that use it, and they run where Snakemake runs
# out: resources/: corpus.txt, gpt2.tiktoken, hellaswag_val.jsonl; hub.json and fineweb-edu/SHARD.txt name files in the cache of the hub client


localrules:
    fetch_corpus,
    fetch_gpt2_ranks,
    fetch_hub,
    fetch_fineweb,


rule fetch_corpus:
    """Fetch the first corpus of the configured list that can be had, and verify it against its pinned hash."""
    output:
        "resources/corpus.txt",
    log:
        "logs/fetch_corpus.log",
    params:
        names=config["corpus"],
    shell:
        "picogpt fetch --first {params.names:q} --folder resources --out {output:q} 2>&1 | tee -i {log:q}"


rule fetch_gpt2_ranks:
    """Fetch the merges of GPT-2's tokenizer and verify them; every source serves the same bytes."""
    output:
        "resources/gpt2.tiktoken",
    log:
        "logs/fetch_gpt2_ranks.log",
    shell:
        "picogpt fetch gpt2-ranks --folder resources > {log:q} 2>&1"


checkpoint fetch_hub:
    """
    Fetch OpenAI's weights into the cache of the hub client, the first shard of FineWeb-Edu for a long training, and the
    items of HellaSwag into resources/.

    If they cannot be had, everything else is made without them. The plan then raises `attempt`, so that the next run
    asks again; jobs that have the answer as a parameter (`on_hub`) run again only if it has changed.
    """
    output:
        update("resources/hub.json"),  # the old answer is kept until there is a new one
    log:
        "logs/fetch_hub.log",
    params:
        names=PLAN["from_hub"],
        attempt=PLAN["hub_attempt"],
    shell:
        "picogpt fetch {params.names:q} --attempt {params.attempt} --status {output:q} 2>&1 | tee -i {log:q}"


rule fetch_fineweb:
    """Fetch one shard of FineWeb-Edu, 2 GB of text, verify it, and note where in the client's cache it lies."""
    output:
        "resources/fineweb-edu/{shard,[0-9]{5}}.txt",
    log:
        "logs/fetch_fineweb_{shard}.log",
    shell:
        "picogpt fetch fineweb-edu --shard {wildcards.shard} > {output:q} 2> {log:q}"
