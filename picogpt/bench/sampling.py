"""Sampling throughput in tokens/s over whole runs, with every run listed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from picogpt import hardware, records
from picogpt.data.tokenizers import Tokenizer
from picogpt.models.language_model import LanguageModel
from picogpt.progress import counting
from picogpt.sample import Decoding, generate, prepare


def measure(
    kind: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    device: str,
    dtype: str,
    num_tokens: int,
    runs: int,
    batch_size: int,
    prompt: str,
    seed: int = 1337,
) -> dict[str, Any]:
    """The record of `runs` runs of `num_tokens` tokens in `batch_size` streams at once, after a short one to warm up.

    The clock runs from the prompt to the last token; each token is looked at, as a test for a stop does, none is printed.
    """
    selected = hardware.select(device, "float32" if dtype == "float32" else "bfloat16")
    provenance = records.provenance(selected)
    key = records.Key("sampling", kind, dtype=dtype) if batch_size == 1 else records.Key("streams", kind)
    model = prepare(model, device, dtype)
    where = next(model.parameters()).device
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64")).to(where)

    def run(count: int, seed: int, on_token: Callable[[torch.Tensor], None]) -> float:
        began = time.perf_counter()
        generate(model, [ids] * batch_size, count, Decoding(), seed, on_token)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = [0.0]

    def note_first(tokens: torch.Tensor) -> None:
        tokens.tolist()
        first[0] = first[0] or time.perf_counter()

    run(min(num_tokens, 16), seed, lambda tokens: None)
    rates, firsts = [], []
    with counting(f"sampling, {dtype}", runs) as advance:
        for number in range(runs):
            first[0], began = 0.0, time.perf_counter()
            seconds = run(num_tokens, seed + number, note_first)
            rates.append(batch_size * num_tokens / seconds)
            firsts.append(first[0] - began)
            advance(1)
    return {
        **provenance,
        **key._asdict(),
        "corpus": {},
        "config": {
            "model": model.config.model_dump(),
            "source": source,
            "dtype": dtype,
            "num_tokens": num_tokens,
            "runs": runs,
            "batch_size": batch_size,
            "prompt": prompt,
            "seed": seed,
        },
        "units": {"tokens_per_second": "of all streams together", "first_token_seconds": "s, from prompt to token"},
        "threads": torch.get_num_threads(),
        "results": {
            "tokens_per_second": rates,
            "mean": statistics.fmean(rates),
            "median": statistics.median(rates),
            "deviation": statistics.stdev(rates) if runs > 1 else None,
            "first_token_seconds": statistics.median(firsts),
            "peak_memory_bytes": hardware.peak_memory_bytes(selected),
        },
    }
