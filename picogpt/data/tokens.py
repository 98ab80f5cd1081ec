"""Token files: a header that describes the content, then the ids, which are memory-mapped.

8 bytes   magic "PICOGPT\\n"
4 bytes   length of the header, little endian
header    JSON: the fields of `Header`, padded with spaces
ids       `count` values of `dtype`, beginning at a multiple of 64 bytes
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from picogpt.config import Settings
from picogpt.data.sampler import Ids
from picogpt.errors import PicogptError
from picogpt.files import atomic_write

MAGIC = b"PICOGPT\n"
ALIGNMENT = 64
LARGEST_HEADER = 1 << 16
# Larger files are not checked at the start, which would take too long; their batches are checked one by one.
CHECKED_COUNT = 1 << 26
MAKES_ONE = "picogpt tokenize char or picogpt tokenize gpt2 makes one"


class Header(Settings):
    """The header of a token file."""

    version: Literal[1] = 1
    dtype: Literal["uint8", "uint16", "uint32"] = "uint16"
    vocab_size: int = Field(ge=1)
    count: int = Field(0, ge=0)
    text_bytes: int | None = Field(None, ge=1, description="of the text, in UTF-8; older files do not say it")
    split: str
    corpus: str
    text_sha256: str
    tokenizer_sha256: str
    data_sha256: str = ""
    """Hash of the ids of both splits, by which a run knows its data; in a file of a shard: of the ids in the file."""
    first_document: int | None = Field(None, description="in a file of a shard: its first one's index in the source")
    documents: int | None = Field(None, description="in a file of a shard: number, each terminated by <|endoftext|>")

    @property
    def little_endian(self) -> np.dtype:
        """The dtype of the ids in the file."""
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class TokenFile:
    """An open token file, or many under one manifest. `ids` has shape (count,) and stays on disk until it is read."""

    path: Path
    header: Header
    ids: Ids

    def check(self, ids: np.ndarray) -> None:
        """Raises PicogptError when one of `ids`, any shape, is not in the vocabulary."""
        if ids.size and (largest := int(ids.max())) >= (vocab_size := self.header.vocab_size):
            mistake = f"the id {largest} in a vocabulary of {vocab_size}"
            raise PicogptError(f"{self.path} holds {mistake}: tokenize the text again")

    def is_undamaged(self) -> bool:
        """Whether the file, one of a shard, holds the ids and the documents that were written."""
        written = self.header.documents is not None and self.header.data_sha256
        return written == hashlib.sha256(self.ids[:]).hexdigest()


@dataclass(frozen=True)
class TokenData:
    """The training and validation tokens of a corpus."""

    train: TokenFile
    val: TokenFile

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return self.train.header.vocab_size

    def corpus(self) -> dict[str, str | int | None]:
        """Identity of the data, for records and checkpoints; `val_bytes` is None where an older file does not say it."""
        header = self.train.header
        return {
            "name": header.corpus,
            **header.model_dump(include={"text_sha256", "tokenizer_sha256", "data_sha256"}),
            "train_tokens": header.count,
            "val_tokens": self.val.header.count,
            "val_bytes": self.val.header.text_bytes,
        }


def write_tokens(
    path: Path,
    header: Header,
    parts: Iterable[tuple[int, np.ndarray]],
    advance: Callable[..., object] | None = None,
    count_bytes: Callable[[np.ndarray], int] | None = None,
) -> None:
    """Write a token file of any length, atomically; each of `parts` is a number of documents and their ids, shape (N,).

    `count`, and in a file of a shard `documents`, `data_sha256` and by `count_bytes` the bytes of the ids, are set in the
    header, which is written last.
    `advance` is told the documents and tokens of each part once they are written.
    """
    growth = 128  # of the header while the ids are written: three numbers and a hash
    length = len(header.model_dump_json().encode()) + growth
    length += -(len(MAGIC) + 4 + length) % ALIGNMENT
    count, documents, size, digest = 0, 0, 0, hashlib.sha256()
    with atomic_write(path) as file:
        file.seek(len(MAGIC) + 4 + length)
        for more, ids in parts:
            content = ids.astype(header.little_endian).tobytes()
            file.write(content)
            digest.update(content)
            count, documents = count + len(ids), documents + more
            size += count_bytes(ids) if count_bytes else 0
            if advance:
                advance(more, len(ids))
        known = {"count": count, "documents": documents, "data_sha256": digest.hexdigest(), "text_bytes": size or None}
        header = header.model_copy(update=known if header.first_document is not None else {"count": count})
        file.seek(0)
        file.write(MAGIC + length.to_bytes(4, "little") + header.model_dump_json().encode().ljust(length))


def open_tokens(
    path: str | Path, check: bool = True, belongs: str = "", remedy: str = "tokenize the text again", **expected: Any
) -> TokenFile:
    """Open a token file; with `check`, and unless it is very large, check every id in it.

    Its header must have the `expected` fields; errors say what the file `belongs` to by them, and the `remedy`.

    Raises PicogptError when it is missing, foreign, of another version, cut short, or holds an id that is no token.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic, length = file.read(len(MAGIC)), int.from_bytes(file.read(4), "little")
            if magic != MAGIC or not 0 < length <= LARGEST_HEADER:
                raise PicogptError(f"{path} is not a token file: {MAKES_ONE}")
            header = Header.model_validate_json(file.read(length))
        size = path.stat().st_size
    except OSError as error:
        raise PicogptError(f"cannot read the token file {path}: {error.strerror}; {MAKES_ONE}") from error
    except ValidationError as error:
        raise PicogptError(f"{path} has a damaged header ({first_mistake(error)}): {remedy}") from error
    start = len(MAGIC) + 4 + length
    if size != (promised := start + header.count * header.little_endian.itemsize):
        held = f"{size:,} bytes where its header promises {promised:,}"
        raise PicogptError(f"{path} holds {held}: it was cut short or changed; {remedy}")
    for field, value in expected.items():
        if (found := getattr(header, field)) != value:
            raise PicogptError(f"{path} is not {belongs}: its {field} is {found}, not {value}; {remedy}")
    ids = np.memmap(path, header.little_endian, mode="r", offset=start, shape=(header.count,))
    tokens = TokenFile(path, header, ids)
    if check and header.count <= CHECKED_COUNT:
        tokens.check(ids)
    return tokens


def first_mistake(error: ValidationError) -> str:
    """The first key that pydantic rejects, with its value and the reason."""
    detail = error.errors()[0]
    value = "" if detail["type"] in ("missing", "json_invalid") else f"={reprlib.repr(detail['input'])}"
    return f"{'.'.join(map(str, detail['loc']))}{value}: {detail['msg']}".lstrip("=: ")


def hash_of_parts(hashes: Iterable[str]) -> str:
    """Hash of all ids of a corpus, from the hashes of its files."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()


def hash_of_texts(hashes: Sequence[str]) -> str:
    """Hash of all texts of a corpus, from the hash of each."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
