"""Result records: numbers with all that is needed to know where they come from. One JSON file each."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import AwareDatetime, ConfigDict

from picogpt import __version__, hardware
from picogpt.config import Settings, parse
from picogpt.errors import PicogptError, UsageError
from picogpt.files import read_text, write_text

SCHEMA_VERSION = 2
HUB_UNREACHABLE = "hub unreachable"
"""Why a number of OpenAI's weights is missing."""
SOURCE = ("picogpt/", "config/", "profiles/", "workflow/", "Snakefile")
"""Where untracked files count as changes too."""
NOT_SOURCE = (":!results/reference", ":!media/reference")


class Key(NamedTuple):
    """What a record measures. Fields that do not apply are None."""

    task: str
    """train, ladder, evaluate, sampling, streams (sampling of many streams at once), weights or data."""
    model: str | None = None
    machine: str | None = None
    """Name in config/hardware/ of a distributed training or a training ladder."""
    rung: str | None = None
    dtype: str | None = None
    """float32, bfloat16 or int8: the data type of the weights, of evaluate and sampling."""

    def __str__(self) -> str:
        """The name in messages and, with underscores, of files: "train gpt2", "ladder cpu flash"."""
        if self.task == "streams":
            return f"sampling {self.model} streams"
        return " ".join(part for part in (self._replace(model=None) if self.task == "ladder" else self) if part)


Records = Mapping[Key, dict[str, Any]]


class Device(Settings):
    model_config = ConfigDict(extra="allow")

    name: str
    kind: str
    cores: int


class Record(Settings):
    """The parts that every record has; it may have more."""

    model_config = ConfigDict(extra="allow")

    task: str
    model: str | None = None
    machine: str | None = None
    rung: str | None = None
    dtype: str | None = None
    created: AwareDatetime
    device: Device
    software: dict[str, Any]
    commit: str | None
    dirty: bool | None
    corpus: dict[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]
    not_measured: str | None = None
    missing: dict[str, str] | None = None


NUMBERS = {
    "train": (
        "ranks", "config.train.seed", "results.parameters", "results.steps", "results.tokens", "results.epochs", "results.best_epoch",
        "results.best_val_loss", "results.tokens_per_second", "results.train_seconds",
    ),
    "ladder": (
        "config.hardware.batch_size", "config.hardware.block_size", "config.hardware.steps", "results.parameters",
        "results.tokens_per_second", "results.median", "results.fastest", "results.slowest", "results.final_loss", "results.peak_memory_bytes",
    ),
}  # fmt: skip
"""Numbers that the records of a task must have, except where nothing was measured."""


def key(record: Mapping[str, Any]) -> Key:
    """What a record measures, or a row of published.csv, where an empty text stands for None."""
    return Key(*(record.get(field) or None for field in Key._fields))  # type: ignore[arg-type]


def at(record: Any, path: str) -> Any:
    """The value at nested keys, joined by dots, as in "config.train.seed"; None if there is none."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


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


def unreachable(key: Key, reason: str) -> dict[str, Any]:
    """The record of what could not be measured because the hub did not answer."""
    empty: dict[str, Any] = {"corpus": {}, "config": {}, "results": {}}
    why = {"not_measured": HUB_UNREACHABLE, "reason": reason}
    return {**provenance(hardware.select("cpu")), **key._asdict(), **empty, **why}


def write(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record. Raises PicogptError when a required part is missing or the file cannot be written."""
    _check(record, path)
    write_text(path, json.dumps(record, indent=2) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Read a record; one of schema version 1 is converted to the current one.

    Raises PicogptError when it is not JSON, of another schema version, or lacks a part.
    """
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise PicogptError(f"{path} is not a result record: {error}") from error
    record = _upgraded(record)
    _check(record, path)
    return record


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line. Raises PicogptError naming the line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise PicogptError(f"{path}, line {number}: {error}") from error
    return rows


def _upgraded(record: Any) -> Any:
    """Version 1 named what a record measures by words, `kind`, and not by fields."""
    if not isinstance(record, dict) or record.get("schema_version") != 1:
        return record
    match str(record.get("kind")).split(" "):
        case ["train", model, *machine]:
            key = Key("train", model, " ".join(machine) or None)
        case ["ladder", *machine, rung]:
            key = Key("ladder", "gpt2", " ".join(machine), rung)
        case ["sampling", model, "streams"]:
            key = Key("streams", model)
        case ["evaluate" | "sampling" as task, model, dtype]:
            key = Key(task, model, dtype=dtype)
        case ["weights" | "data" as task]:
            key = Key(task)
        case _:
            return record
    return {"schema_version": SCHEMA_VERSION, **key._asdict()} | {
        name: value for name, value in record.items() if name not in ("schema_version", "kind")
    }


def _check(record: Any, path: str | Path) -> None:
    if not isinstance(record, dict):
        raise PicogptError(f"{path} is not a result record: it is no mapping")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise PicogptError(
            f"{path} has schema version {record.get('schema_version')} and this picogpt reads {SCHEMA_VERSION}:"
            " delete it and make it again (make report)"
        )
    try:
        parse(Record, record, f"{path} is not a complete result record")
    except UsageError as error:  # a damaged file is a failure, and no wrong request
        raise PicogptError(str(error)) from error
    numbers = () if record.get("not_measured") else NUMBERS.get(record["task"], ())
    if wrong := [number for number in numbers if not isinstance(at(record, number), int | float)]:
        raise PicogptError(f"{path} is not a complete result record: no number in {', '.join(wrong)}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
