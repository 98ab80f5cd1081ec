"""Many token files as one corpus: `manifest.json` lists them, and training reads them as if they were one.

Each shard of a corpus is tokenized by itself, anywhere and in any order, into `train-00000.bin`, `train-00001.bin`, …;
the first documents of the first shard are `val.bin`. `join` looks at all of them once and writes the manifest.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from picogpt.config import Settings
from picogpt.data.tokens import Header, TokenData, TokenFile, first_mistake, hash_of_parts, hash_of_texts, open_tokens
from picogpt.errors import PicogptError
from picogpt.files import exclusive_lock, read_text, write_text
from picogpt.progress import counting

MANIFEST = "manifest.json"
VAL = "val.bin"
MOST_OPEN = 1 << 14  # Linux gives a process 65,530 memory maps, and an open shard takes one
OTHER_FILES = 256  # descriptors that are left for everything else
HASH = r"^[0-9a-f]{64}$"


class Part(Settings):
    """A token file of a sharded corpus, and what it was made from."""

    file: str
    count: int = Field(ge=0, description="tokens")
    first_document: int = Field(ge=0, description="of the source: the first one here")
    documents: int = Field(ge=0)
    sha256: str = Field(pattern=HASH, description="of the ids")
    source: str
    source_sha256: str = Field(pattern=HASH)


class Manifest(Settings):
    """All token files of a sharded corpus, in the order of the shards."""

    version: Literal[1] = 1
    corpus: str
    dtype: Literal["uint8", "uint16", "uint32"]
    vocab_size: int
    tokenizer_sha256: str = Field(pattern=HASH)
    data_sha256: str = Field(pattern=HASH, description="hash of the hashes of all parts, val last")
    train: list[Part] = Field(min_length=1)
    val: Part

    def header(self) -> Header:
        """The header that a single file with all training tokens would have."""
        same = self.model_dump(include={"dtype", "vocab_size", "corpus", "tokenizer_sha256", "data_sha256"})
        text_sha256 = hash_of_texts([part.source_sha256 for part in self.train])
        return Header(split="train", count=sum(part.count for part in self.train), text_sha256=text_sha256, **same)

    def open(self, part: Part, folder: Path) -> TokenFile:
        """Open one of the files. Raises PicogptError, naming it, when it is not the one that was joined."""
        same = self.model_dump(include={"dtype", "vocab_size", "tokenizer_sha256"})
        hashes = {"data_sha256": part.sha256, "text_sha256": part.source_sha256}
        listed, remedy = f"the file that {folder / MANIFEST} lists", "tokenize its shard again, and join the shards"
        return open_tokens(folder / part.file, False, listed, remedy, count=part.count, **hashes, **same)


class ShardedTokens:
    """The ids of many files, read like one array by slices; a file is opened when a slice first needs it.

    Slices are found by bisection, and files stay open, so that a slice costs the same however many files there are.
    """

    def __init__(self, counts: Sequence[int], open_part: Callable[[int], TokenFile]):
        self._ends = list(accumulate(counts))
        self._open = functools.lru_cache(may_open(len(counts)))(open_part)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, part: slice) -> Any:
        """An array of the ids, shape (stop - start,); a slice of everything is this object, and reads nothing.

        Raises PicogptError naming the file that is missing, damaged, or holds an id that is no token.
        """
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise IndexError(f"ids of many files are read in order, not in steps of {step}")
        if stop - start == len(self):
            return self
        index = min(bisect_right(self._ends, start), len(self._ends) - 1)
        pieces: list[np.ndarray] = []
        while start < stop or not pieces:
            tokens, end = self._open(index), self._ends[index]
            begin = end - tokens.header.count
            pieces.append(tokens.ids[start - begin : max(start, min(stop, end)) - begin])
            tokens.check(pieces[-1])
            start, index = end, index + 1
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def may_open(count: int) -> int:
    """How many of `count` files this process may keep open; its limit is raised for them as far as it may be."""
    wanted = min(count, MOST_OPEN) + OTHER_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < min(wanted, hard):
        with suppress(ValueError, OSError):  # a system with a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), limits[1]))
            soft = min(wanted, hard)
    return max(1, min(wanted, soft) - OTHER_FILES)


def shard_file(number: int) -> str:
    """The name of the token file of a shard."""
    return f"train-{number:05}.bin"


def open_shards(folder: str | Path) -> TokenData:
    """Open the corpus whose manifest is in `folder`. No shard is opened before a batch needs it.

    Raises PicogptError when the manifest is damaged, a file that it lists is missing, or `val.bin` is another.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(read_text(path))
    except ValidationError as error:
        raise PicogptError(
            f"{path} is not a complete manifest ({first_mistake(error)}): join the shards again"
        ) from error
    if manifest.data_sha256 != hash_of_parts(part.sha256 for part in (*manifest.train, manifest.val)):
        raise PicogptError(f"{path} was changed: data_sha256 is not that of the files it lists; join the shards again")
    here, train = set(os.listdir(folder)), manifest.train
    if missing := [part.file for part in train if part.file not in here]:
        raise PicogptError(f"{folder / missing[0]} is not there, and {path} lists it: tokenize its shard again")
    ids = ShardedTokens([part.count for part in train], lambda index: manifest.open(train[index], folder))
    val = manifest.open(manifest.val, folder)
    val.check(val.ids[:])  # evaluation reads all of it; training batches are checked one by one
    return TokenData(TokenFile(path, manifest.header(), ids), val)


def join(folder: Path, corpus: str, sources: Sequence[tuple[str, str]]) -> TokenData:
    """Write the manifest of a corpus: one shard for each of `sources`, (name, sha256) in their order.

    Every id is read once, to know that it is the one that was written.

    Raises PicogptError naming the shard that is missing, damaged, of another source, tokenizer or corpus.
    """
    parts: list[Part] = []
    same: dict[str, Any] = {"corpus": corpus}
    with exclusive_lock(folder, "joining shards"), counting("checking", len(sources) + 1) as advance:
        for file, number in [(VAL, 0), *((shard_file(number), number) for number in range(len(sources)))]:
            path, (name, sha256), again = folder / file, sources[number], f"tokenize shard {number} again"
            if not path.exists():
                raise PicogptError(f"{path} is not there: tokenize shard {number}")
            known = {"text_sha256": sha256, "first_document": parts[0].documents if len(parts) == 1 else 0, **same}
            listed = f"shard {number} of this corpus, made from {name}"
            tokens = open_tokens(path, False, listed, f"{again} into this folder", **known)
            if not tokens.is_undamaged():
                raise PicogptError(f"{path} is damaged: its ids are not those that were written; {again}")
            header = tokens.header
            counts = header.model_dump(include={"count", "first_document", "documents"})
            parts.append(Part(file=file, sha256=header.data_sha256, source=name, source_sha256=sha256, **counts))
            same = header.model_dump(include={"corpus", "tokenizer_sha256", "vocab_size", "dtype"})
            advance(1)
        val, *train = parts
        data_sha256 = hash_of_parts(part.sha256 for part in (*train, val))
        manifest = Manifest(data_sha256=data_sha256, train=train, val=val, **same)
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return open_shards(folder)


def is_whole(path: Path, expected: Header) -> bool:
    """Whether `path` is an undamaged token file with all the fields that are known in the `expected` header."""
    known = expected.model_dump(exclude={"count", "data_sha256"}, exclude_none=True)
    try:
        return open_tokens(path, check=False, **known).is_undamaged()
    except PicogptError:
        return False
