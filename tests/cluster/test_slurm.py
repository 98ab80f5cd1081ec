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

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import hub
import pytest
import yaml
from cluster import Cluster, Pipeline
from conftest import ROOT
from hub import HELD_OUT, hub_path, parquet, registered, texts
from pipeline import BOX, SMALL, needs_snakemake
from test_fineweb_rules import PAIR, TINY, source_with
from test_train import assert_same_run

from picogpt import records
from picogpt.data import fineweb
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data, tokenize_chars

pytestmark = [
    pytest.mark.slurm,
    needs_snakemake,
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
BIGRAM = "weights/char_bigram/pipeline/record.json"
FINEWEB = "weights/gpt2/pipeline/fineweb-edu_across"
SHARDS = "weights/gpt2_tokenizer/pipeline/fineweb-edu"
INTERRUPTED = {
    "limit": FINEWEB, "cancel": FINEWEB, "killed": TRANSFORMER, "drain": TRANSFORMER, "down": FINEWEB, "low": FINEWEB,
}  # fmt: skip
"""By partition, the training that something happens to there."""
HELD_AT = {TRANSFORMER: 10, FINEWEB: 3}
"""Steps before which a training waits; a checkpoint is saved every 5 steps, or at a signal."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.running(tmp_path_factory.mktemp("slurm"), PARTITIONS, urgent="urgent") as running:
        yield running


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, gpt2: GPT2Tokenizer, gpt2_resources: Path) -> Path:
    """A folder with the settings, with what needs a network, a shard of text in tokens, and the tokens of characters."""
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    for path in (folder / "resources/fineweb-edu", folder / SHARDS):
        path.mkdir(parents=True)
    shutil.copy(gpt2_resources / "gpt2.tiktoken", folder / "resources")
    shutil.copy(corpus, folder / "words.txt")
    text = {"shards": 1, "val_documents": HELD_OUT, "set": TRAIN}
    settings = {**SMALL, "corpus": "words.txt", "fineweb": text, "ladder": {"set": SMALL["ladder"]["set"]}}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    for name, machine in MACHINES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(machine))
    source = folder / "resources/fineweb-edu/00000.parquet"
    source.write_bytes(parquet(texts(0)))
    source.with_suffix(".txt").write_text(f"fineweb-edu/0: {source}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "dataset", lambda: registered([source.read_bytes()]))
        fineweb.tokenize(0, folder / SHARDS, gpt2, HELD_OUT, source)
        fineweb.join(folder / SHARDS, 1)
    tokenize_chars(folder / "words.txt", folder / "weights/char_tokenizer/pipeline")
    return folder


@pytest.fixture(scope="module")
def pipelines(cluster: Cluster, prepared: Path, tmp_path_factory) -> Iterator[dict[str, Pipeline]]:
    """A folder for each partition. In all but `gpu` a training goes on while other tests run."""
    root, hardware = tmp_path_factory.mktemp("pipelines"), ("box.yaml", "pair.yaml", "across.yaml")
    # Not exclusively: these two are to meet on their nodes.
    early, late = ({"train_fineweb": {"slurm_extra": f"--signal=TERM@{seconds}"}} for seconds in (60, 120))
    unheard = {"slurm_partition": "killed", "mem_mb": 4000, "runtime": 60}  # no signal before the time is over
    changes: dict[str, dict] = {
        "gpu": {},
        "limit": {"set-resources": early, "retries": 1},
        "cancel": {"set-resources": late, "retries": 0},
        "killed": {"default-resources": unheard, "retries": 1},
        "drain": {"retries": 0},
        "down": {"retries": 0},
        "low": {"retries": 1},
    }
    pipelines = {name: Pipeline(cluster, prepared, root / name, name, hardware, **changes[name]) for name in changes}
    for name, run in INTERRUPTED.items():
        pipelines[name].start_held(run, HELD_AT[run], **({"PICOGPT_TEST_DEAF": "1"} if name == "killed" else {}))
    yield pipelines
    for name in INTERRUPTED:
        pipelines[name].training.process.kill()
        pipelines[name].training.process.wait()


@pytest.fixture(scope="module")
def straight(pipelines: dict[str, Pipeline]) -> Path:
    """Where all of the pipeline ran, without a stop."""
    pipelines["gpu"].run()
    return pipelines["gpu"].folder


def long_training(data: Path | str, folder: str, *settings: str) -> list[str]:
    """Arguments of picogpt: the long training by hand."""
    config = ROOT / "config/models/gpt2_fineweb.yaml"
    pairs = [f"--set={pair}" for pair in (*TRAIN, *settings)]
    return ["train", "gpt2", f"--data={data}", f"--folder={folder}", f"--config={config}", *pairs]


def test_two_jobs_of_two_nodes_each_meet_on_their_nodes(pipelines):
    """Each with ranks that have found each other, by a port of its own."""
    for name in ("limit", "cancel"):
        pipelines[name].held()
    assert [pipelines[name].ask("%D %N") for name in ("limit", "cancel")] == [["2", "pair[1-2]"]] * 2


def test_two_time_limits_are_met(pipelines, cluster: Cluster):
    """One with a signal before it, as in the profile, and one that nobody hears; SLURM looks at the clock twice a minute."""
    for pipeline in (pipelines["limit"], pipelines["killed"]):
        pipeline.held()
        (job,), (elapsed,) = pipeline.ask("%A"), pipeline.ask("%M")
        minutes = int(elapsed.split(":")[-2])
        cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1}")


def test_a_training_on_two_nodes_of_which_one_goes_down_goes_on_elsewhere(pipelines, cluster: Cluster):
    pipeline = pipelines["down"]
    pipeline.held()
    (job,), (nodes,) = pipeline.ask("%A"), pipeline.ask("%N")
    _, node = cluster.ask("scontrol", "show", "hostnames", nodes).split()
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    slurm.wait_for(pipeline.ended, "the end of a job", cluster)
    slurm.wait_for(lambda: pipeline.ask("%A", "PD") == [job], "the job in the queue again", cluster)
    pipeline.go_at_once()


def test_a_node_that_is_drained_ends_what_runs_and_gets_nothing_new(pipelines, cluster: Cluster):
    pipeline = pipelines["drain"]
    pipeline.held()
    (node,) = pipeline.ask("%N")
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    pipeline.go()
    pipeline.training.end()
    assert pipeline.sessions(TRANSFORMER) == 1
    pipeline.run(BIGRAM)
    assert sorted(pipeline.ask("%N", "all")) == sorted(PARTITIONS["drain"])  # one job on each


def test_a_training_on_two_nodes_that_makes_room_on_one_of_them_goes_on(pipelines, cluster: Cluster):
    pipeline = pipelines["low"]
    pipeline.held()
    done = pipeline.folder / "urgent"
    urgent = ("--partition=urgent", "--exclusive", "--mem=1000", f"--wrap=touch {done}", f"--output={done}.log")
    cluster.ask("sbatch", *urgent)
    slurm.wait_for(done.exists, "the urgent job", cluster)
    assert pipeline.ended()
    # The step that it was before, and not one more.
    assert pipeline.saved_step(FINEWEB) == HELD_AT[FINEWEB] + 1
    pipeline.go_at_once()
    pipeline.training.end()
    assert pipeline.sessions(FINEWEB) == 2


def test_a_cancelled_training_on_two_nodes_goes_on_at_the_next_run(pipelines, cluster: Cluster):
    pipeline = pipelines["cancel"]
    pipeline.held()

    # Meanwhile the folder is taken, for a second pipeline and for a second job.
    assert "another pipeline is running in this folder" in pipeline.run(f"{FINEWEB}/record.json", status=1)
    sizes = ("train.batch_size=4", "train.micro_batch_size=1", "model.block_size=16")
    second = [BIN / "picogpt", *long_training(SHARDS, FINEWEB, *sizes)]
    with pytest.raises(RuntimeError, match=f"another process is training in {FINEWEB}"):
        cluster.ask("srun", "--partition=gpu", "--mem=1000", f"--chdir={pipeline.folder}", *second)

    cluster.ask("scancel", "--partition=cancel", "--user=root")
    out = pipeline.training.end(1)
    assert "SLURM status is: 'CANCELLED'" in out
    assert f"stopped by SIGTERM at step {pipeline.saved_step(FINEWEB)} of 8; everything is saved" in out
    pipeline.go()
    pipeline.run(f"{FINEWEB}/record.json")
    assert pipeline.sessions(FINEWEB) == 2


def test_all_of_the_pipeline_on_one_device_two_ranks_and_two_nodes(straight: Path):
    for name, ranks in (("box", 1), ("pair", 2), ("across", 2)):
        assert records.read(straight / f"results/records/ladder/{name}/baseline.json")["ranks"] == ranks
    for name in ("results/report.md", "results/summary.csv", "media/gpt2_across_loss.png", "media/gpt2_words_loss.png"):
        assert (straight / name).exists(), name


def test_no_job_wants_anything_of_the_network(cluster: Cluster, straight: Path, tmp_path: Path):
    network = straight / "network.txt"
    assert not network.exists(), network.read_text()
    # One that does is found out.
    watched = ["env", f"PYTHONPATH={ROOT / 'tests/slow'}", f"PICOGPT_TEST_NET={tmp_path / 'asked'}", sys.executable]
    script = "import socket; socket.getaddrinfo('example.invalid', 80)"
    with pytest.raises(RuntimeError):
        cluster.ask("srun", "--partition=gpu", "--mem=1000", *watched, "-c", script)
    assert (tmp_path / "asked").read_text() == "-c: example.invalid:80\n"


def test_shards_of_a_corpus_are_tokenized_side_by_side(cluster: Cluster, prepared: Path, tmp_path: Path):
    """A job each, in a copy of the source tree whose registry names two small shards; only fetching them asks the hub."""
    contents = [parquet(texts(number)) for number in range(2)]
    pipeline = Pipeline(cluster, prepared, tmp_path / "shards", "gpu", retries=0)
    source_with(contents, pipeline.folder / "source")
    for folder in ("resources/fineweb-edu", SHARDS):
        shutil.rmtree(pipeline.folder / folder)
    settings = yaml.safe_load((pipeline.folder / "small.yaml").read_text())
    settings["fineweb"]["shards"] = 2
    (pipeline.folder / "small.yaml").write_text(yaml.safe_dump(settings))
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    with hub.running() as running:
        running.files.update({hub_path(number): content for number, content in enumerate(contents)})
        notes = [f"resources/fineweb-edu/{number:05}.txt" for number in range(2)]
        pipeline.run(*notes, HF_ENDPOINT=running.address, **cache)
    (tmp_path / "met").mkdir()
    pipeline.run(f"{SHARDS}/manifest.json", PICOGPT_TEST_MEET=f"2:{tmp_path / 'met'}", **cache)
    assert len(list((tmp_path / "met").iterdir())) == 2
    data = open_data(pipeline.folder / SHARDS)
    assert (data.val.header.documents, data.train.header.corpus) == (HELD_OUT, fineweb.NAME)
    assert not (pipeline.folder / "network.txt").exists()


def test_jobs_on_the_same_node_have_gpus_and_cores_of_their_own(cluster: Cluster, tmp_path: Path):
    cores = f"PYTHONPATH={ROOT} {sys.executable} -c 'from picogpt import hardware; print(hardware.cpu_count())'"
    script = (
        f'echo "$CUDA_VISIBLE_DEVICES" $({cores}) > {tmp_path}/new.$SLURM_JOB_ID && mv {tmp_path}/new.$SLURM_JOB_ID'
        f" {tmp_path}/$SLURM_JOB_ID; while [ ! -e {tmp_path}/go ]; do sleep 0.2; done"
    )
    share = ("--nodelist=gpu2", "--mem=1000", "--gpus=h100:1", "--cpus-per-task=1")
    for _ in range(2):
        cluster.ask("sbatch", "--partition=gpu", *share, "--output=/dev/null", f"--wrap={script}")
    slurm.wait_for(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2, "two jobs on one node", cluster)
    shown = sorted(path.read_text().strip() for path in tmp_path.glob("[0-9]*"))
    (tmp_path / "go").touch()
    assert shown == ["0 1", "1 1"]


def test_a_training_that_slurm_killed_at_its_time_limit_goes_on(pipelines, cluster: Cluster):
    pipeline = pipelines["killed"]
    pipeline.held()
    slurm.wait_for(pipeline.ended, "the end of a job", cluster, pipeline.training.process)
    assert pipeline.saved_step(TRANSFORMER) == HELD_AT[TRANSFORMER]  # the last checkpoint, and nothing at the end
    pipeline.go()
    assert "SLURM status is: 'TIMEOUT'" in pipeline.training.end()
    assert pipeline.sessions(TRANSFORMER) == 2


def test_trainings_that_were_stopped_equal_one_that_was_not(pipelines, straight: Path):
    """The weights bit for bit, and every line of the metrics: the curve has no seam."""
    pipelines["down"].training.end()
    assert pipelines["down"].sessions(FINEWEB) == 2
    for name in ("drain", "killed", "cancel", "down", "low"):
        run = INTERRUPTED[name]
        assert_same_run(pipelines[name].folder / run, straight / run)


def test_a_training_longer_than_its_time_limit_goes_on_from_where_it_was(pipelines, straight: Path, tmp_path: Path):
    pipeline = pipelines["limit"]

    def saved() -> bool:
        return "of 8; everything is saved" in pipeline.training.out.read_text()

    slurm.wait_for(saved, "the signal before the time limit", pipeline.cluster, pipeline.training.process)
    pipeline.go()
    pipeline.training.end()
    run = pipeline.folder / FINEWEB
    record = records.read(run / "record.json")
    assert (record["ranks"], record["machine"], record["results"]["sessions"]) == (2, "across", 2)
    assert_same_run(run, straight / FINEWEB)
    # The same by hand, in one go, with both ranks on one node.
    (tmp_path / "across.yaml").write_text(yaml.safe_dump({**MACHINES["across"], "nodes": 1, "ranks": 2}))
    launch = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "-m", "picogpt"]
    by_hand = [*launch, *long_training(pipeline.folder / SHARDS, "run"), "--hardware=across.yaml"]
    alone = subprocess.run(by_hand, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert alone.returncode == 0, alone.stderr
    assert_same_run(run, tmp_path / "run")


def test_what_cannot_run_says_what_to_change(pipelines, cluster: Cluster, prepared: Path, tmp_path: Path):
    # What a cluster with accounting answers to who may pay.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sacctmgr").write_text("#!/bin/sh\necho project1\n")
    (tmp_path / "bin/sacctmgr").chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:{cluster.environment['PATH']}"}
    set_this = "set default-resources: {} in profiles/slurm/profile.yaml to one of those of {}"
    partition = set_this.format("slurm_partition", "sinfo -s")
    account = set_this.format("slurm_account", "sacctmgr show")
    started = []
    for number, (name, payer, environment, refused, advice) in enumerate(
        [
            ("nowhere", None, {}, "invalid partition specified: nowhere", partition),
            ("billed", None, {}, "partition billed takes no job without an account", account),
            ("gpu", "nobody", path, "The given account nobody appears to be invalid", account),
        ]
    ):
        pipeline = Pipeline(cluster, prepared, tmp_path / str(number), name, account=payer, retries=0)
        started.append((pipeline.start(BIGRAM, **environment), refused, advice))
    for run, refused, advice in started:
        out = run.end(1)
        assert refused in out
        assert advice in out
    # The list of the profile is gone, and this machine would speak for the cluster.
    out = pipeline.run(BIGRAM, "--config", "gpus=0", status=1)
    assert "ladder: hardware: auto would describe this machine" in out


def test_a_machine_that_is_not_what_its_name_says(cluster: Cluster, prepared: Path, tmp_path: Path):
    machines = ("crowd.yaml", "duo.yaml", "grid.yaml", "h100")
    pipeline = Pipeline(cluster, prepared, tmp_path / "wrong", "gpu", machines, retries=0)
    targets = [f"results/records/ladder/{Path(name).stem}/baseline.json" for name in machines]
    (tmp_path / "ranks").mkdir()
    out = pipeline.run(*targets, "--keep-going", status=1, PICOGPT_TEST_RANKS=str(tmp_path / "ranks"))
    # Two ranks on one node and four on two were there before they refused, each beside the GPUs of its node.
    ranks = {path.name: path.read_text() for path in (tmp_path / "ranks").iterdir()}
    on_one_node = {"0 of 2": "0 of 0,1", "1 of 2": "1 of 0,1"}
    assert ranks == {
        **on_one_node,
        **{"0 of 4": "0 of 0,1", "1 of 4": "1 of 0,1", "2 of 4": "0 of 0,1", "3 of 4": "1 of 0,1"},
    }
    for message in (
        "hardware grid is grid (cuda, .*), and this device is",
        "hardware h100 is H100 (cuda, NVIDIA H100",
        "), and this device is",
        "gpu_model in the profile asks for the right GPUs",
        "Requested node configuration is not available",  # three GPUs of a node with two
        "--gpus=h100:3",
        "no node of the partition has the requested GPUs, cores or memory",
    ):
        assert message in out


def test_a_file_that_appears_late_is_waited_for_as_long_as_the_profile_says(
    cluster: Cluster, prepared: Path, tmp_path: Path
):
    started = []
    for patience in (60, 1):
        settings = {"latency-wait": patience, "retries": 0}
        pipeline = Pipeline(cluster, prepared, tmp_path / str(patience), "gpu", **settings)
        started.append(pipeline.start(BIGRAM, PICOGPT_TEST_LATE=f"{pipeline.folder / BIGRAM}:6"))
    assert "--latency-wait" not in started[0].end()
    assert "--latency-wait" in started[1].end(1)
