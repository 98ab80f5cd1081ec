"""The figure of a training ladder: what each rung brought on one machine, beside the published marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt.records import Key
from picogpt.registry import RUNGS
from picogpt.report.compare import published_for, read_records, read_references
from picogpt.report.figures import BLUE, GREEN, GREY, VERMILION, drawing
from picogpt.report.ladder import LOSS_TOLERANCE, Ladder, find

GPT2_124M = 124_439_808


def draw_throughput(name: str, record_files: Iterable[Path], reference_files: Iterable[Path], out: Path) -> None:
    """Bars of speed-up over the baseline, rung by rung, with tokens/s; published values as diamonds.

    Where `record_files` have none of this machine, the reference records are drawn, in another colour and named as such;
    where there are none either, the published marks alone. Nothing else ever stands under the name of a machine.
    """
    ladder = find(name, read_records(record_files), read_references(reference_files))
    rungs = {rung: position for position, rung in enumerate(ladder.machine.rungs)}
    marks = {}
    for rung in rungs:
        if row := published_for(Key("ladder", "gpt2", ladder.name, rung)).get("speedup"):
            marks[rung] = row["published"]
    target = published_for(Key("train", "gpt2", ladder.name)).get("tokens_per_second", {}).get("published")
    results = {rung: ladder.rungs[rung]["results"] for rung in rungs if rung in ladder.rungs}
    bars = {rung: bar for rung, bar in results.items() if bar.get("speedup")}
    ends = marks | {rung: max(_steps(bar)[1], marks.get(rung, 0)) for rung, bar in bars.items()}
    longest = max([1.0, *marks.values(), *(bar["speedup"] for bar in bars.values())])

    height = 1.9 + 0.42 * len(rungs)  # inches
    with drawing(out, 10.5, height) as figure:
        axes = figure.subplots()
        for rung, bar in bars.items():
            speedup, (slowest, fastest) = bar["speedup"], _steps(bar)
            look: Any = {"color": BLUE} if ladder.here else {"color": GREEN, "hatch": "//"}
            error = {"ecolor": "#222222", "elinewidth": 1.1, "capsize": 2.5}
            spread = [[speedup - slowest], [fastest - speedup]]
            axes.barh(rungs[rung], speedup, 0.62, xerr=spread, error_kw=error, edgecolor="white", **look)
        axes.plot(
            list(marks.values()), [rungs[rung] for rung in marks], "D",
            markersize=8, color=VERMILION, markeredgecolor="white", zorder=5,
        )  # fmt: skip
        if target and "baseline" in bars:
            ratio = target / bars["baseline"]["tokens_per_second"]
            longest = max(longest, ratio)
            axes.axvline(ratio, color=VERMILION, linestyle=(0, (4, 2)), linewidth=1.4)
        for rung, position in rungs.items():
            words = _amount(bars[rung]) if rung in bars else f"{marks[rung]:g}x" if rung in marks else ""
            axes.text(ends.get(rung, 0) + 0.015 * longest, position, words, va="center", fontsize=10)
            if ladder.rungs and rung not in bars:
                known = ladder.rungs.get(rung)
                reason = f": {known.get('not_measured') or 'no baseline to compare with'}" if known else ""
                axes.text(0.02, position, "not measured" + reason, va="center", fontsize=9, color=GREY, style="italic")
        axes.set_yticks(list(rungs.values()), [RUNGS[rung].label for rung in rungs])
        axes.set(ylim=(len(rungs) - 0.4, -0.6), xlim=(0, longest * 1.42), xlabel="speed-up over the baseline")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if not bars:
            _say_so(axes, bool(ladder.rungs), bool(marks), target)
        small: Any = {"fontsize": 9.5, "color": GREY}
        figure.text(0.012, 1 - 0.12 / height, _title(ladder, bars), fontsize=13, va="top", fontweight="bold")
        figure.text(0.012, 1 - 0.42 / height, _subtitle(ladder, bars, bool(marks), target), va="top", **small)
        figure.text(0.012, 0.1 / height, _caption(ladder, bars), va="bottom", **small | {"fontsize": 9})
        figure.tight_layout(rect=(0, 0.42 / height, 1, 1 - 0.6 / height))


def _steps(bar: dict[str, Any]) -> tuple[float, float]:
    """The speed-ups of the slowest and of the fastest step."""
    return bar["speedup"] * bar["median"] / bar["slowest"], bar["speedup"] * bar["median"] / bar["fastest"]


def _say_so(axes: Any, measured: bool, marks: bool, target: float | None) -> None:
    """Write into the picture that nothing in it was measured, or that there is nothing to compare it with."""
    words = "The baseline was not measured, so there are no speed-ups." if measured else "Not measured in this run."
    if marks:
        words += "\nThe diamonds are the published values."
    elif target:
        words += f"\nPublished: {target:,.0f} tokens/s."
    elif not measured:
        words += "\nNo numbers are published for this machine."
    # Published speed-ups grow from top to bottom: the upper right corner is free.
    x, y, align = (0.98, 0.95, "right") if marks else (0.5, 0.6, "center")
    box = {"facecolor": "white", "edgecolor": "#d0d0d0", "boxstyle": "round,pad=0.6"}
    axes.text(x, y, words, transform=axes.transAxes, ha=align, va="top", fontsize=11.5, color="#444444", bbox=box)


def _title(ladder: Ladder, bars: dict[str, dict[str, Any]]) -> str:
    parameters = next((bar["parameters"] for bar in bars.values()), GPT2_124M)
    model = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"of {parameters:,} parameters"
    return "Training GPT-2 {} on {}: B={}, T={}".format(model, ladder.machine.title, *ladder.shape)


def _subtitle(ladder: Ladder, bars: dict[str, dict[str, Any]], marks: bool, target: float | None) -> str:
    if not bars:
        found = "records without a baseline" if ladder.rungs else "no records of this run, and no reference records"
        return found + (": published values alone" if marks else "")
    whose = "measured in this run" if ladder.here else "reference records, not measured in this run"
    above = "those above it" if len(bars) == len(ladder.rungs) else "those measured above it"
    parts = [f"bars: {whose}, each rung including {above}; error bars: fastest and slowest step"]
    if marks:
        parts.append("diamonds: published")
    if target:
        parts.append(f"dashed: published, {target:,.0f} tokens/s")
    return "; ".join(parts)


def _amount(bar: dict[str, Any]) -> str:
    parts = [f"{bar['speedup']:.2f}x", f"{bar['tokens_per_second']:,.0f} tok/s"]
    if bar.get("mfu"):
        parts.append(f"{100 * bar['mfu']:.0f}% of its bfloat16 peak")
    if bar.get("out_of_memory"):
        parts.append(f"micro-batches of {bar.get('micro_batch_size')}: larger ones ran out of memory")
    return "  ".join(parts)


def _caption(ladder: Ladder, bars: dict[str, dict[str, Any]]) -> str:
    if not bars:
        return "published: the write-up of which this is a reproduction; config/published.csv has its numbers"
    record = ladder.rungs[next(iter(bars))]
    device = record["device"]
    difference = ladder.largest_difference or 0.0  # there are bars, so there is a baseline
    within = "all within" if difference <= LOSS_TOLERANCE else "NOT all within"
    cores = f", {device['cores']} cores" if device["kind"] == "cpu" else ""
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    dirty = " with uncommitted changes" if record["dirty"] else ""
    memory = max(bar["peak_memory_bytes"] for bar in bars.values()) / 2**30
    return (
        f"{device['name']}{cores}{driver}; torch {record['software'].get('torch')};"
        f" commit {(record['commit'] or 'unknown')[:12]}{dirty}; {record['created'][:10]};"
        f" medians of {record['config']['hardware']['steps']} steps.\nLosses differ from the baseline's by at most"
        f" {difference:.1g} nats, {within} {LOSS_TOLERANCE}; highest memory {memory:.1f} GiB"
    )
