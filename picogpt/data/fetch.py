"""Downloads, each verified against its hash: the files of `config/assets.yaml`, and files on the Hugging Face hub."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from picogpt.config import AnySettings, GPT2Config, Settings, config_folder, parse, read_yaml
from picogpt.errors import PicogptError, Refused, Unreachable, UsageError, innermost
from picogpt.files import atomic_write, exclusive_lock, read_text, sha256_file

MIRROR_VARIABLE = "PICOGPT_MIRROR"
WEIGHTS_FILE = "model.safetensors"
ATTEMPTS = 4
TIMEOUT_S = (10.0, 30.0)  # to connect, and between two reads
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
REFUSALS = {
    401: "It wants a login: hf auth login, or HF_TOKEN.",
    403: "This login may not read it.",
    404: "This hub does not have it: is HF_ENDPOINT right?",
}
"""HTTP statuses that the hub would answer again, and what to do about them."""


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
    """A registered asset, small enough to be held in memory."""

    kind: Literal["corpus", "tokenizer", "task"]
    title: str
    licence: str
    addresses: tuple[str, ...] = ()
    archive: Archive | None = None


class Pretrained(Settings):
    """A checkpoint of OpenAI's on the hub."""

    repository: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    parameters: Literal["124M", "355M", "774M", "1558M"]

    def config(self) -> GPT2Config:
        """The model that the weights are for."""
        return GPT2Config(kind="gpt2", size=self.parameters)


class Answer(Settings):
    """The result of asking for one file: the `path` of a file that is here, else the `reason`."""

    state: Literal["here", "refused", "unreachable"]
    path: str | None = None
    reason: str | None = None


class HubStatus(Settings):
    """Which files could be had, from the hub above all, as a fetch rule leaves it for the rest of a workflow."""

    attempt: int = Field(ge=1)
    endpoint: str
    files: dict[str, Answer]


def read_registry(file: str, cls: type[AnySettings]) -> dict[str, AnySettings]:
    """The entries of a YAML file in `config/` by name."""
    path = config_folder() / file
    return {name: parse(cls, tree, f"{path}, {name}") for name, tree in read_yaml(path).items()}


@functools.cache
def registry() -> dict[str, Asset]:
    """All assets by name."""
    return read_registry("assets.yaml", Asset)


@functools.cache
def pretrained() -> dict[str, Pretrained]:
    """OpenAI's checkpoints by name: pretrained, pretrained-medium, pretrained-large, pretrained-xl."""
    return read_registry("pretrained.yaml", Pretrained)


def find(name: str) -> Asset:
    """The asset called `name`. Raises UsageError, listing the names, when there is none."""
    if name not in registry():
        raise UsageError(f"no asset is called {name!r}; there are: {', '.join(registry())}")
    return registry()[name]


def identify(sha256: str) -> str | None:
    """The name of the registered asset whose content has this hash."""
    return next((name for name, asset in registry().items() if asset.sha256 == sha256), None)


def is_whole(path: Path, file: File) -> bool:
    """Whether `path` holds exactly the registered bytes."""
    return path.is_file() and path.stat().st_size == file.size and sha256_file(path) == file.sha256


def require(path: Path, file: File, command: str) -> None:
    """Raises PicogptError unless `path` holds exactly the registered bytes, which `command` brings."""
    if not is_whole(path, file):
        found = f"has sha256 {sha256_file(path)}" if path.is_file() else "is not there"
        raise PicogptError(f"{path} {found}; {file.file} has sha256 {file.sha256}: {command} brings it")


def fetch(name: str, folder: str | Path, cached_only: bool = False) -> Path:
    """Download the asset `name` into `folder`; without any request if it is there already, or with `cached_only`.

    Raises Unreachable when no source answers, PicogptError when one serves other bytes.
    """
    import tarfile

    asset = find(name)
    target = Path(folder) / asset.file
    if is_whole(target, asset):
        return target
    if cached_only:
        raise Unreachable(f"{target} is not there, or is another file: picogpt fetch {name} brings it")
    with exclusive_lock(target.parent, f"fetching {name}", f".{target.name}.lock"):
        content = _download(asset.archive or asset)
        if archive := asset.archive:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                members = [tar.extractfile(archive.member.format(part)) for part in archive.parts]
                content = b"".join(member.read() for member in members if member)
            content = _verified(content, asset, archive.file)
        with atomic_write(target) as file:
            file.write(content)
    return target


def fetch_first(names: Sequence[str], folder: str | Path) -> tuple[str, Path]:
    """Download the first asset of `names` that is available into `folder`; return its name and path.

    Raises Unreachable, with the reason for each, when none is available.
    """
    reasons = []
    for name in names:
        try:
            return name, fetch(name, folder)
        except Unreachable as error:
            reasons.append(str(error))
            print(f"{name} cannot be had here", file=sys.stderr)
    raise Unreachable("\n".join(reasons))


def _download(file: Asset | Archive) -> bytes:
    """The content of `file` from the first source that answers."""
    reasons = []
    try:
        for address in _sources(file):
            try:
                return _verified(_receive(address, file), file, address)
            except Unreachable as error:
                reasons.append(f"{address}: {error}")
    except Unreachable as error:  # the package index
        reasons.append(str(error))
    advice = f"Give a folder or URL that has {file.file} in {MIRROR_VARIABLE}, or run again where a source answers."
    raise Unreachable(without_passwords("\n  ".join([f"cannot get {file.file}:", *reasons, advice])))


def _sources(file: Asset | Archive) -> Iterator[str]:
    """The paths and URLs to ask for `file`, in order: the mirror, then the registered ones, or the index that pip uses.

    Raises Unreachable when the index cannot be read.
    """
    if mirror := os.environ.get(MIRROR_VARIABLE):
        yield f"{mirror.rstrip('/')}/{file.file}"
    if isinstance(file, Asset):
        yield from file.addresses
        return
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple

    options = _pip_options()
    try:
        with PyPISimple(options.get("index-url", PYPI_SIMPLE_ENDPOINT)) as client:
            client.s.verify = options.get("cert") or True
            page = client.get_project_page(file.project, timeout=TIMEOUT_S)
    except (requests.RequestException, NoSuchProjectError) as error:
        raise Unreachable(f"the package index of pip: {innermost(error)}") from error
    yield from (package.url for package in page.packages if package.filename == file.file)


def _receive(address: str, file: File) -> bytes:
    """The content of a path, or of a URL up to one byte more than `file` has, which shows that it is another file."""
    import requests

    from picogpt.progress import transfer

    if "://" not in address:
        try:
            return Path(address).read_bytes()
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from error
    failure = ""
    for attempt in range(ATTEMPTS):
        time.sleep(0.5 * attempt)
        content = b""
        try:
            headers = {"Accept-Encoding": "identity"}  # the registered bytes, and no others
            with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
                response.raise_for_status()
                with transfer(file.file, file.size) as advance:
                    for chunk in response.iter_content(1 << 16):
                        content += chunk
                        advance(len(chunk))
                        if len(content) > file.size:  # a hostile server could send endlessly
                            break
                return content[: file.size + 1]
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 0)
            failure = f"HTTP status {status}" if status else innermost(error)
            if 0 < status < 500 or (isinstance(error, requests.ConnectionError) and not content):
                break
    raise Unreachable(failure)


def _verified(content: bytes, file: File, source: str) -> bytes:
    if (actual := hashlib.sha256(content).hexdigest()) != file.sha256:
        difference = f"sha256 {actual}, expected {file.sha256}. Nothing was kept."
        raise PicogptError(f"{without_passwords(source)} serves another file than {file.file}: {difference}")
    return content


def without_passwords(text: str) -> str:
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _pip_options() -> dict[str, str]:
    """The options that pip itself would use, by name; environment variables take precedence, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = [line.partition("=") for line in sorted(lines, key=lambda line: line.startswith(":env:"))]
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in pairs}


def endpoint() -> str:
    """The URL of the hub: $HF_ENDPOINT, or else Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def read_status(path: Path) -> HubStatus | None:
    """The status that a fetch rule left; None where there is no file. Raises PicogptError for any other content."""
    try:
        return HubStatus.model_validate_json(read_text(path)) if path.exists() else None
    except ValidationError as error:
        raise PicogptError(f"{path} does not say what the hub gave: delete it, and the next run writes it") from error


def fetch_pretrained(name: str, cached_only: bool = False) -> Path:
    """The safetensors file of `name` in the hub client's own cache. Raises like `obtain`."""
    entry, command = pretrained()[name], f"picogpt fetch {name}"
    return obtain(entry.repository, WEIGHTS_FILE, entry.revision, entry.sha256, command, "model", cached_only)


def obtain(
    repository: str, file: str, revision: str, sha256: str | None, command: str, repo_type: str, cached_only: bool
) -> Path:
    """A file of a repository on the hub, verified, in the cache of the hub's client; downloaded unless `cached_only`.

    Without `sha256` the hub's own hash must fit. `command` fetches the file, for messages; `repo_type` is "model" or
    "dataset".

    Raises Unreachable when the hub does not answer or does not provide it, PicogptError when it serves another file or
    the disk cannot take it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    names: Any = {"repo_id": repository, "filename": file, "repo_type": repo_type, "revision": revision}
    where, hub = f"{repository}/{file} at {revision[:12]}", without_passwords(endpoint())
    cached = try_to_load_from_cache(**names)
    if not isinstance(cached, str) and (cached_only or not _hub_answers()):  # the client would ask for 23 s
        remedy = f", and the hub ({hub}) cannot be reached: run {command} where it can, or set HF_ENDPOINT"
        remedy = f": {command} brings it" if cached_only else remedy
        raise Unreachable(f"{where} is not in the cache of the hub's client ({constants.HF_HUB_CACHE}){remedy}")
    try:
        # For a file that it has, the client would still ask the hub.
        path = Path(cached if isinstance(cached, str) else hf_hub_download(**names, endpoint=endpoint()))
        # The cache names a file by its hash; that may be a link itself, to a file that several repositories share.
        stored = path.parent / os.readlink(path) if path.is_symlink() else path
        if sha256 is None:
            url = hf_hub_url(**names, endpoint=endpoint())
            sha256 = stored.name if path.is_symlink() else str(get_hf_file_metadata(url).etag)
    except Exception as error:  # of the client, its transport or the disk: they have no class in common
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise PicogptError(f"cannot write {where} into the cache: {error.strerror}") from error
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(response, "status_code", 0)
        if status in REFUSALS:
            raise Refused(f"the hub ({hub}) answers {status} to {where}. {REFUSALS[status]}") from error
        reason = f"the hub ({hub}) answers {status}" if status >= 400 else innermost(error)
        raise Unreachable(f"cannot get {where}: {reason}; the same command tries again") from error
    if (actual := sha256_file(path)) != sha256:
        for name in (stored, path):
            name.unlink(missing_ok=True)
        difference = f"sha256 {actual}, expected {sha256}. Nothing was kept."
        raise PicogptError(f"the hub serves another file than {file} at the pinned revision: {difference}")
    return path


def _hub_answers() -> bool:
    """Whether the hub answers a request at all, whatever the answer."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return requests.head(endpoint(), timeout=5) is not None
    except requests.RequestException:
        return False
