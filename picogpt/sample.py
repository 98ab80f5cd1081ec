"""Decoding: one token after another from any model.

The context of a token never exceeds the model's block size. When it is full, decoding goes on from the last
half block: the context is read in again and grows anew. This depends on the position alone, so that decoding
with a cache and without give the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from picogpt import hardware
from picogpt.data.tokenizers import CharTokenizer
from picogpt.errors import UsageError
from picogpt.models.cache import KVCache
from picogpt.models.language_model import LanguageModel
from picogpt.progress import counting


@dataclass(frozen=True)
class Decoding:
    """How to choose a token from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities reach p."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k {self.top_k} must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} must be above 0 and at most 1")


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: torch.Tensor,
    count: int,
    decoding: Decoding,
    seed: int,
    on_token: Callable[[torch.Tensor], None] = lambda tokens: None,
    cached: bool = True,
) -> torch.Tensor:
    """Continue `prompt` (B, T) of int64 ids by `count` tokens; returns the new ones, (B, count).

    The same seed gives the same tokens, with a cache and without. `on_token` gets each column (B,) as it is made.

    Raises UsageError when `count` is below 1 or the prompt is empty.
    """
    if count < 1:
        raise UsageError(f"-n {count} must be 1 or more")
    if prompt.size(1) == 0:
        raise UsageError("the prompt is empty: give at least one character")
    batch, length = prompt.shape
    block_size = model.config.block_size
    random = torch.Generator().manual_seed(seed)
    tokens = torch.empty(batch, length + count, dtype=torch.int64, device=prompt.device)
    tokens[:, :length] = prompt
    cache: KVCache | None = None
    cache_first, read = -1, 0
    for position in range(length, length + count):
        first = context_start(position, length, block_size)
        if cached and first != cache_first:
            cache, cache_first, read = model.new_cache(batch), first, first
        logits = model(tokens[:, read if cache else first : position], cache=cache)
        read = position
        tokens[:, position] = choose(logits[:, -1], decoding, random)
        on_token(tokens[:, position])
    return tokens[:, length:]


def context_start(position: int, prompt_length: int, block_size: int) -> int:
    """First position that the prediction of `position` sees; it moves on by half a block whenever the block is full."""
    hop = max(1, block_size // 2)
    # A long prompt keeps its last block; without a step back, the first context would be cut at once.
    first = max(0, prompt_length - block_size)
    return first + max(0, -(-(position - first - block_size) // hop)) * hop


def choose(logits: torch.Tensor, decoding: Decoding, random: torch.Generator) -> torch.Tensor:
    """Draw one token a row from logits (B, V); returns ids (B,)."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    logits = logits.double().cpu()
    logits = (logits - logits.max(-1, keepdim=True).values) / decoding.temperature  # at most 0: nothing overflows
    if decoding.top_k is not None and decoding.top_k < logits.size(-1):
        lowest = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if decoding.top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that is more likely
        beyond = before >= decoding.top_p
        dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]


def sample_texts(
    model: LanguageModel,
    tokenizer: CharTokenizer,
    prompt: str,
    count: int,
    samples: int,
    decoding: Decoding,
    seed: int,
    device: str = "auto",
    cached: bool = True,
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[str], float]:
    """Continue `prompt` by `count` tokens, `samples` times; returns the new texts and the tokens/s of all together.

    `on_token` gets each token of the first text as it is made.

    Raises UsageError when the prompt is empty or has characters that the tokenizer lacks.
    """
    where = hardware.select(device).torch_name
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64")).to(where)
    began = time.perf_counter()
    with nullcontext() if on_token else counting("sampling", count) as advance:

        def show(tokens: torch.Tensor) -> None:
            if on_token:
                on_token(int(tokens[0]))
            elif advance:
                advance(1)

        new = generate(model.to(where), ids.repeat(samples, 1), count, decoding, seed, show, cached)
    texts = [tokenizer.decode(row) for row in new.cpu().numpy()]
    return texts, samples * count / (time.perf_counter() - began)
