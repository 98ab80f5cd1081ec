"""Commands that list and compare trainings."""

from __future__ import annotations

import json
import re
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from picogpt.cli.common import KINDS, PATH, WEIGHTS, aligned
from picogpt.errors import PicogptError, UsageError

COLUMNS = ("run", "model", "corpus", "parameters", "steps (epochs)", "best val", "tokens/s", "s", "device", "date")


@click.group(invoke_without_command=True)
@click.option("--model", type=click.Choice(KINDS), help="List only the runs of this model.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: losses in nats per token, times in s.")
@click.pass_context
def runs(context: click.Context, model: str | None, as_json: bool) -> None:
    """List the trainings in weights/, newest first, with the progress of those that are not finished.

    \b
      picogpt runs --model gpt2
      picogpt runs diff RUN RUN
      picogpt runs plot RUN RUN RUN --out curves.png
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
        click.echo(json.dumps(found, indent=2))
    elif found:
        click.echo(aligned([COLUMNS, *map(_row, found)], range(3, 8)))
    elif not damaged:
        of_model = f" of {model}" if model else ""
        click.echo(f"no training{of_model} is in {WEIGHTS}/: picogpt train {model or KINDS[0]} makes one", err=True)
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
    for section, group in groupby(differing, key=itemgetter(0)):
        rows.append((section, "", "", ""))
        comma = "," if section == "results" else ""  # a setting is shown as --set takes it
        for _, key, one, two in group:
            amount = _shown(two - one, "+" + comma) if {type(one), type(two)} <= {int, float} else ""
            rows.append((f"  {key}", _shown(one, comma), _shown(two, comma), amount))
    click.echo(aligned(rows, range(1, 4)))
    if {section for section, *_ in differing} == {"results"}:
        click.echo("the same settings, corpus, device, software and execution")


@runs.command()
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option("--by", type=click.Choice(["epoch", "step"]), default="epoch", help="Quantity of the horizontal axis.")
@click.option("--out", type=PATH, required=True, help="PNG file.")
def plot(names: tuple[str, ...], by: str, out: Path) -> None:
    """Draw the losses of trainings, finished or not, in one picture.

    RUN is a folder, or a name from `picogpt runs`, or MODEL/RUN if a name is ambiguous.

    \b
      picogpt runs plot wide 20260210_183518 --out curves.png
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the picture is a PNG file, so its name must end in .png")
    from picogpt.report.figures import draw_runs
    from picogpt.runs import find, metrics, unit

    folders = {name: find(name, WEIGHTS) for name in names}
    units = sorted(set(filter(None, map(unit, folders.values()))))
    draw_runs({name: metrics(folder) for name, folder in folders.items()}, out, by, " or ".join(units) or "token")
    click.echo(out)


def _row(run: dict[str, Any]) -> list[str]:
    """A line of the list."""

    def shown(name: str, form: str, missing: str = "-") -> str:
        return missing if run[name] is None else f"{run[name]:{form}}"

    steps = shown("steps", ",d", "no step") + (f" ({run['epochs']:.2f})" if run["epochs"] is not None else "")
    ranks = f", {run['ranks']} ranks" if (run["ranks"] or 1) > 1 else ""
    date = datetime.fromisoformat(run["date"]).astimezone()
    return [
        run["name"], run["model"], shown("corpus", ""), shown("parameters", ",d"),
        steps if run["finished"] else f"unfinished: {steps}", shown("best_val_loss", ".4f"), shown("tokens_per_second", ",.0f"),
        shown("train_seconds", ",.0f"), shown("device", "") + ranks, f"{date:%Y-%m-%d %H:%M}",
    ]  # fmt: skip


def _shown(value: Any, form: str) -> str:
    """A value of a record in a few characters; `form` begins the format of a number."""
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{40,64}", value) else value
    if type(value) in (int, float):  # not bool
        return f"{value:{form}}" if isinstance(value, int) else f"{value:{form}.7g}"
    return "-" if value is None else json.dumps(value)
