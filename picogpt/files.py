"""Atomic writes, and locks on folders."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from picogpt.errors import PicogptError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; flush it to disk and rename it on success, delete it on failure.

    Raises PicogptError, naming `path`, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a rename survives a power cut only once its folder is on disk too
        finally:
            os.close(folder)
    except OSError as error:
        raise PicogptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def place(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, atomically."""
    spare = target.with_name(f".{target.name}.placing")
    spare.unlink(missing_ok=True)
    try:
        os.link(source, spare)
    except OSError:  # a file system without links
        shutil.copyfile(source, spare)
    os.replace(spare, target)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, without the byte-order mark that some editors write before the text. Raises as `read_hashed`."""
    return read_hashed(path)[0]


def read_hashed(path: str | Path) -> tuple[str, str]:
    """The text of a UTF-8 file, or of a pipe, and the SHA-256 of its bytes, which are read once.

    Raises PicogptError when it is missing, unreadable, or not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff"), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise PicogptError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise PicogptError(f"{path} is not UTF-8 text: {wrong}") from error


def own_name(text: str, source: str | None = None) -> str:
    """`text` as a name for files: with letters of any script, digits, and . _ - alone.

    Where that changed it, or with a `source` that must not meet another of the same `text`, a part of a hash is added.
    """
    name = re.sub(r"[^\w.-]+", "_", text.encode("utf-8", "replace").decode()).strip("._") or "text"
    if name == text and source is None:
        return name
    return f"{name}-{hashlib.sha256((source or text).encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(folder: str | Path, what: str, name: str = ".lock") -> Iterator[None]:
    """Lock `folder`, or with another `name` of the lock a part of it, for this process; `what` describes its use in errors.

    Raises PicogptError when another process holds it. The operating system releases the lock of a process that was killed.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / name)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=0)
    except Timeout as error:
        raise PicogptError(f"another process is {what} in {folder}: wait for it, or use another folder") from error
    except OSError as error:
        raise PicogptError(f"cannot write in {folder}: {error.strerror or error}") from error
    with held:
        yield
