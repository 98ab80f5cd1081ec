"""Atomic writes, and locks on folders."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from picogpt.errors import PicogptError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file of a clone begins whose content Git LFS has not fetched."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; flush it to disk and rename it on success, delete it on failure.

    Where `path` is a link, the file that it names is replaced; a device or a pipe is written into. Raises PicogptError,
    naming `path`, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # renaming would end /dev/null, for root
            with open(path, "wb") as file:
                yield file
            return
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise PicogptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _flush_folder(path: Path) -> None:
    """A rename survives a power cut only once its folder is on disk too; not every file system can be asked for that."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def make_folder(folder: str | Path) -> None:
    """Make `folder` and those above it, unless they are there. Raises an OSError that explains a link to what is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        reason = f"{error.filename} is a file, or a link to a folder that is not there (is its disk mounted?)"
        raise NotADirectoryError(errno.ENOTDIR, reason) from error


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

    Raises PicogptError when it is missing, unreadable, not UTF-8, or only a pointer of Git LFS.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(LFS_POINTER):
            raise PicogptError(f"{path} only says where Git LFS keeps the file: git lfs pull brings it")
        return decode(content, path).removeprefix("\ufeff"), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise PicogptError(f"cannot read {path}: {error.strerror}") from error


def decode(content: bytes, path: str | Path, start: int = 0) -> str:
    """UTF-8 that begins at byte `start` of a file. Raises PicogptError, which names the first byte that is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte {start + error.start} is 0x{content[error.start]:02x}"
        encoding = "UTF-16" if start + error.start == 0 and content[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        remedy = f"if it is {encoding}, iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt makes it one"
        raise PicogptError(f"{path} is not UTF-8 text: {wrong}; {remedy}") from error


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
        make_folder(folder)
        held = lock.acquire(timeout=0)
    except Timeout as error:
        raise PicogptError(f"another process is {what} in {folder}: wait for it, or use another folder") from error
    except OSError as error:
        raise PicogptError(f"cannot write in {folder}: {error.strerror or error}") from error
    with held:
        yield
