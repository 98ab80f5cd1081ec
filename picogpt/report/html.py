"""What `results/report.html` draws: loss curves as SVG that answer to the pointer, tokens coloured by their probability."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.errors import PicogptError
from picogpt.files import read_text
from picogpt.report.compare import published_for, read_records
from picogpt.report.figures import best_label, magnified, read_losses, reference_lines
from picogpt.report.ladder import Ladder

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 712, 10, 290
"""The plot in the drawing, in its own units."""
BITS = (1, 2, 4, 7, 10)
"""Limits between the colours of tokens: -log2 of their probability."""


def loss_curve(metrics: Path) -> dict[str, Any]:
    """The drawing of the run in the folder of `metrics`: the same curves, marks and limits as the magnified part of its figure.

    `series` are names and [epoch, loss] pairs; coordinates of paths, ticks, references and the best step are in the
    drawing's units, y downwards. `bits` turns a loss into bits per byte; None where the size of the text is not known.
    """
    from matplotlib.ticker import MaxNLocator

    (record,) = read_records([metrics.with_name("record.json")]).values()
    results, lines = record["results"], reference_lines(record)
    train, val, exact = read_losses(metrics)
    end, bits = results["epochs"], results.get("val_bits_per_byte")
    low, high = magnified(train, val, [value for value, *_ in lines], results["epochs"])

    def x(epoch: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * epoch / end, 1)

    def y(loss: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (loss - low) / ((high - low) or 1), 1)

    series = {"training batches, smoothed": train, "validation": val}
    marks = [(value, label) for value, label, *_ in lines]
    marks += [(value, f"training, exact: {value:.4f}") for value in exact.iloc[-1:]]
    return {
        "record": record,
        "series": {name: list(map(list, part.items())) for name, part in series.items()},
        "paths": [" ".join(f"{x(epoch)},{y(loss)}" for epoch, loss in part.items()) for part in series.values()],
        "lines": [{"y": y(value), "label": label, "inside": low <= value <= high} for value, label in marks],
        "best": {"x": x(results["best_epoch"]), "y": y(results["best_val_loss"]), "label": best_label(results)},
        "x_ticks": [(x(tick), f"{tick:g}") for tick in MaxNLocator(5).tick_values(0, end) if tick <= end],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high],
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "end": end,
        "bits": bits / results["best_val_loss"] if bits else None,
    }


def curves(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Drawings of runs from their `metrics.jsonl`, by the names of their records, as "train gpt2"."""
    drawn = [loss_curve(path) for path in files]
    return {str(records.key(curve["record"])): curve for curve in drawn}


def tokens(path: Path, most: int = 1500) -> list[tuple[str, float, int]]:
    """The first tokens of a file of `sample --probabilities`: text, probability, colour from 0, likely, to 5.

    Raises PicogptError when the file is another.
    """
    try:
        first = json.loads(read_text(path))[0]
        pairs = list(zip(map(str, first["tokens"]), map(float, first["probabilities"]), strict=True))[:most]
        return [(text, share, bisect_right(BITS, -math.log2(share) if share else math.inf)) for text, share in pairs]
    except (ValueError, TypeError, LookupError) as error:
        raise PicogptError(f"{path} was not written by `sample --probabilities`: {error}") from error


def bars(ladder: Ladder) -> dict[str, Any]:
    """The published speed-ups of a ladder by rung, and the longest bar."""
    key = records.Key("ladder", "gpt2", ladder.name)
    rows = {rung: published_for(key._replace(rung=rung)).get("speedup") for rung in ladder.machine.rungs}
    marks = {rung: row["published"] for rung, row in rows.items() if row}
    measured = [record["results"].get("speedup") or 0 for record in ladder.rungs.values()]
    return {"marks": marks, "longest": max([1.0, *marks.values(), *measured])}
