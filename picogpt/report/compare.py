"""The published numbers beside the measured ones: `config/published.csv` and the records of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from picogpt import machines, records
from picogpt.config import config_folder
from picogpt.data.fetch import find
from picogpt.errors import PicogptError
from picogpt.files import write_text
from picogpt.records import Key, Records, at
from picogpt.reference import CORPUS, check, require_good
from picogpt.report.ladder import compare_with_baselines

COLUMNS = ["section", "metric", "published", "measured", "unit", "device", "status", "note"]
NOT_HERE = "not measured here"
VAL_BYTES = 111_540
"""Of the published text, whose characters are of one byte each."""
PUBLISHED_COLUMNS = (
    "section", "metric", *Key._fields, "key", "unit", "published", "source", "tolerance", "better", "device",
    "depends_on_text", "comparable", "note",
)  # fmt: skip


@functools.cache
def published() -> pd.DataFrame:
    """The rows of `config/published.csv`, in order; config/README.md describes its columns.

    `published` and `tolerance` are floats, or None where there is none; all other columns are texts.

    Raises PicogptError naming the row and column of a value that is not allowed.
    """
    path = config_folder() / "published.csv"
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        if missing := [name for name in PUBLISHED_COLUMNS if name not in rows]:
            raise PicogptError(f"{path} lacks the columns {', '.join(missing)}")
        for column in ("published", "tolerance"):
            numbers = pd.to_numeric(rows[column])
            rows[column] = numbers.astype(object).where(numbers.notna(), None)
    except (OSError, ValueError) as error:
        raise PicogptError(f"cannot read {path}: {error}") from error
    answers = {"better": ["", "higher", "lower"], "depends_on_text": ["no", "yes"], "comparable": ["no", "yes"]}
    for column, allowed in answers.items():
        for row, value in rows.loc[~rows[column].isin(allowed), column].items():
            wanted = " or ".join(filter(None, allowed))
            raise PicogptError(f"{path}, line {row + 2}: {column} is {value!r}, not {wanted}")
    for row, metric in rows.loc[rows.duplicated(["section", "metric"]), "metric"].items():
        raise PicogptError(f"{path}, line {row + 2}: duplicate metric {metric!r}")
    return rows


def published_for(key: Key) -> dict[str, dict[str, Any]]:
    """The rows with a published value that belong beside the results of a record, by their key in the results."""
    rows = published().to_dict("records")
    return {row["key"]: row for row in rows if records.key(row) == key and row["published"] is not None}


def on_published_text(record: dict[str, Any]) -> bool:
    """Whether a record was measured on the text and split of every published loss, by hash and sizes; its name is not trusted."""
    corpus = record["corpus"]
    sizes = {(1_003_854, VAL_BYTES), (301_966, 36_059)}  # of both parts, in characters and in GPT-2's tokens
    here = (corpus.get("train_tokens"), corpus.get("val_tokens"))
    return corpus.get("text_sha256") == find(CORPUS).sha256 and here in sizes


def compare(measured: Records, references: Records, banner: str = "") -> pd.DataFrame:
    """One row for each published row: `COLUMNS`, values that are missing as None.

    status: reproduced, better, differs, not comparable, or not measured here. A `banner` says why no number is comparable.
    """
    keyed = [(row, records.key(row)) for row in published().to_dict("records")]
    answers = [row | _answer(row, measured.get(key), references.get(key)) for row, key in keyed]
    table = pd.DataFrame(answers, columns=COLUMNS, dtype=object)
    if banner:
        table.loc[table["status"] != NOT_HERE, ["status", "note"]] = "not comparable", banner
    return table


def write_summary(record_files: Iterable[Path], reference_files: Iterable[Path], out: Path, banner: str = "") -> None:
    """Write the comparison as CSV. A number that was not measured here may come from the reference records, and says so."""
    table = compare(read_records(record_files), read_references(reference_files), banner)
    for column in ("published", "measured"):
        table[column] = table[column].map(lambda value: f"{value:.7g}" if isinstance(value, float) else value)
    write_text(out, table.to_csv(index=False, lineterminator="\n"))


def read_records(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Records by what they measure, those of an older version with bits per byte where the size of their text is known.

    Raises PicogptError when two measure the same.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in paths:
        record = records.read(path)
        key = records.key(record)
        if key in found:
            raise PicogptError(f"{path} is a second record of {key}: pass only one of each")
        found[key] = record
        loss = number(record, "best_val_loss" if key.task == "train" else "val_loss")
        if loss is not None and number(record, "val_bits_per_byte") is None and on_published_text(record):
            corpus = {**record["corpus"], "val_bytes": VAL_BYTES}
            record["results"]["val_bits_per_byte"] = records.bits_per_byte(loss, corpus)
    compare_with_baselines(found)
    return found


def read_references(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """Reference records: if several devices have a record of the same measurement, the first in the order of `paths`.

    Raises PicogptError when one was edited or does not say what it was measured with.
    """
    paths = list(paths)
    found: dict[Key, dict[str, Any]] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        files = [path for path in paths if path.parent == folder]
        check(folder)
        for path in files:
            require_good(path, records.read(path))
        # All rungs of a ladder come from one reference folder.
        ladders = {key.machine for key in found if key.task == "ladder"}
        for key, record in read_records(files).items():
            if key.task != "ladder" or key.machine not in ladders:
                found.setdefault(key, record)
    return found


def number(record: dict[str, Any] | None, key: str) -> float | None:
    """A number in the results of a record; `tokens_per_second.0` is the first item of a list. None if there is none."""
    value = at(record, f"results.{key}")
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _answer(row: dict[str, Any], record: dict[str, Any] | None, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The measured value, its device, the status and the note beside a published row."""
    measured, published, text = number(record, row["key"]), row["published"], at(record, "corpus.name")
    needs = f"needs {machines.load(row['machine']).title}" if row["machine"] in machines.names() else None
    if record is None or measured is None:
        why = record and (record.get("not_measured") or (record.get("missing") or {}).get(row["key"]))
        command = f"picogpt evaluate {row['model']} --task hellaswag does that"
        absent = command if row["task"] == "hellaswag" else "not in the records of this run"
        return _not_here(row, reference, needs, why or needs or absent)
    answer = {"measured": measured, "device": record["device"]["name"], "note": row["note"]}
    if row["depends_on_text"] == "yes" and not on_published_text(record):
        note = f"measured on {text or 'an unknown text'}, published for {CORPUS}, split 90/10"
        return answer | {"status": "not comparable", "note": note}
    if row["device"] not in ("", answer["device"]):
        # A number of another device is never put beside the published one.
        return _not_here(row, reference, needs, f"published for {row['device']}; this machine is {answer['device']}")
    if limit := at(record, "config.limit"):
        return answer | {"status": "not comparable", "note": f"the first {limit:,} items alone"}
    if published is None or row["comparable"] == "no":
        return answer | {"status": "not comparable", "note": row["note"] or "nothing is published"}
    tolerance = row["tolerance"] or 0
    if abs(measured - published) <= tolerance:
        return answer | {"status": "reproduced", "note": f"within {tolerance:g}"}
    better = row["better"] == ("lower" if measured < published else "higher")
    return answer | {"status": "better" if better else "differs"}


def _not_here(row: dict[str, Any], reference: dict[str, Any] | None, needs: str | None, reason: str) -> dict[str, Any]:
    """The answer for a number that was not measured here: from a reference record, if it is of the device in question."""
    answer: dict[str, Any] = {"measured": None, "device": None, "status": NOT_HERE, "note": reason}
    there = number(reference, row["key"])
    if reference and there is not None and (needs or row["device"] == reference["device"]["name"]):
        note = f"{reason}; the number comes from a reference record of {reference['created'][:10]}"
        answer |= {"measured": there, "device": reference["device"]["name"], "note": note}
    return answer
