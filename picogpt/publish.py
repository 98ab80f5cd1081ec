"""Publishing an exported folder on the Hugging Face hub, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from picogpt.data import fetch
from picogpt.errors import PicogptError, UsageError, innermost

LOGIN = "hf auth login, or HF_TOKEN with a token that may write"
REFUSALS = {
    401: f"it does not know this login: {LOGIN}",
    403: "this login may not write there, as it is another's, or the token may only read",
    404: "it has no such place; is HF_ENDPOINT right?",
}
"""HTTP statuses that the hub would answer again, and why."""


def check(name: str) -> None:
    """Raises UsageError when `name` is no USER/NAME, PicogptError when nobody is logged in. Asks no hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the user, or the organization, must stand before a /")
    except HFValidationError as error:
        raise UsageError(f"--push {name!r} is not a repository as USER/NAME: {error}") from error
    if not get_token():
        raise PicogptError(f"cannot push to {name}, as nobody is logged in: {LOGIN}")


def push(folder: Path, name: str, private: bool) -> str:
    """Publish the files of `folder` as the repository `name`, which is made where it is not there; returns its URL.

    In one commit, so that the repository has all of them or none. What arrived before a failure is not sent again. Other
    files that the repository has stay.

    Raises PicogptError, saying what is on the hub now, when that fails, or when `private` and the repository is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # of each attempt; what comes of them is told here
    hub, before = fetch.endpoint(), None
    api = HfApi(endpoint=hub)
    failed = f"cannot push {folder} to {name} on the hub ({fetch.without_passwords(hub)})"
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        before = api.repo_info(name)
        if not private or before.private:
            # Not upload_folder, which may make several commits.
            api.create_commit(
                name, [CommitOperationAdd(path.name, path) for path in files], commit_message="Export of picogpt"
            )
            return str(url)
    except Exception as error:  # of the client, its transport or the store: they have no class in common
        status = _status(error)
        reason = str(error) if isinstance(error, ValueError) else innermost(error)
        reason = " ".join(REFUSALS.get(status, f"{status or ''} {reason}").split()).rstrip(".")
        again = "" if status in REFUSALS else " The same command tries again."
        raise PicogptError(f"{failed}: {reason}. {_now(api, name, before)}{again}") from error
    raise PicogptError(f"{failed}: it is there already, and public: leave out --private, or choose another name")


def _now(api: Any, name: str, before: Any) -> str:
    """What is on the hub after a failure."""
    if before is None:
        return "Nothing was published."
    try:
        unchanged = api.repo_info(name).sha == before.sha
    except Exception:  # as above
        return f"{name} is there; whether the files are in it cannot be asked now."
    return f"{name} is there, without these files." if unchanged else f"{name} is there, with a new commit."


def _status(error: BaseException | None) -> int:
    """The HTTP status in a chain of errors; 0 where there is none."""
    while error:
        if status := getattr(getattr(error, "response", None), "status_code", 0):
            return status
        error = error.__cause__ or error.__context__
    return 0
