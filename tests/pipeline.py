"""Snakemake with small settings, as the tests of the workflow run it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT

SNAKEMAKE = shutil.which("snakemake", path=str(Path(sys.executable).parent))
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow]'")
WORKFLOW = ("Snakefile", "config", "profiles", "workflow")
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}
"""Nobody answers there: the rows of OpenAI's weights say so, everything else is made, and every run asks again."""

SMALL_GPT = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2"]
SMALL = {
    "char_bigram": {"set": ["model.block_size=16", "train.epochs=2"], "sample_characters": 20, "untrained_characters": 20},
    "char_transformer": {
        "set": [
            *SMALL_GPT, "model.block_size=16", "train.steps=30", "train.eval_interval=10",
            "runtime.checkpoint_interval=5", "runtime.log_interval=5",
        ],
        "sample_characters": 100, "untrained_characters": 30,
    },
    "gpt2": {
        "set": [*SMALL_GPT, "model.block_size=16", "train.steps=6", "train.eval_interval=3"],
        "sample_tokens": 30, "prompts": ["the king", "O"], "prompt_tokens": 5, "dtypes": ["int8"],
        "throughput_tokens": 10, "throughput_runs": 2, "throughput_streams": [2],
    },
    "fineweb": {"shards": 1},
    "run": "pipeline",
    "gpus": 0,
    "ladder": {"hardware": ["box.yaml"], "set": SMALL_GPT},
}  # fmt: skip
BOX = {
    "title": "box", "device": ".*", "kind": "cpu", "batch_size": 2, "micro_batch_size": 2, "block_size": 16,
    "warmup_steps": 1, "steps": 3, "rungs": ["baseline", "flash"],
}  # fmt: skip


def configure(folder: Path, **change: object) -> None:
    """Write the settings that `command` passes, and those of the machine that they name."""
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, **change}))
    (folder / "box.yaml").write_text(yaml.safe_dump(BOX))


def source_tree(folder: Path) -> Path:
    """The copy of the source tree in `folder` where there is one, or else this one."""
    return folder / "source" if (folder / "source").exists() else ROOT


def command(folder: Path, *arguments: object) -> list[str]:
    """Snakemake on the workflow of the source tree, working in `folder`."""
    return [
        str(SNAKEMAKE), *map(str, arguments),
        "--snakefile", str(source_tree(folder) / "Snakefile"),
        "--directory", str(folder),
        "--configfile", str(folder / "small.yaml"),
    ]  # fmt: skip


def snakemake(folder: Path, *arguments: object, status: int = 0, **environment: str) -> str:
    """Run it, which ends with this status, and return all that it prints. The hub is that of hub.txt, where there is one."""
    endpoint = (folder / "hub.txt").read_text() if (folder / "hub.txt").exists() else NO_HUB["HF_ENDPOINT"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(folder / "hub"), **environment}
    run = forked.run("snakemake", *command(folder, *arguments)[1:], env=environment)
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout + run.stderr


def job_counts(out: str) -> dict[str, int]:
    """How many jobs of each rule a dry run has planned, from what it printed."""
    table = out.split("Job stats:")[-1]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    return {name: count for name, count in counts.items() if name not in ("total", "all")}


def jobs(out: str) -> set[str]:
    """Names of the rules that a dry run has planned, from what it printed."""
    return set(job_counts(out))
