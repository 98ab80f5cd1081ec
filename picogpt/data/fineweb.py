"""FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557): shards of text on the Hugging Face hub, and their tokens.

The registry is `config/fineweb.yaml`. A shard is a parquet file of documents; each is tokenized by itself.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

from pydantic import Field

from picogpt.config import Settings
from picogpt.data import shards
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.documents import open_table, rows
from picogpt.data.fetch import File, obtain, read_registry, require
from picogpt.data.tokens import Header, TokenData, write_tokens
from picogpt.errors import UsageError
from picogpt.files import exclusive_lock
from picogpt.progress import Encoding

NAME = "fineweb-edu"


class Dataset(Settings):
    """A data set on the hub: parquet files with a column `text`."""

    title: str
    licence: str
    repository: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    folder: str
    shards: tuple[File, ...] = Field(min_length=1)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


@functools.cache
def dataset() -> Dataset:
    """The registered data set."""
    return read_registry("fineweb.yaml", Dataset)[NAME]


def shard(number: int | str) -> File:
    """The parquet file of a shard. Raises UsageError when there is no such shard."""
    registered = dataset().shards
    if not str(number).isdecimal() or int(number) >= len(registered):
        raise UsageError(f"{NAME} has {len(registered)} shards, 0 to {len(registered) - 1}: there is no shard {number}")
    return registered[int(number)]


def fetch_shard(number: int | str, cached_only: bool = False) -> Path:
    """The parquet file of a shard in the hub client's own cache. Raises like `fetch.obtain`."""
    data, file = dataset(), shard(number)
    path = f"{data.folder}/{file.file}"
    return obtain(data.repository, path, data.revision, file.sha256, _command(number), "dataset", cached_only)


def _command(number: int | str) -> str:
    """What brings a shard, for messages."""
    return f"picogpt fetch {NAME} --shard {number}"


def tokenize(
    number: int, folder: Path, tokenizer: GPT2Tokenizer, val_documents: int, file: Path | None = None, threads: int = 0
) -> Path:
    """Write the tokens of a shard into `folder` and return their file; does nothing if it is complete already.

    The first `val_documents` of the first shard go to `val.bin`. Every document ends with `<|endoftext|>`. The text is
    in `file`, or else in the cache of the hub's client; the network is not used. On `threads` cores, 0 for all; the
    memory does not grow with the shard.

    Raises Unreachable when the text is not here, PicogptError when it is another or cannot be read.
    """
    path, text_sha256 = folder / shards.shard_file(number), shard(number).sha256
    hashes = {"text_sha256": text_sha256, "tokenizer_sha256": tokenizer.sha256}
    same: Any = {"corpus": NAME, "vocab_size": tokenizer.vocab_size, **hashes}
    held_out = val_documents if number == 0 else 0
    headers = {path: Header(split="train", first_document=held_out, **same)}
    if held_out:  # before the documents for training: they are read in order
        val = Header(split="val", first_document=0, documents=held_out, **same)
        headers = {folder / shards.VAL: val, **headers}
    with exclusive_lock(folder, f"tokenizing shard {number}", f".{path.name}.lock"):
        if all(shards.is_whole(part, expected) for part, expected in headers.items()):
            return path
        if file:
            require(file, shard(number), _command(number))
        file = file or fetch_shard(number, cached_only=True)
        table = open_table(file)
        total, documents = table.metadata.num_rows, rows(table, file)
        if held_out >= total:
            raise UsageError(f"{file} has {total} documents: --val-documents {held_out} would leave none for training")
        with Encoding(f"{NAME} shard {number}", total) as bar:
            for part, header in headers.items():
                some = itertools.islice(documents, header.documents)  # all that are left, for training
                write_tokens(part, header, tokenizer.encode_batches(some, threads), bar.advance, tokenizer.count_bytes)
    return path


def join(folder: Path, count: int) -> TokenData:
    """Write the manifest over the first `count` shards in `folder`. Raises as `shards.join`."""
    return shards.join(folder, NAME, [(file.file, file.sha256) for file in map(shard, range(count))])
