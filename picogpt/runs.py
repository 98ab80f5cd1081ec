"""Lists the trainings in weights/ with their progress, and compares two of them. Does not load torch."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.errors import PicogptError, UsageError
from picogpt.registry import MODELS

RESULTS = ("parameters", "steps", "epochs", "best_val_loss", "tokens_per_second", "train_seconds")
SECTIONS = ("settings", "corpus", "device", "software", "execution", "results")
EXECUTION = ("machine", "commit", "dirty", "ranks", "threads", "micro_batch_size", "compiled")


def folders(weights: Path, model: str | None = None) -> list[Path]:
    """Folders that hold a training, finished or not: weights/MODEL/RUN, for gpt2 weights/gpt2/RUN/CORPUS."""
    top = model.replace("-", "_") if model else "*"
    marks = (f"{top}/{run}/{mark}" for run in ("*", "*/*") for mark in ("record.json", "checkpoints"))
    return sorted({path.parent for pattern in marks for path in weights.glob(pattern)})


def listed(weights: Path, model: str | None = None) -> tuple[list[dict[str, Any]], list[PicogptError]]:
    """All trainings in `weights`, newest first, and the errors of records that cannot be read.

    folder, name (RUN of weights/MODEL/RUN), model, finished, corpus, device, ranks; parameters, steps done, epochs,
    best_val_loss in nats per token, tokens_per_second, train_seconds; date of the record, of an unfinished run of the
    last line of its metrics, in UTC. Values that an unfinished run does not have yet are None.
    """
    runs, damaged = [], []
    for folder in folders(weights, model):
        parts, finished = folder.relative_to(weights).parts, (folder / "record.json").exists()
        try:
            values = _finished(folder) if finished else _begun(folder, *parts)
            values["date"] = values["date"].astimezone(UTC).isoformat(timespec="seconds")
            runs.append({"folder": str(folder), "name": parts[1], "finished": finished, **values})
        except PicogptError as error:
            damaged.append(error)
    return sorted(runs, key=lambda run: run["date"], reverse=True), damaged


def find(name: str, weights: Path) -> Path:
    """The folder of a training: `name` is the folder, or RUN, as much of MODEL/RUN/CORPUS around it as is needed.

    Raises UsageError, listing what there is, when it names none or several.
    """
    if any((Path(name) / mark).exists() for mark in ("record.json", "checkpoints")):
        return Path(name)
    runs = {folder.relative_to(weights).parts: folder for folder in folders(weights)}
    if not runs:
        raise UsageError(f"no training is in {weights}/: picogpt train {next(iter(MODELS))} makes one")
    wanted = Path(name).parts
    # A name of one part is RUN; a longer one may begin with MODEL.
    starts = (1,) if len(wanted) == 1 else (0, 1)
    found = [parts for parts in runs if any(parts[start : start + len(wanted)] == wanted for start in starts)]
    if len(found) == 1:
        return runs[found[0]]
    problem = f"several runs are called {name}:" if found else f"no run is called {name}; there are:"
    raise UsageError(f"{problem} {', '.join('/'.join(parts) for parts in found or runs)}")


def differences(first: Path, second: Path) -> list[tuple[str, str, Any, Any]]:
    """All differences between the records of two trainings, except for their date: (section, key, first, second).

    A value that a record does not have is None. Raises PicogptError when a run is not finished, or its record cannot be read.
    """
    import pandas as pd

    def values(folder: Path) -> dict[str, Any]:
        record = _record(folder)
        record |= {"settings": record["config"], "execution": {name: record.get(name) for name in EXECUTION}}
        row = pd.json_normalize({section: record[section] for section in SECTIONS})
        return row.astype(object).iloc[0].to_dict()  # as objects, numbers stay those of Python

    one, two = values(first), values(second)
    found = []
    for path in one | two:
        if one.get(path) != two.get(path):
            section, _, key = path.partition(".")
            found.append((section, key, one.get(path), two.get(path)))
    return sorted(found, key=lambda difference: SECTIONS.index(difference[0]))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics of a training; where one is not finished, up to the first line that is incomplete.

    Raises PicogptError when a finished training has a line that is not JSON.
    """
    finished = folder / "metrics.jsonl"
    return records.read_lines(finished) if finished.exists() else _growing(folder / "checkpoints/metrics.jsonl")


def unit(folder: Path) -> str | None:
    """What the losses of a training are a mean over, character or token; None of one that is not finished."""
    if not (folder / "record.json").exists():
        return None
    return "character" if str(_record(folder)["model"]).startswith("char") else "token"


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    if not path.exists():
        raise PicogptError(f"{folder} is not finished: there is no {path.name} to compare")
    record = records.read(path)
    if record["task"] != "train":
        raise PicogptError(f"{path} is the record of {records.key(record)}, not of a training")
    return record


def _finished(folder: Path) -> dict[str, Any]:
    """The values of a run with a record. Raises PicogptError when it cannot be read."""
    record = _record(folder)
    results = {name: record["results"][name] for name in RESULTS}
    origin = {"ranks": record["ranks"], "device": record["device"]["name"]}
    date = datetime.fromisoformat(record["created"])
    return {"model": record["model"], "corpus": record["corpus"].get("name"), **results, **origin, "date": date}


def _begun(folder: Path, model: str, run: str, corpus: str | None = None) -> dict[str, Any]:
    """The values of a run without a record, from its metrics."""
    metrics = folder / "checkpoints/metrics.jsonl"
    rows = _growing(metrics)
    last = {name: value for row in rows for name, value in row.items()}
    steps = int(last["step"]) if "step" in last else None
    best = min((row["val_loss"] for row in rows if "val_loss" in row), default=None)
    results = {name: last.get(name) for name in RESULTS}
    results |= {"steps": steps, "epochs": last.get("epoch"), "best_val_loss": best}
    origin = {"ranks": None, "device": None}
    date = datetime.fromtimestamp((metrics if metrics.exists() else folder).stat().st_mtime, UTC)
    return {"model": model.replace("_", "-"), "corpus": corpus, **results, **origin, "date": date}


def _growing(metrics: Path) -> list[dict[str, float]]:
    """The lines of a file that may be being written, up to the first one that is incomplete."""
    rows: list[dict[str, float]] = []
    for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
        try:
            rows.append({name: float(value) for name, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError):
            break
    return rows
