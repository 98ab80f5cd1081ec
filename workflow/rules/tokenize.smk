# in:  the corpus
# out: weights/char_tokenizer/RUN/: tokenizer.json, train.bin, val.bin
#      weights/gpt2_tokenizer/RUN/: train.bin, val.bin


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


rule tokenize_gpt2:
    """
    GPT-2's tokens: frequent strings of bytes, 50,257 of them.

    The text is cut where the character models cut it, so that all are measured on the same words.
    """
    input:
        text=corpus_file(),
        ranks="resources/gpt2.tiktoken",
    output:
        multiext(f"{GPT2_TOKENS}/", "train.bin", "val.bin"),
    log:
        "logs/tokenize_gpt2.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=10,
        mem_mb=2000,
    params:
        run=RUN,
    shell:
        "picogpt tokenize gpt2" " --text {input.text:q}" " --run {params.run:q}" " > {log:q} 2>&1"
