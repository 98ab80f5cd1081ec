"""GPT-2's tokenizer: byte pair encoding with OpenAI's 50,000 merges (Sennrich et al. 2016, arXiv:1508.07909).

`tiktoken` does the work. The merge ranks are one registered file, `gpt2.tiktoken`. It is fetched, or made from
OpenAI's own `vocab.bpe`; both ways end in the same bytes, which the registry's hash confirms.
"""

from __future__ import annotations

import base64
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from picogpt import hardware
from picogpt.data import fetch
from picogpt.errors import UsageError
from picogpt.files import atomic_write

RANKS, MERGES = "gpt2-ranks", "gpt2-merges"
"""Names of the registered files."""
END_OF_TEXT = "<|endoftext|>"
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 1 << 23
"""Held in memory: web pages are about 5 MB then."""
PIECE_CHARACTERS = 1 << 20
CUT = re.compile(r"(?<=\S)\n")
LAST_BLANK = re.compile(r"(?=[^\S\x1c-\x1f][\S\x1c-\x1f])(?<=[^\S\x1c-\x1f]{1000})")
"""The place in a long run of blanks where the pattern cuts it too: before the last one, which goes with the word behind."""


class GPT2Tokenizer:
    """Text to token ids below 50,257 and back; the last id is `<|endoftext|>`."""

    def __init__(self, ranks_file: str | Path):
        path, expected = Path(ranks_file), fetch.find(RANKS)
        fetch.require(path, expected, f"picogpt fetch {RANKS}")
        self.sha256 = expected.sha256
        # Not tiktoken.load, which keeps a copy of each file that it reads in the system's temporary folder.
        lines = (line.split() for line in path.read_bytes().splitlines())
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.end_of_text: int | None = len(self.ranks)
        special, pattern = {END_OF_TEXT: len(self.ranks)}, r50k_pat_str
        self.tiktoken = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=special)
        self.vocab_size = self.tiktoken.n_vocab
        self._lengths = np.array([*map(len, sorted(self.ranks, key=self.ranks.__getitem__)), 0])

    @classmethod
    def fetched(cls, folder: str | Path) -> GPT2Tokenizer:
        """The tokenizer from the file in `folder`. Downloads it if it is missing; raises as `fetch_ranks`."""
        return cls(fetch_ranks(folder))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a prompt, uint16; `<|endoftext|>` in it is one token. Raises UsageError on broken Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at position {error.start}: {text[:80]!r}") from error
        return self._ids(text, allowed_special="all")

    def _ids(self, text: str, **special: Any) -> np.ndarray:
        try:
            return self.tiktoken.encode_to_numpy(text, **special).astype(np.uint16)
        except ValueError:  # its pattern cannot take back one of a million blanks
            if len(parts := LAST_BLANK.split(text)) == 1:
                raise
            return np.concatenate([self._ids(part, **special) for part in parts])

    def encode_batches(self, documents: Iterable[str], threads: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Batches of documents in order: their number, and their ids, uint16, each document terminated by `<|endoftext|>`.

        What looks like `<|endoftext|>` inside a document is ordinary text. While one batch is taken, the next one is read
        and encoded, on `threads` cores, 0 for all.
        """
        with ThreadPoolExecutor(threads or hardware.cpu_count()) as pool:  # tiktoken releases the GIL
            begun = (
                (len(batch), pool.map(self._encode_piece, itertools.chain.from_iterable(map(_pieces, batch))))
                for batch in batches(documents)
            )
            # A pair is complete once the batch after it has begun.
            for (count, parts), _ in itertools.pairwise(itertools.chain(begun, [(0, iter(()))])):
                yield count, np.concatenate(list(parts))

    def _encode_piece(self, piece: tuple[str, bool]) -> np.ndarray:
        """The ids of a part of a document, with the end of text behind the last one."""
        text, is_last = piece
        ids = self._ids(text, disallowed_special=())
        return np.append(ids, np.uint16(len(self.ranks))) if is_last else ids

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: np.ndarray | list[int]) -> bytes:
        """Bytes of token ids: a token may end inside a character."""
        return self.tiktoken.decode_bytes([int(index) for index in ids])

    def count_bytes(self, ids: np.ndarray) -> int:
        """Length in UTF-8 of the text of token ids; `<|endoftext|>` has none: it stands between documents, in no text."""
        return int(self._lengths[ids].sum())


def fetch_ranks(folder: str | Path) -> Path:
    """Download the merge ranks into `folder`: computed from OpenAI's merges, or read from a source distribution.

    Raises Unreachable, with the reason for each source, when none answers.
    """
    expected = fetch.find(RANKS)
    target = Path(folder) / expected.file
    if not fetch.is_whole(target, expected):
        name, source = fetch.fetch_first([MERGES, RANKS], folder)
        if name == MERGES:
            with atomic_write(target) as file:
                file.write(ranks_of_merges(source.read_text(encoding="utf-8")))
    return target


def ranks_of_merges(merges: str) -> bytes:
    """The content of `gpt2.tiktoken` from that of `vocab.bpe`: bytes, then merges, each with its rank."""
    to_byte = {character: byte for byte, character in byte_characters().items()}
    lines = merges.splitlines()[1:]  # the first one names the version
    tokens = [*to_byte, *(line.replace(" ", "") for line in lines)]
    content = (bytes(to_byte[character] for character in token) for token in tokens)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(content))


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character by which OpenAI's files write each byte, in the order of the first 256 ids."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists that fit into memory."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) >= DOCUMENTS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the last one) of parts that encode to the same ids as the whole.

    A cut between a character and the line break after it is safe: no pattern matches across it or looks past it.
    """
    start = 0
    while found := CUT.search(document, start + PIECE_CHARACTERS):
        yield document[start : found.start()], False
        start = found.start()
    yield document[start:], True
