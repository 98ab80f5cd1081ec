"""The figure of how the cost of data grows."""

from __future__ import annotations

import statistics
from pathlib import Path

from picogpt import records
from picogpt.report.figures import BLUE, GREEN, GREY, STYLE, VERMILION, pyplot, save


def draw_data_scaling(record_file: Path, out: Path) -> None:
    """Left: tokens/s of tokenizing by cores, ours and tiktoken's. Right: time to open and to draw a batch by shards."""
    plt = pyplot()
    record = records.read(record_file)
    results, config = record["results"], record["config"]
    threads, shards = config["threads"], config["shards"]
    with plt.rc_context(STYLE):
        figure, (cores, files) = plt.subplots(1, 2, figsize=(11, 4.2))
        for name, label, colour, marker in (
            ("tiktoken_tokens_per_second", "tiktoken's own batches", GREY, "s"),
            ("tokens_per_second", "picogpt", BLUE, "o"),
        ):
            runs = [sorted(rate / 1e6 for rate in rates) for rates in results[name]]
            middle = [statistics.median(rates) for rates in runs]
            spread = [
                [m - rates[0] for m, rates in zip(middle, runs, strict=True)],
                [rates[-1] - m for m, rates in zip(middle, runs, strict=True)],
            ]
            cores.errorbar(
                threads, middle, yerr=spread, marker=marker, markersize=7, color=colour, linewidth=1.6, capsize=3,
                label=label,
            )  # fmt: skip
        ideal = [results["one_thread"] * count / 1e6 for count in threads]
        cores.plot(threads, ideal, color=BLUE, linewidth=1, linestyle=(0, (2, 2)), label="one core, times cores")
        cores.set_title("tokenizing", loc="left", fontsize=11)
        cores.set_xlabel("cores")
        cores.set_ylabel("million tokens a second")
        cores.set_xticks(threads)
        cores.set_ylim(bottom=0)
        for name, label, colour, marker in (
            ("first_batch_seconds", f"first batch of {config['windows']} windows, which opens files", VERMILION, "D"),
            ("batch_seconds", f"batch of {config['windows']} windows, later", BLUE, "o"),
            ("open_seconds", "opening the corpus", GREEN, "s"),
        ):
            values = [1000 * seconds for seconds in results[name]]
            files.plot(shards, values, marker=marker, markersize=7, color=colour, linewidth=1.6, label=label)
        files.set_xscale("log")
        files.set_yscale("log")
        files.set_title("reading", loc="left", fontsize=11)
        files.set_xlabel("shards")
        files.set_ylabel("milliseconds")
        for axes in (cores, files):
            axes.legend(fontsize=9.5, loc="upper left")
        low, high = files.get_ylim()
        files.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        cores.set_ylim(top=cores.get_ylim()[1] * 1.35)
        figure.suptitle("How the cost of data grows", x=0.012, ha="left", fontweight="bold")
        device = record["device"]
        caption = (
            f"{device['name']}, {device['cores']} cores; medians, and fastest and slowest of {config['runs']} runs;"
            f" simulated shards of {config['shard_tokens']:,} tokens; {record['created'][:10]}"
        )
        figure.text(0.012, 0.018, caption, fontsize=9, color=GREY)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        save(figure, out)
