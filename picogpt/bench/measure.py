"""What a trained model is measured by: its validation loss in the dtype of sampling, and its sampling speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from picogpt import hardware, records
from picogpt.data.tokenizers import Tokenizer
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError
from picogpt.models.gpt2 import GPT2, TiedHead
from picogpt.models.language_model import LanguageModel
from picogpt.progress import counting
from picogpt.sample import Decoding, generate, prepare
from picogpt.stream import read_prompt, sample_texts
from picogpt.train.evaluate import evaluate


def quality(
    key: records.Key,
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    data: TokenData,
    *,
    device: str,
    dtype: str,
    prompts: Sequence[str] = (),
    num_tokens: int = 100,
    seed: int = 1337,
) -> dict[str, Any]:
    """The record of a model's validation loss, and of a text of `num_tokens` tokens from each prompt, top-k 50.

    Raises PicogptError when the data are of another tokenizer, or the loss is not finite.
    """
    header = data.val.header
    if header.tokenizer_sha256 != tokenizer.sha256:
        found = f"tokens of another tokenizer ({header.vocab_size:,} of them, not {tokenizer.vocab_size:,})"
        raise PicogptError(f"{data.val.path} holds {found} than {source}: use another folder of --data")
    where = hardware.select(device, "float32")  # no autocast: the weights have the dtype that is measured
    record = {**records.provenance(where), **key._asdict()}
    model = prepare(model, device, dtype, decoding=False)
    # A specialized output layer computes all logits of a batch at once, so evaluate one sequence at a time.
    fused = not isinstance(model, GPT2) or isinstance(model.head, TiedHead)
    loss = evaluate(model, data.val.ids, where, batch_size=None if fused else 1)
    if not math.isfinite(loss):
        raise PicogptError(f"the loss of {source} is {loss}: its weights are damaged, or too large for {dtype}")
    ids = [read_prompt(tokenizer, prompt, model.config.block_size, truncate=True) for prompt in prompts]
    decoding = Decoding(temperature=0.9, top_k=50)
    samples = sample_texts(model, tokenizer, ids, num_tokens, decoding, seed)[0] if prompts else []
    config = {"source": source, "dtype": dtype, "prompts": list(prompts), "num_tokens": num_tokens, "seed": seed}
    corpus = data.corpus()
    corpus["val_bytes"] = corpus["val_bytes"] or tokenizer.count_bytes(data.val.ids[:])  # an older file does not say it
    return {
        **record,
        "corpus": corpus,
        "config": {"model": model.config.model_dump(), **config},
        "units": {"val_loss": "nats per token, mean over the whole split", "val_bits_per_byte": records.BITS_PER_BYTE},
        "results": {
            "val_loss": loss,
            "val_bits_per_byte": records.bits_per_byte(loss, corpus),
            "texts": [sample.text for sample in samples],
        },
    }


def speed(
    key: records.Key,
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    *,
    device: str,
    dtype: str,
    num_tokens: int,
    runs: int,
    batch_size: int,
    prompt: str,
    compiled: bool = False,
    seed: int = 1337,
) -> dict[str, Any]:
    """The record of `runs` runs of `num_tokens` tokens in `batch_size` streams at once, after a short one to warm up.

    The clock runs from the prompt to the last token; each token is looked at, as a test for a stop does, none is printed.
    """
    selected = hardware.select(device, "float32" if dtype == "float32" else "bfloat16")
    record = {**records.provenance(selected), **key._asdict()}
    model = prepare(model, device, dtype, compiled=compiled)
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64")).to(selected.torch_name)

    def run(count: int, seed: int) -> tuple[float, float]:
        """Seconds to the first token and to the last one."""
        times: list[float] = []

        def look(tokens: torch.Tensor) -> None:
            tokens.tolist()  # as a text from them needs
            times.append(time.perf_counter())

        began = time.perf_counter()
        generate(model, [ids] * batch_size, count, Decoding(), seed, look, compiled=compiled)
        return times[0] - began, times[-1] - began

    run(min(num_tokens, 16), seed)
    timed = []
    with counting(f"sampling, {dtype}", runs) as advance:
        for number in range(runs):
            timed.append(run(num_tokens, seed + number))
            advance(1)
    rates = [batch_size * num_tokens / whole for _, whole in timed]
    config = {"num_tokens": num_tokens, "runs": runs, "batch_size": batch_size, "prompt": prompt, "seed": seed}
    config |= {"compiled": compiled}
    return {
        **record,
        "corpus": {},
        "config": {"model": model.config.model_dump(), "source": source, "dtype": dtype, **config},
        "units": {"tokens_per_second": "of all streams together", "first_token_seconds": "s, from prompt to token"},
        "threads": torch.get_num_threads(),
        "results": {
            "tokens_per_second": rates,
            "mean": statistics.fmean(rates),
            "median": statistics.median(rates),
            "deviation": statistics.stdev(rates) if runs > 1 else None,
            "first_token_seconds": statistics.median(first for first, _ in timed),
            "peak_memory_bytes": hardware.peak_memory_bytes(selected),
        },
    }
