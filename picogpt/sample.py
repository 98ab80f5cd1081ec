"""Sampling from any model, one token after another, for one prompt or many, with a KV cache or without.

The context never exceeds the model's block size. When it is full, it is cut to its last half block, which is processed
again as a prompt. Where it is cut depends on the position alone, so sampling with and without a cache give the same tokens.

Randomness is fixed in advance: sample i uses seed + i, one number for each token, independent of the other samples in the
batch and of the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from picogpt import hardware
from picogpt.errors import PicogptError, UsageError
from picogpt.models import kernels
from picogpt.models.cache import KVCache
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel


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
    prompts: Sequence[torch.Tensor],
    count: int,
    decoding: Decoding,
    seed: int,
    on_token: Callable[[torch.Tensor], bool | None] = lambda tokens: None,
    cached: bool = True,
) -> torch.Tensor:
    """Continue each of `prompts`, int64 ids of any length (T,), by `count` tokens; returns the new ones, (B, count).

    In float32 the same seed gives the same tokens with and without a cache, and in a batch as alone. In bfloat16 and int8
    kernels depend on the batch size, so sequences eventually diverge. `on_token` is called with each column of new
    tokens (B,); sampling stops when it returns True.

    Raises UsageError when `count` is below 1 or a prompt is empty, PicogptError when the logits are NaN.
    """
    if count < 1:
        raise UsageError(f"-n {count} must be 1 or more")
    if min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("the prompt is empty: give at least one character")
    lengths, device = [len(prompt) for prompt in prompts], prompts[0].device
    longest, block_size = max(lengths), model.config.block_size
    # Left padding: all prompts end in the same column.
    indents = [longest - length for length in lengths]
    tokens = torch.zeros(len(prompts), longest + count, dtype=torch.int64, device=device)
    for row, indent, prompt in zip(tokens, indents, prompts, strict=True):
        row[indent:longest] = prompt
    uniform = torch.stack(
        [
            torch.rand(count, generator=torch.Generator().manual_seed((seed + row) % 2**63), dtype=torch.float64)
            for row in range(len(prompts))
        ]
    )
    if device.type != "mps":  # which has no float64, so tokens are chosen on the CPU
        uniform = uniform.to(device)  # (B, count)
    padding = torch.zeros(len(prompts), dtype=torch.int64, device=device) if len(set(lengths)) > 1 else None
    cache = model.new_cache(len(prompts), padding, fixed=device.type == "cuda") if cached else None
    decoder = _Decoder(model, cache, decoding) if cache else None
    starts: list[int] = []
    for made in range(count):
        column = longest + made
        before, starts = starts, [
            indent + context_start(length + made, length, block_size)
            for indent, length in zip(indents, lengths, strict=True)
        ]  # fmt: skip
        if decoder is None:
            # Without a cache: each sequence alone, its whole context computed again for every token.
            rows = [model(row[None, start:column])[:, -1] for row, start in zip(tokens, starts, strict=True)]
            tokens[:, column] = choose(_numbers(torch.cat(rows)), decoding, uniform[:, made])
        elif starts != before:
            tokens[:, column] = decoder.read(tokens[:, min(starts) : column], starts, uniform[:, made])
        else:
            tokens[:, column] = decoder.next(tokens[:, column - 1 : column], uniform[:, made])
        if on_token(tokens[:, column]):
            return tokens[:, longest : column + 1]
    return tokens[:, longest:]


class _Decoder:
    """The model with its KV cache: `read` is the prefill, `next` decodes one token, on a GPU as one CUDA graph."""

    def __init__(self, model: LanguageModel, cache: KVCache, decoding: Decoding):
        self.model, self.cache, self.decoding = model, cache, decoding
        self.graph: torch.cuda.CUDAGraph | None = None

    def read(self, contexts: torch.Tensor, starts: Sequence[int], uniform: torch.Tensor) -> torch.Tensor:
        """Prefill with contexts (B, T), where row b begins at column starts[b] - min(starts); return the next tokens."""
        self.cache.restart([start - min(starts) for start in starts])
        logits = _numbers(self.model(contexts, cache=self.cache)[:, -1])
        return choose(logits, self.decoding, uniform)

    def next(self, newest: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The tokens after `newest` (B, 1)."""
        if newest.device.type != "cuda":
            return self._step(newest, uniform)
        if self.graph is None:
            self._capture(newest, uniform)
        self.newest.copy_(newest)
        self.uniform.copy_(uniform)
        self.graph.replay()  # type: ignore[union-attr]
        self.cache.length += 1
        return self.chosen

    def _step(self, tokens: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return choose(self.model(tokens, cache=self.cache)[:, -1], self.decoding, uniform)

    def _capture(self, newest: torch.Tensor, uniform: torch.Tensor) -> None:
        """Capture one step as a CUDA graph, which launches its hundreds of small kernels at once."""
        cache = self.cache
        self.newest, self.uniform = newest.clone(), uniform.clone()
        length, last = cache.length, cache.last.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: libraries allocate their workspaces at the first calls
            for _ in range(3):
                self._step(self.newest, self.uniform)
                cache.rewind(length)
                cache.last.copy_(last)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.chosen = self._step(self.newest, self.uniform)
        cache.rewind(length)
        cache.last.copy_(last)


def context_start(position: int, prompt_length: int, block_size: int) -> int:
    """First position in the context of `position`; it advances by half a block whenever the context is full."""
    stride = max(1, block_size // 2)
    # Of a prompt longer than a block, the last block is kept; otherwise its first context would be cut at once.
    first = max(0, prompt_length - block_size)
    return first + max(0, -(-(position - first - block_size) // stride)) * stride


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    """`logits`; raises PicogptError where they are NaN, of which `choose` would make text of a sort."""
    if logits.isnan().any():
        raise PicogptError(
            "the model computes no numbers (NaN): its weights are damaged, or too large for this --dtype"
        )
    return logits


def choose(logits: torch.Tensor, decoding: Decoding, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row from logits (B, V) by uniform numbers in [0, 1), float64 (B,); returns ids (B,).

    Inverse transform sampling: the token at which the cumulative probability exceeds the row's number. It needs no random
    state and no synchronization with the host.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(uniform.device).double()
    logits = (logits - logits.amax(-1, keepdim=True)) / decoding.temperature  # at most 0, so exp cannot overflow
    if decoding.top_k is not None and decoding.top_k < logits.size(-1):
        lowest = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if decoding.top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # total probability of the more likely tokens
        beyond = before >= decoding.top_p
        dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    reached = logits.exp_().cumsum(-1)  # (B, V)
    passed = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
    return passed.clamp(max=logits.size(-1) - 1)


def prepare(model: LanguageModel, device: str = "auto", dtype: str = "float32", decoding: bool = True) -> LanguageModel:
    """Move a model to a device and dtype for sampling: float32, bfloat16, or int8 (weights only, GPT-2 only).

    With `decoding` false, for evaluation, float32 and bfloat16 matrices keep torch's layout.

    Raises UsageError when the device is not here or the model has no int8.
    """
    where = hardware.select(device)
    hardware.prepare(where, hardware.cpu_count())
    hardware.keep_memory(where)
    if dtype != "float32":
        model = model.bfloat16()
    model = model.to(where.torch_name).eval()
    if isinstance(model, GPT2):
        if dtype == "int8":
            return kernels.specialize(model, kernels.Int8Linear)
        if dtype == "bfloat16" and not hardware.multiplies_bfloat16(where.type):
            return kernels.specialize(model, kernels.Bfloat16Linear)
        if decoding and where.type == "cpu" and kernels.can_pack(model.ln_f.weight.dtype):
            return kernels.specialize(model, kernels.PackedLinear)
    elif dtype == "int8":
        raise UsageError("--dtype int8 is for gpt2; the character models fit into a cache as they are")
    return model
