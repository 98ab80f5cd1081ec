"""Commands that write figures, tables and the page from records."""

from __future__ import annotations

from pathlib import Path

import click

from picogpt.errors import UsageError

REFERENCE = "Record of results/reference/, shown as such where nothing was measured here; repeatable."


@click.group()
def report() -> None:
    """Write figures, tables and the page from result records."""


@report.command("loss-curve")
@click.option(
    "--run-folder", type=click.Path(path_type=Path), required=True, help="Folder with metrics.jsonl and record.json."
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def loss_curve(run_folder: Path, out: Path) -> None:
    """Draw the loss curves of a run beside the published values."""
    from picogpt.report.figures import draw_loss_curve

    draw_loss_curve(run_folder, out)


@report.command()
@click.option("--hardware", "name", required=True, help="Machine of config/hardware/, or a YAML file of your own.")
@click.argument("record_files", type=click.Path(path_type=Path), nargs=-1)
@click.option("--reference", "references", type=click.Path(path_type=Path), multiple=True, help=REFERENCE)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def throughput(name: str, record_files: tuple[Path, ...], references: tuple[Path, ...], out: Path) -> None:
    """Draw the training ladder of a machine from the records of its rungs, beside the published values."""
    from picogpt.report.throughput import draw_throughput

    draw_throughput(name, record_files, references, out)


@report.command()
@click.argument("record_files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--reference", "references", type=click.Path(path_type=Path), multiple=True, help=REFERENCE)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def summary(record_files: tuple[Path, ...], references: tuple[Path, ...], out: Path) -> None:
    """Write the table of published and measured numbers."""
    from picogpt.report.compare import write_summary

    write_summary(record_files, references, out)


@report.command()
@click.option("--template", type=click.Path(path_type=Path), required=True)
@click.option("--summary", "summary_file", type=click.Path(path_type=Path), required=True)
@click.option("--record", "record_files", type=click.Path(path_type=Path), multiple=True)
@click.option(
    "--sample",
    "samples",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Sampled text that the template shows by its file name; repeatable.",
)
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="Value that the template uses; repeatable.")
@click.option("--hardware", multiple=True, help="Machine whose training ladder is shown; repeatable.")
@click.option("--reference", "references", type=click.Path(path_type=Path), multiple=True, help=REFERENCE)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def page(
    template: Path,
    summary_file: Path,
    record_files: tuple[Path, ...],
    samples: tuple[Path, ...],
    values: tuple[str, ...],
    hardware: tuple[str, ...],
    references: tuple[Path, ...],
    out: Path,
) -> None:
    """Fill in the template of the write-up with the numbers of a run."""
    from picogpt.report.page import write_page

    if wrong := [pair for pair in values if "=" not in pair]:
        raise UsageError(f"--set {wrong[0]!r} is not of the form NAME=VALUE")
    named = dict(pair.split("=", 1) for pair in values)
    write_page(template, summary_file, record_files, samples, named, hardware, references, out)


@click.command()
@click.option("--run", default="pipeline", help="Run in weights/ whose records are kept.")
def reference(run: str) -> None:
    """Copy the records and figures of a complete run to results/reference/DEVICE/ and media/reference/DEVICE/.

    These folders are tracked by git: on machines without this device, figures and tables show their numbers, and say so.
    Records of another text than tinyshakespeare, or of uncommitted code, are refused.
    """
    from picogpt.reference import keep

    for folder in keep(Path(), run):
        click.echo(f"{folder}/: {len(list(folder.iterdir()))} files")
