"""`results/report.md`: the write-up, filled in with the numbers of this run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from picogpt import machines
from picogpt.errors import PicogptError
from picogpt.files import read_text, write_text
from picogpt.report import ladder
from picogpt.report.compare import read_records, read_references, read_summary


def write_page(
    template: Path,
    summary: Path,
    record_files: Iterable[Path],
    samples: Iterable[Path],
    values: Mapping[str, str],
    hardware: Iterable[str],
    reference_files: Iterable[Path],
    out: Path,
) -> None:
    """Fill in the Markdown template.

    It sees `sections` (rows of the summary by section), `records` (by kind), `samples` (texts by their file's name without suffix), the `values`,
    and `ladders`: for each machine of `hardware`, its settings and its records, those of a reference where there are
    none from here; and the `loss_tolerance` of all.

    Raises PicogptError when the template asks for something that is not there.
    """
    rows = read_summary(summary)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["excerpt"] = lambda text, length: text if len(text) <= length else text[:length] + " …"
    by_kind, references = read_records(record_files), read_references(reference_files)
    ladders = []
    for argument in hardware:
        name = machines.name_of(argument)
        here = ladder.of(name, by_kind)
        rungs = here or ladder.of(name, references)
        machine = machines.load(argument)
        batch, block = ladder.shape(machine, rungs)
        ladders.append(
            {
                "name": name,
                "machine": machine,
                "rungs": rungs,
                "here": bool(here),
                "batch": batch,
                "block": block,
                "difference": ladder.largest_difference(rungs),
            }
        )
    try:
        page = environment.from_string(read_text(template)).render(
            sections={name: list(group) for name, group in groupby(rows, key=lambda row: row["section"])},
            records=by_kind,
            ladders=ladders,
            loss_tolerance=ladder.LOSS_TOLERANCE,
            samples={path.stem: read_text(path) for path in samples},
            **values,
        )
    except (TemplateError, TypeError, ValueError) as error:  # the last two: a number that the record lacks
        raise PicogptError(f"{template} cannot be filled in: {error}") from error
    write_text(out, page)
