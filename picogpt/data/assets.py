"""Files from outside: downloaded once, from a mirror, a URL or a package index, and verified.

The registry is `config/assets.yaml`.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import requests
import urllib3
from pydantic import Field

from picogpt.config import Settings, config_folder, parse, read_yaml
from picogpt.errors import PicogptError, Unreachable, UsageError, innermost
from picogpt.files import exclusive_lock, sha256_file
from picogpt.progress import transfer

MIRROR_VARIABLE = "PICOGPT_MIRROR"
ATTEMPTS = 4
TIMEOUT_S = (10.0, 30.0)
CHUNK_BYTES = 1 << 16


class File(Settings):
    """A registered file with its size and hash."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    size: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Archive(File):
    """A source distribution on a Python package index, and its members that make up an asset."""

    project: str
    member: str
    parts: list[str]


class Asset(File):
    """A registered asset."""

    kind: Literal["corpus", "tokenizer"]
    title: str
    licence: str
    addresses: tuple[str, ...] = ()
    archive: Archive | None = None


@functools.cache
def registry() -> dict[str, Asset]:
    """All assets by name."""
    path = config_folder() / "assets.yaml"
    return {name: parse(Asset, tree, f"{path}, {name}") for name, tree in read_yaml(path).items()}


def find(name: str) -> Asset:
    """The asset called `name`. Raises UsageError, listing the names, when there is none."""
    try:
        return registry()[name]
    except KeyError:
        raise UsageError(f"no asset is called {name!r}; there are: {', '.join(registry())}") from None


def identify(sha256: str) -> str | None:
    """The name of the registered asset whose content has this hash."""
    return next((name for name, asset in registry().items() if asset.sha256 == sha256), None)


def fetch(name: str, folder: str | Path) -> Path:
    """Download the asset `name` into `folder`; without any request if it is there already.

    Raises Unreachable when no source answers, PicogptError when one serves other bytes.
    """
    asset = find(name)
    target = Path(folder) / asset.file
    if is_whole(target, asset):
        return target
    with exclusive_lock(target.parent, f"fetching {name}", f".{target.name}.lock"):
        if asset.archive is None:
            _obtain(asset, target, lambda: asset.addresses)
        else:
            _build(asset, asset.archive, target)
    return target


def fetch_first(names: Sequence[str], folder: str | Path) -> tuple[str, Path]:
    """Download the first asset of `names` that is available into `folder`; return its name and path.

    Raises Unreachable, with the reason for each, when none can be had.
    """
    reasons = []
    for name in names:
        try:
            return name, fetch(name, folder)
        except Unreachable as error:
            reasons.append(str(error))
            print(f"{name} cannot be had here, trying the next", file=sys.stderr)
    raise Unreachable("\n".join(reasons))


def is_whole(path: Path, file: File) -> bool:
    """Whether `path` holds exactly the registered bytes."""
    return path.is_file() and path.stat().st_size == file.size and sha256_file(path) == file.sha256


def _obtain(file: File, target: Path, addresses: Callable[[], Sequence[str]]) -> None:
    reasons: list[str] = []
    for address in _sources(file, addresses, reasons):
        try:
            if "://" in address:
                _download(address, file, target)
            else:
                _copy(Path(address), file, target)
            return
        except Unreachable as error:
            reasons.append(f"{_without_password(address)}: {error}")
    raise Unreachable(
        "\n  ".join([f"cannot get {file.file}:", *reasons])
        + f"\n  Give a folder or an address that has {file.file} in {MIRROR_VARIABLE}, or run again where a source answers."
    )


def _sources(file: File, addresses: Callable[[], Sequence[str]], reasons: list[str]) -> Iterator[str]:
    mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror:
        yield f"{mirror.rstrip('/')}/{file.file}"
    try:
        yield from addresses()
    except Unreachable as error:
        reasons.append(str(error))


def _copy(source: Path, file: File, target: Path) -> None:
    try:
        incoming = open(source, "rb")
    except OSError as error:
        raise Unreachable(error.strerror or str(error)) from error
    with incoming, _incoming(target).open("wb") as outgoing:
        # One byte more than the expected size is enough to know that the file differs.
        outgoing.write(incoming.read(file.size + 1))
    _accept(str(source), file, target)


def _download(address: str, file: File, target: Path) -> None:
    part = _incoming(target)
    failure = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.25 * 2**attempt)
        try:
            resumed = part.exists()
            _receive(address, file, part)
            if (
                resumed and sha256_file(part) != file.sha256
            ):  # the part kept from before may be damaged: download once from the start
                part.unlink()
                _receive(address, file, part)
            return _accept(address, file, target)
        except requests.HTTPError as error:
            failure = f"HTTP status {error.response.status_code}"
            if error.response.status_code < 500:
                break
        except requests.ConnectionError as error:
            failure = f"no connection ({innermost(error)})"
            # Retry a host that closed the connection halfway, not one that cannot be reached at all.
            if not part.exists() or part.stat().st_size == 0:
                break
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            failure = innermost(error)
    kept = part.stat().st_size if part.exists() else 0
    if kept:
        failure += f"; {kept:,} of {file.size:,} bytes are kept, and the next run continues from there"
    raise Unreachable(failure)


def _receive(address: str, file: File, part: Path) -> None:
    """Download the rest of `file` and append it to `part`. Raises the errors of requests and urllib3."""
    have = part.stat().st_size if part.exists() else 0
    if have >= file.size:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        # A server that ignores Range sends the whole file again.
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
        with open(part, "ab" if resumed else "wb") as out, transfer(file.file, total=file.size) as advance:
            # Not iter_content, which buffers, and loses, what arrived just before the connection closed.
            for chunk in iter(lambda: response.raw.read1(CHUNK_BYTES), b""):
                # A hostile server could send endlessly.
                chunk = chunk[: file.size + 1 - have]
                out.write(chunk)
                have += len(chunk)
                advance(len(chunk))
                if have > file.size:
                    break
    if have < file.size:
        raise requests.ConnectionError(f"the server closed the connection after {have:,} of {file.size:,} bytes")


def _accept(source: str, file: File, target: Path) -> None:
    """Rename the downloaded file to its final name if its hash is right, else delete it."""
    part = _incoming(target)
    actual, size = sha256_file(part), part.stat().st_size
    if actual != file.sha256:
        part.unlink()
        raise PicogptError(
            f"{_without_password(source)} serves another file than {file.file}: sha256 {actual} ({size:,} bytes read),"
            f" expected {file.sha256} ({file.size:,} bytes). Nothing was kept."
        )
    os.replace(part, target)


def _without_password(address: str) -> str:
    """The URL without credentials, for logs."""
    return re.sub(r"(?<=://)[^/@]*@", "", address)


def _incoming(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _build(asset: Asset, archive: Archive, target: Path) -> None:
    """Download the archive, write its members one after another into `target`, and delete it."""
    path = target.parent / archive.file
    if not is_whole(path, archive):
        _obtain(archive, path, lambda: _index_addresses(archive))
    with tarfile.open(path) as tar, open(_incoming(target), "wb") as out:
        for part in archive.parts:
            member = tar.extractfile(archive.member.format(part))
            assert member is not None  # the archive's hash is pinned, so its members are known
            out.write(member.read())
    _accept(str(path), asset, target)
    path.unlink()


def _index_addresses(archive: Archive) -> list[str]:
    """The URL of the archive on the package index that pip is configured with. Raises Unreachable."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple

    options = _pip_options()
    endpoint = options.get("index-url", PYPI_SIMPLE_ENDPOINT)
    try:
        with PyPISimple(endpoint) as client:
            if options.get("cert"):
                client.s.verify = options["cert"]
            page = client.get_project_page(archive.project, timeout=TIMEOUT_S)
    except (requests.RequestException, NoSuchProjectError) as error:
        raise Unreachable(f"the package index of pip: {innermost(error)}") from error
    return [package.url for package in page.packages if package.filename == archive.file]


def _pip_options() -> dict[str, str]:
    """The options that pip itself would use, by name; environment variables take precedence, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    options: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        options[key.rpartition(".")[2]] = value.strip("'\"")
    return options
