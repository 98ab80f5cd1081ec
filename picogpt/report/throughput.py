"""The figure of a training ladder: what each rung brought on one machine, beside the published marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from picogpt import machines
from picogpt.config import MachineConfig
from picogpt.report import ladder
from picogpt.report.compare import published_values, read_records, read_references
from picogpt.report.figures import BLUE, GREEN, GREY, STYLE, VERMILION, pyplot, save

GPT2_124M = 124_439_808
LABELS = {
    "baseline": "baseline: float32, AdamW",
    "tf32": "+ TF32",
    "bf16": "+ bfloat16 autocast",
    "compile": "+ torch.compile",
    "flash": "+ flash attention",
    "padded_vocab": "+ padded vocabulary",
    "fused_adamw": "+ fused AdamW, decay groups",
    "fused_loss": "+ fused head and loss",
    "best_attention": "+ fastest attention kernel",
    "kept_memory": "+ malloc keeps freed memory",
    "cuda_graphs": "+ CUDA graphs",
    "max_autotune": "+ max-autotune",
}


def draw_throughput(name: str, record_files: Iterable[Path], reference_files: Iterable[Path], out: Path) -> None:
    """Bars of speed-up over the baseline, rung by rung, with tokens/s; published values as diamonds.

    Where `record_files` have none of this machine, the reference records are drawn, in another colour and named as such;
    where there are none either, the published marks alone. Nothing else ever stands under the name of a machine.
    """
    machine, name = machines.load(name), machines.name_of(name)
    here = ladder.of(name, read_records(record_files))
    measured = here or ladder.of(name, read_references(reference_files))
    marks = {rung: published_values(ladder.kind(name, rung)).get("speedup") for rung in machine.rungs}
    target = published_values(f"train gpt2 {name}").get("tokens_per_second")

    plt = pyplot()
    height = 1.9 + 0.42 * len(machine.rungs)  # inches
    bars = {rung: record["results"] for rung, record in measured.items() if record["results"].get("speedup")}
    first = bars.get("baseline")
    longest = max(
        [
            1.0,
            *([target / first["tokens_per_second"]] if target and first else []),
            *(mark for mark in marks.values() if mark),
            *(bar["speedup"] for bar in bars.values()),
        ]
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10.5, height))
        for place, rung in enumerate(machine.rungs):
            end = 0.0
            if rung in bars:
                end = _draw_bar(axes, place, bars[rung], BLUE if here else GREEN)
            elif measured:
                axes.text(0.02, place, _reason(measured.get(rung)), va="center", fontsize=9, color=GREY, style="italic")
            mark = marks[rung]
            if mark:
                axes.plot(
                    mark, place, marker="D", markersize=8, color=VERMILION, markeredgecolor="white", linestyle="none",
                    zorder=5,
                )  # fmt: skip
            words = _amount(bars[rung], machine) if rung in bars else f"{mark:g}x" if mark else ""
            axes.text(max(end, mark or 0) + 0.015 * longest, place, words, va="center", fontsize=10)
        if target and first:
            axes.axvline(target / first["tokens_per_second"], color=VERMILION, linestyle=(0, (4, 2)), linewidth=1.4)
        axes.set_yticks(range(len(machine.rungs)), [LABELS[rung] for rung in machine.rungs])
        axes.set_ylim(len(machine.rungs) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.42)
        axes.set_xlabel("speed-up over the baseline")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if not bars:
            _say_so(axes, bool(measured), any(marks.values()), target)
        parameters = next((bar["parameters"] for bar in bars.values()), GPT2_124M)
        title = _title(machine.title, parameters, *ladder.shape(machine, measured))
        figure.text(0.012, 1 - 0.12 / height, title, fontsize=13, va="top", fontweight="bold")
        subtitle = _subtitle(bool(here), measured, bars, any(marks.values()), target)
        figure.text(0.012, 1 - 0.42 / height, subtitle, fontsize=9.5, color=GREY, va="top")
        figure.text(0.012, 0.1 / height, _caption(measured, list(bars.values())), fontsize=9, color=GREY, va="bottom")
        figure.tight_layout(rect=(0, 0.42 / height, 1, 1 - 0.6 / height))
        save(figure, out)


def _draw_bar(axes: Any, place: int, results: dict[str, Any], colour: str) -> float:
    """A bar with the spread of its steps; returns where it ends."""
    speedup, median = results["speedup"], results["median"]
    slowest, fastest = speedup * median / results["slowest"], speedup * median / results["fastest"]
    axes.barh(place, speedup, height=0.62, color=colour, edgecolor="white", hatch="//" if colour == GREEN else None)
    spread = [[speedup - slowest], [fastest - speedup]]
    axes.errorbar(speedup, place, xerr=spread, color="#222222", elinewidth=1.1, capsize=2.5)
    return fastest


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
    x, y, at = (0.98, 0.95, "right") if marks else (0.5, 0.6, "center")
    axes.text(
        x, y, words, transform=axes.transAxes, ha=at, va="top", fontsize=11.5, color="#444444",
        bbox={"facecolor": "white", "edgecolor": "#d0d0d0", "boxstyle": "round,pad=0.6"},
    )  # fmt: skip


def _title(machine: str, parameters: int, batch_size: int, block_size: int) -> str:
    size = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"of {parameters:,} parameters"
    return f"Training GPT-2 {size} on {machine}: B={batch_size}, T={block_size}"


def _subtitle(
    here: bool, measured: Mapping[str, Any], bars: Mapping[str, Any], marks: bool, target: float | None
) -> str:
    if not bars:
        found = "records without a baseline" if measured else "no records of this run, and no reference records"
        return found + (": published values alone" if marks else "")
    whose = "measured in this run" if here else "reference records, not measured in this run"
    above = "those above it" if len(bars) == len(measured) else "those measured above it"
    parts = [f"bars: {whose}, each rung including {above}; error bars: fastest and slowest step"]
    if marks:
        parts.append("diamonds: published")
    if target:
        parts.append(f"dashed: published, {target:,.0f} tokens/s")
    return "; ".join(parts)


def _amount(results: dict[str, Any], machine: MachineConfig) -> str:
    parts = [f"{results['speedup']:.2f}x", f"{results['tokens_per_second']:,.0f} tok/s"]
    if results["mfu"]:
        parts.append(f"{100 * results['mfu']:.0f}% of its bfloat16 peak")
    if results["out_of_memory"]:
        parts.append(f"micro-batches of {results['micro_batch_size']}: larger ones ran out of memory")
    return "  ".join(parts)


def _reason(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not measured"
    return f"not measured: {record.get('not_measured', 'no baseline to compare with')}"


def _caption(measured: dict[str, Any], bars: list[dict[str, Any]]) -> str:
    if not bars:
        return "published: the write-up of which this is a reproduction; config/published.csv has its numbers"
    record = next(record for record in measured.values() if record["results"])
    device, software = record["device"], record["software"]
    difference = ladder.largest_difference(measured) or 0.0  # there are bars, so there is a baseline
    within = "all within" if difference <= ladder.LOSS_TOLERANCE else "NOT all within"
    machine = f"{device['name']}, {device['cores']} cores" if device["kind"] == "cpu" else device["name"]
    dirty = " with uncommitted changes" if record["dirty"] else ""
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return (
        f"{machine}{driver}; torch {software['torch']}; commit {(record['commit'] or 'unknown')[:12]}{dirty}; {record['created'][:10]};"
        f" medians of {len(bars[0]['step_seconds'])} steps.\nLosses differ from the baseline's by at most {difference:.1g} nats,"
        f" {within} {ladder.LOSS_TOLERANCE}; highest memory {max(results['peak_memory_bytes'] for results in bars) / 2**30:.1f} GiB"
    )
