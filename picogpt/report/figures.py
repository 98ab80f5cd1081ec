"""Figures, drawn from records alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.files import atomic_write
from picogpt.report.compare import CORPUS, on_published_text, published

# Okabe and Ito's palette, which colour-blind readers can distinguish; grey for published values.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
EVALUATED = {"part": "part of the text", "whole": "whole text"}
STYLE: Any = {
    "figure.facecolor": "white",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw_loss_curve(run_folder: Path, out: Path) -> None:
    """Training and validation loss of a run by epoch; published values, the best step and known limits marked.

    Two panels: the whole run, and its lower part magnified. Epochs are marked by dotted lines.
    """
    plt = pyplot()
    record = records.read(run_folder / "record.json")
    rows = records.read_lines(run_folder / "metrics.jsonl")
    results = record["results"]
    train = _smooth([(row["epoch"], row["train_loss"]) for row in rows if "train_loss" in row])
    val = [(row["epoch"], row["val_loss"]) for row in rows if "val_loss" in row]
    exact_train = [(row["epoch"], row["train_loss_exact"]) for row in rows if "train_loss_exact" in row]
    lines = _references(record)
    with plt.rc_context(STYLE):
        figure, (whole, lower) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.5))
        for axes in (whole, lower):
            for epoch in range(1, int(results["epochs"] + 0.01) + 1):
                axes.axvline(epoch, color="#bdbdbd", linewidth=0.8, linestyle=(0, (1, 2)))
            for value, label, colour, dashes in lines:
                axes.axhline(value, color=colour, linewidth=1.3, linestyle=(0, dashes), label=label)
            axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.2, label="training batches, smoothed")
            axes.plot(*zip(*val, strict=True), color=VERMILION, linewidth=2, label="validation, whole text")
            axes.plot(
                results["best_epoch"], results["best_val_loss"], marker="o", markersize=8, color=VERMILION,
                markeredgecolor="white", linestyle="none", label=f"best: {results['best_val_loss']:.4f}", zorder=5,
            )  # fmt: skip
            if exact_train:
                axes.plot(
                    *zip(*exact_train, strict=True), marker="D", markersize=7, color=BLUE, markeredgecolor="white",
                    linestyle="none", label=f"training, {EVALUATED[record['config']['train']['eval_train']]}: {exact_train[-1][1]:.4f}", zorder=4,
                )  # fmt: skip
            axes.set_xlabel("epoch")
            axes.set_xlim(0, results["epochs"] * 1.02)
        lower.set_ylim(_magnified(train, val, [value for value, *_ in lines], results["epochs"]))
        whole.set_ylabel(f"loss, nats per {_unit(record)}")
        whole.set_title("whole run", loc="left", fontsize=11)
        lower.set_title("magnified", loc="left", fontsize=11)
        handles, labels = lower.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: index < len(lines))  # ours first
        figure.legend(
            [handles[index] for index in order], [labels[index] for index in order],
            loc="lower left", bbox_to_anchor=(0.005, 0.055), ncols=4, fontsize=9.5, columnspacing=1.6,
        )  # fmt: skip
        figure.suptitle(_title(record), x=0.012, ha="left", fontweight="bold")
        figure.text(0.012, 0.018, _caption(record), fontsize=9, color=GREY)
        figure.tight_layout(rect=(0, 0.17, 1, 1))
        save(figure, out)


def pyplot() -> Any:
    """matplotlib's pyplot, loaded when a figure is drawn, and without a screen."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, out: Path) -> None:
    """Write a figure as PNG, in one piece, and free it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=144)
    pyplot().close(figure)
    with atomic_write(out) as file:
        file.write(picture.getvalue())


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over about a fortieth of the run, so that the trend is seen and not the noise of single batches."""
    width = max(1, len(points) // 40)
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _references(record: dict[str, Any]) -> list[tuple[float, str, str, tuple[int, ...]]]:
    """(value, label, colour, dashes) of the horizontal lines: published losses, and the floor of a bigram."""
    lines: list[tuple[float, str, str, tuple[int, ...]]] = []
    floor = record["results"].get("closed_form_train_loss")
    if floor is not None:
        lines.append((floor, f"lower bound of training, pair counts: {floor:.4f}", GREEN, (2, 1)))
    names = {
        "train_loss_after": ("published, training", (8, 3)),
        "val_loss_after": ("published, final validation", (5, 3)),
        "best_val_loss": ("published, best validation", (3, 2)),
    }
    rows = published()
    known = rows[(rows.record == record["kind"]) & rows.published.notna()].set_index("key")
    for key, (name, dashes) in names.items():
        if key not in known.index:
            continue
        number = known.loc[key]
        if number.comparable == "no":
            name = "published, measured differently"
        elif number.depends_on_text == "yes" and not on_published_text(record):
            name += f" ({CORPUS})"
        lines.append((number.published, f"{name}: {number.published:.4f}", GREY, dashes))
    return lines


def _magnified(
    train: list[tuple[float, float]], val: list[tuple[float, float]], lines: list[float], epochs: float
) -> tuple[float, float]:
    """Limits that show the curves after the first tenth of the run, and the lines that lie near them."""
    settled = [loss for epoch, loss in train + val if epoch >= 0.1 * epochs] or [loss for _, loss in val]
    low, high = min(settled), max(settled)
    near = [value for value in lines if low - 0.5 * (high - low) < value < high + 1.5 * (high - low)]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _title(record: dict[str, Any]) -> str:
    kind = record["kind"].removeprefix("train ")
    results = record["results"]
    return f"{kind} on {record['corpus']['name']}: {results['parameters']:,} parameters, {results['tokens'] / 1e6:.1f} M {_unit(record)}s seen"


def _unit(record: dict[str, Any]) -> str:
    return "token" if record["kind"].startswith("train gpt2") else "character"


def _caption(record: dict[str, Any]) -> str:
    device, software = record["device"], record["software"]
    seconds = record["results"]["train_seconds"]
    return (
        f"{device['name']}, {device['cores']} cores, {device['dtype']}; torch {software['torch']};"
        f" {seconds:.0f} s of training; seed {record['config']['train']['seed']}"
    )
