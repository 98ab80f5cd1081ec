"""Commands that list and compare trainings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from picogpt.cli.common import KINDS, WEIGHTS
from picogpt.errors import PicogptError, UsageError

if TYPE_CHECKING:
    from picogpt.runs import Run

COLUMNS = ("run", "model", "corpus", "parameters", "steps (epochs)", "best val", "tokens/s", "s", "device", "date")
NUMBERS = range(3, 8)


@click.group(invoke_without_command=True)
@click.option("--model", type=click.Choice(KINDS), help="List only the runs of this model.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: losses in nats per token, times in s.")
@click.pass_context
def runs(context: click.Context, model: str | None, as_json: bool) -> None:
    """List the trainings in weights/, newest first, with the progress of those that are not finished.

    \b
      picogpt runs --model gpt2
      picogpt runs diff RUN RUN
    """
    if context.invoked_subcommand:
        if model or as_json:
            raise UsageError(
                f"--model and --json belong to the list: leave them out before {context.invoked_subcommand}"
            )
        return
    from picogpt.runs import listed

    found, damaged = listed(WEIGHTS, model)
    if as_json:
        click.echo(json.dumps([run.model_dump(mode="json") for run in found], indent=2))
    elif found:
        click.echo(_aligned([COLUMNS, *map(_row, found)], NUMBERS))
    elif not damaged:
        click.echo(f"no training{f' of {model}' if model else ''} is in {WEIGHTS}/: picogpt train makes one", err=True)
    if damaged:
        raise PicogptError("\n".join(map(str, damaged)))


@runs.command()
@click.argument("first")
@click.argument("second")
def diff(first: str, second: str) -> None:
    """Compare two trainings: the settings, text, device and versions that differ, and the results.

    FIRST and SECOND are folders, or names from `picogpt runs`, or MODEL/RUN if a name is ambiguous.

    \b
      picogpt runs diff wide 20260210_183518
      picogpt runs diff char_transformer/pipeline char_transformer/wide
    """
    from picogpt.runs import differences, find

    folders = find(first, WEIGHTS), find(second, WEIGHTS)
    differing = differences(*folders)
    if not differing:
        click.echo(f"{folders[0]} and {folders[1]}: nothing differs")
        return
    rows = [("", str(folders[0]), str(folders[1]), "difference")]
    for section in dict.fromkeys(difference.section for difference in differing):
        rows.append((section, "", "", ""))
        for each in differing:
            if each.section == section:
                comma = "," if section == "results" else ""  # a setting is shown as --set takes it
                amount = "" if each.amount is None else f"{each.amount:+{comma}.7g}"
                rows.append((f"  {each.key}", _shown(each.first, comma), _shown(each.second, comma), amount))
    click.echo(_aligned(rows, range(1, 4)))
    if {difference.section for difference in differing} == {"results"}:
        click.echo("the same settings, corpus, device, software and execution")


def _row(run: Run) -> tuple[str, ...]:
    """A line of the list."""
    epochs = "" if run.epochs is None else f" ({run.epochs:.2f})"
    steps = "no step" if run.steps is None else f"{run.steps:,}{epochs}"
    return (
        run.name,
        run.model,
        run.corpus or "-",
        _number(run.parameters, ",d"),
        steps if run.finished else f"unfinished: {steps}",
        _number(run.best_val_loss, ".4f"),
        _number(run.tokens_per_second, ",.0f"),
        _number(run.train_seconds, ",.0f"),
        f"{run.device or '-'}{f', {run.ranks} ranks' if (run.ranks or 1) > 1 else ''}",
        f"{run.date.astimezone():%Y-%m-%d %H:%M}",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _shown(value: Any, comma: str) -> str:
    """A value of a record in a few characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:{comma}.7g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:{comma}}"
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{40,64}", value) else value
    return json.dumps(value)


def _aligned(rows: Sequence[tuple[str, ...]], right: range) -> str:
    """Columns two spaces apart, those in `right` aligned at their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
