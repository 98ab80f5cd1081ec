# in:  the text; shards of FineWeb-Edu in the hub client's cache; resources/gpt2.tiktoken
# out: weights/char_tokenizer/RUN/: tokenizer.json, train.bin, val.bin
#      weights/gpt2_tokenizer/RUN/: train.bin, val.bin
#      weights/gpt2_tokenizer/RUN/fineweb-edu/: train-00000.bin, ..., val.bin, manifest.json

FINEWEB = f"{GPT2_TOKENS}/fineweb-edu"
SHARDS = [f"{number:05}" for number in range(config["fineweb"]["shards"])]
# Of a text of the user's own the hash counts: the time of a folder says little, and a text that is moved here can be old.
TEXT = ancient(PLAN["text"]) if PLAN["text_identity"] else PLAN["text"]


rule tokenize_char:
    """One token per character, of a vocabulary from the training part; the validation loss is measured on the other tenth."""
    input:
        text=TEXT,
    output:
        multiext(f"{TOKENS}/", "tokenizer.json", "train.bin", "val.bin"),
    log:
        "logs/tokenize_char.log",
    params:
        **PLAN["text_identity"],
        run=RUN,
        flags="--drop-unseen" if config["drop_unseen"] else "",
    shell:
        """
        picogpt tokenize char \
            --text {input.text:q} \
            --name {params.run:q} \
            {params.flags} \
            >{log:q} 2>&1
        """


rule tokenize_gpt2:
    """
    GPT-2's byte-pair encoding, 50,257 tokens. The text is split where it is split for the character models, so that all
    models are evaluated on the same text.
    """
    input:
        text=TEXT,
        ranks="resources/gpt2.tiktoken",
    output:
        multiext(f"{GPT2_TOKENS}/", "train.bin", "val.bin"),
    log:
        "logs/tokenize_gpt2.log",
    params:
        **PLAN["text_identity"],
        run=RUN,
    shell:
        """
        picogpt tokenize gpt2 \
            --text {input.text:q} \
            --name {params.run:q} \
            >{log:q} 2>&1
        """


rule tokenize_fineweb:
    """
    GPT-2's tokens of one shard; a cluster tokenizes shards side by side, without the network. The text is streamed, so the memory does not grow with the shard.
    """
    input:
        text="resources/fineweb-edu/{shard}.txt",
        ranks="resources/gpt2.tiktoken",
    output:
        f"{FINEWEB}/train-{{shard}}.bin",
    log:
        "logs/tokenize_fineweb_{shard}.log",
    wildcard_constraints:
        shard=r"(?!00000)\d{5}",
    threads: 8
    resources:
        runtime=120,
    params:
        shard="{shard}",
        flags="",
    shell:
        "picogpt tokenize fineweb-edu"
        f" --shard {{params.shard}} --folder {FINEWEB}"
        " {params.flags} --threads {threads}"
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
        flags=f"--val-documents {config['fineweb']['val_documents']}",


rule fineweb_manifest:
    """Read every token once, to verify that each shard is whole, and list the shards as one corpus."""
    input:
        expand(f"{FINEWEB}/train-{{shard}}.bin", shard=SHARDS),
        f"{FINEWEB}/val.bin",
    output:
        f"{FINEWEB}/manifest.json",
    log:
        "logs/fineweb_manifest.log",
    params:
        folder=lambda wildcards, output: Path(output[0]).parent,
        shards=len(SHARDS),
    shell:
        "picogpt tokenize fineweb-edu --join {params.shards} --folder {params.folder:q} > {log:q} 2>&1"
