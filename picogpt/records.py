"""Result records: numbers with all that is needed to know where they come from. One JSON file each."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from picogpt import __version__, hardware
from picogpt.errors import PicogptError
from picogpt.files import read_text, write_text

SCHEMA_VERSION = 1
HUB_UNREACHABLE = "hub unreachable"
"""Why a number of OpenAI's weights is missing."""
SOURCE = ("picogpt/", "config/", "profiles/", "workflow/", "Snakefile")
"""Where a file counts also that git does not know."""
NOT_SOURCE = (":!results/reference", ":!media/reference")
REQUIRED = ("schema_version", "kind", "created", "device", "software", "commit", "dirty", "corpus", "config", "results")


def provenance(device: hardware.Device) -> dict[str, Any]:
    """What the numbers of a record stand on: time, device, driver, library versions, commit."""
    source, dirty = commit()
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {
            "name": device.name,
            "kind": device.type,
            "dtype": device.dtype,
            "driver": hardware.driver_version() if device.type == "cuda" else None,
            "cores": hardware.cpu_count(),
            "instructions": hardware.cpu_instructions(),
            "memory_bytes": hardware.memory_bytes(),
        },
        "software": {
            "picogpt": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            **{name: _version(name) for name in ("torch", "triton", "numpy")},
            "cudnn": hardware.cudnn_version() if device.type == "cuda" else None,
        },
        "commit": source,
        "dirty": dirty,
    }


def unreachable(kind: str, reason: str) -> dict[str, Any]:
    """The record of what could not be measured because the hub did not answer."""
    return {
        **provenance(hardware.select("cpu")),
        "kind": kind,
        "corpus": {},
        "config": {},
        "not_measured": HUB_UNREACHABLE,
        "reason": reason,
        "results": {},
    }


def write(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record. Raises PicogptError when a required part is missing or the file cannot be written."""
    _check(record, str(path))
    write_text(path, json.dumps(record, indent=2) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises PicogptError when it is not JSON, of another schema version, or lacks a part."""
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise PicogptError(f"{path} is not a result record: {error}") from error
    _check(record, str(path))
    return record


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line. Raises PicogptError naming the line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise PicogptError(f"{path}, line {number}: {error}") from error
    return rows


def _check(record: Any, path: str) -> None:
    missing = [key for key in REQUIRED if not isinstance(record, dict) or key not in record]
    if missing:
        raise PicogptError(f"{path} is not a complete result record: {', '.join(missing)} missing")
    wrong = [key for key in ("device", "software", "corpus", "config", "results") if not isinstance(record[key], dict)]
    if wrong:
        raise PicogptError(f"{path} is not a result record: {', '.join(wrong)} must be mappings")
    if record["schema_version"] != SCHEMA_VERSION:
        raise PicogptError(
            f"{path} has schema version {record['schema_version']} and this picogpt reads {SCHEMA_VERSION}:"
            " delete it and make it again (make report)"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether files differ from it; (None, None) outside a git checkout.

    The reference records are results, not source: they may differ. Nor do files outside SOURCE count that git does not know.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *NOT_SOURCE).splitlines()
        # An unknown file is told as `?? picogpt/new.py`; a name with odd characters has quotes around it.
        dirty = any(not line.startswith("??") or line[3:].strip('"').startswith(SOURCE) for line in changed)
        return git("rev-parse", "HEAD"), dirty
    except (OSError, subprocess.SubprocessError):
        return None, None
