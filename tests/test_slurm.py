"""The pipeline on a SLURM cluster: real daemons on this machine, the shipped profile, files that are called GPUs."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster as slurm
import pytest
import torch
import yaml
from cluster import Cluster
from conftest import ROOT
from test_fineweb import HELD_OUT, PAIR, TINY, parquet, registered, texts
from test_workflow import BOX, NO_HUB, SMALL, SNAKEMAKE

from picogpt import records
from picogpt.data import fineweb
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.train import checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow,slurm]'"),
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]
# Two nodes each, so that tests that go on side by side do not meet.
PARTITIONS = {name: (f"{name}1", f"{name}2") for name in ("gpu", "limit", "cancel", "down")}
ONE_RUNG = {**BOX, "rungs": ["baseline"]}
MACHINES = {
    "box": ONE_RUNG,
    "pair": {**ONE_RUNG, "ranks": 2, "micro_batch_size": 1},
    "across": {**PAIR, "title": "two nodes", "ranks": 1, "nodes": 2},
    "crowd": {**ONE_RUNG, "kind": "cuda", "ranks": 3, "batch_size": 6},
}
TRANSFORMER = "weights/char_transformer/pipeline"
FINEWEB = "weights/gpt2/pipeline/fineweb-edu_across"


class Pipeline:
    """Snakemake in a folder of its own, through the shipped profile with this cluster's values."""

    def __init__(self, cluster: Cluster, prepared: Path, folder: Path, partition: str, **changes: object):
        self.folder = Path(shutil.copytree(prepared, folder))
        self.environment = {**os.environ, **NO_HUB, **cluster.environment, "PYTHONPATH": f"{ROOT / 'tests/slow'}:{ROOT}"}
        profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
        profile["default-resources"]["slurm_partition"] = partition
        del profile["default-resources"]["slurm_account"]  # this cluster does no accounting
        profile["config"].update(size="cpu", ladder={"hardware": [f"{name}.yaml" for name in MACHINES] + ["h100"]})
        profile.update({"slurm-init-seconds-before-status-checks": 1, "slurm-status-command": "squeue"}, **changes)
        (self.folder / "profile").mkdir()
        (self.folder / "profile/config.yaml").write_text(yaml.safe_dump(profile))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [
            str(SNAKEMAKE), *arguments,
            "--snakefile", str(ROOT / "workflow/Snakefile"),
            "--workflow-profile", str(self.folder / "profile"),
            "--directory", str(self.folder),
            "--configfile", str(self.folder / "small.yaml"),
        ]  # fmt: skip
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={**self.environment, **environment},
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        return ended(self.start(*arguments, **environment))

    def steps(self, run: str) -> int:
        """How far a training has come by its metrics."""
        metrics = self.folder / run / "checkpoints/metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and what was printed."""
    out, _ = process.communicate(timeout=280)
    return process.returncode, out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(run / "best.pt").state


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.running(tmp_path_factory.mktemp("slurm"), PARTITIONS) as running:
        yield running


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, gpt2: GPT2Tokenizer, gpt2_resources: Path
) -> Path:
    """A folder with the settings, and what needs a network: GPT-2's ranks, a shard of text in tokens."""
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    shards = folder / "weights/gpt2_tokenizer/pipeline/fineweb-edu"
    for path in (folder / "resources/fineweb-edu", shards):
        path.mkdir(parents=True)
    shutil.copy(gpt2_resources / "gpt2.tiktoken", folder / "resources")
    shutil.copy(corpus, folder / "words.txt")
    settings = {
        **SMALL, "corpus": "words.txt", "size": "cpu",
        "fineweb": {"shards": 1, "val_documents": HELD_OUT, "set": [*TINY, "train.steps=300", "train.eval_interval=300"]},
    }  # fmt: skip
    del settings["ladder"]["hardware"]
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    for name, machine in MACHINES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(machine))
    source = folder / "resources/fineweb-edu/00000.parquet"
    source.write_bytes(parquet(texts(0)))
    (folder / "resources/fineweb-edu/00000.txt").write_text(f"fineweb-edu/0: {source}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "dataset", lambda: registered([source.read_bytes()]))
        fineweb.tokenize(0, shards, gpt2, HELD_OUT, source)
        fineweb.join(shards, 1)
    return folder


@pytest.fixture(scope="module")
def pipelines(cluster: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """A folder for each partition."""
    root = tmp_path_factory.mktemp("pipelines")
    limit = {"limit": {"set-resources": {"train_fineweb": {"runtime": 1, "slurm_extra": "--signal=TERM@5"}}}}
    return {name: Pipeline(cluster, prepared, root / name, name, **limit.get(name, {})) for name in PARTITIONS}


@pytest.fixture(scope="module")
def limited(pipelines: dict[str, Pipeline]) -> subprocess.Popen[str]:
    """A training on two nodes that lasts longer than its time limit; begun first, because it lasts longest."""
    return pipelines["limit"].start(f"{FINEWEB}/record.json", PICOGPT_TEST_STEP="0.3")


@pytest.fixture(scope="module")
def straight(pipelines: dict[str, Pipeline], limited: object) -> Path:
    """The transformer of the pipeline, trained without a stop."""
    status, out = pipelines["gpu"].run(
        f"{TRANSFORMER}/record.json",
        *(f"results/records/ladder/{name}/baseline.json" for name in ("box", "pair", "across")),
    )
    assert status == 0, out
    return pipelines["gpu"].folder


def test_one_device_two_ranks_and_two_nodes(straight: Path):
    ranks = {
        name: records.read(straight / f"results/records/ladder/{name}/baseline.json")["ranks"]
        for name in ("box", "pair", "across")
    }
    assert ranks == {"box": 1, "pair": 2, "across": 2}
