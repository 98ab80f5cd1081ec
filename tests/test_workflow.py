"""The workflow as a user runs it: real Snakemake, real steps, a small configuration in an empty folder."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import hub
import pytest
import yaml
from conftest import ROOT, copy_source

from picogpt import hardware, records

SNAKEMAKE = shutil.which("snakemake", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow]'")

SMALL = {
    "char_bigram": {"set": ["model.block_size=16", "train.epochs=2"], "sample_characters": 20, "untrained_characters": 20},
    "char_transformer": {
        "set": [
            "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16",
            "train.steps=30", "train.eval_interval=10", "runtime.checkpoint_interval=5", "runtime.log_interval=5",
        ],
        "sample_characters": 100,
        "untrained_characters": 30,
    },
    "gpt2": {
        "set": [
            "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16",
            "train.steps=6", "train.eval_interval=3",
        ],
        "sample_tokens": 30,
        "prompts": ["the king", "O"],
        "prompt_tokens": 5,
        "dtypes": ["int8"],
        "throughput_tokens": 10,
        "throughput_runs": 2,
        "throughput_streams": 2,
    },
    "fineweb": {"shards": 1},
    "run": "pipeline",
    "ladder": {"hardware": ["box.yaml"], "set": ["model.n_layer=1", "model.n_embd=16", "model.n_head=2"]},
}  # fmt: skip
BOX = {
    "title": "box", "device": ".*", "kind": "cpu", "batch_size": 2, "micro_batch_size": 2, "block_size": 16,
    "warmup_steps": 1, "steps": 3, "rungs": ["baseline", "flash"],
}  # fmt: skip
TRANSFORMER_SAMPLE = "media/char_transformer_sample.txt"
ARTIFACTS = (
    "media/gpt2_box_throughput.png",
    "media/gpt2_a30_throughput.png",
    "media/gpt2_cpu_throughput.png",
    "media/char_bigram_loss.png",
    "media/char_transformer_loss.png",
    TRANSFORMER_SAMPLE,
    "media/gpt2_words_loss.png",
    "media/gpt2_words_sample.txt",
    "results/summary.csv",
    "results/report.md",
)


WORKFLOW = ("Snakefile", "config", "profiles", "workflow")


def command(folder: Path, *arguments: str) -> list[str]:
    """Snakemake on the workflow of this source tree, or of the copy in `folder`, working in `folder`."""
    tree = folder / "source" if (folder / "source").exists() else ROOT
    return [
        str(SNAKEMAKE),
        *arguments,
        "--snakefile", str(tree / "Snakefile"),
        "--directory", str(folder),
        "--configfile", str(folder / "small.yaml"),
    ]  # fmt: skip


# Nobody answers there: the rows of OpenAI's weights say so, everything else is made, and every run asks again.
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    endpoint = (folder / "hub.txt").read_text() if (folder / "hub.txt").exists() else NO_HUB["HF_ENDPOINT"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(folder / "hub"), **environment}
    return forked.run("snakemake", *command(folder, *arguments)[1:], env=environment)


def configure(folder: Path, **change: object) -> None:
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "size": "cpu", **change}))
    if not (folder / "box.yaml").exists():
        (folder / "box.yaml").write_text(yaml.safe_dump(BOX))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder where the pipeline has run on the user's own text, from a copy of its files that tests may change.

    A hub refused the weights, so that later runs do not ask it again.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    copy_source(folder / "source", *WORKFLOW)
    configure(folder, corpus=str(corpus))
    with hub.running() as refusing:
        (folder / "hub.txt").write_text(refusing.address)
        run = snakemake(folder)
    assert run.returncode == 0, run.stderr
    return folder


def jobs(run: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the rules that a dry run would run."""
    lines = (run.stdout + run.stderr).split("Job stats:")[-1].splitlines()
    return {line.split()[0] for line in lines if len(line.split()) == 2 and line.split()[1].isdigit()} - {
        "total",
        "all",
    }


def test_bare_snakemake_lists_every_job_in_a_fresh_clone(tmp_path: Path):
    clone = copy_source(tmp_path / "clone", *WORKFLOW)
    run = subprocess.run([str(SNAKEMAKE), "-n"], cwd=clone, capture_output=True, text=True, check=True)
    assert jobs(run) == {
        "fetch_corpus", "fetch_gpt2_ranks", "fetch_hub", "tokenize_char", "tokenize_gpt2", "train", "train_gpt2",
        "sample", "sample_untrained", "sample_gpt2", "evaluate", "bench_sampling", "bench_sampling_streams",
        "bench_weights", "bench_train", "loss_curve", "throughput", "summary", "page",
    }  # fmt: skip
    assert "Using workflow specific profile profiles/default" in run.stderr


def test_every_artifact_is_made(finished: Path):
    for artifact in ARTIFACTS:
        assert (finished / artifact).stat().st_size > 0
    assert len((finished / "media/char_transformer_sample.txt").read_text()) == 100
    with open(finished / "results/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_metric = {(row["section"], row["metric"]): row for row in rows}
    losses = [row for row in rows if row["unit"].startswith("nats") and row["measured"]]
    assert {row["status"] for row in losses} == {"not comparable"}
    assert float(by_metric["sample quality", "val loss, ours, int8"]["measured"]) > 8
    assert float(by_metric["sampling throughput", "ours, this machine, int8"]["measured"]) > 0
    for row in (
        by_metric["sample quality", "val loss, pretrained, int8"],
        by_metric["weights", "pretrained, safetensors"],
    ):
        assert (row["status"], row["measured"], row["note"]) == ("not measured here", "", "hub unreachable")
    published_gpu = by_metric["sampling throughput", "ours, published GPU, mean"]
    assert (published_gpu["published"], published_gpu["measured"], published_gpu["device"]) == ("83.92", "", "")
    runs = [by_metric["sampling throughput", f"ours, published GPU, run {number}"] for number in range(1, 6)]
    assert [row["published"] for row in runs] == ["83.54", "83.5", "83.4", "84.44", "84.72"]
    top = by_metric["training ladder", "a30, fused AdamW, decay groups"]
    assert (top["published"], top["measured"], top["note"]) == ("9.3", "", "needs A30")
    ddp = by_metric["ddp", "2x H100, throughput"]
    assert (ddp["published"], ddp["status"], ddp["note"]) == ("900000", "not measured here", "needs 2x H100")
    page = (finished / "results/report.md").read_text()
    assert "| flash | " in page
    assert "Not measured in this run." in page
    assert "Corpus: **words**" in page
    assert "not measured here: hub unreachable" in page
    logs = {path.stem for path in (finished / "logs").glob("*.log")}
    assert {"tokenize_char", "train_char_bigram", "summary", "page"} <= logs


def test_a_rung_for_another_device_is_refused_and_the_message_names_both(finished: Path):
    run = snakemake(finished, "results/records/ladder/a30/baseline.json")
    assert run.returncode == 1
    assert "hardware a30 is A30 (cuda, NVIDIA A30), and this device is" in run.stderr + run.stdout
    assert hardware.cpu_name() in run.stderr + run.stdout
    assert not (finished / "results/records/ladder/a30").exists() or not list(
        (finished / "results/records/ladder/a30").iterdir()
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("media/gpt2_h10_throughput.png", "there is no hardware called h10: there are a30, box, cpu"),
        (
            "results/records/ladder/cpu/tf32.json",
            "there is no rung of hardware cpu called tf32: there are baseline, bf16",
        ),
    ],
)
def test_a_machine_or_rung_that_is_none_is_named(finished: Path, target: str, message: str):
    run = snakemake(finished, "-n", target)
    assert run.returncode == 1
    assert message in run.stderr + run.stdout


def test_a_wrong_hardware_file_is_named(finished: Path):
    try:
        (finished / "box.yaml").write_text(yaml.safe_dump({**BOX, "rungs": ["flash"]}))
        run = snakemake(finished, "-n")
    finally:
        (finished / "box.yaml").write_text(yaml.safe_dump(BOX))
    assert run.returncode == 1
    assert "box.yaml:" in run.stderr + run.stdout
    assert "rungs must begin with baseline" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("change", "rungs"),
    [({"steps": 4}, 2), ({"rungs": ["baseline", "flash", "fused_loss"]}, 1), ({"title": "another name"}, 0)],
)
def test_a_changed_hardware_file_measures_the_rungs_that_depend_on_it(finished: Path, change: dict, rungs: int):
    try:
        (finished / "box.yaml").write_text(yaml.safe_dump({**BOX, **change}))
        run = snakemake(finished, "-n", "results/summary.csv")
        counts = {line.split()[1] for line in (run.stdout + run.stderr).splitlines() if line.startswith("bench_train ")}
        assert counts == ({str(rungs)} if rungs else set())
    finally:
        (finished / "box.yaml").write_text(yaml.safe_dump(BOX))


def test_the_report_of_snakemake_has_every_artifact(finished: Path):
    run = snakemake(finished, "--report", "report.html")
    assert run.returncode == 0, run.stderr
    page = (finished / "report.html").read_text()
    for artifact in ARTIFACTS:
        assert Path(artifact).name in page, artifact
    assert "a character bigram, a character transformer and GPT-2 (124M) are trained" in page
    for path in (ROOT, finished, Path.home(), sys.prefix):
        assert str(path) not in page, path


def test_records_of_an_older_version_are_refused_by_name(finished: Path, tmp_path: Path):
    old = finished / "results/records/weights.json"
    kept = old.read_text()
    try:
        old.write_text(json.dumps({**json.loads(kept), "schema_version": 0}))
        run = snakemake(finished, "results/summary.csv", "--forcerun", "summary")
        assert run.returncode == 1
        assert "results/records/weights.json has schema version 0" in run.stderr + run.stdout
    finally:
        old.write_text(kept)
    assert snakemake(finished).returncode == 0


def test_a_second_run_does_nothing(finished: Path):
    run = snakemake(finished)
    assert run.returncode == 0
    assert "Nothing to be done" in run.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"char_transformer": {"sample_characters": 50}}, {"sample", "page"}),
        ({"char_bigram": {"untrained_characters": 30}}, {"sample_untrained", "page"}),
        ({"char_bigram": {"set": ["model.block_size=16", "train.epochs=1"]}}, {"train", "sample", "sample_untrained", "loss_curve", "summary", "page", "bench_weights"}),
        ({"drop_unseen": True}, {"tokenize_char", "train", "sample", "sample_untrained", "loss_curve", "summary", "page", "bench_weights"}),
        ({"gpt2": {"sample_tokens": 20}}, {"sample_gpt2", "page"}),
        ({"gpt2": {"throughput_runs": 3}}, {"bench_sampling", "bench_sampling_streams", "summary", "page"}),
        ({"gpt2": {"prompts": ["my lord"]}}, {"evaluate", "summary", "page"}),
        ({"ladder": {"set": ["model.n_layer=2", "model.n_embd=16", "model.n_head=2"]}}, {"bench_train", "throughput", "summary", "page"}),
        ({"gpt2": {"set": [*SMALL["gpt2"]["set"], "train.seed=7"]}}, {"train_gpt2", "sample_gpt2", "loss_curve", "evaluate", "bench_sampling", "bench_sampling_streams", "bench_weights", "summary", "page"}),
        ({"gpt2": {"dtypes": ["float32"]}}, {"evaluate", "bench_sampling", "summary", "page"}),
        ({}, set()),
    ],
    ids=["sample length", "untrained sample", "training", "tokens", "gpt2 sample", "throughput", "prompts", "ladder", "gpt2 training", "dtypes", "nothing"],
)  # fmt: skip
def test_a_changed_value_runs_what_depends_on_it(finished: Path, corpus: Path, change: dict, expected: set[str]):
    configure(finished, corpus=str(corpus))
    tree = yaml.safe_load((finished / "small.yaml").read_text())
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    (finished / "small.yaml").write_text(yaml.safe_dump(tree))
    assert jobs(snakemake(finished, "-n")) == expected
    configure(finished, corpus=str(corpus))


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("models/char_bigram.yaml", "learning_rate: 0.07", "learning_rate: 0.05", {"train", "sample", "sample_untrained", "loss_curve", "summary", "page", "bench_weights"}),
        ("models/char_bigram.yaml", "log_interval: 10", "log_interval: 20", set()),
        ("published.csv", ",2.487851,", ",2.5,", {"loss_curve", "throughput", "summary", "page"}),
    ],
    ids=["settings of a model", "runtime of a model", "published"],
)  # fmt: skip
def test_a_value_changed_in_a_file_runs_what_depends_on_it(
    finished: Path, file: str, old: str, new: str, expected: set[str]
):
    path = finished / "source/config" / file
    text, times = path.read_text(), (path.stat().st_atime, path.stat().st_mtime)
    assert old in text
    try:
        path.write_text(text.replace(old, new))
        assert jobs(snakemake(finished, "-n")) == expected
    finally:
        path.write_text(text)
        os.utime(path, times)


def test_where_openais_weights_are_here_the_page_shows_them(finished: Path):
    """Records as `evaluate` and `bench sample` write them where the weights are in the cache; test_pretrained.py makes such."""
    folder = Path(shutil.copytree(finished, finished.with_name("copy")))  # as far from the source tree as the first
    for name in ("evaluate", "sampling"):
        ours = json.loads((folder / f"results/records/{name}_gpt2_int8.json").read_text())
        theirs = {**ours, "model": "gpt2-pretrained"}
        if name == "evaluate":
            theirs["results"] = {"val_loss": 3.125, "texts": ["theirs, the first", "theirs, the second"]}
        (folder / f"results/records/{name}_gpt2-pretrained_int8.json").write_text(json.dumps(theirs))
    run = snakemake(folder, "results/report.md")
    assert run.returncode == 0, run.stderr
    page = (folder / "results/report.md").read_text()
    assert "the kingtheirs, the first" in page
    assert "| val loss, pretrained, int8 | – | 3.125 |" in page
    assert "| gpt2-pretrained | int8 | not measured" not in page


def test_planning_asks_no_network(finished: Path):
    with hub.running() as answering:
        run = snakemake(finished, "-n", HF_ENDPOINT=answering.address)  # another hub, which may have the weights
        assert jobs(run) == {"fetch_hub", "evaluate", "bench_sampling", "bench_weights", "summary", "page"}
        assert answering.requests == []


def test_the_pretrained_rows_join_once_the_hub_answers(finished: Path):
    """Every run asks, and makes nothing else, until the hub has said what it would go on saying."""
    folder = Path(shutil.copytree(finished, finished.with_name("asking")))

    def times() -> dict[str, int]:
        files = (path for path in folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts)
        return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}

    def asked(endpoint: str) -> tuple[set[str], str]:
        """The files that a run has written, and what the hub said."""
        before = times()
        run = snakemake(folder, HF_ENDPOINT=endpoint)
        assert run.returncode == 0, run.stderr
        written = {path for path, time in times().items() if before.get(path) != time}
        return written, json.loads((folder / "resources/hub.json").read_text())["files"]["pretrained"]["state"]

    written, state = asked(NO_HUB["HF_ENDPOINT"])
    assert (state, "results/summary.csv" in written) == ("unreachable", True)
    for _ in range(2):
        written, state = asked(NO_HUB["HF_ENDPOINT"])
        assert (state, written) == ("unreachable", {"resources/hub.json", "logs/fetch_hub.log"})
    with hub.running() as answering:
        answering.status = 501  # an answer that may be another one tomorrow
        assert asked(answering.address) == ({"resources/hub.json", "logs/fetch_hub.log"}, "unreachable")
        answering.status = 404
        written, state = asked(answering.address)
        assert (state, "results/summary.csv" in written) == ("refused", True)
        assert asked(answering.address) == (set(), "refused")


def test_a_pipeline_killed_in_the_middle_goes_on_to_the_same_results(finished: Path, corpus: Path, tmp_path: Path):
    configure(tmp_path, corpus=str(corpus))
    run = tmp_path / "weights/char_transformer/pipeline"
    process = subprocess.Popen(
        command(tmp_path, TRANSFORMER_SAMPLE),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **NO_HUB},
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/last.pt").exists():
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "record.json").exists()

    again = snakemake(tmp_path, TRANSFORMER_SAMPLE)
    assert again.returncode == 0, again.stderr
    assert records.read(run / "record.json")["results"]["sessions"] == 2
    assert (tmp_path / TRANSFORMER_SAMPLE).read_text() == (finished / TRANSFORMER_SAMPLE).read_text()
    losses = [
        records.read(f / run.relative_to(tmp_path) / "record.json")["results"]["val_loss_after"]
        for f in (tmp_path, finished)
    ]
    assert losses[0] == losses[1]


def test_a_failing_step_fails_the_pipeline_and_shows_its_message(tmp_path: Path):
    (tmp_path / "text.txt").write_text("ab" * 95 + "zabababa")
    configure(tmp_path, corpus="text.txt")
    run = snakemake(tmp_path, "weights/char_tokenizer/pipeline/train.bin")
    assert run.returncode == 1
    assert "'z' (1 times)" in run.stderr

    (tmp_path / "text.txt").write_text("abc\n" * 30)
    run = snakemake(tmp_path, "weights/char_transformer/pipeline/best.pt", "--config", "corpus=text.txt")
    assert run.returncode == 0, run.stderr
    (tmp_path / "text.txt").write_text("abc\n" * 5)
    run = snakemake(tmp_path, "weights/char_transformer/pipeline/best.pt")
    assert run.returncode == 1
    assert "block_size=16 needs at least 32" in run.stderr


def test_a_wrong_key_is_named(finished: Path):
    run = snakemake(finished, "-n", "--config", "corpuss=x")
    assert run.returncode == 1
    assert "'corpuss' was unexpected" in run.stdout + run.stderr


def test_a_text_that_is_not_there_is_named(finished: Path):
    """Also where the tokens of another text lie."""
    run = snakemake(finished, "media/char_bigram_loss.png", "--config", "corpus=nothere.txt")
    assert run.returncode == 1
    assert "there is no text nothere.txt" in run.stdout + run.stderr


def test_one_pipeline_at_a_time(tmp_path: Path, corpus: Path):
    configure(tmp_path, corpus=str(corpus))
    (tmp_path / ".snakemake").mkdir()
    with open(tmp_path / ".snakemake/pipeline.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = snakemake(tmp_path)
    assert run.returncode == 1
    assert "another pipeline is running in this folder" in run.stderr
    assert not (tmp_path / "weights").exists()


def test_without_any_source_the_error_says_what_to_do(tmp_path: Path):
    configure(tmp_path, corpus=["tinyshakespeare"])
    # A proxy that is not there cuts the network off.
    cut_off = {
        **os.environ,
        "PICOGPT_MIRROR": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    wanted = command(tmp_path, "resources/corpus.txt")
    run = subprocess.run(wanted, capture_output=True, text=True, check=False, env=cut_off, timeout=120)
    assert run.returncode == 1
    assert "cannot get tinyshakespeare.txt" in run.stderr
    assert "PICOGPT_MIRROR" in run.stderr
    assert not (tmp_path / "resources/corpus.txt").exists()


@pytest.mark.parametrize(("corpus", "source"), [("mine.txt", "mine.txt"), ("tinyshakespeare", "resources/corpus.txt")])
def test_a_corpus_is_a_file_of_the_user_or_a_registered_name(tmp_path: Path, corpus: str, source: str):
    (tmp_path / "mine.txt").write_text("abc\n" * 30)
    configure(tmp_path, corpus=corpus)
    run = snakemake(tmp_path, "-n", "weights/char_tokenizer/pipeline/train.bin")
    assert run.returncode == 0, run.stderr
    assert ("fetch_corpus" in jobs(run)) == (source == "resources/corpus.txt")


def on_a_cluster(folder: Path, profile: str, *arguments: str) -> str:
    """What is planned for a cluster, by a shipped profile; in one line."""
    pytest.importorskip(f"snakemake_executor_plugin_{profile}")
    options = [
        "-n",
        "--snakefile", ROOT / "Snakefile",
        "--workflow-profile", profile,
        "--directory", folder,
    ]  # fmt: skip
    run = forked.run("snakemake", *options, *arguments, env={**os.environ, **NO_HUB})
    assert run.returncode == 0, run.stderr
    return " ".join((run.stdout + run.stderr).split())


def rungs_of(*names: str) -> int:
    return sum(len(yaml.safe_load((ROOT / f"config/hardware/{name}.yaml").read_text())["rungs"]) for name in names)


def test_on_a_cluster_the_profile_says_what_is_measured(tmp_path: Path):
    plan = on_a_cluster(tmp_path, "slurm", "media/gpt2_h100_throughput.png")
    assert f"bench_train {rungs_of('h100')}" in plan
    for resource in ("gpu=1, gpu_model=h100", "slurm_extra=--signal=TERM@120 --exclusive", "runtime=60"):
        assert resource in plan


def test_all_machines_of_the_write_up_are_planned_on_a_cluster(tmp_path: Path):
    names = sorted(path.stem for path in (ROOT / "config/hardware").glob("*.yaml"))
    # What a cluster may call them; where nothing is said, any GPU serves.
    models = {"h100": "hopper", "h100x16": "sxm", "a30": "ampere", "default": "cheap"}
    values = ["size=gpu", "gpus=2", f"gpu_model={json.dumps(models)}", f"ladder={{hardware: [{', '.join(names)}]}}"]
    plan = on_a_cluster(tmp_path, "slurm", "-p", "--config", *values)
    ranks = "torchrun --nproc_per_node=2 --max-restarts=1 --shutdown-timeout=100 --standalone -m picogpt train gpt2"
    assert ranks in plan
    assert f"bench_train {rungs_of(*names)}" in plan
    outputs = {name: f"results/records/ladder/{name}/baseline.json" for name in names}
    outputs["default"] = "weights/char_bigram/pipeline/best.pt"
    asked = {}
    for name, output in outputs.items():
        resources = re.search(rf"output: {re.escape(output)}[ ,].*? resources: (.*?)\[", plan)
        assert resources, output
        asked[name] = dict(pair.split("=", 1) for pair in re.split(r",? ", resources[1]) if "=" in pair)
    two_nodes = {"nodes": "2", "gpu": "16", "tasks": "2", "mpi": "srun", "cpus_per_task": "64"}
    assert asked["h100x16"].items() >= two_nodes.items()
    assert {name: resources.get("gpu_model") for name, resources in asked.items()} == dict.fromkeys(names) | models


def test_several_nodes_without_a_cluster_say_what_is_missing(finished: Path):
    (finished / "nodes.yaml").write_text(yaml.safe_dump({**BOX, "nodes": 2, "batch_size": 4}))
    run = snakemake(
        finished, "results/records/ladder/nodes/baseline.json", "--config", "ladder={hardware: [nodes.yaml]}"
    )
    assert run.returncode == 1
    assert "several nodes need snakemake --workflow-profile slurm" in run.stderr + run.stdout
