"""The published numbers beside the measured ones: `config/published.csv` merged with the records of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from picogpt import machines, records, reference
from picogpt.config import config_folder
from picogpt.data.fetch import find
from picogpt.errors import PicogptError
from picogpt.files import write_text
from picogpt.report import ladder

CORPUS = "tinyshakespeare"
"""The text that every published loss was measured on."""
TRAIN_VAL_TOKENS = {(1_003_854, 111_540), (301_966, 36_059)}
"""The sizes of its two parts, in characters and in GPT-2's tokens."""
COLUMNS = ["section", "metric", "published", "measured", "unit", "device", "status", "note"]
TEXT_COLUMNS = [
    "section", "metric", "record", "key", "unit", "source", "better", "device", "depends_on_text", "comparable", "note",
]  # fmt: skip
ALLOWED = {"better": {"", "lower", "higher"}, "depends_on_text": {"yes", "no"}, "comparable": {"yes", "no"}}

Records = Mapping[str, dict[str, Any]]
"""Result records by their kind."""


@functools.cache
def published() -> pd.DataFrame:
    """The rows of `config/published.csv`, in order.

    record, key: the kind of the record that measures a number, and its key in the results; items of a list by index, for
        example tokens_per_second.0.
    published, source: the published value, or NaN, and where it stands in the write-up.
    tolerance, better: the difference up to which a number counts as reproduced; lower or higher, where one is better.
    device: where it was measured, if that matters. depends_on_text: whether it can be compared on this text alone.
    comparable: no where the two are measured in different ways. note: why ours differs.

    Raises PicogptError naming the row and column of a value that is not allowed.
    """
    path = config_folder() / "published.csv"
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values={
            "published": [""], "tolerance": [""]
        })  # fmt: skip
        rows = rows.astype({"published": float, "tolerance": float})
    except (OSError, ValueError, KeyError) as error:
        raise PicogptError(f"cannot read {path}: {error}") from error
    if missing := [name for name in (*TEXT_COLUMNS, "published", "tolerance") if name not in rows]:
        raise PicogptError(f"{path} lacks the columns {', '.join(missing)}")
    for column, allowed in ALLOWED.items():
        for row, value in rows.loc[~rows[column].isin(allowed), column].items():
            raise PicogptError(
                f"{path}, line {row + 2}: {column} is {value!r}, not {' or '.join(sorted(allowed - {''}))}"
            )
    if (twice := rows.duplicated(["section", "metric"])).any():
        raise PicogptError(f"{path}, line {twice.idxmax() + 2}: duplicate metric {rows.metric[twice.idxmax()]!r}")
    return rows


def published_values(record: str) -> dict[str, float]:
    """The published values that belong beside the results of a kind of record, by key."""
    rows = published()
    rows = rows[(rows.record == record) & rows.published.notna()]
    return dict(zip(rows.key, rows.published, strict=True))


def on_published_text(record: dict[str, Any]) -> bool:
    """Whether a record was measured on the published text and split, by hash and sizes: a name proves nothing."""
    corpus = record["corpus"]
    sizes = (corpus.get("train_tokens"), corpus.get("val_tokens"))
    return corpus.get("text_sha256") == find(CORPUS).sha256 and sizes in TRAIN_VAL_TOKENS


def compare(measured: Records, references: Records) -> pd.DataFrame:
    """One row for each published row: `COLUMNS`, values that are missing as None.

    status: reproduced, better, differs, not comparable, or not measured here.
    """
    rows = published().rename(columns={"device": "published_device", "note": "why"})
    rows = rows.merge(_values(measured), how="left", on=["record", "key"])
    rows = rows.merge(_values(references), how="left", on=["record", "key"], suffixes=("", "_of_reference"))
    rows["needs"] = rows.record.map(_needs)
    rows = rows.astype(object).where(rows.notna(), None)
    answers = [row | _answer(row, measured.get(row["record"])) for row in rows.to_dict("records")]
    return pd.DataFrame(answers, columns=COLUMNS, dtype=object)


def write_summary(record_files: Iterable[Path], reference_files: Iterable[Path], out: Path) -> None:
    """Write the comparison as CSV. A number that was not measured here may come from the reference records, and says so."""
    table = compare(read_records(record_files), read_references(reference_files))
    for column in ("published", "measured"):
        table[column] = table[column].map(lambda value: f"{value:.7g}" if isinstance(value, float) else value)
    write_text(out, table.to_csv(index=False, lineterminator="\n"))


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of `summary.csv`."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def read_records(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Records by their kind. Raises PicogptError when two are of one kind."""
    by_kind: dict[str, dict[str, Any]] = {}
    for path in paths:
        record = records.read(path)
        if record["kind"] in by_kind:
            raise PicogptError(f"{path} is a second record of {record['kind']}: pass only one of each kind")
        by_kind[record["kind"]] = record
    ladder.compare_with_baselines(by_kind)
    return by_kind


def read_references(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Reference records by their kind: if several devices have a record of the same kind, the first in the order of `paths`.

    Raises PicogptError when one was edited or does not say what it was measured with.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    by_kind: dict[str, dict[str, Any]] = {}
    for folder, files in by_folder.items():
        reference.check(folder)
        # A ladder belongs to one machine: it never gets a rung from another.
        ladders = {ladder.machine_of(name) for name in by_kind} - {None}
        for path in files:
            reference.require_good(path, records.read(path))
        more = {name: record for name, record in read_records(files).items() if ladder.machine_of(name) not in ladders}
        by_kind = {**more, **by_kind}
    return by_kind


def _values(by_kind: Records) -> pd.DataFrame:
    """All numbers in the results of records: record, key, measured, device, date."""
    rows = [
        (kind, key, value, record["device"]["name"], record.get("created", "")[:10])
        for kind, record in by_kind.items()
        for key, value in _numbers(record["results"])
    ]
    return pd.DataFrame(rows, columns=["record", "key", "measured", "device", "date"], dtype=object)


def _numbers(results: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in results.items():
        listed = [(f"{key}.{index}", item) for index, item in enumerate(value)] if isinstance(value, list) else []
        for name, number in listed or [(key, value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield name, number


def _answer(row: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
    """What changes in a merged row: its status and note; where nothing was measured here, also its number and device."""
    measured, published = row["measured"], row["published"]
    if record is None or measured is None:
        known = record and (record.get("not_measured") or record.get("missing", {}).get(row["key"]))
        return _not_here(row, known or row["needs"] or "not in the records of this run")
    if row["depends_on_text"] == "yes" and not on_published_text(record):
        text = record["corpus"]["name"]
        return {"status": "not comparable", "note": f"measured on {text}, published for {CORPUS}, split 90/10"}
    if row["published_device"] not in ("", row["device"]):
        # A number of another device is never put beside the published one.
        return _not_here(row, f"published for {row['published_device']}; this machine is {row['device']}")
    if published is None or row["comparable"] == "no":
        return {"status": "not comparable", "note": row["why"] or "nothing is published"}
    tolerance = row["tolerance"] or 0
    if abs(measured - published) <= tolerance:
        return {"status": "reproduced", "note": f"within {tolerance:g}"}
    better = row["better"] == ("lower" if measured < published else "higher")
    return {"status": "better" if better else "differs", "note": row["why"]}


def _not_here(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """The answer for a number that was not measured here: from a reference record, if it is of the device in question."""
    answer = {"measured": None, "device": None, "status": "not measured here", "note": reason}
    number, device = row["measured_of_reference"], row["device_of_reference"]
    if number is not None and (row["needs"] or row["published_device"] == device):
        note = f"{reason}; the number comes from a reference record of {row['date_of_reference']}"
        answer |= {"measured": number, "device": device, "note": note}
    return answer


def _needs(record: str) -> str | None:
    """What a number of one machine needs; None for numbers that every machine can measure."""
    name = next((name for name in machines.names() if name in record.split(" ")), None)
    return f"needs {machines.load(name).title}" if name else None
