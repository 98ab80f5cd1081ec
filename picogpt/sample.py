"""Sampling from any model, one token after another, for one prompt or many, with a KV cache or without.

The context never exceeds the model's block size. When it is full, it is cut to its last half block, which is processed
again as a prompt. Where it is cut depends on the position alone, so sampling with and without a cache give the same tokens.

Randomness is fixed in advance: sample i uses seed + i, one number for each token, independent of the other samples in the
batch and of the device.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from picogpt import hardware
from picogpt.errors import PicogptError, Unsuited, UsageError
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
    compiled: bool = False,
) -> torch.Tensor:
    """Continue each of `prompts`, int64 ids of any length (T,), by `count` tokens; returns the new ones, (B, count).

    In float32 the same seed gives the same tokens with and without a cache, and in a batch as alone. In bfloat16 and int8
    kernels depend on the batch size, so sequences eventually diverge. `on_token` is called with each column of new
    tokens (B,), in order; the tokens end with the column for which it returns True. On a GPU it looks at one while the next
    is made. With `compiled` the step of one token is compiled by torch.compile at its first use, which takes a while.

    Cache and CUDA graph are kept for the next call with the same model, number of prompts and decoding.

    Raises UsageError when `count` is below 1, a prompt is empty, or there is no cached step to compile; PicogptError when the
    logits are NaN.
    """
    if count < 1:
        raise UsageError(f"-n {count} must be 1 or more")
    if min(len(prompt) for prompt in prompts) == 0:
        raise UsageError("the prompt is empty: give at least one character")
    lengths, device = [len(prompt) for prompt in prompts], prompts[0].device
    longest, block_size = max(lengths), model.config.block_size
    # Left padding: all prompts end in the same column.
    indents = [longest - length for length in lengths]
    given = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, indent, prompt in zip(given, indents, prompts, strict=True):
        row[indent:] = prompt
    uniform = torch.stack(
        [
            torch.rand(count, generator=torch.Generator().manual_seed((seed + row) % 2**63), dtype=torch.float64)
            for row in range(len(prompts))
        ]
    )
    if device.type != "mps":  # which has no float64, so tokens are chosen on the CPU
        uniform = uniform.to(device)  # (B, count)
    decoder = _decoder(model, uniform, device, len(set(lengths)) > 1, decoding, compiled) if cached else None
    if compiled and not decoder:
        raise UsageError("--compile is for the step of a KV cache, which --no-cache and char-bigram do without")
    new = decoder.chosen if decoder else torch.zeros(len(prompts), count, dtype=torch.int64, device=uniform.device)
    behind = BEHIND.get(device.type, 0) if decoder else 0
    starts: list[int] = []
    for made in range(count + behind):
        if made < count:
            before, starts = starts, [
                indent + context_start(length + made, length, block_size)
                for indent, length in zip(indents, lengths, strict=True)
            ]  # fmt: skip
            if decoder and starts == before:
                decoder.next(model)
            else:
                tokens = torch.cat((given, new[:, :made].to(device)), 1)
                if decoder:
                    decoder.read(model, tokens[:, min(starts) :], starts)
                else:
                    # Each sequence alone, its whole context computed again for every token.
                    rows = [model(row[None, start:])[:, -1] for row, start in zip(tokens, starts, strict=True)]
                    new[:, made] = choose(_numbers(torch.cat(rows)), decoding, uniform[:, made])
        seen = made - behind
        if seen >= 0 and on_token(decoder.look(seen) if decoder else new[:, seen].clone()):
            count = seen + 1
            break
    if decoder:
        _KEPT[model] = decoder  # not after an error
    return new[:, :count].to(device, copy=True)


BEHIND = {"cuda": 1}
"""By device type, how many tokens later than they are launched the host looks at them; 0 where nothing is asynchronous."""

_KEPT: weakref.WeakKeyDictionary[LanguageModel, _Decoder] = weakref.WeakKeyDictionary()
"""The last decoder of each model, unless it is in use."""


def _decoder(
    model: LanguageModel, uniform: torch.Tensor, device: torch.device, padded: bool, decoding: Decoding, compiled: bool
) -> _Decoder | None:
    """The decoder that has been kept if it still fits, or else a new one; None for a model without a cache."""
    rows, count = uniform.shape
    weights = [(weight.data_ptr(), weight.dtype) for weight in itertools.chain(model.parameters(), model.buffers())]
    key = (rows, device, padded, decoding, compiled, model.training, weights)
    decoder = _KEPT.pop(model, None)
    if decoder is None or decoder.key != key or decoder.chosen.size(1) < count:
        decoder = None  # gives its memory back before another takes its own
        padding = torch.zeros(rows, dtype=torch.int64, device=device) if padded else None
        cache = model.new_cache(rows, padding, fixed=compiled or device.type == "cuda")
        if cache is None:
            return None
        decoder = _Decoder(cache, decoding, compiled, uniform.new_zeros(rows, max(count, model.config.block_size)), key)
    decoder.begin(uniform)
    return decoder


def _logits(model: LanguageModel, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Of the token after `tokens` (B, T), (B, V)."""
    return model(tokens, cache=cache)[:, -1]


class _Decoder:
    """The model with its KV cache: `read` is the prefill, `next` decodes one token, on a GPU as one CUDA graph.

    All that changes from token to token is in tensors on the device, so that steps follow one another without the host.
    """

    def __init__(self, cache: KVCache, decoding: Decoding, compiled: bool, uniform: torch.Tensor, key: Any):
        self.cache, self.decoding, self.key = cache, decoding, key
        self.uniform = uniform  # (B, capacity)
        self.chosen = torch.zeros_like(uniform, dtype=torch.int64)  # (B, capacity)
        self.made = torch.zeros(1, dtype=torch.int64, device=uniform.device)  # columns of `chosen` that are filled
        self.newest = torch.zeros_like(cache.last)  # (B, 1)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.on_gpu, self.host = uniform.device.type == "cuda", self.chosen.T  # (capacity, B)
        if self.on_gpu:
            self.host = torch.empty(self.host.shape, dtype=torch.int64, pin_memory=True)
            self.copied = [torch.cuda.Event() for _ in range(1 + BEHIND["cuda"])]
        self.logits: Callable[..., torch.Tensor] = _logits
        if compiled:
            cache.written_out = True
            tuned: dict[str, Any] = {"coordinate_descent_tuning": True}
            # The choice stays outside: torch 2.11 cannot compile a running sum of 16 rows of float64.
            self.logits = torch.compile(_logits, fullgraph=True, dynamic=False, options=tuned)

    def begin(self, uniform: torch.Tensor) -> None:
        """Start anew, with the numbers (B, count) by which tokens will be chosen."""
        self.uniform[:, : uniform.size(1)] = uniform
        self.made.zero_()
        self.launched = 0

    def read(self, model: LanguageModel, contexts: torch.Tensor, starts: Sequence[int]) -> None:
        """Prefill with contexts (B, T), where row b begins at column starts[b] - min(starts), and choose tokens."""
        self.cache.restart([start - min(starts) for start in starts])
        with hardware.attention_backends(contexts.device.type, cudnn=False):  # which plans anew for each length
            self._step(lambda *inputs: _numbers(_logits(*inputs)), model, contexts)
        self._launched()

    def next(self, model: LanguageModel) -> None:
        """Choose the tokens after the newest ones."""
        if self.on_gpu and self.graph is None:
            self._capture(model)
        if self.graph:
            self.graph.replay()
        else:
            self._step(self.logits, model, self.newest)
        self._launched()

    def look(self, index: int) -> torch.Tensor:
        """The tokens (B,) number `index`, on the host once they are there."""
        if self.on_gpu:
            self.copied[index % len(self.copied)].synchronize()
        return self.host[index].clone()

    def _step(self, logits: Callable[..., torch.Tensor], model: LanguageModel, tokens: torch.Tensor) -> None:
        uniform = self.uniform.index_select(1, self.made)[:, 0]
        chosen = choose(logits(model, tokens, self.cache), self.decoding, uniform)[:, None].to(uniform.device)
        self.chosen.index_copy_(1, self.made, chosen)
        self.newest.copy_(chosen)
        self.made += 1

    def _launched(self) -> None:
        """Let the newest tokens be copied to the host as soon as they are there."""
        if self.on_gpu:
            self.host[self.launched].copy_(self.chosen[:, self.launched], non_blocking=True)
            self.copied[self.launched % len(self.copied)].record()
        self.launched += 1

    def _capture(self, model: LanguageModel) -> None:
        """Capture one step as a CUDA graph, which launches its hundreds of small kernels at once."""
        state = (self.cache.slot, self.cache.last, self.newest, self.made)
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with hardware.attention_backends("cuda", cudnn=True):
            with torch.cuda.stream(side):  # warm-up: libraries allocate their workspaces at the first calls
                for _ in range(3):
                    self._step(self.logits, model, self.newest)
                    for tensor, old in zip(state, before, strict=True):
                        tensor.copy_(old)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(self.logits, model, self.newest)
        self.graph = graph


@torch.inference_mode()
def probabilities(model: LanguageModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of each of `tokens` (N,), sampled after `prompt` (T,), in the context in which `generate` chose it; (N,).

    Those that the model gives, before temperature, top-k and top-p.
    """
    ids, first, block_size = torch.cat([prompt, tokens]), len(prompt), model.config.block_size
    found = []
    for start, group in itertools.groupby(range(first, len(ids)), lambda end: context_start(end, first, block_size)):
        positions = torch.tensor(list(group), device=ids.device)
        logits = model(ids[None, start : positions[-1]])[0, positions - 1 - start]  # (positions, V)
        found.append(logits.float().softmax(-1).gather(-1, ids[positions, None])[:, 0])
    return torch.cat(found)


def context_start(position: int, prompt_length: int, block_size: int) -> int:
    """First position in the context of `position`; it advances by half a block whenever the context is full."""
    stride = max(1, block_size // 2)
    # Of a prompt longer than a block, the last block is kept; otherwise its first context would be cut at once.
    first = max(0, prompt_length - block_size)
    return first + max(0, -(-(position - first - block_size) // stride)) * stride


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    """`logits`; raises PicogptError where they are NaN, of which `choose` would make text of a sort."""
    if logits.isnan().any():
        raise PicogptError("the model computes NaN: its weights are damaged, or too large for this --dtype")
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


def prepare(
    model: LanguageModel, device: str = "auto", dtype: str = "float32", decoding: bool = True, compiled: bool = False
) -> LanguageModel:
    """Move a model to a device and dtype for sampling: float32, bfloat16, or int8 (weights only, GPT-2 only).

    With `decoding` false, for evaluation, float32 and bfloat16 matrices keep torch's layout. `compiled` is for a GPU.

    Raises UsageError when the device is not here, has no use for the dtype or for a compiled step, or the model has no int8.
    """
    where = hardware.select(device)
    if dtype == "int8" and decoding and where.type == "cuda":
        raise Unsuited(
            "--dtype int8 is slower than bfloat16 on a GPU (670 and 1,175 tokens/s on an H100): use --dtype bfloat16"
        )
    if compiled and where.type != "cuda":
        raise Unsuited("--compile is for a GPU, where a step is hundreds of small kernels: leave it out on this device")
    hardware.prepare(where, hardware.cpu_count())
    hardware.keep_memory(where)
    if dtype != "float32":
        model = model.bfloat16()
    model = model.to(where.torch_name).eval()
    if isinstance(model, GPT2):
        if compiled:
            return kernels.specialize(model, kernels.SplitLinear)
        if dtype == "int8":
            return kernels.specialize(model, kernels.Int8Linear)
        if dtype == "bfloat16" and not hardware.multiplies_bfloat16(where.type):
            return kernels.specialize(model, kernels.Bfloat16Linear)
        if decoding and where.type == "cpu" and kernels.can_pack(model.ln_f.weight.dtype):
            return kernels.specialize(model, kernels.PackedLinear)
    elif dtype == "int8":
        raise UsageError("--dtype int8 is for gpt2; the character models fit into a cache as they are")
    return model
