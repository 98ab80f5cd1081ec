"""The documents of a user's text: of a file, of a folder of files, of JSON lines, or of a parquet table.

A text file is one document. In `.jsonl` and `.jsonl.gz` each line is one, in `.parquet` each row, by its field `text`. In
a folder each file is read by its suffix; what is hidden, empty, or no text is left out.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from picogpt.data.tokens import first_mistake
from picogpt.errors import PicogptError, UsageError
from picogpt.files import decode, read_hashed, read_text, sha256_file

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COLUMN = "text"
SNIFFED_BYTES = 8192
"""Git too takes a file for text that has no zero byte in so many of its first ones."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Documents = Callable[[], Iterator[str]]
"""Gives the documents in order, read anew each time."""


def read(path: Path) -> tuple[Documents, str]:
    """The documents of a text, and its hash as of `sha256`. A text file, which may be a pipe, is read at once, others as needed.

    Raises PicogptError when there is no text, or when it cannot be read; for most files only once they are.
    """
    if path.is_dir():
        digest = sha256(path)  # first: a file that comes now is noticed by `require_unchanged`
        files, others = text_files(path)
        if others:
            named = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
            print(f"left out of {path}, as no text files: {len(others):,} ({named})", file=sys.stderr)
        return lambda: (document for file in files for document in _documents(file)), digest
    if not _is_table(path):
        text, digest = read_hashed(path)
        return lambda: iter([text] if text else []), digest
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is read more than once, which a pipe or a device cannot be: save it as a file")
    return functools.partial(_documents, path), sha256(path)


def require_unchanged(path: Path, digest: str) -> None:
    """Raises PicogptError when a text that was not read at once is no longer the one of this hash."""
    if (path.is_dir() or _is_table(path)) and sha256(path) != digest:
        raise PicogptError(f"{path} was changed while it was read: tokenize it when nothing writes to it any more")


def sha256(path: Path) -> str:
    """The hash by which a change of a text is noticed: of a folder, that of the lines that sha256sum prints of its files."""
    try:
        if not path.is_dir():
            return sha256_file(path)
        lines = (f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in text_files(path)[0])
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    except OSError as error:
        raise PicogptError(f"cannot read {error.filename}: {error.strerror}") from error


def size(path: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in (text_files(path)[0] if path.is_dir() else [path]))


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files with text in `folder` and below it, in the order of their names; and what else there is.

    Files that are hidden or empty are not mentioned, links to folders not followed.

    Raises PicogptError when there is none, or something cannot be read; UsageError when results would be written there.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder} holds the folder of this run, and so its results: use a folder of texts alone")
    files: list[Path] = []
    others: list[Path] = []
    try:
        for parent, folders, names in os.walk(folder, onerror=_refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            others += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    others.append(path)
                elif status.st_size:
                    (files if _is_table(path) or _is_text(path) else others).append(path)
    except OSError as error:
        raise PicogptError(f"cannot read {error.filename}: {error.strerror}; mend or remove it") from error
    if not files:
        kinds = "UTF-8 text, .jsonl, .jsonl.gz or .parquet"
        raise PicogptError(f"{folder} has no text: put files of {kinds} there (not hidden, not empty)")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix()), sorted(others)


def _refuse(error: OSError) -> None:
    raise error


def _is_table(path: Path) -> bool:
    """Whether the file holds many documents."""
    return path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(SNIFFED_BYTES)
    return b"\0" not in start or start.startswith(UTF_16)  # which is refused later, by name


def _documents(path: Path) -> Iterator[str]:
    """The documents of a file that are not empty."""
    if not _is_table(path):
        texts = iter([read_text(path)])
    else:
        texts = rows(open_table(path), path) if path.suffix.lower() == ".parquet" else _lines(path)
    return filter(None, texts)


class _Line(BaseModel):
    text: str


def _lines(path: Path) -> Iterator[str]:
    """The texts of JSON lines in order. Raises PicogptError, with the number of the line, when one is none."""
    start = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        yield _Line.model_validate_json(line.removeprefix(codecs.BOM_UTF8)).text
                except ValidationError as error:
                    decode(line, path, start)  # says more where that is the reason
                    wanted = f'a line must be an object with a text, as {{"{COLUMN}": "..."}}'
                    raise PicogptError(f"{path}, line {number}: {first_mistake(error)}; {wanted}") from error
                start += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise PicogptError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def open_table(path: Path) -> pq.ParquetFile:
    """Open a parquet file with a column of texts. Raises PicogptError."""
    import pyarrow
    import pyarrow.parquet

    try:
        # With the defaults a whole row group, or the whole file, would be read into memory at once.
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pyarrow.ArrowException) as error:
        raise PicogptError(f"{path} is not a parquet file: {error}") from error
    held = [(field.name, str(field.type)) for field in table.schema_arrow]
    if [dtype in ("string", "large_string") for name, dtype in held if name == COLUMN] != [True]:
        listed = ", ".join(f"{name} ({dtype})" for name, dtype in held) or "no columns"
        raise PicogptError(f"{path} has no column {COLUMN!r} of strings, or several; it has {listed}")
    return table


def rows(table: pq.ParquetFile, path: Path) -> Iterator[str]:
    """The texts in order, read one row group at a time. Raises PicogptError when one cannot be read."""
    import pyarrow

    for group in range(table.num_row_groups):
        try:
            for batch in table.iter_batches(1024, row_groups=[group], columns=[COLUMN]):  # documents, about 5 MB
                texts = batch.column(0)
                if texts.null_count:
                    raise PicogptError(f"{path}: a document in row group {group} has no {COLUMN}")
                yield from texts.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise PicogptError(f"{path}: row group {group} cannot be read: {error}") from error
