"""`results/summary.csv`: one row a number, published beside measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.errors import PicogptError
from picogpt.files import atomic_write
from picogpt.report.published import compare, numbers

COLUMNS = ("section", "metric", "published", "measured", "unit", "device", "status", "note")


def read_records(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Records by their kind. Raises PicogptError when two are of one kind."""
    by_kind: dict[str, dict[str, Any]] = {}
    for path in paths:
        record = records.read(path)
        if record["kind"] in by_kind:
            raise PicogptError(f"{path} is a second record of {record['kind']}: give one of each")
        by_kind[record["kind"]] = record
    return by_kind


def write_summary(record_files: Iterable[Path], out: Path) -> None:
    """Write the comparison of all published numbers with those of the records."""
    by_kind = read_records(record_files)
    with atomic_write(out, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number in numbers():
            row = compare(number, by_kind.get(number.record))
            writer.writerow({key: _printed(value) for key, value in row.items()})


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of `summary.csv`."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _printed(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value
