"""The model card: README.md of an exported model, with the header that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from picogpt import records
from picogpt.checkpoint import Weights
from picogpt.data import fetch, fineweb
from picogpt.data.tokens import hash_of_texts
from picogpt.errors import PicogptError
from picogpt.models.pretrained import name_for

CARD = """---
{header}---

# GPT-2 with {parameters:,} parameters, {origin} on {text}

| | |
| --- | --- |
{rows}

The licence of these weights is for their author to state, as `license:` in the header of this file.

## How to use it

```python
from transformers import pipeline

generate = pipeline("text-generation", {name})
print(generate("The")[0]["generated_text"])
```

It samples as picogpt does by default, at temperature 1 from all tokens (`generation_config.json`). picogpt itself samples from
the checkpoint, a `best.pt`, that this model was exported from:

```
picogpt sample gpt2 --ckpt best.pt --prompt The
```

The model continues text in the manner of what it was trained on. It follows no instructions, and states what is not true.

## Settings

With this as `settings.yaml`, `picogpt train gpt2 --config settings.yaml` trains it again on the same text:

```yaml
{settings}```
"""
UNKNOWN = "not known: the record of the training is not beside the checkpoint"


def model_card(weights: Weights, parameters: int, name: str) -> str:
    """The card of a GPT-2 that transformers finds under `name`, from its checkpoint and the record beside it.

    What they do not say is called unknown. No string of a user can change the header or the Markdown.
    """
    train, corpus = weights.experiment.train, weights.corpus
    source, base = _source(corpus), None
    if train.init == "pretrained":
        base = fetch.pretrained()[name_for(weights.experiment.model, weights.vocab_size)]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "picogpt"],
        "language": "en" if source else None,  # of every registered text; of another it is not known
        "datasets": [source.repository] if isinstance(source, fineweb.Dataset) else None,
        "base_model": base.repository if base else None,
    }
    text = source.title if source else _plain(corpus.get("name", "a text without a name"))
    licence = source.licence if source else "its licence is not known, as picogpt does not provide it"
    counts = (_number(corpus.get(f"{split}_tokens")) for split in ("train", "val"))
    shape = weights.experiment.model.model_dump()
    rows = {
        "size": "{n_layer} layers, {n_head} heads, width {n_embd}, a context of {block_size:,} tokens".format(**shape),
        "initial weights": f"{base.repository} at {base.revision}" if base else f"random, seed {train.seed}",
        "text": f"{text} ({licence})",
        "its SHA-256": _plain(corpus.get("text_sha256", "not known")),
        "its tokens": "{} for training, {} for validation".format(*counts),
        **_training(weights),
        "these weights": f"step {weights.step:,}"
        if weights.step or not base
        else "the initial ones: no step was better",
        "validation loss": f"{weights.val_loss:.4f} nats per token{_bits(weights)}, on the whole validation text",
    }
    settings = weights.experiment.model_dump(mode="json", include={"model", "train"})
    return CARD.format(
        header=_yaml({key: value for key, value in header.items() if value}),
        parameters=parameters,
        origin=f"trained further from {base.repository}" if base else "trained from scratch",
        text=text,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        name=json.dumps(name),
        settings=_yaml(settings),
    )


def _source(corpus: dict[str, Any]) -> fetch.Asset | fineweb.Dataset | None:
    """What is registered with the hash of this text, whatever it is called."""
    sha256, shards = corpus.get("text_sha256"), [shard.sha256 for shard in fineweb.dataset().shards]
    if any(hash_of_texts(shards[:count]) == sha256 for count in range(1, len(shards) + 1)):
        return fineweb.dataset()
    name = fetch.identify(str(sha256))
    return fetch.find(name) if name else None


def _training(weights: Weights) -> dict[str, str]:
    """What only the record beside the checkpoint knows, if it is of these weights."""
    try:
        record = records.read(weights.path.with_name("record.json"))
    except PicogptError:
        record = {}
    fingerprint = weights.experiment.fingerprint(weights.vocab_size, str(weights.corpus.get("data_sha256")))
    ours = ("train", fingerprint, weights.step, weights.val_loss)
    if ours != tuple(
        records.at(record, at) for at in ("task", "fingerprint", "results.best_step", "results.best_val_loss")
    ):
        return dict.fromkeys(("training", "device", "software"), UNKNOWN)
    results, device, software = record["results"], record["device"], record["software"]
    source = f"{record['commit'] or 'not known'}{' with changes' if record['dirty'] else ''}"
    return {
        "training": "{steps:,} steps, {tokens:,} tokens, {epochs:.2f} epochs, {train_seconds:,.0f} s".format(**results),
        "device": _plain(f"{record['ranks']} x {device['name']}, matrix products in {device.get('dtype')}"),
        "software": _plain(f"picogpt {software.get('picogpt')}, commit {source}; torch {software.get('torch')}"),
    }


def _bits(weights: Weights) -> str:
    tokens, size = (weights.corpus.get(key) for key in ("val_tokens", "val_bytes"))
    known = isinstance(tokens, int) and isinstance(size, int) and size > 0
    return f", {records.bits_per_byte(weights.val_loss, weights.corpus):.4f} bits per byte" if known else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number"


def _plain(text: Any) -> str:
    """Any text as one line of Markdown that shows just that, also in a table."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    # Others act on what is around them, or end the file for some programs.
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    return re.sub(r"([\\`*_{}\[\]<>|&~#$])", r"\\\1", line)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
