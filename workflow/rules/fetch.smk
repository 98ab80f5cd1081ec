# in:  nothing (the network, once)
# out: resources/corpus.txt


localrules:
    fetch_corpus,


rule fetch_corpus:
    """
    Bring the first corpus of the configured list that can be had, verified against its pinned hash.

    This is the only step that touches the network. What arrived stays in resources/, so that the next run asks nobody.
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
