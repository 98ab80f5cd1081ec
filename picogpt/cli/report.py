"""Commands that write figures, tables and the page from records."""

from __future__ import annotations

from pathlib import Path

import click

from picogpt.errors import UsageError


@click.group()
def report() -> None:
    """Write figures, tables and the page from result records."""


@report.command("loss-curve")
@click.option("--run-folder", type=click.Path(path_type=Path), required=True, help="Has metrics.jsonl and record.json.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def loss_curve(run_folder: Path, out: Path) -> None:
    """Draw the loss curve of a run beside the published values."""
    from picogpt.report.figures import draw_loss_curve

    draw_loss_curve(run_folder, out)


@report.command()
@click.argument("record_files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def summary(record_files: tuple[Path, ...], out: Path) -> None:
    """Write the table of published and measured numbers."""
    from picogpt.report.tables import write_summary

    write_summary(record_files, out)


@report.command()
@click.option("--template", type=click.Path(path_type=Path), required=True)
@click.option("--summary", "summary_file", type=click.Path(path_type=Path), required=True)
@click.option("--record", "record_files", type=click.Path(path_type=Path), multiple=True)
@click.option("--sample", "samples", multiple=True, metavar="NAME=FILE", help="A text that the template shows.")
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="A value that the template uses.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def page(
    template: Path,
    summary_file: Path,
    record_files: tuple[Path, ...],
    samples: tuple[str, ...],
    values: tuple[str, ...],
    out: Path,
) -> None:
    """Fill in the template of the write-up."""
    from picogpt.report.page import write_page

    write_page(template, summary_file, record_files, _pairs(samples, "--sample"), _pairs(values, "--set"), out)


def _pairs(arguments: tuple[str, ...], option: str) -> dict[str, str]:
    wrong = [pair for pair in arguments if "=" not in pair]
    if wrong:
        raise UsageError(f"{option} {wrong[0]!r} is not of the form NAME=...")
    return dict(pair.split("=", 1) for pair in arguments)
