"""Figures, drawn from records alone: loss curves here, training ladders in throughput.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from picogpt import records
from picogpt.errors import PicogptError
from picogpt.files import atomic_write
from picogpt.report.compare import CORPUS, on_published_text, published_for, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish; grey for published values.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "figure.facecolor": "white", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "text.parse_math": False, "axes.axisbelow": True, "grid.color": "#e6e6e6", "legend.frameon": False,
}  # fmt: skip
PUBLISHED = {
    "train_loss_after": ("published, training", (8, 3)),
    "val_loss_after": ("published, final validation", (5, 3)),
    "best_val_loss": ("published, best validation", (3, 2)),
}
"""Labels and dashes of published losses, by their key in the results."""


def draw_loss_curve(run_folder: Path, out: Path, banner: str = "") -> None:
    """Training and validation loss of a run by epoch; published values, the best step and known limits marked.

    Two panels: the whole run, and its lower part magnified. Epochs are marked by dotted lines. `banner`: see `drawing`.
    """
    (record,) = read_records([run_folder / "record.json"]).values()
    train, val, exact_train = read_losses(run_folder / "metrics.jsonl")
    results, device, lines = record["results"], record["device"], reference_lines(record)
    marker: Any = {"linestyle": "none", "markeredgecolor": "white", "zorder": 5}
    part = {"part": "part of the text", "whole": "whole text"}.get(record["config"]["train"].get("eval_train"))
    unit = "character" if str(record["model"]).startswith("char") else "token"
    with drawing(out, 11, 4.6, banner) as figure:
        whole, lower = figure.subplots(1, 2, width_ratios=(1, 1.5))
        for axes, title in ((whole, "whole run"), (lower, "magnified")):
            for epoch in range(1, int(results["epochs"] + 0.01) + 1):
                axes.axvline(epoch, color="#bdbdbd", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.plot(train, color=BLUE, linewidth=1.2, label="training batches, smoothed")
            axes.plot(val, color=VERMILION, linewidth=2, label="validation, whole text")
            if len(exact_train):
                label = f"training, {part}: {exact_train.iloc[-1]:.4f}"
                axes.plot(exact_train, "D", markersize=7, color=BLUE, label=label, **marker)
            best = results["best_epoch"], results["best_val_loss"]
            axes.plot(*best, "o", markersize=8, color=VERMILION, label=best_label(results), **marker)
            for value, label, colour, dashes in lines:
                axes.axhline(value, color=colour, linewidth=1.3, linestyle=(0, dashes), label=label, zorder=1.5)
            axes.set(xlabel="epoch", xlim=(0, results["epochs"] * 1.02))
            axes.set_title(title, loc="left", fontsize=11)
        lower.set_ylim(magnified(train, val, [value for value, *_ in lines], results["epochs"]))
        whole.set_ylabel(f"loss, nats per {unit}")
        legend: Any = {"loc": "lower left", "bbox_to_anchor": (0.005, 0.055), "ncols": 3, "columnspacing": 1.6}
        figure.legend(*lower.get_legend_handles_labels(), fontsize=9.5, **legend)
        model = str(records.key(record)).removeprefix("train ")
        title = f"{model} on {drawable(str(record['corpus'].get('name')), 26)}: {results['parameters']:,} parameters, {results['tokens'] / 1e6:.1f} M {unit}s seen"
        figure.suptitle(title, x=0.012, ha="left", fontweight="bold")
        caption = (
            f"{device['name']}, {device['cores']} cores, {device.get('dtype')}; torch {record['software'].get('torch')};"
            f" {results['train_seconds']:.0f} s of training; seed {record['config']['train']['seed']}"
        )
        figure.text(0.012, 0.018, caption, fontsize=9, color=GREY)
        figure.tight_layout(rect=(0, 0.21, 1, 1))


def draw_runs(runs: dict[str, list[dict[str, Any]]], out: Path, by: str = "epoch", unit: str = "token") -> None:
    """Validation and training losses of several runs, each a name and the lines of its metrics, by epoch or step.

    The vertical axis shows what comes after the first tenth of each run. The losses are in nats per `unit`. Raises
    PicogptError when a run has no validation loss yet.
    """
    curves = [losses_of(rows, name, by)[:2] for name, rows in runs.items()]
    if nothing := [name for name, (_, val) in zip(runs, curves, strict=True) if val.empty]:
        raise PicogptError(f"{nothing[0]} has no validation loss yet: there is nothing to draw")
    ends = [max([*train.index, *val.index]) for train, val in curves]
    limits = [magnified(train, val, [], end) for (train, val), end in zip(curves, ends, strict=True)]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    margin = 0.03 * (high - low) or 0.1
    names = [drawable(name if len(name) <= 90 else f"…{name[-89:]}", 90) for name in runs]
    longest = max(map(len, names))
    columns = 1 if longest > 50 else 2 if longest > 30 else 3
    below = 0.4 + 0.21 * -(-len(names) // columns)  # inches, for the legend and its title
    with drawing(out, 11, 4.1 + below) as figure:
        both = figure.subplots(1, 2, sharey=True)
        for axes, part, title in zip(
            both, (1, 0), ("validation, whole text", "training batches, smoothed"), strict=True
        ):
            for number, losses in enumerate(curves):
                dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
                marker = "" if len(losses[part]) > 1 else "o"
                axes.plot(losses[part], dashes, marker=marker, linewidth=1.8, color=COLOURS[number % len(COLOURS)])
            axes.set(xlabel=by, xlim=(-0.01 * max(ends), 1.02 * max(ends) or 1), ylim=(low - margin, high + margin))
            axes.set_title(title, loc="left", fontsize=11)
        both[0].set_ylabel(f"loss, nats per {unit}")
        # The value comes first: matplotlib leaves out labels that begin with _.
        labels = [f"{val.min():.4f}  {name}" for (_, val), name in zip(curves, names, strict=True)]
        legend: Any = {"loc": "lower left", "bbox_to_anchor": (0.03, 0), "ncols": columns, "alignment": "left"}
        figure.legend(both[0].lines, labels, fontsize=9.5, title="best validation loss, and run", **legend)
        figure.tight_layout(rect=(0, below / (4.1 + below), 1, 1))


def best_label(results: dict[str, Any]) -> str:
    """The lowest validation loss of a training, where it is known also in bits per byte."""
    bits = results.get("val_bits_per_byte")
    return f"best: {results['best_val_loss']:.4f}" + (f" ({bits:.3f} bits per byte)" if bits else "")


def drawable(text: str, most: int) -> str:
    """A user's text in a figure: at most `most` characters, with code points in place of those that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = "".join(each if font.get_char_index(ord(each)) else f"U+{ord(each):04X}" for each in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def drawing(out: Path, width: float, height: float, banner: str = "") -> Iterator[Figure]:
    """A new figure in the style of all, of this size in inches; it is written to `out` as PNG, in one piece.

    `banner` is a sentence in its lower right corner, for a run that is not one of the write-up.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # not the user's own matplotlibrc, which may ask for TeX
        figure = Figure(figsize=(width, height))
        yield figure
        if banner:
            box = {"facecolor": "#fff3d6", "edgecolor": VERMILION, "boxstyle": "round,pad=0.35"}
            words = drawable(banner, 60)
            figure.text(0.985, 0.12 / height, words, ha="right", va="bottom", fontsize=9.5, color=VERMILION, bbox=box)
        with atomic_write(out) as file:
            figure.savefig(file, format="png", dpi=144)


def read_losses(metrics: Path) -> list[pd.Series]:
    """As `losses_of`, from a file of metrics."""
    return losses_of(records.read_lines(metrics), metrics)


def losses_of(rows: list[dict[str, Any]], source: object, by: str = "epoch") -> list[pd.Series]:
    """The losses of the training batches, of validation and of the training text by epoch, or by step.

    Those of batches are means over about a fortieth of the run, so that the trend is seen and not their noise.
    """
    losses = ("train_loss", "val_loss", "train_loss_exact")
    try:
        frame = pd.DataFrame(rows, columns=[by, *losses], dtype=float)
    except (ValueError, TypeError) as error:
        raise PicogptError(f"{source} has a loss that is not a number: {error}") from error
    train, val, exact_train = (frame[[by, loss]].dropna() for loss in losses)
    train = train.groupby(np.arange(len(train)) // max(1, len(train) // 40)).mean()
    return [part.set_index(by).iloc[:, 0] for part in (train, val, exact_train)]


def reference_lines(record: dict[str, Any]) -> list[tuple[float, str, str, tuple[int, ...]]]:
    """(value, label, colour, dashes) of the horizontal lines: published losses, and the floor of a bigram."""
    lines: list[tuple[float, str, str, tuple[int, ...]]] = []
    if (floor := record["results"].get("closed_form_train_loss")) is not None:
        lines.append((floor, f"lower bound of training, pair counts: {floor:.4f}", GREEN, (2, 1)))
    rows = published_for(records.key(record))
    for key, (name, dashes) in PUBLISHED.items():
        if not (row := rows.get(key)):
            continue
        if row["comparable"] == "no":
            name = "published, measured differently"
        elif row["depends_on_text"] == "yes" and not on_published_text(record):
            name += f" ({CORPUS})"
        lines.append((row["published"], f"{name}: {row['published']:.4f}", GREY, dashes))
    return lines


def magnified(train: pd.Series, val: pd.Series, lines: list[float], epochs: float) -> tuple[float, float]:
    """Limits that show the curves after the first tenth of the run, and the lines that lie near them."""
    losses = pd.concat([train, val])
    settled = losses[losses.index >= 0.1 * epochs] if (losses.index >= 0.1 * epochs).any() else val
    low, high = settled.min(), settled.max()
    near = [value for value in lines if low - 0.5 * (high - low) < value < high + 1.5 * (high - low)]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low)
    return low - margin, high + margin
