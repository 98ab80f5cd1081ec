"""The figure of a training ladder: what each rung brought on one machine, beside the published marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt.records import Key
from picogpt.registry import RUNGS
from picogpt.report.compare import published_for, read_records, read_references
from picogpt.report.figures import BLUE, GREEN, GREY, VERMILION, drawable, drawing
from picogpt.report.ladder import LOSS_TOLERANCE, Ladder, find


def draw_throughput(
    name: str, record_files: Iterable[Path], reference_files: Iterable[Path], out: Path, banner: str = ""
) -> None:
    """Bars of speed-up over the baseline, rung by rung, with tokens/s; published values as diamonds.

    Where `record_files` have none of this machine, the reference records are drawn, in another colour and named as such;
    where there are none either, the published marks alone. Nothing else ever stands under the name of a machine.
    """
    ladder = find(name, read_records(record_files), read_references(reference_files))
    rungs = {rung: position for position, rung in enumerate(ladder.machine.rungs)}
    rows = {rung: published_for(Key("ladder", "gpt2", ladder.name, rung)).get("speedup") for rung in rungs}
    marks = {rung: row["published"] for rung, row in rows.items() if row}
    target = published_for(Key("train", "gpt2", ladder.name)).get("tokens_per_second", {}).get("published")
    results = {rung: record["results"] for rung, record in ladder.rungs.items()}
    bars = {rung: results[rung] for rung in rungs if results.get(rung, {}).get("speedup")}
    ratio = target / bars["baseline"]["tokens_per_second"] if target and "baseline" in bars else 0.0
    longest = max([1.0, ratio, *marks.values(), *(bar["speedup"] for bar in bars.values())])
    title, subtitle, caption = _texts(ladder, bars, bool(marks), target)
    foot = 0.45 if banner else 0.1  # inches, as the caption is as wide as the figure
    height = 1.8 + foot + 0.42 * len(rungs)  # inches
    look: Any = {"color": BLUE} if ladder.here else {"color": GREEN, "hatch": "//"}
    look |= {"edgecolor": "white", "error_kw": {"ecolor": "#222222", "elinewidth": 1.1, "capsize": 2.5}}
    with drawing(out, 10.5, height, banner) as figure:
        axes = figure.subplots()
        for rung, position in rungs.items():
            end, words = marks.get(rung, 0.0), f"{marks[rung]:g}x" if rung in marks else ""
            if bar := bars.get(rung):
                speedup = bar["speedup"]
                slowest, fastest = (speedup * bar["median"] / bar[step] for step in ("slowest", "fastest"))
                axes.barh(position, speedup, 0.62, xerr=[[speedup - slowest], [fastest - speedup]], **look)
                end, words = max(end, fastest), _amount(bar)
            elif ladder.rungs:
                known = ladder.rungs.get(rung)
                reason = f": {known.get('not_measured') or 'no baseline to compare with'}" if known else ""
                axes.text(0.02, position, "not measured" + reason, va="center", fontsize=9, color=GREY, style="italic")
            axes.text(end + 0.015 * longest, position, words, va="center", fontsize=10)
        diamonds: Any = {"color": VERMILION, "markeredgecolor": "white", "markersize": 8, "zorder": 5}
        axes.plot(list(marks.values()), [rungs[rung] for rung in marks], "D", **diamonds)
        if ratio:
            axes.axvline(ratio, color=VERMILION, linestyle=(0, (4, 2)), linewidth=1.4)
        axes.set_yticks(list(rungs.values()), [RUNGS[rung].label for rung in rungs])
        axes.set(ylim=(len(rungs) - 0.4, -0.6), xlim=(0, longest * 1.42), xlabel="speed-up over the baseline")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if not bars:
            _say_so(axes, bool(ladder.rungs), bool(marks), target)
        figure.text(0.012, 1 - 0.12 / height, title, fontsize=13, va="top", fontweight="bold")
        figure.text(0.012, 1 - 0.42 / height, subtitle, va="top", fontsize=9.5, color=GREY)
        figure.text(0.012, foot / height, caption, va="bottom", fontsize=9, color=GREY)
        figure.tight_layout(rect=(0, (foot + 0.32) / height, 1, 1 - 0.6 / height))


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


def _amount(bar: dict[str, Any]) -> str:
    mfu = f"  {100 * bar['mfu']:.0f}% of its bfloat16 peak" if bar.get("mfu") else ""
    micro = f"  micro-batches of {bar.get('micro_batch_size')}: larger ones ran out of memory"
    return (
        f"{bar['speedup']:.2f}x  {bar['tokens_per_second']:,.0f} tok/s{mfu}{micro if bar.get('out_of_memory') else ''}"
    )


def _texts(ladder: Ladder, bars: dict[str, dict[str, Any]], marks: bool, target: float | None) -> tuple[str, str, str]:
    """Title, subtitle and caption of the figure."""
    parameters = next((bar["parameters"] for bar in bars.values()), 124_439_808)
    model = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"of {parameters:,} parameters"
    title = "Training GPT-2 {} on {}: B={}, T={}".format(model, drawable(ladder.machine.title, 50), *ladder.shape)
    if not bars:
        found = "records without a baseline" if ladder.rungs else "no records of this run, and no reference records"
        caption = "published: the write-up of which this is a reproduction; config/published.csv has its numbers"
        return title, found + (": published values alone" if marks else ""), caption
    whose = "measured in this run" if ladder.here else "reference records, not measured in this run"
    above = "those above it" if len(bars) == len(ladder.rungs) else "those measured above it"
    subtitle = f"bars: {whose}, each rung including {above}; error bars: fastest and slowest step"
    subtitle += "; diamonds: published" if marks else ""
    subtitle += f"; dashed: published, {target:,.0f} tokens/s" if target else ""
    record = ladder.rungs[next(iter(bars))]
    device, commit = record["device"], (record["commit"] or "unknown")[:12]
    difference = ladder.largest_difference or 0.0  # there are bars, so there is a baseline
    cores = f", {device['cores']} cores" if device["kind"] == "cpu" else ""
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    caption = (
        f"{device['name']}{cores}{driver}; torch {record['software'].get('torch')}; commit {commit}"
        f"{' with uncommitted changes' if record['dirty'] else ''}; {record['created'][:10]}; medians of"
        f" {record['config']['hardware']['steps']} steps.\nLosses differ from the baseline's by at most {difference:.1g}"
        f" nats, {'all' if difference <= LOSS_TOLERANCE else 'NOT all'} within {LOSS_TOLERANCE}; highest memory"
        f" {max(bar['peak_memory_bytes'] for bar in bars.values()) / 2**30:.1f} GiB"
    )
    return title, subtitle, caption
