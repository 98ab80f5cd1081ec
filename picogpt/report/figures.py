"""Figures, drawn from records alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picogpt import records
from picogpt.files import atomic_write
from picogpt.report.published import CORPUS, published

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by colour-blind readers; and grey for what is not ours.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
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

    Two panels: the whole run, and its lower part magnified.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    record = records.read(run_folder / "record.json")
    rows = records.read_lines(run_folder / "metrics.jsonl")
    results = record["results"]
    train = [(row["epoch"], row["train_loss"]) for row in rows if "train_loss" in row]
    val = [(row["epoch"], row["val_loss"]) for row in rows if "val_loss" in row]
    references = _references(record)
    with plt.rc_context(STYLE):
        figure, (whole, lower) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1, 1.35))
        for axes in (whole, lower):
            axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=0.9, alpha=0.55, label="training batches")
            axes.plot(*zip(*val, strict=True), color=VERMILION, linewidth=2, label="validation, whole split")
            for epoch in range(1, int(results["epochs"]) + 1):
                axes.axvline(epoch, color="#bdbdbd", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.plot(
                results["best_epoch"], results["best_val_loss"], marker="o", markersize=8, color=VERMILION,
                markeredgecolor="white", linestyle="none", label=f"best: {results['best_val_loss']:.4f}", zorder=5,
            )  # fmt: skip
            axes.set_xlabel("epoch")
            axes.set_xlim(0, results["epochs"] * 1.02)
        _frame_lower(lower, val, results, references)
        whole.set_ylabel("cross-entropy, nats per character")
        whole.set_title("whole run", loc="left", fontsize=11)
        lower.set_title("magnified", loc="left", fontsize=11)
        lower.legend(loc="upper right")
        figure.suptitle(_title(record), x=0.012, ha="left", fontweight="bold")
        figure.text(0.012, 0.008, _caption(record), fontsize=8, color=GREY)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=144)
        plt.close(figure)
    with atomic_write(out) as file:
        file.write(picture.getvalue())


def _references(record: dict[str, Any]) -> list[tuple[float, str, str]]:
    """(value, label, colour) of the horizontal lines: published losses, and the floor of a bigram."""
    lines = []
    results = record["results"]
    if "closed_form_train_loss" in results:
        floor = results["closed_form_train_loss"]
        lines.append((floor, f"best any bigram can do in training: {floor:.4f}", GREEN))
    names = {
        "best_val_loss": "published best",
        "val_loss_after": "published validation",
        "train_loss_after": "published training",
    }
    values = published(record["kind"])
    where = "" if record["corpus"]["name"] == CORPUS else f" (on {CORPUS})"
    lines += [(values[key], f"{name}{where}: {values[key]:.4f}", GREY) for key, name in names.items() if key in values]
    return lines


def _frame_lower(axes: Axes, val: list[tuple[float, float]], results: dict[str, Any], lines: list) -> None:
    """Show the part from below every line to a little above the first tenth of the run, and label the lines."""
    settled = [loss for epoch, loss in val if epoch >= 0.1 * results["epochs"]]
    near = [value for value, _, _ in lines if value < 1.7 * results["best_val_loss"]]
    low, high = min([results["best_val_loss"], *near]), max([*settled, *near])
    margin = 0.12 * (high - low)
    axes.set_ylim(low - margin, high + 2.2 * margin)
    # Labels of lines that nearly coincide go to opposite sides of theirs.
    placed: list[float] = []
    for value, label, colour in sorted(lines):
        if value not in near:
            continue
        axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
        close = any(abs(value - other) < 0.09 * (high - low) for other in placed)
        axes.annotate(
            label, (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 3 if close or not placed else -3),
            textcoords="offset points", ha="right", va="bottom" if close or not placed else "top", fontsize=8.5, color=colour,
        )  # fmt: skip
        placed.append(value)


def _title(record: dict[str, Any]) -> str:
    kind = record["kind"].removeprefix("train ")
    results = record["results"]
    return f"{kind} on {record['corpus']['name']}: {results['parameters']:,} parameters, {results['tokens'] / 1e6:.1f} M characters seen"


def _caption(record: dict[str, Any]) -> str:
    device, software = record["device"], record["software"]
    seconds = record["results"]["train_seconds"]
    return (
        f"{device['name']}, {device['cores']} cores, {device['dtype']}; torch {software['torch']};"
        f" {seconds:.0f} s of training; seed {record['config']['train']['seed']}"
    )
