"""The pipeline on a SLURM cluster: real daemons on this machine, the shipped profile, files that are called GPUs."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
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
from picogpt.data.corpus import tokenize_chars
from picogpt.train import checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow,slurm]'"),
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]
# Two nodes each, so that tests that go on side by side do not meet.
PARTITIONS = {name: (f"{name}1", f"{name}2") for name in ("gpu", "limit", "cancel", "down")}
TRAIN = [*TINY, "runtime.threads=1", "train.steps=24", "train.eval_interval=24"]
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
        self.environment = {
            **os.environ,
            **NO_HUB,
            **cluster.environment,
            "PYTHONPATH": f"{ROOT / 'tests/slow'}:{ROOT}",
        }
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
    partitions = {**PARTITIONS, "billed": PARTITIONS["gpu"]}
    with slurm.running(tmp_path_factory.mktemp("slurm"), partitions) as running:
        yield running


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, gpt2: GPT2Tokenizer, gpt2_resources: Path) -> Path:
    """A folder with the settings, with what needs a network, a shard of text in tokens, and the tokens of characters."""
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    shards = folder / "weights/gpt2_tokenizer/pipeline/fineweb-edu"
    for path in (folder / "resources/fineweb-edu", shards):
        path.mkdir(parents=True)
    shutil.copy(gpt2_resources / "gpt2.tiktoken", folder / "resources")
    shutil.copy(corpus, folder / "words.txt")
    settings = {
        **SMALL, "corpus": "words.txt", "size": "cpu",
        "fineweb": {"shards": 1, "val_documents": HELD_OUT, "set": TRAIN},
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
    tokenize_chars(folder / "words.txt", folder / "weights/char_tokenizer/pipeline")
    return folder


@pytest.fixture(scope="module")
def pipelines(cluster: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """A folder for each partition."""
    root = tmp_path_factory.mktemp("pipelines")
    changes: dict[str, dict] = {
        # SLURM looks at the clock twice a minute: the signal comes between 80 and 110 seconds after the start.
        "limit": {"set-resources": {"train_fineweb": {"runtime": 2, "slurm_extra": "--signal=TERM@10"}}, "retries": 3},
        "cancel": {"retries": 0},
        "down": {"retries": 0},
    }
    return {name: Pipeline(cluster, prepared, root / name, name, **changes.get(name, {})) for name in PARTITIONS}


@pytest.fixture(scope="module")
def begun(pipelines: dict[str, Pipeline]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """What takes long goes on while other tests run."""
    rungs = [f"results/records/ladder/{name}/baseline.json" for name in ("box", "pair", "across")]
    processes = {
        "limit": pipelines["limit"].start(f"{FINEWEB}/record.json", PICOGPT_TEST_STEP="5"),
        "gpu": pipelines["gpu"].start(f"{TRANSFORMER}/record.json", *rungs),
        "down": pipelines["down"].start(f"{TRANSFORMER}/record.json", PICOGPT_TEST_STEP="1"),
        "cancel": pipelines["cancel"].start(f"{TRANSFORMER}/record.json", PICOGPT_TEST_STEP="1"),
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def straight(pipelines: dict[str, Pipeline], begun: dict[str, subprocess.Popen[str]]) -> Path:
    """Where the pipeline ran without a stop."""
    status, out = ended(begun["gpu"])
    assert status == 0, out
    return pipelines["gpu"].folder


def test_the_jobs_of_a_node_that_goes_down_go_on_elsewhere(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["down"]
    slurm.wait_for(lambda: pipeline.steps(TRANSFORMER) >= 5, "training", cluster, 120)
    node = cluster.ask("squeue", "--noheader", "--partition=down", "--states=R", "--format=%N")
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def test_a_cancelled_training_goes_on_at_the_next_run(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["cancel"]
    run = pipeline.folder / TRANSFORMER
    slurm.wait_for(lambda: pipeline.steps(TRANSFORMER) >= 5, "training", cluster, 120)

    # Meanwhile the folder is taken, for a second pipeline and for a second job.
    status, out = pipeline.run(f"{TRANSFORMER}/record.json")
    assert (status, "another pipeline is running in this folder" in out) == (1, True), out
    second = ["picogpt", "train", "char-transformer", "--data", "weights/char_tokenizer/pipeline", "--run", "pipeline"]
    job = subprocess.run(
        ["srun", "--partition=cancel", "--mem=1000", *second],
        capture_output=True, text=True, cwd=pipeline.folder, env=pipeline.environment,
    )  # fmt: skip
    assert job.returncode == 1
    assert f"another process is training in {TRANSFORMER}" in job.stderr

    cluster.ask("scancel", "--partition=cancel", "--user=root")
    status, out = ended(begun["cancel"])
    assert status == 1
    assert "SLURM status is: 'CANCELLED'" in out
    stopped = checkpoint.load_state(run / "checkpoints/last.pt")[0]["progress"]["step"]
    assert f"stopped by SIGTERM at step {stopped} of 30; everything is saved" in out
    again, out = pipeline.run(f"{TRANSFORMER}/record.json")
    assert again == 0, out
    assert records.read(run / "record.json")["results"]["sessions"] == 2


def test_what_cannot_run_says_why(pipelines, begun, cluster: Cluster, prepared: Path, tmp_path: Path):
    unknown = Pipeline(cluster, prepared, tmp_path / "unknown", "nowhere", retries=0)
    unpaid = Pipeline(cluster, prepared, tmp_path / "unpaid", "billed", retries=0)
    target = "weights/char_bigram/pipeline/record.json"
    processes = [unknown.start(target), unpaid.start(target)]
    status, out = ended(processes[0])
    assert (status, "invalid partition specified: nowhere" in out) == (1, True), out
    status, out = ended(processes[1])
    assert (status, "partition billed takes no job without an account" in out) == (1, True), out
    # The list of the profile is gone, and this machine would speak for the cluster.
    status, out = unknown.run(target, "--config", "size=cpu")
    assert (status, "gpus: auto, ladder: hardware: auto would ask this machine" in out) == (1, True), out


def test_a_machine_that_is_not_what_its_name_says(straight: Path, pipelines, cluster: Cluster):
    targets = [f"results/records/ladder/{name}/baseline.json" for name in ("h100", "crowd")]
    status, out = pipelines["gpu"].run(*targets, "--keep-going", "--retries", "0")
    assert status == 1
    assert "hardware h100 is H100 (cuda, NVIDIA H100" in out
    assert "), and this device is" in out
    assert "Requested node configuration is not available" in out  # three GPUs of a node with two
    assert "--gpus=h100:3" in out


def test_one_device_two_ranks_and_two_nodes(straight: Path):
    ranks = {
        name: records.read(straight / f"results/records/ladder/{name}/baseline.json")["ranks"]
        for name in ("box", "pair", "across")
    }
    assert ranks == {"box": 1, "pair": 2, "across": 2}


def test_stopped_trainings_end_with_the_weights_of_one_that_was_not(pipelines, begun, straight: Path):
    status, out = ended(begun["down"])
    assert status == 0, out
    assert records.read(pipelines["down"].folder / TRANSFORMER / "record.json")["results"]["sessions"] == 2
    for name in ("cancel", "down"):
        assert same(pipelines[name].folder / TRANSFORMER, straight / TRANSFORMER), name


def test_a_training_longer_than_its_time_limit_goes_on_from_where_it_was(pipelines, begun, tmp_path: Path):
    pipeline = pipelines["limit"]
    status, out = ended(begun["limit"])
    assert status == 0, out
    run = pipeline.folder / FINEWEB
    record = records.read(run / "record.json")
    assert (record["ranks"], record["kind"]) == (2, "train gpt2 across")
    assert record["results"]["sessions"] > 1
    assert "of 24; everything is saved" in out
    # The same by hand, in one go, with both ranks on one node.
    (tmp_path / "across.yaml").write_text(yaml.safe_dump({**MACHINES["across"], "nodes": 1, "ranks": 2}))
    command = [
        "torchrun", "--standalone", "--nproc_per_node=2", "-m", "picogpt", "train", "gpt2",
        "--data", str(pipeline.folder / "weights/gpt2_tokenizer/pipeline/fineweb-edu"),
        "--folder", "run", "--config", str(ROOT / "config/models/gpt2_fineweb.yaml"),
        *(f"--set={pair}" for pair in TRAIN), "--hardware", "across.yaml",
    ]  # fmt: skip
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert alone.returncode == 0, alone.stderr
    assert same(run, tmp_path / "run")
