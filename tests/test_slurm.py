"""The pipeline on a SLURM cluster: real daemons on this machine, the shipped profile, files that are called GPUs.

Trainings that a test interrupts wait at a known step (tests/slow), so that nothing depends on the speed of the machine.
Covered:

- the whole pipeline, with ladders on one device, on two ranks of a node and on two nodes, and the long training on two nodes;
- a training on two nodes that meets its time limit and is submitted again; one that hears no signal and is killed at its
  limit; one that is cancelled and continued by the next run; one that is preempted on one of its nodes; one of whose nodes
  goes down; one on a node that is drained: each with the weights and the curve of a run that was not interrupted, bit for bit,
  and with those of the same training by hand on one node;
- two trainings on the same two nodes at once, each with a port of its own; four ranks on two nodes, each with the GPUs of its node;
- two shards of FineWeb-Edu tokenized side by side while the hub is gone; no job uses the network;
- two jobs on one node, each with a GPU and a core of its own; output files that appear late, with and without enough patience;
- the errors for an unknown partition, a missing or unknown account, more GPUs than a node has, and the wrong device.

That a killed rank is replaced is tested in test_distributed.py, without SLURM.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cluster as slurm
import hub
import pytest
import yaml
from cluster import Cluster
from conftest import ROOT
from hub import HELD_OUT, hub_path, parquet, registered, texts
from test_fineweb_rules import PAIR, TINY, source_with
from test_train import assert_same_run
from test_workflow import BOX, NO_HUB, SMALL, SNAKEMAKE

from picogpt import checkpoint, records
from picogpt.data import fineweb
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data, tokenize_chars

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow,slurm]'"),
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]
BIN = Path(sys.executable).parent
# Nodes of their own, so that tests that go on side by side do not meet; but two jobs of two nodes each, which share theirs.
PARTITIONS = {
    "gpu": ("gpu1", "gpu2"), "limit": ("pair1", "pair2"), "cancel": ("pair1", "pair2"), "down": ("down1", "down2", "down3"),
    "drain": ("drain1", "drain2"), "killed": ("killed1",), "low": ("low1", "low2"), "urgent": ("low1",), "billed": ("gpu1", "gpu2"),
}  # fmt: skip
TRAIN = [*TINY, "runtime.threads=1", "train.steps=8", "train.eval_interval=4"]
ONE_RUNG = {**BOX, "rungs": ["baseline"]}
MACHINES = {
    "box": ONE_RUNG,
    "pair": {**ONE_RUNG, "ranks": 2, "micro_batch_size": 1},
    "across": {**PAIR, "title": "two nodes", "ranks": 1, "nodes": 2},
    "crowd": {**ONE_RUNG, "kind": "cuda", "ranks": 3, "batch_size": 6},
    "duo": {**PAIR, "title": "duo", "kind": "cuda"},
    "grid": {**PAIR, "title": "grid", "kind": "cuda", "nodes": 2},
}
TRANSFORMER = "weights/char_transformer/pipeline"
BIGRAM = "weights/char_bigram/pipeline"
FINEWEB = "weights/gpt2/pipeline/fineweb-edu_across"
HELD_AT = {TRANSFORMER: 10, FINEWEB: 3}
"""Steps before which a training waits; a checkpoint is saved every 5 steps, or at a signal."""


@dataclass
class Started:
    """A Snakemake that runs."""

    process: subprocess.Popen[bytes]
    out: Path

    def end(self) -> tuple[int, str]:
        """Exit status and what was printed."""
        self.process.wait(slurm.LONGEST_S)
        return self.process.returncode, self.out.read_text()


class Pipeline:
    """Snakemake in a folder of its own, through the shipped profile with this cluster's values."""

    def __init__(
        self,
        cluster: Cluster,
        prepared: Path,
        folder: Path,
        partition: str,
        hardware: tuple[str, ...],
        tree: Path = ROOT,
        account: str | None = None,
        **changes: object,
    ):
        self.cluster, self.partition, self.tree = cluster, partition, tree
        self.folder = Path(shutil.copytree(prepared, folder))
        self.started = self.waits = 0
        self.born: str | None = None
        self.environment = {
            **os.environ,
            **NO_HUB,
            **cluster.environment,
            "PATH": f"{cluster.environment['PATH']}:{BIN}",
            "PYTHONPATH": f"{ROOT / 'tests/slow'}:{tree}",
            "PICOGPT_TEST_NET": str(self.folder / "network.txt"),
        }
        profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())
        profile["default-resources"]["slurm_partition"] = partition
        profile["default-resources"]["slurm_account"] = account
        if account is None:  # this cluster does no accounting
            del profile["default-resources"]["slurm_account"]
        profile["config"].update(size="cpu", ladder={"hardware": list(hardware)})
        profile.update({"slurm-init-seconds-before-status-checks": 1, "slurm-status-command": "squeue"}, **changes)
        (self.folder / "profile").mkdir()
        (self.folder / "profile/profile.yaml").write_text(yaml.safe_dump(profile))

    def start(self, *arguments: str, **environment: str) -> Started:
        command = [
            str(SNAKEMAKE), *arguments,
            "--snakefile", str(self.tree / "Snakefile"),
            "--workflow-profile", str(self.folder / "profile"),
            "--directory", str(self.folder),
            "--configfile", str(self.folder / "small.yaml"),
        ]  # fmt: skip
        self.started += 1
        out = self.folder / f"out{self.started}.txt"
        with open(out, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=self.folder, env={**self.environment, **environment}
            )
        return Started(process, out)

    def start_held(self, run: str, **environment: str) -> Started:
        """Start a training that waits in the middle."""
        return self.start(f"{run}/record.json", PICOGPT_TEST_HOLD=f"{HELD_AT[run]}:{self.folder}/go", **environment)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        return self.start(*arguments, **environment).end()

    def held(self, started: Started) -> int:
        """The process that waits, once one does; always the first one, if another has taken its place."""
        slurm.wait_for((self.folder / "go.held").exists, "a training", self.cluster, started.process)
        self.waits = self.waits or int((self.folder / "go.held").read_text())
        self.born = self.born or slurm.birth(self.waits)
        return self.waits

    def lives(self) -> bool:
        """Whether the process that waited is there yet; another with its number is not it."""
        return slurm.birth(self.waits) == self.born

    def go(self) -> None:
        """Let it go on."""
        (self.folder / "go").touch()

    def ask(self, what: str, states: str = "R") -> list[str]:
        """What SLURM says of the jobs of this partition."""
        return self.cluster.ask(
            "squeue", "--noheader", f"--partition={self.partition}", f"--states={states}", f"--format={what}"
        ).split()


def sessions(pipeline: Pipeline, run: str) -> int:
    return records.read(pipeline.folder / run / "record.json")["results"]["sessions"]


def saved_step(pipeline: Pipeline, run: str) -> int:
    return checkpoint.load_state(pipeline.folder / run / "checkpoints/last.pt")[0]["progress"]["step"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.running(tmp_path_factory.mktemp("slurm"), PARTITIONS, urgent="urgent") as running:
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
    settings["ladder"] = {"set": SMALL["ladder"]["set"]}
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
    # Not exclusively: these two are to meet on their nodes.
    early, late = ({"train_fineweb": {"slurm_extra": f"--signal=TERM@{seconds}"}} for seconds in (60, 120))
    unheard = {"slurm_partition": "killed", "mem_mb": 4000, "runtime": 60}  # no signal before the time is over
    changes: dict[str, dict] = {
        "limit": {"set-resources": early, "retries": 1},
        "cancel": {"set-resources": late, "retries": 0},
        "killed": {"default-resources": unheard, "retries": 1},
        "down": {"retries": 0},
        "drain": {"retries": 0},
        "low": {"retries": 1},
    }
    hardware = ("box.yaml", "pair.yaml", "across.yaml")
    return {
        name: Pipeline(cluster, prepared, root / name, name, hardware, **changes.get(name, {}))
        for name in ("gpu", *changes)
    }


@pytest.fixture(scope="module")
def begun(pipelines: dict[str, Pipeline]) -> Iterator[dict[str, Started]]:
    """What takes long goes on while other tests run."""
    processes = {
        "limit": pipelines["limit"].start_held(FINEWEB),
        "cancel": pipelines["cancel"].start_held(FINEWEB),
        "killed": pipelines["killed"].start_held(TRANSFORMER, PICOGPT_TEST_DEAF="1"),
        "drain": pipelines["drain"].start_held(TRANSFORMER),
        **{name: pipelines[name].start_held(FINEWEB) for name in ("down", "low")},
    }
    yield processes
    for started in processes.values():
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="module")
def straight(pipelines: dict[str, Pipeline], begun: dict[str, Started]) -> Path:
    """Where all of the pipeline ran, without a stop."""
    status, out = pipelines["gpu"].run()
    assert status == 0, out
    return pipelines["gpu"].folder


def test_two_jobs_of_two_nodes_each_meet_on_their_nodes(pipelines, begun):
    """Each with ranks that have found each other, by a port of its own."""
    for name in ("limit", "cancel"):
        pipelines[name].held(begun[name])
    assert [pipelines[name].ask("%D %N") for name in ("limit", "cancel")] == [["2", "pair[1-2]"]] * 2


def test_two_time_limits_are_met(pipelines, begun, cluster: Cluster):
    """One with a signal before it, as in the profile, and one that nobody hears; SLURM looks at the clock twice a minute."""
    for name in ("limit", "killed"):
        pipeline = pipelines[name]
        pipeline.held(begun[name])
        (job,), (elapsed,) = pipeline.ask("%A"), pipeline.ask("%M")
        minutes = int(elapsed.split(":")[-2])
        cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1}")


def test_a_training_on_two_nodes_of_which_one_goes_down_goes_on_elsewhere(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["down"]
    pipeline.held(begun["down"])
    (job,), (nodes,) = pipeline.ask("%A"), pipeline.ask("%N")
    _, node = cluster.ask("scontrol", "show", "hostnames", nodes).split()
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    slurm.wait_for(lambda: not pipeline.lives(), "the end of a job", cluster)
    slurm.wait_for(lambda: pipeline.ask("%A", "PD") == [job], "the job in the queue again", cluster)
    pipeline.go()
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # by itself it waits two minutes


def test_a_node_that_is_drained_ends_what_runs_and_gets_nothing_new(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["drain"]
    pipeline.held(begun["drain"])
    (node,) = pipeline.ask("%N")
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    pipeline.go()
    status, out = begun["drain"].end()
    assert status == 0, out
    assert sessions(pipeline, TRANSFORMER) == 1
    status, out = pipeline.run(f"{BIGRAM}/record.json")
    assert status == 0, out
    assert sorted(pipeline.ask("%N", "all")) == sorted(PARTITIONS["drain"])  # one job on each


def test_a_training_on_two_nodes_that_makes_room_on_one_of_them_goes_on(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["low"]
    pipeline.held(begun["low"])
    done = pipeline.folder / "urgent"
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--exclusive",
        "--mem=1000",
        f"--wrap=touch {done}",
        f"--output={done}.log",
    ]
    cluster.ask(*urgent)
    slurm.wait_for(done.exists, "the urgent job", cluster)
    assert not pipeline.lives()
    # The step that it was before, and not one more.
    assert saved_step(pipeline, FINEWEB) == HELD_AT[FINEWEB] + 1
    pipeline.go()
    for job in pipeline.ask("%A", "PD"):
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    status, out = begun["low"].end()
    assert status == 0, out
    assert sessions(pipeline, FINEWEB) == 2


def test_a_cancelled_training_on_two_nodes_goes_on_at_the_next_run(pipelines, begun, cluster: Cluster):
    pipeline = pipelines["cancel"]
    pipeline.held(begun["cancel"])

    # Meanwhile the folder is taken, for a second pipeline and for a second job.
    status, out = pipeline.run(f"{FINEWEB}/record.json")
    assert (status, "another pipeline is running in this folder" in out) == (1, True), out
    second = [
        "picogpt", "train", "gpt2", "--data", "weights/gpt2_tokenizer/pipeline/fineweb-edu", "--folder", FINEWEB,
        *(f"--set={pair}" for pair in TRAIN), "--config", str(ROOT / "config/models/gpt2_fineweb.yaml"),
        "--set=train.batch_size=4", "--set=train.micro_batch_size=1", "--set=model.block_size=16",
    ]  # fmt: skip
    job = subprocess.run(
        ["srun", "--partition=gpu", "--mem=1000", *second],
        capture_output=True, text=True, cwd=pipeline.folder, env=pipeline.environment, timeout=slurm.LONGEST_S,
    )  # fmt: skip
    assert job.returncode == 1, job.stderr
    assert f"another process is training in {FINEWEB}" in job.stderr

    cluster.ask("scancel", "--partition=cancel", "--user=root")
    status, out = begun["cancel"].end()
    assert status == 1
    assert "SLURM status is: 'CANCELLED'" in out
    assert f"stopped by SIGTERM at step {saved_step(pipeline, FINEWEB)} of 8; everything is saved" in out
    pipeline.go()
    again, out = pipeline.run(f"{FINEWEB}/record.json")
    assert again == 0, out
    assert sessions(pipeline, FINEWEB) == 2


def test_all_of_the_pipeline_on_one_device_two_ranks_and_two_nodes(straight: Path):
    ranks = {
        name: records.read(straight / f"results/records/ladder/{name}/baseline.json")["ranks"]
        for name in ("box", "pair", "across")
    }
    assert ranks == {"box": 1, "pair": 2, "across": 2}
    for name in ("results/report.md", "results/summary.csv", "media/gpt2_across_loss.png", "media/gpt2_words_loss.png"):
        assert (straight / name).exists(), name


def test_no_job_wants_anything_of_the_network(pipelines, straight: Path, tmp_path: Path):
    network = straight / "network.txt"
    assert not network.exists(), network.read_text()
    # One that does is found out.
    script = "import socket; socket.getaddrinfo('example.invalid', 80)"
    environment = {**pipelines["gpu"].environment, "PICOGPT_TEST_NET": str(tmp_path / "asked")}
    command = ["srun", "--partition=gpu", "--mem=1000", sys.executable, "-c", script]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=slurm.LONGEST_S).returncode != 0
    assert (tmp_path / "asked").read_text() == "-c: example.invalid:80\n"


def test_shards_of_a_corpus_are_tokenized_side_by_side(cluster: Cluster, prepared: Path, tmp_path: Path):
    """A job each, in a copy of the source tree whose registry names two small shards; only fetching them asks the hub."""
    contents = [parquet(texts(number)) for number in range(2)]
    tree = source_with(contents, tmp_path / "tree")
    pipeline = Pipeline(cluster, prepared, tmp_path / "shards", "gpu", ("box.yaml",), tree, retries=0)
    shutil.rmtree(pipeline.folder / "resources/fineweb-edu")
    shutil.rmtree(pipeline.folder / "weights/gpt2_tokenizer/pipeline/fineweb-edu")
    settings = yaml.safe_load((pipeline.folder / "small.yaml").read_text())
    settings["fineweb"]["shards"] = 2
    (pipeline.folder / "small.yaml").write_text(yaml.safe_dump(settings))
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    with hub.running() as running:
        running.files.update({hub_path(number): content for number, content in enumerate(contents)})
        notes = [f"resources/fineweb-edu/{number:05}.txt" for number in range(2)]
        status, out = pipeline.run(*notes, HF_ENDPOINT=running.address, **cache)
        assert status == 0, out
    (tmp_path / "met").mkdir()
    manifest = "weights/gpt2_tokenizer/pipeline/fineweb-edu/manifest.json"
    status, out = pipeline.run(manifest, PICOGPT_TEST_MEET=f"2:{tmp_path / 'met'}", **cache)
    assert status == 0, out
    assert len(list((tmp_path / "met").iterdir())) == 2
    data = open_data((pipeline.folder / manifest).parent)
    assert (data.val.header.documents, data.train.header.corpus) == (HELD_OUT, fineweb.NAME)
    assert not (pipeline.folder / "network.txt").exists()


def test_jobs_on_the_same_node_have_gpus_and_cores_of_their_own(cluster: Cluster, tmp_path: Path):
    cores = f"PYTHONPATH={ROOT} {sys.executable} -c 'from picogpt import hardware; print(hardware.cpu_count())'"
    script = (
        f'echo "$CUDA_VISIBLE_DEVICES" $({cores}) > {tmp_path}/new.$SLURM_JOB_ID && mv {tmp_path}/new.$SLURM_JOB_ID'
        f" {tmp_path}/$SLURM_JOB_ID; while [ ! -e {tmp_path}/go ]; do sleep 0.2; done"
    )
    for _ in range(2):
        cluster.ask(
            "sbatch",
            "--partition=gpu",
            "--nodelist=gpu2",
            "--mem=1000",
            "--gpus=h100:1",
            "--cpus-per-task=1",
            "--output=/dev/null",
            f"--wrap={script}",
        )
    slurm.wait_for(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2, "two jobs on one node", cluster)
    shown = sorted(path.read_text().strip() for path in tmp_path.glob("[0-9]*"))
    (tmp_path / "go").touch()
    assert shown == ["0 1", "1 1"]


def test_a_training_that_slurm_killed_at_its_time_limit_goes_on(pipelines, begun, cluster: Cluster):
    pipeline, started = pipelines["killed"], begun["killed"]
    pipeline.held(started)
    slurm.wait_for(lambda: not pipeline.lives(), "the end of a job", cluster, started.process)
    assert saved_step(pipeline, TRANSFORMER) == HELD_AT[TRANSFORMER]  # the last checkpoint, and nothing at the end
    pipeline.go()
    status, out = started.end()
    assert status == 0, out
    assert "SLURM status is: 'TIMEOUT'" in out
    assert sessions(pipeline, TRANSFORMER) == 2


def test_trainings_that_were_stopped_equal_one_that_was_not(pipelines, begun, straight: Path):
    """The weights bit for bit, and every line of the metrics: the curve has no seam."""
    status, out = begun["down"].end()
    assert status == 0, out
    assert sessions(pipelines["down"], FINEWEB) == 2
    for name in ("drain", "killed"):
        assert_same_run(pipelines[name].folder / TRANSFORMER, straight / TRANSFORMER)
    for name in ("cancel", "down", "low"):
        assert_same_run(pipelines[name].folder / FINEWEB, straight / FINEWEB)


def test_a_training_longer_than_its_time_limit_goes_on_from_where_it_was(pipelines, begun, straight, tmp_path: Path):
    pipeline, started = pipelines["limit"], begun["limit"]

    def saved() -> bool:
        return "of 8; everything is saved" in started.out.read_text()

    slurm.wait_for(saved, "the signal before the time limit", pipeline.cluster, started.process)
    pipeline.go()
    status, out = started.end()
    assert status == 0, out
    run = pipeline.folder / FINEWEB
    record = records.read(run / "record.json")
    assert (record["ranks"], record["machine"], record["results"]["sessions"]) == (2, "across", 2)
    assert_same_run(run, straight / FINEWEB)
    # The same by hand, in one go, with both ranks on one node.
    (tmp_path / "across.yaml").write_text(yaml.safe_dump({**MACHINES["across"], "nodes": 1, "ranks": 2}))
    command = [
        str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "-m", "picogpt", "train", "gpt2",
        "--data", str(pipeline.folder / "weights/gpt2_tokenizer/pipeline/fineweb-edu"),
        "--folder", "run", "--config", str(ROOT / "config/models/gpt2_fineweb.yaml"),
        *(f"--set={pair}" for pair in TRAIN), "--hardware", "across.yaml",
    ]  # fmt: skip
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert alone.returncode == 0, alone.stderr
    assert_same_run(run, tmp_path / "run")


def test_what_cannot_run_says_what_to_change(begun, cluster: Cluster, prepared: Path, tmp_path: Path):
    unknown = Pipeline(cluster, prepared, tmp_path / "unknown", "nowhere", ("box.yaml",), retries=0)
    unpaid = Pipeline(cluster, prepared, tmp_path / "unpaid", "billed", ("box.yaml",), retries=0)
    target = f"{BIGRAM}/record.json"
    nobody = Pipeline(cluster, prepared, tmp_path / "nobody", "gpu", ("box.yaml",), account="nobody", retries=0)
    # What a cluster with accounting answers to who may pay.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sacctmgr").write_text("#!/bin/sh\necho project1\n")
    (tmp_path / "bin/sacctmgr").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{nobody.environment['PATH']}"
    processes = [unknown.start(target), unpaid.start(target), nobody.start(target, PATH=path)]
    status, out = processes[0].end()
    assert (status, "invalid partition specified: nowhere" in out) == (1, True), out
    assert "set default-resources: slurm_partition in profiles/slurm/profile.yaml to one of those of sinfo -s" in out
    status, out = processes[1].end()
    assert (status, "partition billed takes no job without an account" in out) == (1, True), out
    assert "set default-resources: slurm_account in profiles/slurm/profile.yaml to one of those of sacctmgr show" in out
    status, out = processes[2].end()
    assert (status, "The given account nobody appears to be invalid" in out) == (1, True), out
    assert "set default-resources: slurm_account in profiles/slurm/profile.yaml to one of those of sacctmgr show" in out
    # The list of the profile is gone, and this machine would speak for the cluster.
    status, out = unknown.run(target, "--config", "size=cpu")
    assert (status, "gpus: auto, ladder: hardware: auto would describe this machine" in out) == (1, True), out


def test_a_machine_that_is_not_what_its_name_says(cluster: Cluster, prepared: Path, tmp_path: Path):
    machines = ("crowd.yaml", "duo.yaml", "grid.yaml", "h100")
    pipeline = Pipeline(cluster, prepared, tmp_path / "wrong", "gpu", machines, retries=0)
    targets = [f"results/records/ladder/{Path(name).stem}/baseline.json" for name in machines]
    (tmp_path / "ranks").mkdir()
    status, out = pipeline.run(*targets, "--keep-going", PICOGPT_TEST_RANKS=str(tmp_path / "ranks"))
    assert status == 1
    # Two ranks on one node and four on two were there before they refused, each beside the GPUs of its node.
    ranks = {path.name: path.read_text() for path in (tmp_path / "ranks").iterdir()}
    assert ranks == {
        **{"0 of 2": "0 of 0,1", "1 of 2": "1 of 0,1"},
        **{"0 of 4": "0 of 0,1", "1 of 4": "1 of 0,1", "2 of 4": "0 of 0,1", "3 of 4": "1 of 0,1"},
    }
    assert "hardware grid is grid (cuda, .*), and this device is" in out
    assert "hardware h100 is H100 (cuda, NVIDIA H100" in out
    assert "), and this device is" in out
    assert "gpu_model in the profile asks for the right GPUs" in out
    assert "Requested node configuration is not available" in out  # three GPUs of a node with two
    assert "--gpus=h100:3" in out
    assert "no node of the partition has the requested GPUs, cores or memory" in out


@pytest.mark.parametrize(("wait", "status"), [(60, 0), (1, 1)])
def test_a_file_that_appears_late_is_waited_for(
    cluster: Cluster, prepared: Path, tmp_path: Path, wait: int, status: int
):
    settings = {"latency-wait": wait, "retries": 0}
    pipeline = Pipeline(cluster, prepared, tmp_path / "late", "gpu", ("box.yaml",), **settings)
    found, out = pipeline.run(f"{BIGRAM}/record.json", PICOGPT_TEST_LATE="record.json:6")
    assert found == status, out
    assert ("--latency-wait" in out) == (status == 1), out
