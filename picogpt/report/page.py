"""`results/report.md` and `results/report.html`: the write-up, filled in with the numbers of this run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from picogpt.errors import PicogptError
from picogpt.files import read_text, write_text
from picogpt.records import Key
from picogpt.report import html, ladder
from picogpt.report.compare import read_records, read_references


def write_page(
    template: Path,
    summary: Path,
    record_files: Iterable[Path],
    samples: Iterable[Path],
    values: Mapping[str, str],
    hardware: Iterable[str],
    reference_files: Iterable[Path],
    out: Path,
    banner: str = "",
    metrics: Iterable[Path] = (),
    probabilities: Iterable[Path] = (),
) -> None:
    """Fill in the template, of Markdown or, by its name, of HTML, where all values are escaped.

    It sees `sections` (rows of the summary by section), all `records`, the function `record` of the fields of a
    `records.Key` (undefined where there is no such record), `samples` (texts by their file's name without suffix), the
    `values`, the `banner`, the `ladders` of the machines `hardware`, and the `loss_tolerance` of all ladders. For HTML
    also the loss `curves` of the files `metrics`, the `tokens` of samples from files of `probabilities`, and `bars`.

    Raises PicogptError when the template asks for something that is not there.
    """
    blocks: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader, is_html = FileSystemLoader(template.parent), ".html" in template.suffixes
    environment = Environment(loader=loader, autoescape=is_html, undefined=StrictUndefined, **blocks)
    environment.filters["excerpt"] = lambda text, length: text if len(text) <= length else text[:length] + " …"
    environment.filters["fenced"] = lambda text: f"{_ticks(text, 3)}text\n{text}\n{_ticks(text, 3)}"
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", r"\|")
    environment.filters["code"] = lambda text: f"{_ticks(text, 1)} {text} {_ticks(text, 1)}"
    measured, references = read_records(record_files), read_references(reference_files)

    def record(*names: str, **fields: str) -> Any:
        key = Key(*names, **fields)
        return measured.get(key) or environment.undefined(f"there is no record of {key}")

    try:
        rows = pd.read_csv(StringIO(read_text(summary)), dtype=str, keep_default_na=False)
        page = environment.from_string(read_text(template)).render(
            sections={name: group.to_dict("records") for name, group in rows.groupby("section")},
            record=record,
            records=list(measured.values()),
            ladders=[ladder.find(name, measured, references) for name in hardware],
            loss_tolerance=ladder.LOSS_TOLERANCE,
            banner=banner,
            samples={path.stem: read_text(path) for path in samples},
            curves=html.curves(metrics),
            tokens={path.stem: html.tokens(path) for path in probabilities},
            bars=html.bars,
            **values,
        )
    except (TemplateError, LookupError, TypeError, ValueError) as error:  # all but the first: a number is missing
        raise PicogptError(f"{template} cannot be filled in: {error}") from error
    write_text(out, page)


def _ticks(text: str, least: int) -> str:
    """Backticks that Markdown does not take for a part of `text`: more than it has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
