# in:  weights/MODEL/RUN/best.pt and the tokenizer
# out: texts written by the models: media/MODEL_sample.txt; before training: results/samples/MODEL_untrained.txt;
#      with the probability of each token: results/samples/MODEL_sample.json, MODEL_untrained.json


rule sample:
    """Sample from a model: each token is drawn from the probabilities that it gives."""
    input:
        ckpt=f"weights/{{model}}/{RUN}/best.pt",
        tokenizer=f"{TOKENS}/tokenizer.json",
    output:
        text=report(
            "media/{model}_sample.txt", caption="../report/sample.rst", category="samples", labels={"model": "{model}"}
        ),
        probabilities="results/samples/{model}_sample.json",
    log:
        "logs/sample_{model}.log",
    priority: 90
    params:
        name=lambda wildcards: wildcards.model.replace("_", "-"),
        tokenizer=f"--tokenizer-dir={TOKENS}",
        tokens=lambda wildcards: config[wildcards.model]["sample_characters"],
        untrained="",
    shell:
        "picogpt sample {params.name:q}"
        " --ckpt {input.ckpt:q}"
        " {params.tokenizer} {params.untrained} -n {params.tokens}"
        " --out {output.text:q}"
        " --probabilities {output.probabilities:q}"
        " > {log:q} 2>&1"
        " && echo picogpt: to look at: {output.text:q}"


use rule sample as sample_untrained with:
    # From the initial weights, which are rebuilt from the seed.
    output:
        text="results/samples/{model}_untrained.txt",
        probabilities="results/samples/{model}_untrained.json",
    log:
        "logs/sample_{model}_untrained.log",
    params:
        tokens=lambda wildcards: config[wildcards.model]["untrained_characters"],
        untrained="--untrained",


use rule sample as sample_gpt2 with:
    input:
        ckpt=f"{GPT2}/best.pt",
        tokenizer="resources/gpt2.tiktoken",
    output:
        text=report(
            f"media/gpt2_{CORPUS}_sample.txt",
            caption="../report/sample.rst",
            category="samples",
            labels={"model": "gpt2"},
        ),
        probabilities=f"results/samples/gpt2_{CORPUS}_sample.json",
    log:
        "logs/sample_gpt2.log",
    params:
        name="gpt2",
        tokenizer="",
        tokens=config["gpt2"]["sample_tokens"],
