"""Sampling from any model, one token after another, for one prompt or many, with a KV cache or without.

The context never exceeds the model's block size. When it is full, it is cut to its last half block, which is processed
again as a prompt. Where it is cut depends on the position alone, so sampling with and without a cache give the same tokens.

Randomness is fixed in advance: sample i uses seed + i, one number for each token, independent of the other samples in the
batch and of the device.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from picogpt import hardware
from picogpt.data.tokenizers import Tokenizer
from picogpt.errors import UsageError
from picogpt.models import inference
from picogpt.models.cache import KVCache
from picogpt.models.gpt2 import GPT2
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

    Raises UsageError when `count` is below 1 or a prompt is empty.
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
        [torch.rand(count, generator=_generator(seed + row), dtype=torch.float64) for row in range(len(prompts))]
    )
    if device.type != "mps":  # which has no float64, so tokens are chosen on the CPU
        uniform = uniform.to(device)  # (B, count)
    decoder = _Decoder(model, len(prompts), decoding, ragged=len(set(lengths)) > 1) if cached else None
    starts: list[int] = []
    for made in range(count):
        column = longest + made
        before, starts = starts, [
            indent + context_start(length + made, length, block_size)
            for indent, length in zip(indents, lengths, strict=True)
        ]  # fmt: skip
        if decoder is None:
            # The reference: each sequence alone, its whole context computed again for every token.
            logits = torch.cat(
                [model(row[None, start:column])[:, -1] for row, start in zip(tokens, starts, strict=True)]
            )
            tokens[:, column] = choose(logits, decoding, uniform[:, made])
        elif starts != before:
            tokens[:, column] = decoder.read(tokens[:, min(starts) : column], starts, uniform[:, made])
        else:
            tokens[:, column] = decoder.next(tokens[:, column - 1 : column], uniform[:, made])
        if on_token(tokens[:, column]):
            return tokens[:, longest : column + 1]
    return tokens[:, longest:]


class _Decoder:
    """The model with its KV cache: `read` is the prefill, `next` decodes one token, on a GPU as one CUDA graph."""

    def __init__(self, model: LanguageModel, batch_size: int, decoding: Decoding, ragged: bool):
        self.model, self.decoding, self.ragged = model, decoding, ragged
        self.device = next(model.parameters()).device
        padding = torch.zeros(batch_size, dtype=torch.int64, device=self.device) if ragged else None
        self.cache: KVCache | None = model.new_cache(batch_size, padding, fixed=self.device.type == "cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def read(self, contexts: torch.Tensor, starts: Sequence[int], uniform: torch.Tensor) -> torch.Tensor:
        """Prefill with contexts (B, T), where row b begins at column starts[b] - min(starts); return the next tokens."""
        if self.cache is not None:
            self.cache.restart([start - min(starts) for start in starts] if self.ragged else None)
        return self._step(contexts, uniform)

    def next(self, newest: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The tokens after `newest` (B, 1)."""
        if self.device.type != "cuda" or self.cache is None:
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
        assert cache is not None
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


class TextStream:
    """Turns tokens into text incrementally: complete UTF-8 characters, and never a part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), at_end_of_text: bool = True):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.last_id = tokenizer.end_of_text if at_end_of_text else None
        self.tokens = 0
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty after a stop."""
        if self.ended:
            return ""
        self.tokens += 1
        if token == self.last_id:
            return self.close()
        return self._certain(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """The rest of the text, when no more tokens follow."""
        if self.ended:
            return ""
        text = self._certain(self._decoder.decode(b"", final=True))
        if not self.ended:
            text, self._held, self.ended = text + self._held, "", True
        return text

    def _certain(self, text: str) -> str:
        self._held += text
        places = [place for place in map(self._held.find, self.stops) if place >= 0]
        if places:
            self.ended = True
            return self._held[: min(places)]
        # Hold back an end that may be the beginning of a stop string.
        longest = max(map(len, self.stops), default=0)
        first = max(0, len(self._held) - longest + 1) if longest else len(self._held)
        for start in range(first, len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self.stops):
                certain, self._held = self._held[:start], self._held[start:]
                return certain
        certain, self._held = self._held, ""
        return certain


@dataclass(frozen=True)
class Sample:
    """A sampled text."""

    text: str
    tokens: int


def prepare(model: LanguageModel, device: str = "auto", dtype: str = "float32", decoding: bool = True) -> LanguageModel:
    """Move a model to a device and dtype for sampling: float32, bfloat16, or int8 (weights only, GPT-2 only).

    With `decoding` false, for evaluation, float32 and bfloat16 matrices keep torch's layout.

    Raises UsageError when the device is not here or the model has no int8.
    """
    where = hardware.select(device)
    hardware.prepare(where, hardware.cpu_count())
    if dtype != "float32":
        model = model.bfloat16()
    model = model.to(where.torch_name).eval()
    if isinstance(model, GPT2):
        if dtype == "int8":
            return inference.specialize(model, inference.Int8Linear)
        if dtype == "bfloat16" and not hardware.multiplies_bfloat16(where.type):
            return inference.specialize(model, inference.Bfloat16Linear)
        if decoding and where.type == "cpu" and inference.can_pack(model.ln_f.weight.dtype):
            return inference.specialize(model, inference.PackedLinear)
    elif dtype == "int8":
        raise UsageError("--dtype int8 is for gpt2; the character models fit into a cache as they are")
    return model


def sample_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    count: int,
    decoding: Decoding,
    seed: int,
    stops: Sequence[str] = (),
    at_end_of_text: bool = True,
    cached: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> tuple[list[Sample], float]:
    """Continue each prompt, ids from `read_prompt`, by `count` tokens, or up to a stop string.

    Returns the samples and the seconds they took. `on_text` is called with the text of the first sample as it grows.
    """
    device = next(model.parameters()).device
    ids = [torch.from_numpy(prompt).to(device) for prompt in prompts]
    streams = [TextStream(tokenizer, stops, at_end_of_text) for _ in prompts]
    texts = ["" for _ in prompts]
    began = time.perf_counter()

    def add(row: int, text: str) -> None:
        texts[row] += text
        if row == 0 and on_text and text:
            on_text(text)

    with nullcontext() if on_text else counting("sampling", count) as advance:

        def take(tokens: torch.Tensor) -> bool:
            if advance:
                advance(1)
            for row, token in enumerate(tokens.tolist()):
                add(row, streams[row].push(token))
            return all(stream.ended for stream in streams)

        generate(model, ids, count, decoding, seed, take, cached)
    for row, stream in enumerate(streams):
        add(row, stream.close())
    seconds = time.perf_counter() - began
    return [Sample(text, stream.tokens) for text, stream in zip(texts, streams, strict=True)], seconds


def read_prompt(tokenizer: Tokenizer, prompt: str, block_size: int, truncate: bool = False) -> np.ndarray:
    """Ids of a prompt, int64, shape (T,); with `truncate` only its end, if it is longer than the context.

    Raises UsageError when the prompt is empty, has characters that the tokenizer lacks, or exceeds the context.
    """
    ids = tokenizer.encode(prompt).astype(np.int64)
    if len(ids) == 0:
        raise UsageError("the prompt is empty: give at least one character")
    if len(ids) > block_size and not truncate:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens and the context of this model holds {block_size:,}:"
            " shorten it, or read its end alone with --truncate"
        )
    return ids[-block_size:]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def first_prompt(tokenizer: Tokenizer, documents: bool) -> str:
    """The prompt of a sample without one: the end of a document, or a line break."""
    if documents and tokenizer.end_of_text is not None:
        return tokenizer.decode([tokenizer.end_of_text])
    try:
        tokenizer.encode("\n")
        return "\n"
    except UsageError:  # a vocabulary of characters without one
        return tokenizer.decode([0])
