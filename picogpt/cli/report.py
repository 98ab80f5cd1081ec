"""Commands that write figures, tables and the page from records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from picogpt.cli.common import PATH
from picogpt.errors import UsageError

OUT = click.option("--out", type=PATH, required=True)
BANNER = click.option("--banner", default="", help="Sentence for runs that are not those of the write-up.")
REFERENCES = click.option(
    "--reference", "reference_files", type=PATH, multiple=True, help="Record of results/reference/, shown as such where nothing was measured here; repeatable.",
)  # fmt: skip


@click.group()
def report() -> None:
    """Write figures, tables and the page from result records."""
    # A notebook leaves its own backend to the commands that it starts, and matplotlib fails where it lacks that one.
    os.environ["MPLBACKEND"] = "agg"


@report.command("loss-curve")
@click.option("--run-folder", type=PATH, required=True, help="Folder with metrics.jsonl and record.json.")
@BANNER
@OUT
def loss_curve(run_folder: Path, banner: str, out: Path) -> None:
    """Draw the loss curves of a run beside the published values."""
    from picogpt.report.figures import draw_loss_curve

    draw_loss_curve(run_folder, out, banner)


@report.command()
@click.option("--hardware", "name", required=True, help="Machine of config/hardware/, or a YAML file of your own.")
@click.argument("record_files", type=PATH, nargs=-1)
@REFERENCES
@BANNER
@OUT
def throughput(**arguments: Any) -> None:
    """Draw the training ladder of a machine from the records of its rungs, beside the published values."""
    from picogpt.report.throughput import draw_throughput

    draw_throughput(**arguments)


@report.command()
@click.argument("record_files", type=PATH, nargs=-1, required=True)
@REFERENCES
@BANNER
@OUT
def summary(**arguments: Any) -> None:
    """Write the table of published and measured numbers."""
    from picogpt.report.compare import write_summary

    write_summary(**arguments)


@report.command()
@click.option("--template", type=PATH, required=True)
@click.option("--summary", type=PATH, required=True)
@click.option("--record", "record_files", type=PATH, multiple=True)
@click.option("--sample", "samples", type=PATH, multiple=True, help="Text, shown by its file name; repeatable.")
@click.option(
    "--metrics", type=PATH, multiple=True, help="metrics.jsonl of a run, for its loss curve in HTML; repeatable."
)
@click.option("--probabilities", type=PATH, multiple=True, help="File of `sample --probabilities`; repeatable.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Value that the template uses; repeatable.")
@click.option("--hardware", multiple=True, help="Machine whose training ladder is shown; repeatable.")
@REFERENCES
@BANNER
@OUT
def page(pairs: tuple[str, ...], **arguments: Any) -> None:
    """Fill in the template of the write-up with the numbers of a run."""
    from picogpt.report.page import write_page

    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UsageError(f"--set {wrong[0]!r} is not of the form NAME=VALUE")
    write_page(values=dict(pair.split("=", 1) for pair in pairs), **arguments)


@click.command()
@click.option("--name", "--run", "run", default="pipeline", help="Run in weights/ whose records are kept.")
def reference(run: str) -> None:
    """Copy the records and figures of a complete run to results/reference/DEVICE/ and media/reference/DEVICE/.

    These folders are tracked by git: on machines without this device, figures and tables show their numbers, and say so.
    Records of another text than tinyshakespeare, or of uncommitted code, are refused.
    """
    from picogpt.reference import keep

    for folder in keep(Path(), run):
        click.echo(f"{folder}/: {len(list(folder.iterdir()))} files")
