"""FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557): shards of text on the Hugging Face hub, and their tokens.

The registry is `config/fineweb.yaml`. A shard is a parquet file of documents; each is tokenized by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from picogpt.config import Settings
from picogpt.data import shards
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.fetch import File, HubFile, is_whole, obtain, read_registry
from picogpt.data.tokens import Header, TokenData, write_tokens
from picogpt.errors import PicogptError, UsageError
from picogpt.files import exclusive_lock, sha256_file
from picogpt.progress import Encoding

if TYPE_CHECKING:
    import pyarrow.parquet as pq

NAME = "fineweb-edu"
COLUMN = "text"
DOCUMENTS_AT_ONCE = 1024
"""Held in memory, about 5 MB of text."""
READ_BYTES = 1 << 20


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


def parquet(number: int) -> HubFile:
    """The parquet file of a shard. Raises UsageError when there is no such shard."""
    data, shard = dataset(), _shard(number)
    path, command = f"{data.folder}/{shard.file}", f"picogpt fetch {NAME} --shard {number}"
    return HubFile(data.repository, path, data.revision, shard.sha256, command, repo_type="dataset")


def tokenize(
    number: int,
    folder: str | Path,
    tokenizer: GPT2Tokenizer,
    val_documents: int,
    file: str | Path | None = None,
    threads: int = 0,
) -> Path:
    """Write the tokens of a shard into `folder` and return their file; does nothing if it is complete already.

    The first `val_documents` of the first shard go to `val.bin`. Every document ends with `<|endoftext|>`. The text comes
    from `file`, or from the cache of the hub's client; nobody is asked for it. On `threads` cores, 0 for all; the
    memory does not grow with the shard.

    Raises Unreachable when the text is not here, PicogptError when it is another or cannot be read.
    """
    shard, folder = _shard(number), Path(folder)
    path = folder / shards.shard_file(number)
    held_out = val_documents if number == 0 else 0
    header = Header(
        vocab_size=tokenizer.vocab_size,
        split="train",
        corpus=NAME,
        text_sha256=shard.sha256,
        tokenizer_sha256=tokenizer.sha256,
        first_document=held_out,
    )
    val_header = header.model_copy(update={"split": "val", "first_document": 0, "documents": held_out})
    headers = {folder / shards.VAL: val_header, path: header} if held_out else {path: header}
    with exclusive_lock(folder, f"tokenizing shard {number}", f".{path.name}.lock"):
        if all(shards.is_whole(part, expected) for part, expected in headers.items()):
            return path
        source = obtain(parquet(number), cached_only=True) if file is None else _verified(Path(file), shard)
        table = _open(source)
        total = table.metadata.num_rows
        if held_out >= total:
            raise UsageError(
                f"{source} has {total:,} documents: --val-documents {held_out} would leave none for training"
            )
        documents = _documents(table, source)
        with Encoding(f"{NAME} shard {number}", total) as bar:
            for part, expected in headers.items():
                some = itertools.islice(documents, expected.documents)  # all that are left, for training
                write_tokens(part, expected, _encoded(some, tokenizer, threads, bar))
    return path


def _encoded(
    documents: Iterator[str], tokenizer: GPT2Tokenizer, threads: int, bar: Encoding
) -> Iterator[tuple[int, np.ndarray]]:
    """The ids of the documents in batches, each with its number of documents; shows the progress on `bar`."""
    batches = iter(lambda: list(itertools.islice(documents, DOCUMENTS_AT_ONCE)), [])
    for count, ids in tokenizer.encode_batches(batches, threads):
        bar.advance(count, len(ids))
        yield count, ids


def join(folder: str | Path, count: int) -> TokenData:
    """Write the manifest over the first `count` shards in `folder`. Raises as `shards.join`."""
    _shard(count - 1)
    return shards.join(folder, NAME, [(shard.file, shard.sha256) for shard in dataset().shards[:count]])


def _shard(number: int) -> File:
    registered = dataset().shards
    if not 0 <= number < len(registered):
        raise UsageError(f"{NAME} has {len(registered)} shards, 0 to {len(registered) - 1}: there is no shard {number}")
    return registered[number]


def _verified(path: Path, shard: File) -> Path:
    """`path`, when it holds the bytes of `shard`."""
    if not is_whole(path, shard):
        found = f"{path.stat().st_size:,} bytes, sha256 {sha256_file(path)}" if path.is_file() else "it is not there"
        raise PicogptError(
            f"{path} is not {shard.file} of {NAME}: {found}; expected {shard.size:,} bytes, sha256 {shard.sha256}"
        )
    return path


def _open(path: Path) -> pq.ParquetFile:
    """Open a parquet file with a column of texts. Raises PicogptError."""
    import pyarrow
    import pyarrow.parquet

    try:
        # With the defaults a whole row group, or the whole file, would be read into memory at once.
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (OSError, pyarrow.ArrowException) as error:
        raise PicogptError(f"{path} is no parquet file: {error}") from error
    schema = table.schema_arrow
    held = {name: str(schema.field(name).type) for name in schema.names}
    if held.get(COLUMN) not in ("string", "large_string"):
        listed = ", ".join(f"{name} ({kind})" for name, kind in held.items())
        raise PicogptError(f"{path} has no column {COLUMN!r} of strings; it has {listed or 'no columns'}")
    return table


def _documents(table: pq.ParquetFile, path: Path) -> Iterator[str]:
    """The texts in order, read one row group at a time. Raises PicogptError when one cannot be read."""
    import pyarrow

    for group in range(table.num_row_groups):
        try:
            for batch in table.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[group], columns=[COLUMN]):
                texts = batch.column(0)
                if texts.null_count:
                    raise PicogptError(f"{path}: a document in row group {group} has no {COLUMN}")
                yield from texts.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise PicogptError(f"{path}: row group {group} cannot be read: {error}") from error
