"""`results/report.md`: the write-up, filled in with the numbers of this run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from picogpt.errors import PicogptError
from picogpt.files import read_text, write_text
from picogpt.report.tables import read_records, read_summary


def write_page(
    template: Path,
    summary: Path,
    record_files: Iterable[Path],
    samples: Mapping[str, str],
    values: Mapping[str, str],
    out: Path,
) -> None:
    """Fill in the Markdown template.

    It sees `sections` (rows of the summary by section), `records` (by kind), `samples` (texts by name) and the `values`.

    Raises PicogptError when the template asks for something that is not there.
    """
    rows = read_summary(summary)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["excerpt"] = lambda text, length: text if len(text) <= length else text[:length] + " …"
    try:
        page = environment.from_string(read_text(template)).render(
            sections={name: list(group) for name, group in groupby(rows, key=lambda row: row["section"])},
            records=read_records(record_files),
            samples={name: read_text(path) for name, path in samples.items()},
            **values,
        )
    except (TemplateError, TypeError, ValueError) as error:  # the last two: a number that the record lacks
        raise PicogptError(f"{template} cannot be filled in: {error}") from error
    write_text(out, page)
