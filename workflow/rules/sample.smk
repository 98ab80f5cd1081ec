# in:  weights/MODEL/RUN/best.pt and the tokenizer
# out: texts that the models write: results/samples/, media/*_sample.txt


localrules:
    sample_artifact,


rule sample:
    """
    Let a model write: one character after another, each drawn from the probabilities it gives.

    The untrained text comes from the weights that the training began with, rebuilt from the seed.
    """
    input:
        ckpt=f"weights/{{model}}/{RUN}/best.pt",
        tokenizer=f"{TOKENS}/tokenizer.json",
    output:
        "results/samples/{model}_{stage}.txt",
    log:
        "logs/sample_{model}_{stage}.log",
    wildcard_constraints:
        stage="trained|untrained",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=20,
        mem_mb=2000,
    params:
        tokens=lambda wildcards, input: Path(input.tokenizer).parent,
        kind=lambda wildcards: wildcards.model.replace("_", "-"),
        characters=lambda wildcards: config[wildcards.model][
            ("sample_characters" if wildcards.stage == "trained" else "untrained_characters")
        ],
        untrained=lambda wildcards: ("--untrained" if wildcards.stage == "untrained" else ""),
    shell:
        "picogpt sample {params.kind:q}"
        " --ckpt {input.ckpt:q}"
        " --tokenizer-dir {params.tokens:q}"
        " -n {params.characters}"
        " {params.untrained}"
        " --out {output:q}"
        " > {log:q} 2>&1"


rule sample_artifact:
    """The long sample of the write-up, under its own name."""
    input:
        "results/samples/char_transformer_trained.txt",
    output:
        report(
            "media/char_transformer_sample.txt",
            caption="../report/char_transformer_sample.rst",
            category="character models",
            labels={"model": "char transformer", "artifact": "sample"},
        ),
    log:
        "logs/sample_artifact.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=5,
        mem_mb=500,
    shell:
        "cp {input:q} {output:q} 2> {log:q}"


rule sample_gpt2:
    """Let GPT-2 write, one token after another, from the weights that predict the validation text best."""
    input:
        ckpt=f"{GPT2}/best.pt",
        ranks="resources/gpt2.tiktoken",
    output:
        report(
            f"media/gpt2_{CORPUS}_sample.txt",
            caption="../report/gpt2_sample.rst",
            category="gpt-2",
            labels={"model": "gpt2", "artifact": "sample"},
        ),
    log:
        "logs/sample_gpt2.log",
    conda:
        "../envs/picogpt.yaml"
    resources:
        runtime=20,
        mem_mb=4000,
    params:
        tokens=config["gpt2"]["sample_tokens"],
    shell:
        "picogpt sample gpt2" " --ckpt {input.ckpt:q}" " -n {params.tokens}" " --out {output:q}" " > {log:q} 2>&1"
