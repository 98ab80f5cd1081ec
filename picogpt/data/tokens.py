"""Token files: a header that describes the content, then the ids, which are memory-mapped.

8 bytes   magic "PICOGPT\\n"
4 bytes   length of the header, little endian
header    JSON: version, dtype, vocab_size, count, split, corpus, three hashes, documents; padded with spaces
ids       `count` values of `dtype`, beginning at a multiple of 64 bytes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from picogpt.data.sampler import Ids
from picogpt.errors import PicogptError
from picogpt.files import atomic_write

MAGIC = b"PICOGPT\n"
VERSION = 1
ALIGNMENT = 64
LARGEST_HEADER = 1 << 16
DTYPES = ("uint8", "uint16", "uint32")
SPLITS = ("train", "val")
# Larger files are not checked at the start, which would take too long; their batches are checked one by one.
CHECKED_COUNT = 1 << 26


@dataclass(frozen=True)
class Header:
    """The header of a token file."""

    version: int
    dtype: str
    vocab_size: int
    count: int
    split: str
    corpus: str
    text_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    """Hash of the ids of both splits: files that belong together have the same, and a run knows its data by it.
    In a file of a shard: of the ids in it; the manifest has the hash of all."""
    first_document: int | None = None
    """In a file of a shard: the index of its first document in the source."""
    documents: int | None = None
    """In a file of a shard: the number of documents, each terminated by `<|endoftext|>`."""


@dataclass(frozen=True)
class TokenFile:
    """An open token file, or many under one manifest. `ids` has shape (count,) and stays on disk until it is read."""

    path: Path
    header: Header
    ids: Ids

    def check(self, ids: np.ndarray) -> None:
        """Raises PicogptError when one of `ids`, any shape, is not in the vocabulary."""
        if ids.size and int(ids.max()) >= self.header.vocab_size:
            raise PicogptError(
                f"{self.path} holds the id {int(ids.max())} in a vocabulary of {self.header.vocab_size}:"
                " tokenize the text again"
            )


@dataclass(frozen=True)
class TokenData:
    """The training and validation tokens of a corpus."""

    train: TokenFile
    val: TokenFile

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return self.train.header.vocab_size

    def corpus(self) -> dict[str, str | int]:
        """Identity of the data, for records and checkpoints."""
        header = self.train.header
        return {
            "name": header.corpus,
            "text_sha256": header.text_sha256,
            "tokenizer_sha256": header.tokenizer_sha256,
            "data_sha256": header.data_sha256,
            "train_tokens": header.count,
            "val_tokens": self.val.header.count,
        }


def write_tokens(path: str | Path, ids: np.ndarray, header: Header) -> None:
    """Write a token file atomically."""
    with atomic_write(path) as file:
        file.write(_head(header))
        file.write(_bytes(ids, header))


class TokenStream:
    """A token file that is being written in parts; the header is written last."""

    def __init__(self, file: IO[bytes], header: Header):
        self._file, self._header, self._hash = file, header, hashlib.sha256()
        self.count = self.documents = 0
        largest = replace(header, count=1 << 62, documents=1 << 62, data_sha256="0" * 64)
        self._room = len(_head(largest))
        file.write(bytes(self._room))

    def append(self, ids: np.ndarray, documents: int) -> None:
        """Write the ids of so many documents."""
        part = _bytes(ids, self._header)
        self._file.write(part)
        self._hash.update(part)
        self.count += len(ids)
        self.documents += documents

    def finish(self) -> Header:
        """Write the header."""
        header = replace(self._header, count=self.count, documents=self.documents, data_sha256=self._hash.hexdigest())
        self._file.seek(0)
        self._file.write(_head(header, self._room))
        return header


@contextmanager
def streaming(path: str | Path, header: Header) -> Iterator[TokenStream]:
    """Write a token file of any length in parts; `header` has all fields but count, documents and data_sha256."""
    with atomic_write(path) as file:
        stream = TokenStream(file, header)
        yield stream
        stream.finish()


def _head(header: Header, room: int = 0) -> bytes:
    """The bytes before the ids: at least `room` of them, a multiple of 64."""
    text, start = json.dumps(asdict(header)).encode(), len(MAGIC) + 4
    text = text.ljust(max(room - start, len(text) + -(start + len(text)) % ALIGNMENT))
    return MAGIC + len(text).to_bytes(4, "little") + text


def _bytes(ids: np.ndarray, header: Header) -> bytes:
    return np.ascontiguousarray(ids, dtype=np.dtype(header.dtype).newbyteorder("<")).tobytes()


def open_tokens(path: str | Path, check: bool = True) -> TokenFile:
    """Open a token file; with `check`, and unless it is very large, check every id in it.

    Raises PicogptError when it is missing, foreign, of another version, cut short, or holds an id that is no token.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic, length = file.read(len(MAGIC)), int.from_bytes(file.read(4), "little")
            if magic != MAGIC or not 0 < length <= LARGEST_HEADER:
                raise PicogptError(f"{path} is not a token file: picogpt tokenize makes one")
            text = file.read(length)
        size = path.stat().st_size
    except OSError as error:
        raise PicogptError(f"cannot read the token file {path}: {error.strerror}; picogpt tokenize makes it") from error
    try:
        tree = json.loads(text)
        if tree["version"] != VERSION:
            raise PicogptError(
                f"{path} has version {tree['version']} and this picogpt reads version {VERSION}: tokenize the text again"
            )
        header = Header(**tree)
        if header.dtype not in DTYPES or header.count < 0 or header.vocab_size < 1:
            raise ValueError(f"dtype {header.dtype}, count {header.count}, vocab_size {header.vocab_size}")
    except (ValueError, KeyError, TypeError) as error:
        raise PicogptError(f"{path} has a damaged header ({error}): tokenize the text again") from error
    dtype = np.dtype(header.dtype).newbyteorder("<")
    start = len(MAGIC) + 4 + length
    if size != start + header.count * dtype.itemsize:
        raise PicogptError(
            f"{path} holds {size:,} bytes where its header promises {start + header.count * dtype.itemsize:,}:"
            " it was cut short or changed; tokenize the text again"
        )
    ids = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(header.count,))
    tokens = TokenFile(path, header, ids)
    if check and header.count <= CHECKED_COUNT:
        tokens.check(ids)
    return tokens
