# in:  the corpus
# out: weights/char_tokenizer/RUN/: tokenizer.json, train.bin, val.bin


rule tokenize_char:
    """
    One number a character.

    The first 90% of the text are for training; the rest measures whether the model has learned the language
    or only the text. The vocabulary comes from the training part alone.
    """
    input:
        text=corpus_file(),
    output:
        multiext(f"{TOKENS}/", "tokenizer.json", "train.bin", "val.bin"),
    log:
        "logs/tokenize_char.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=10,
        mem_mb=2000,
    params:
        run=RUN,
        flags="--drop-unseen" if config["drop_unseen"] else "",
    shell:
        "picogpt tokenize char" " --text {input.text:q}" " --run {params.run:q}" " {params.flags}" " > {log:q} 2>&1"
