"""Result records: numbers with all that is needed to know where they come from. One JSON file each."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from picogpt import __version__, hardware
from picogpt.errors import PicogptError
from picogpt.files import read_text, write_text

SCHEMA_VERSION = 2
HUB_UNREACHABLE = "hub unreachable"
"""Recorded where OpenAI's weights are not in the local cache."""
PARTS: dict[str, Any] = {
    "task": str, "model": str | None, "machine": str | None, "rung": str | None, "dtype": str | None, "streams": str | None,
    "device.name": str, "device.kind": str, "device.cores": int, "software": dict, "commit": str | None, "dirty": bool | None,
    "corpus": dict, "config": dict, "results": dict, "not_measured": str | None, "missing": dict | None,
}  # fmt: skip
"""Required type of each part, nested keys joined by dots; a part whose type includes None may be absent."""
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
"""Numbers that a record of the task must also have, unless it has `not_measured`."""


class Key(NamedTuple):
    """What a record measures. Fields that do not apply are None."""

    task: str
    """train, ladder, evaluate, hellaswag, sampling, streams (sampling of many streams at once), weights or data."""
    model: str | None = None
    machine: str | None = None
    """Name in config/hardware/ of a distributed training or a training ladder."""
    rung: str | None = None
    dtype: str | None = None
    """float32, bfloat16 or int8: the data type of the weights, of evaluate, hellaswag and sampling."""
    streams: str | None = None
    """How many are sampled at once, of streams; None in older records."""

    def __str__(self) -> str:
        """The name in messages and, with underscores, of files: "train gpt2", "ladder cpu flash"."""
        if self.task == "streams":
            return " ".join(filter(None, ("sampling", self.model, self.streams, "streams")))
        return " ".join(part for part in (self._replace(model=None) if self.task == "ladder" else self) if part)


BITS_PER_BYTE = "of the lowest val loss: nats per token * corpus.val_tokens / (corpus.val_bytes * ln 2)"
"""The unit of `val_bits_per_byte` in results."""
Records = Mapping[Key, dict[str, Any]]


def key(record: Mapping[str, Any]) -> Key:
    """What a record measures, or a row of published.csv, where an empty text stands for None."""
    return Key(*(record.get(field) or None for field in Key._fields))  # type: ignore[arg-type]


def at(record: Any, path: str) -> Any:
    """The value at nested keys and indexes, joined by dots, as in "config.train.betas.0"; None if there is none."""
    for part in path.split("."):
        if isinstance(record, list):
            record = {str(index): item for index, item in enumerate(record)}
        record = record.get(part) if isinstance(record, dict) else None
    return record


def bits_per_byte(loss: float, corpus: Mapping[str, Any]) -> float | None:
    """A loss in nats per token as bits per byte of the validation text, in which models of any tokens compare.

    None where the size of the text is not known.
    """
    size = corpus.get("val_bytes")
    return loss * corpus["val_tokens"] / size / math.log(2) if size else None


def provenance(device: hardware.Device) -> dict[str, Any]:
    """Where the numbers of a record come from: time, device, driver, library versions, commit."""
    source, dirty = commit()
    packages = ("torch", "triton", "numpy")
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
            **{name: next((found.version for found in distributions(name=name)), None) for name in packages},
            "cudnn": hardware.cudnn_version() if device.type == "cuda" else None,
        },
        "commit": source,
        "dirty": dirty,
    }


def commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether files differ from it; (None, None) outside a git checkout.

    The reference records are results, not source: they may differ. Untracked files make the tree dirty only in source folders.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        # With --git-dir, an installed package never tells the commit of a repository around it.
        # And status does not write to the index, which would lock it for a commit that the user makes at the same time.
        command = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!results/reference", ":!media/reference")
        source = ("picogpt", "config", "profiles", "workflow", "Snakefile")
        unknown = git("ls-files", "--others", "--exclude-standard", "--", *source)
        return git("rev-parse", "HEAD"), bool(changed or unknown)
    except (OSError, subprocess.SubprocessError):
        return None, None


def not_measured(key: Key, why: str, device: hardware.Device) -> dict[str, Any]:
    """The record of what this device does not measure, and why."""
    nothing = {"corpus": {}, "config": {}, "results": {}, "not_measured": why}
    return {**provenance(device), **key._asdict(), **nothing}


def unreachable(key: Key, reason: str, why: str = HUB_UNREACHABLE) -> dict[str, Any]:
    """The record of what could not be measured because a file could not be had; `reason` is the whole message."""
    return not_measured(key, why, hardware.select("cpu")) | {"reason": reason}


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
        if not isinstance(record, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError) as error:
        raise PicogptError(f"{path} is not a result record: {error}") from error
    if record.get("schema_version") == 1:
        _upgrade(record)
    _check(record, path)
    return record


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line. Raises PicogptError naming the first line that is not a JSON object."""
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise PicogptError(f"{path}, line {number}: {error}") from error
    return rows


def _upgrade(record: dict[str, Any]) -> None:
    """Version 1 named what a record measures by words, `kind`, and not by fields."""
    match str(record.pop("kind", None)).split(" "):
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
            return
    record |= {"schema_version": SCHEMA_VERSION, **key._asdict()}


def _check(record: dict[str, Any], path: str | Path) -> None:
    if (schema := record.get("schema_version")) != SCHEMA_VERSION:
        wanted = f"this picogpt reads {SCHEMA_VERSION}: delete it and make it again (make report)"
        raise PicogptError(f"{path} has schema version {schema} and {wanted}")
    wrong = [part for part in ("commit", "dirty") if part not in record]  # None means: no git checkout
    wrong += [part for part, wanted in PARTS.items() if not isinstance(at(record, part), wanted)]
    if not wrong and not record.get("not_measured"):
        wrong = [part for part in NUMBERS.get(record["task"], ()) if not isinstance(at(record, part), int | float)]
    try:
        datetime.fromisoformat(str(record.get("created")))
    except ValueError:
        wrong.append("created")
    if wrong:
        told = ", ".join(f"{part}={json.dumps(at(record, part), default=str)}" for part in wrong)
        raise PicogptError(f"{path} is not a complete result record, its values are missing or of a wrong type: {told}")
