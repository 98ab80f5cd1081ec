"""`results/summary.csv`: one row a number, published beside measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt import records, reference
from picogpt.errors import PicogptError
from picogpt.files import atomic_write
from picogpt.report import ladder
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
    ladder.compare_with_baselines(by_kind)
    return by_kind


def write_summary(record_files: Iterable[Path], reference_files: Iterable[Path], out: Path) -> None:
    """Write the comparison of all published numbers with those of the records.

    Where nothing was measured here, a number of the reference records is shown as such.
    """
    by_kind, references = read_records(record_files), read_references(reference_files)
    with atomic_write(out, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number in numbers():
            row = compare(number, by_kind.get(number.record), references.get(number.record))
            writer.writerow({key: _printed(value) for key, value in row.items()})


def read_references(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Reference records by their kind: of those of one kind, from several machines, the first whose file is named.

    Raises PicogptError when one was edited or lacks its provenance.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    by_kind: dict[str, dict[str, Any]] = {}
    for folder, files in by_folder.items():
        reference.check(folder)
        # A ladder is one machine's: it never gets a rung from another.
        ladders = {ladder.machine_of(name) for name in by_kind} - {None}
        for path in files:
            reference.require_good(path, records.read(path))
        more = {name: record for name, record in read_records(files).items() if ladder.machine_of(name) not in ladders}
        by_kind = {**more, **by_kind}
    return by_kind


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of `summary.csv`."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _printed(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value
