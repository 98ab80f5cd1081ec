"""Draws docs/rulegraph.svg: the rules of the workflow by topic, from Snakemake's own --rulegraph. Needs Graphviz.

python docs/rulegraph.py > docs/rulegraph.svg
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOXES = {
    "fetch": ("fetch", "text, GPT-2's merges, OpenAI's weights", "#cfe2f3"),
    "tokenize": ("tokenize", "characters; GPT-2's byte pairs", "#cfe2f3"),
    "train": ("train", "bigram, transformer, GPT-2", "#fde3cf"),
    "sample": ("sample", "texts, before and after training", "#d5ead8"),
    "evaluate": ("evaluate", "GPT-2's loss by dtype, prompts continued", "#d5ead8"),
    "bench_train": ("training ladder", "each optimization of a step", "#d5ead8"),
    "bench": ("benchmarks", "sampling speed, size of weights", "#d5ead8"),
    "loss_curve": ("loss curves", "media/*_loss.png", "#eadcf0"),
    "throughput": ("ladder figures", "media/gpt2_*_throughput.png", "#eadcf0"),
    "summary": ("summary", "results/summary.csv", "#eadcf0"),
    "page": ("page", "results/report.md, report.html", "#eadcf0"),
}
"""First words of the names of rules: title, what comes out, colour. The first that fits a rule is its box."""


def box_of(rule: str) -> str | None:
    """The box that a rule belongs to; None for `all`, which only lists files."""
    return next((box for box in BOXES if rule.startswith(box)), None)


def edges() -> set[tuple[str, str]]:
    """Pairs of boxes of which the second uses what the first makes, by Snakemake's own graph of rules."""
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "dot"]
    dot = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', dot))
    pairs = {(box_of(names[a]), box_of(names[b])) for a, b in re.findall(r"(\d+) -> (\d+)", dot)}
    return {(a, b) for a, b in pairs if a and b and a != b}


def main() -> None:
    if not (shutil.which("dot") and shutil.which("tred")):
        sys.exit("rulegraph.py needs dot and tred of Graphviz (Debian: apt install graphviz)")
    lines = [
        'digraph rules {rankdir=LR bgcolor=white pad=0.2 nodesep=0.25 ranksep=0.4 node[shape=box style="rounded,filled"'
        ' fontname="Helvetica" fontsize=12 color="#8a8a8a" margin="0.15,0.08"] edge[color="#6b6b6b" arrowsize=0.7]',
        *(
            f'{name} [fillcolor="{colour}" label=<<b>{title}</b><br/><font point-size="9.5">{what}</font>>]'
            for name, (title, what, colour) in BOXES.items()
        ),
        *(f"{a} -> {b}" for a, b in sorted(edges())),
        "}",
    ]
    # tred leaves out an arrow where a longer way says the same.
    reduced = subprocess.run(["tred"], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    svg = subprocess.run(["dot", "-Tsvg"], input=reduced, capture_output=True, text=True, check=True).stdout
    sys.stdout.write(re.sub(r"<!-- (Generated|.*version).*?-->\n", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main()
