"""Lists the trainings in weights/ with their progress, and compares two of them. Does not load torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime

from picogpt import records
from picogpt.config import Settings, parse
from picogpt.errors import PicogptError, UsageError

EXECUTION = ("commit", "dirty", "ranks", "threads", "micro_batch_size", "compiled")


class Run(Settings):
    """One training. Values that an unfinished run does not have yet are None."""

    folder: str
    name: str
    """RUN of weights/MODEL/RUN and of weights/gpt2/RUN/CORPUS."""
    model: str
    finished: bool
    corpus: str | None = None
    parameters: int | None = None
    steps: int | None = None
    """Steps done; of an unfinished run, those in its metrics."""
    epochs: float | None = None
    best_val_loss: float | None = None
    """In nats per token."""
    tokens_per_second: float | None = None
    train_seconds: float | None = None
    ranks: int | None = None
    device: str | None = None
    date: AwareDatetime
    """Date of the record; of an unfinished run, of the last line of its metrics."""


@dataclass(frozen=True)
class Difference:
    """A value that differs between two records; None if a record has none."""

    section: str
    key: str
    first: Any
    second: Any

    @property
    def amount(self) -> float | None:
        """By how much the second number is larger; None where they are not numbers."""
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (self.first, self.second)):
            return self.second - self.first
        return None


def folders(weights: Path, model: str | None = None) -> list[Path]:
    """Folders that hold a training, finished or not: weights/MODEL/RUN, for gpt2 weights/gpt2/RUN/CORPUS."""
    top = model.replace("-", "_") if model else "*"
    marks = (f"{top}/{run}/{mark}" for run in ("*", "*/*") for mark in ("record.json", "checkpoints"))
    return sorted({path.parent for pattern in marks for path in weights.glob(pattern)})


def listed(weights: Path, model: str | None = None) -> tuple[list[Run], list[PicogptError]]:
    """All trainings in `weights`, newest first, and the errors of records that cannot be read."""
    runs, damaged = [], []
    for folder in folders(weights, model):
        try:
            runs.append(_finished(folder, weights) if (folder / "record.json").exists() else _begun(folder, weights))
        except PicogptError as error:
            damaged.append(error)
    return sorted(runs, key=lambda run: run.date, reverse=True), damaged


def find(name: str, weights: Path) -> Path:
    """The folder of a training: `name` is the folder, or RUN, as much of MODEL/RUN/CORPUS around it as is needed.

    Raises UsageError, listing what there is, when it names none or several.
    """
    if any((Path(name) / mark).exists() for mark in ("record.json", "checkpoints")):
        return Path(name)
    here = folders(weights)
    if not here:
        raise UsageError(f"no training is in {weights}/: picogpt train makes one")
    found = [folder for folder in here if _is_called(name, folder.relative_to(weights).parts)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(folder.relative_to(weights)) for folder in found or here)
    raise UsageError(
        f"several runs are called {name}: {names}" if found else f"no run is called {name}; there are: {names}"
    )


def differences(first: Path, second: Path) -> list[Difference]:
    """All differences between the records of two trainings, except for their date.

    Raises PicogptError when one is not finished, or its record cannot be read.
    """
    left, right = (_sections(_record(folder)) for folder in (first, second))
    return [
        Difference(section, key, values.get(key), right[section].get(key))
        for section, values in left.items()
        for key in {**values, **right[section]}
        if values.get(key) != right[section].get(key)
    ]


def _is_called(name: str, parts: tuple[str, ...]) -> bool:
    """Whether `name` is RUN, RUN/CORPUS, MODEL/RUN or MODEL/RUN/CORPUS of a folder with these parts."""
    wanted = Path(name).parts
    return parts[1 : 1 + len(wanted)] == wanted or (len(wanted) > 1 and parts[: len(wanted)] == wanted)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    if not path.exists():
        raise PicogptError(f"{folder} is not finished: there is no {path.name} to compare")
    record = records.read(path)
    if not str(record["kind"]).startswith("train "):
        raise PicogptError(f"{path} is the record of {record['kind']!r}, not of a training")
    return record


def _sections(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record as flat groups of values."""
    return {
        "settings": dict(_flat(record["config"])),
        "corpus": dict(_flat(record["corpus"])),
        "device": dict(_flat(record["device"])),
        "software": dict(_flat(record["software"])),
        "execution": {key: record.get(key) for key in EXECUTION},
        "results": dict(_flat(record["results"])),
    }


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree with their keys joined by dots, as --set takes them."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)


def _finished(folder: Path, weights: Path) -> Run:
    """Raises PicogptError when the record cannot be read, or lacks a number."""
    record = _record(folder)
    values = {key: dict(_flat(record[key])) for key in ("results", "config", "corpus", "device")}
    results = ("parameters", "steps", "epochs", "best_val_loss", "tokens_per_second", "train_seconds")
    wanted = {
        "model": values["config"].get("model.kind"),
        "corpus": values["corpus"].get("name"),
        "device": values["device"].get("name"),
        "ranks": record.get("ranks"),
        "date": record["created"],
        **{key: values["results"].get(key) for key in results},
    }
    missing = [key for key, value in wanted.items() if value is None]
    if missing:
        raise PicogptError(
            f"{folder / 'record.json'} is not a complete record of a training: {', '.join(missing)} missing"
        )
    tree = {"folder": str(folder), "name": folder.relative_to(weights).parts[1], "finished": True, **wanted}
    return parse(Run, tree, str(folder / "record.json"))


def _begun(folder: Path, weights: Path) -> Run:
    """A run without a record, from its metrics. They may be being written, so the last line may be incomplete."""
    model, name, *corpus = folder.relative_to(weights).parts
    metrics = folder / "checkpoints/metrics.jsonl"
    rows = _whole_rows(metrics)
    last = {key: value for row in rows for key, value in row.items()}
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    changed = (metrics if metrics.exists() else folder).stat().st_mtime
    tree = {
        "folder": str(folder),
        "name": name,
        "model": model.replace("_", "-"),
        "finished": False,
        "corpus": corpus[0] if corpus else None,
        "steps": last.get("step"),
        "epochs": last.get("epoch"),
        "best_val_loss": min(losses, default=None),
        "tokens_per_second": last.get("tokens_per_second"),
        "train_seconds": last.get("train_seconds"),
        "date": datetime.fromtimestamp(changed, UTC),
    }
    return parse(Run, tree, str(metrics))


def _whole_rows(metrics: Path) -> list[dict[str, Any]]:
    """The lines before the first incomplete one."""
    rows: list[dict[str, Any]] = []
    for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows
