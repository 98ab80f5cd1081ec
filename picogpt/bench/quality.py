"""Evaluation of a model in the dtype of sampling: its validation loss, and continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from picogpt import hardware, records
from picogpt.data.tokenizers import Tokenizer
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError
from picogpt.models.gpt2 import GPT2, TiedHead
from picogpt.models.language_model import LanguageModel
from picogpt.sample import Decoding, prepare
from picogpt.stream import read_prompt, sample_texts
from picogpt.train.evaluate import evaluate


def measure(
    kind: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    data: TokenData,
    device: str,
    dtype: str,
    prompts: Sequence[str] = (),
    num_tokens: int = 100,
    seed: int = 1337,
) -> dict[str, Any]:
    """The record of a model's validation loss, and of a text of `num_tokens` tokens from each prompt, top-k 50.

    Raises PicogptError when the data are of another tokenizer.
    """
    header = data.val.header
    if header.tokenizer_sha256 != tokenizer.sha256:
        raise PicogptError(
            f"{data.val.path} holds tokens of another tokenizer ({header.vocab_size:,} of them) than that of {source}"
            f" ({tokenizer.vocab_size:,}): give the folder of the right ones with --data"
        )
    where = hardware.select(device, "float32")  # no autocast: the weights have the dtype that is measured
    provenance = records.provenance(where)
    model = prepare(model, device, dtype, decoding=False)
    # A specialized output layer computes all logits of a batch at once, so evaluate one sequence at a time.
    fused = not isinstance(model, GPT2) or isinstance(model.head, TiedHead)
    loss = evaluate(model, data.val.ids, where, batch_size=None if fused else 1)
    texts = []
    if prompts:
        decoding = Decoding(temperature=0.9, top_k=50)
        ids = [read_prompt(tokenizer, prompt, model.config.block_size, truncate=True) for prompt in prompts]
        texts = [sample.text for sample in sample_texts(model, tokenizer, ids, num_tokens, decoding, seed)[0]]
    return {
        **provenance,
        **records.Key("evaluate", kind, dtype=dtype)._asdict(),
        "corpus": data.corpus(),
        "config": {
            "model": model.config.model_dump(),
            "source": source,
            "dtype": dtype,
            "prompts": list(prompts),
            "num_tokens": num_tokens,
            "seed": seed,
        },
        "units": {"val_loss": "nats per token, mean over the whole split"},
        "results": {"val_loss": loss, "texts": texts},
    }
