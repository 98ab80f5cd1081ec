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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from picogpt.config import AnySettings, GPT2Config, Settings, config_folder, parse, read_yaml
from picogpt.errors import PicogptError, Refused, Unreachable, UsageError, innermost
from picogpt.files import atomic_write, exclusive_lock, read_text, sha256_file, write_text

MIRROR_VARIABLE = "PICOGPT_MIRROR"
WEIGHTS_FILE = "model.safetensors"
ATTEMPTS = 4
TIMEOUT_S = (10.0, 30.0)
"""To connect, and between two reads."""
HUB_TIMEOUT_S = 5
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

    kind: Literal["corpus", "tokenizer"]
    title: str
    licence: str
    addresses: tuple[str, ...] = ()
    archive: Archive | None = None


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the hub, at a commit."""

    repository: str
    file: str
    revision: str
    sha256: str | None
    """None: the one that the hub names for that commit."""
    command: str
    """The command that fetches it, for messages."""
    repo_type: Literal["model", "dataset"] = "model"

    def location(self) -> dict[str, Any]:
        """The arguments by which functions of the hub's client take a file."""
        names = {"repo_id": self.repository, "filename": self.file}
        return {**names, "repo_type": self.repo_type, "revision": self.revision}


class Pretrained(Settings):
    """A checkpoint of OpenAI's on the hub."""

    repository: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    parameters: str
    n_layer: int
    n_head: int
    n_embd: int

    def config(self) -> GPT2Config:
        """The model that the weights are for."""
        return GPT2Config(kind="gpt2", n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)

    def weights(self, name: str) -> HubFile:
        """Its safetensors file; `name` is its own in the registry."""
        return HubFile(self.repository, WEIGHTS_FILE, self.revision, self.sha256, f"picogpt fetch {name}")


class Answer(Settings):
    """The result of asking the hub for one file: the `path` of a file that is here, else the `reason`."""

    state: Literal["here", "refused", "unreachable"]
    path: str | None = None
    reason: str | None = None


class HubStatus(Settings):
    """Which files the hub provided, as a fetch rule leaves it for the rest of a workflow."""

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


def fetch(name: str, folder: str | Path) -> Path:
    """Download the asset `name` into `folder`; without any request if it is there already.

    Raises Unreachable when no source answers, PicogptError when one serves other bytes.
    """
    asset = find(name)
    target = Path(folder) / asset.file
    if is_whole(target, asset):
        return target
    with exclusive_lock(target.parent, f"fetching {name}", f".{target.name}.lock"):
        content = _extract(asset, asset.archive) if asset.archive else _download(asset)
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
            print(f"{name} cannot be had here, trying the next", file=sys.stderr)
    raise Unreachable("\n".join(reasons))


def _extract(asset: Asset, archive: Archive) -> bytes:
    """The members of the archive, one after another."""
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(_download(archive))) as tar:
        members = [tar.extractfile(archive.member.format(part)) for part in archive.parts]
        return _verified(b"".join(member.read() for member in members if member), asset, archive.file)


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
    raise Unreachable(_without_passwords("\n  ".join([f"cannot get {file.file}:", *reasons, advice])))


def _sources(file: Asset | Archive) -> Iterator[str]:
    """The paths and URLs to ask for `file`, in order. Raises Unreachable when the package index cannot be read."""
    if mirror := os.environ.get(MIRROR_VARIABLE):
        yield f"{mirror.rstrip('/')}/{file.file}"
    yield from _index_addresses(file) if isinstance(file, Archive) else file.addresses


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
            status = None if error.response is None else error.response.status_code
            failure = f"HTTP status {status}" if status else innermost(error)
            unreachable = isinstance(error, requests.ConnectionError) and not content
            if unreachable or (status and status < 500):
                break
    raise Unreachable(failure)


def _verified(content: bytes, file: File, source: str) -> bytes:
    actual = hashlib.sha256(content).hexdigest()
    if actual != file.sha256:
        raise PicogptError(
            f"{_without_passwords(source)} serves another file than {file.file}: sha256 {actual} ({len(content):,} bytes"
            f" read), expected {file.sha256} ({file.size:,} bytes). Nothing was kept."
        )
    return content


def _without_passwords(text: str) -> str:
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _index_addresses(archive: Archive) -> list[str]:
    """The URL of the archive on the package index that pip is configured with. Raises Unreachable."""
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple

    options = _pip_options()
    try:
        with PyPISimple(options.get("index-url", PYPI_SIMPLE_ENDPOINT)) as client:
            client.s.verify = options.get("cert") or True
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
    pairs = [line.partition("=") for line in sorted(lines, key=lambda line: line.startswith(":env:"))]
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in pairs}


def endpoint() -> str:
    """The URL of the hub: $HF_ENDPOINT, or else Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def write_status(path: Path, status: HubStatus) -> None:
    """Write which files the hub provided."""
    write_text(path, status.model_dump_json(indent=2) + "\n")


def read_status(path: Path) -> HubStatus | None:
    """Read what `write_status` wrote; None where there is no such file. Raises PicogptError for any other content."""
    try:
        return HubStatus.model_validate_json(read_text(path)) if path.exists() else None
    except ValidationError as error:
        raise PicogptError(
            f"{path} does not say what the hub gave: delete it, and the next run writes it again"
        ) from error


def fetch_pretrained(name: str, cached_only: bool = False) -> Path:
    """The safetensors file of `name` in the hub client's own cache. Raises like `obtain`."""
    return obtain(pretrained()[name].weights(name), cached_only)


def obtain(wanted: HubFile, cached_only: bool = False) -> Path:
    """A file of the hub in the cache of the hub's client, verified. Unless `cached_only`, it is downloaded if missing.

    Raises Unreachable when the hub does not answer or does not provide it, PicogptError when it serves another file or
    the disk cannot take it.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = f"{wanted.repository}/{wanted.file} at {wanted.revision[:12]}"
    cached = try_to_load_from_cache(**wanted.location())
    here = isinstance(cached, str)
    if not here and (cached_only or not _hub_answers()):  # the client would ask again and again, for 23 s
        remedy = f": {wanted.command} brings it"
        if not cached_only:
            hub = _without_passwords(endpoint())
            remedy = f", and the hub ({hub}) cannot be reached: run {wanted.command} where it can, or set HF_ENDPOINT"
        raise Unreachable(f"{where} is not in the cache of the hub's client ({constants.HF_HUB_CACHE}){remedy}")
    try:
        # For a file that it has, the client would still ask the hub.
        path = Path(str(cached) if here else hf_hub_download(**wanted.location(), endpoint=endpoint()))
        expected = wanted.sha256 or _named_hash(path, wanted)
    except Exception as error:  # of the client, its transport or the disk: they have no class in common
        raise _explained(error, where) from error
    if (actual := sha256_file(path)) != expected:
        _stored(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise PicogptError(
            f"the hub serves another file than {wanted.file} at the pinned revision: sha256 {actual}, expected {expected}."
            " Nothing was kept."
        )
    return path


def _explained(error: Exception, where: str) -> PicogptError:
    """The error that says what an error of the hub's client means for the user."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return PicogptError(f"cannot write {where} into the cache: {error.strerror}")
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", 0)
    if status < 400:
        return Unreachable(f"cannot get {where}: {innermost(error)}; the same command tries again")
    answer = f"the hub ({_without_passwords(endpoint())}) answers {status} to {where}."
    return Refused(f"{answer} {REFUSALS[status]}") if status in REFUSALS else Unreachable(answer)


def _hub_answers() -> bool:
    """Whether the hub answers a request at all, whatever the answer."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(endpoint(), timeout=HUB_TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def _named_hash(path: Path, wanted: HubFile) -> str:
    """The hash that the hub names for the file: the name of the file in the cache, where the file system has links."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if path.is_symlink():
        return _stored(path).name
    return str(get_hf_file_metadata(hf_hub_url(**wanted.location(), endpoint=endpoint())).etag)


def _stored(path: Path) -> Path:
    """The file that a name in the cache links to. It may be a link itself, to a file that several repositories share."""
    return path.parent / os.readlink(path) if path.is_symlink() else path
