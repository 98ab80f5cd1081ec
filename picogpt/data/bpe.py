"""GPT-2's tokenizer: byte pair encoding with OpenAI's 50,000 merges (Sennrich et al. 2016, arXiv:1508.07909).

`tiktoken` does the work. The merge ranks are one registered file, `gpt2.tiktoken`. It is fetched, or made from
OpenAI's own `vocab.bpe`; both ways end in the same bytes, which the registry's hash confirms.
"""

from __future__ import annotations

import base64
import functools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from picogpt import hardware
from picogpt.data import assets
from picogpt.errors import PicogptError, Unreachable, UsageError
from picogpt.files import atomic_write, sha256_file

RANKS, MERGES = "gpt2-ranks", "gpt2-merges"
"""Names of the registered files."""
END_OF_TEXT = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 20
CUT = re.compile(r"(?<=\S)\n")


class GPT2Tokenizer:
    """Text to token ids below 50,257 and back; the last id is `<|endoftext|>`."""

    def __init__(self, ranks_file: str | Path):
        path = Path(ranks_file)
        expected = assets.find(RANKS)
        if not assets.is_whole(path, expected):
            found = f"has sha256 {sha256_file(path)}" if path.is_file() else "is not there"
            raise PicogptError(
                f"{path} {found}; GPT-2's merge ranks have {expected.sha256}: picogpt fetch {RANKS} brings them"
            )
        lines = (line.split() for line in path.read_bytes().splitlines())
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.end_of_text: int | None = len(self.ranks)
        self.tiktoken = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=self.ranks, special_tokens={END_OF_TEXT: len(self.ranks)}
        )

    @classmethod
    def fetched(cls, folder: str | Path) -> GPT2Tokenizer:
        """The tokenizer from the file in `folder`, which is downloaded first if it is missing.

        Raises Unreachable when no source answers.
        """
        return cls(fetch_ranks(folder))

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens: 50,257."""
        return self.tiktoken.n_vocab

    @property
    def sha256(self) -> str:
        """Identity of the vocabulary: equal hashes give equal ids."""
        return assets.find(RANKS).sha256

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a prompt, uint16; `<|endoftext|>` in it is one token. Raises UsageError on broken Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at position {error.start}: {text[:80]!r}") from error
        return self.tiktoken.encode_to_numpy(text, allowed_special="all").astype(np.uint16)

    def encode_documents(self, documents: Sequence[str], threads: int = 0) -> np.ndarray:
        """Token ids, uint16, of documents with `<|endoftext|>` between them; on `threads` cores, 0 for all.

        What looks like `<|endoftext|>` inside a document is ordinary text.
        """
        ((_, ids),) = self.encode_batches([documents], threads)
        return ids[:-1]

    def encode_batches(self, batches: Iterable[Sequence[str]], threads: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """For each batch, in order, its number of documents and their ids, each terminated by `<|endoftext|>`.

        As `encode_documents`; and while one batch is taken, the next one is read and encoded.
        """
        end = np.array([len(self.ranks)], dtype=np.uint16)

        def ids_of(pieces: list[tuple[bool, Future[np.ndarray]]]) -> np.ndarray:
            parts: list[np.ndarray] = []
            for last, part in pieces:
                parts += [part.result().astype(np.uint16), end] if last else [part.result().astype(np.uint16)]
            return np.concatenate(parts)

        with ThreadPoolExecutor(threads or hardware.cpu_count()) as pool:  # tiktoken releases the GIL
            ahead: deque[tuple[int, list[tuple[bool, Future[np.ndarray]]]]] = deque()
            for documents in batches:
                pieces = [
                    (last, pool.submit(self.tiktoken.encode_to_numpy, piece, disallowed_special=()))
                    for document in documents
                    for last, piece in _pieces(document)
                ]
                ahead.append((len(documents), pieces))
                if len(ahead) > 1:
                    count, pieces = ahead.popleft()
                    yield count, ids_of(pieces)
            for count, pieces in ahead:
                yield count, ids_of(pieces)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: np.ndarray | list[int]) -> bytes:
        """Bytes of token ids: a token may end inside a character."""
        return self.tiktoken.decode_bytes([int(index) for index in ids])


def fetch_ranks(folder: str | Path) -> Path:
    """Download the merge ranks into `folder`: computed from OpenAI's merges, or read from a source distribution.

    Raises Unreachable, with the reason for each source, when none answers.
    """
    target = Path(folder) / assets.find(RANKS).file
    if assets.is_whole(target, assets.find(RANKS)):
        return target
    try:
        merges = assets.fetch(MERGES, folder)
    except Unreachable as no_merges:
        try:
            return assets.fetch(RANKS, folder)
        except Unreachable as no_ranks:
            raise Unreachable(f"{no_merges}\n{no_ranks}") from no_ranks
    with atomic_write(target) as file:
        file.write(ranks_of_merges(merges.read_text(encoding="utf-8")))
    if not assets.is_whole(target, assets.find(RANKS)):  # cannot happen: the merges have been verified
        raise PicogptError(f"{merges} does not give the registered merge ranks")
    return target


def ranks_of_merges(merges: str) -> bytes:
    """The content of `gpt2.tiktoken` from that of `vocab.bpe`: bytes, then merges, each with its rank."""
    characters = byte_characters()
    to_byte = {character: byte for byte, character in characters.items()}
    tokens = [bytes([byte]) for byte in characters]
    for line in merges.splitlines()[1:]:  # the first line names the version
        tokens.append(bytes(to_byte[character] for character in line.replace(" ", "")))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character by which OpenAI's files write each byte, in the order of the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _pieces(document: str) -> Iterator[tuple[bool, str]]:
    """(whether it is the last one, text) of parts that encode to the same ids as the whole.

    A cut between a character and the line break after it is safe: no pattern matches across it or looks past it.
    """
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        found = CUT.search(document, start + PIECE_CHARACTERS)
        if not found:
            break
        yield False, document[start : found.start()]
        start = found.start()
    yield True, document[start:]
