"""Files on the Hugging Face hub, and OpenAI's checkpoints among them: bringing them here. Needs no torch."""

from __future__ import annotations

import errno
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from picogpt.config import GPT2Config, Settings, config_folder, parse, read_yaml
from picogpt.errors import PicogptError, Refused, Unreachable, innermost
from picogpt.files import read_text, sha256_file, write_text

FILE = "model.safetensors"
HUB_TIMEOUT_S = 5
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
"""Packages that bring bytes for the client, of its versions; their errors are not all OSErrors."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the hub, at a commit."""

    repository: str
    file: str
    revision: str
    sha256: str | None
    """None: the one that the hub names for that commit."""
    command: str
    """What fetches it, for messages."""
    kind: Literal["model", "dataset"] = "model"
    """Of the repository."""


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
        """The model it is for."""
        return GPT2Config(kind="gpt2", n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)

    def weights(self, name: str) -> HubFile:
        """Its safetensors file; `name` is its own in the registry."""
        return HubFile(self.repository, FILE, self.revision, self.sha256, f"picogpt fetch {name}")


class Answer(Settings):
    """What the hub said to the request for one file."""

    state: Literal["here", "refused", "unreachable"]
    path: str | None = None
    """Of a file that is here."""
    reason: str | None = None
    """Why it is not here."""


class HubStatus(Settings):
    """What the hub gave, as a fetch rule leaves it for the rest of a workflow."""

    attempt: int = Field(ge=1)
    endpoint: str
    files: dict[str, Answer]


@functools.cache
def registry() -> dict[str, Pretrained]:
    """All of them by name: pretrained, pretrained-medium, pretrained-large, pretrained-xl."""
    path = config_folder() / "pretrained.yaml"
    return {name: parse(Pretrained, tree, f"{path}, {name}") for name, tree in read_yaml(path).items()}


def fetch(name: str, cached_only: bool = False) -> Path:
    """The safetensors file of `name` in the hub client's own cache. Raises as `obtain`."""
    return obtain(registry()[name].weights(name), cached_only)


def endpoint() -> str:
    """Address of the hub: $HF_ENDPOINT, or else Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def write_status(path: Path, status: HubStatus) -> None:
    """Write what the hub gave."""
    write_text(path, status.model_dump_json(indent=2) + "\n")


def read_status(path: Path) -> HubStatus | None:
    """What `write_status` wrote; None where there is no such file. Raises PicogptError when it holds something else."""
    if not path.exists():
        return None
    try:
        return HubStatus.model_validate_json(read_text(path))
    except ValidationError as error:
        raise PicogptError(
            f"{path} does not say what the hub gave: delete it, and the next run writes it again"
        ) from error


def obtain(wanted: HubFile, cached_only: bool = False) -> Path:
    """A file of the hub in the hub client's own cache; fetched and verified where need be.

    With `cached_only` nobody is asked for it.

    Raises Unreachable when the hub does not answer, or answers that it does not give it; PicogptError when it serves
    another file, or the disk takes none.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    where = f"{wanted.repository}/{wanted.file} at {wanted.revision[:12]}"
    nobody = (
        f"cannot get {where}: the hub ({endpoint()}) cannot be reached and the file is not in its cache"
        f" ({constants.HF_HUB_CACHE}). Run {wanted.command} where it can, or set HF_ENDPOINT to a mirror."
    )
    cached = _cached(wanted)
    if cached is None:
        if cached_only:
            raise Unreachable(
                f"{where} is not in the cache of the hub's client ({constants.HF_HUB_CACHE}): {wanted.command} brings it"
            )
        if not answers():  # the client would ask again and again, for 23 s
            raise Unreachable(nobody)
    try:
        # The client would ask the hub of other things even for a file that it has.
        path = cached or Path(
            hf_hub_download(
                wanted.repository,
                wanted.file,
                repo_type=wanted.kind,
                revision=wanted.revision,
                endpoint=endpoint(),
            )
        )
        expected = wanted.sha256 or _named_hash(path, wanted)
    except (errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        status = _status(error)
        if status is None:
            raise Unreachable(f"{nobody} [{innermost(error)}]") from error
        hints = {
            401: " It wants a login: hf auth login, or HF_TOKEN.",
            403: " This login may not read it.",
            404: " This hub does not have it: is HF_ENDPOINT right?",
        }
        message = f"the hub ({endpoint()}) answers {status} to {where}.{hints.get(status, '')}"
        raise (Refused if status in hints else Unreachable)(message) from error
    except Exception as error:
        # The disk is full, or the connection broke for good; Xet's errors are plain RuntimeErrors.
        if isinstance(error, OSError) and error.errno in DISK:
            raise PicogptError(f"cannot write {where} into the cache: {error.strerror}") from error
        transport = type(error).__module__.partition(".")[0] in TRANSPORTS
        if not (transport or isinstance(error, OSError) or type(error) is RuntimeError):
            raise
        raise Unreachable(f"cannot get {where}: {innermost(error)}; the same command tries again") from error
    _verify(path, wanted, expected)
    return path


def _cached(wanted: HubFile) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(wanted.repository, wanted.file, revision=wanted.revision, repo_type=wanted.kind)
    return Path(path) if isinstance(path, str) else None


def answers() -> bool:
    """Whether anybody answers at the address of the hub, whatever the answer."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(endpoint(), timeout=HUB_TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of the client or in what caused it; None where there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status >= 400:
            return status
        error = error.__cause__ or error.__context__
    return None


def _named_hash(path: Path, wanted: HubFile) -> str:
    """The hash that the hub names for the file: the cache calls the file by it, where the file system has links."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    name = _stored(path).name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    url = hf_hub_url(
        wanted.repository, wanted.file, repo_type=wanted.kind, revision=wanted.revision, endpoint=endpoint()
    )
    return str(get_hf_file_metadata(url).etag)


def _stored(path: Path) -> Path:
    """What a name in the cache links to; one link further may lie what several repositories share, under another name."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _verify(path: Path, wanted: HubFile, expected: str) -> None:
    """Raises PicogptError, and drops the file, when it has another hash than the expected one."""
    actual = sha256_file(path)
    if actual != expected:
        _stored(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise PicogptError(
            f"the hub serves another file than {wanted.file} at the pinned revision: sha256 {actual}, expected {expected}."
            " Nothing was kept."
        )
