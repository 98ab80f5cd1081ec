"""Text from sampled tokens: prompts, complete characters, stop strings."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from picogpt.data.tokenizers import Tokenizer
from picogpt.errors import UsageError
from picogpt.models.language_model import LanguageModel
from picogpt.progress import counting
from picogpt.sample import Decoding, generate, probabilities


class TextStream:
    """Turns tokens into text incrementally: complete UTF-8 characters, and never a part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), at_end_of_text: bool = True):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.last_id = tokenizer.end_of_text if at_end_of_text else None
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty after a stop."""
        if self.ended:
            return ""
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
        found = [index for index in map(self._held.find, self.stops) if index >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)]
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
    """A sampled text: its ids, and the characters that each of them completes."""

    ids: list[int]
    parts: list[str]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)


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
    compiled: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> tuple[list[Sample], float]:
    """Continue each prompt, ids from `read_prompt`, by `count` tokens, or up to a stop string.

    Returns the samples and the seconds they took. `on_text` is called with the text of the first sample as it grows.
    """
    device = next(model.parameters()).device
    ids = [torch.from_numpy(prompt).to(device) for prompt in prompts]
    streams = [TextStream(tokenizer, stops, at_end_of_text) for _ in prompts]
    samples = [Sample([], []) for _ in prompts]
    began = time.perf_counter()

    def add(row: int, text: str) -> None:
        samples[row].parts.append(text)
        if row == 0 and on_text and text:
            on_text(text)

    with nullcontext() if on_text else counting("sampling", count) as advance:

        def take(tokens: torch.Tensor) -> bool:
            if advance:
                advance(1)
            for row, token in enumerate(tokens.tolist()):
                if not streams[row].ended:
                    samples[row].ids.append(token)
                    add(row, streams[row].push(token))
            return all(stream.ended for stream in streams)

        generate(model, ids, count, decoding, seed, take, cached, compiled)
    for row, (stream, made) in enumerate(zip(streams, samples, strict=True)):
        add(row, stream.close())
        made.parts[-2:] = ["".join(made.parts[-2:])]
    seconds = time.perf_counter() - began
    return samples, seconds


def scored(model: LanguageModel, prompts: Sequence[np.ndarray], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Of each sample, the characters that each token completes, and its probability; `prompts` as for `sample_texts`."""
    device, found = next(model.parameters()).device, []
    for prompt, made in zip(prompts, samples, strict=True):
        given, ids = (torch.as_tensor(part, device=device) for part in (prompt, made.ids))
        found.append({"tokens": made.parts, "probabilities": probabilities(model, given, ids).tolist()})
    return found


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


def first_prompt(tokenizer: Tokenizer, documents: bool) -> str:
    """The prompt of a sample without one: the end of a document, or a line break."""
    if documents and tokenizer.end_of_text is not None:
        return tokenizer.decode([tokenizer.end_of_text])
    try:
        tokenizer.encode("\n")
        return "\n"
    except UsageError:  # a vocabulary of characters without one
        return tokenizer.decode([0])
