"""The workflow as a user runs it: real Snakemake, real steps, a small configuration in an empty folder."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest
import yaml
from conftest import ROOT, copy_source, hellaswag_items, text_of_words
from filelock import FileLock
from pipeline import BOX, NO_HUB, WORKFLOW, command, configure, job_counts, jobs, needs_snakemake, snakemake

from picogpt import hardware, records
from picogpt.files import write_text

pytestmark = needs_snakemake
TRANSFORMER_SAMPLE = "media/char_transformer_sample.txt"
CURVE = "media/char_bigram_loss.png"
ARTIFACTS = (
    "media/gpt2_box_throughput.png", "media/gpt2_a30_throughput.png", "media/gpt2_cpu_throughput.png",
    CURVE, "media/char_transformer_loss.png", TRANSFORMER_SAMPLE,
    "media/gpt2_words_loss.png", "media/gpt2_words_sample.txt", "results/summary.csv", "results/report.md", "results/report.html",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder where the pipeline has run on the user's own text. A hub refused the weights, so that it is not asked again."""
    folder = tmp_path_factory.mktemp("pipeline") / "finished"
    copy_source(folder / "source", *WORKFLOW)
    shutil.copy(corpus, folder / "words.txt")
    configure(folder, corpus="words.txt")
    with hub.running() as refusing:
        (folder / "hub.txt").write_text(refusing.address)
        snakemake(folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, the source tree in it included, for a test that changes something there."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old} in {path}"
    path.write_text(text.replace(old, new))


NOT_MEASURED = {
    ("sample quality", "val loss, pretrained, int8"): {"note": "hub unreachable"},
    ("weights", "pretrained, safetensors"): {"note": "hub unreachable"},
    ("sampling throughput", "ours, published GPU, mean"): {"published": "83.92", "device": ""},
    **{
        ("sampling throughput", f"ours, published GPU, run {number}"): {"published": published}
        for number, published in enumerate(("83.54", "83.5", "83.4", "84.44", "84.72"), 1)
    },
    ("hellaswag", "acc_norm, ours, float32"): {
        "published": "0.2945",
        "note": "picogpt evaluate gpt2 --task hellaswag does that",
    },
    ("training ladder", "a30, fused AdamW, decay groups"): {"published": "9.3", "note": "needs A30"},
    ("ddp", "2x H100, throughput"): {"published": "900000", "note": "needs 2x H100"},
}
"""Rows of the summary that nothing was measured for, by section and metric, with values of other columns."""


def test_every_artifact_is_made(finished: Path):
    assert [artifact for artifact in ARTIFACTS if not (finished / artifact).stat().st_size] == []
    assert len((finished / TRANSFORMER_SAMPLE).read_text()) == 100
    with open(finished / "results/summary.csv", newline="") as file:
        rows = {(row["section"], row["metric"]): row for row in csv.DictReader(file)}
    losses = [row for row in rows.values() if row["unit"].startswith("nats") and row["measured"]]
    assert {row["status"] for row in losses} == {"not comparable"}
    assert float(rows["sample quality", "val loss, ours, int8"]["measured"]) > 8
    assert float(rows["sampling throughput", "ours, this machine, int8"]["measured"]) > 0
    for key, expected in NOT_MEASURED.items():
        assert rows[key].items() >= {"status": "not measured here", "measured": "", **expected}.items()
    page = (finished / "results/report.md").read_text()
    for text in ("| flash | ", "Not measured in this run.", "Corpus: **words**", "not measured here: hub unreachable"):
        assert text in page
    looks = (finished / "results/report.html").read_text()
    for text in ("<strong>words</strong>", 'class="p', "train gpt2 in nats per token", "hub unreachable"):
        assert text in looks
    logs = {path.stem for path in (finished / "logs").glob("*.log")}
    assert {"tokenize_char", "train_char_bigram", "summary", "page_md", "page_html"} <= logs


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["results/records/ladder/a30/baseline.json"], ["hardware a30 is A30 (cuda, NVIDIA A30), and this device is", hardware.cpu_name()]),
        (["-n", "media/gpt2_h10_throughput.png"], ["there is no hardware called h10: there are a30, box, cpu"]),
        (["-n", "results/records/ladder/cpu/tf32.json"], ["there is no rung of hardware cpu called tf32: there are baseline, bf16"]),
        (["-n", "--config", "ladder={hardware: [wrong.yaml]}"], ["wrong.yaml:", "rungs must begin with baseline"]),
        (["results/records/ladder/nodes/baseline.json", "--config", "ladder={hardware: [nodes.yaml]}"], ["several nodes need snakemake --workflow-profile slurm"]),
        (["-n", "--config", "corpuss=x"], ["'corpuss' was unexpected"]),
        ([CURVE, "--config", "corpus=nothere.txt"], ["there is no text nothere.txt"]),  # though tokens of another are here
    ],
    ids=["device", "machine", "rung", "hardware file", "nodes", "key", "text"],
)  # fmt: skip
def test_a_mistake_is_named(finished: Path, arguments: list[str], messages: list[str]):
    (finished / "wrong.yaml").write_text(yaml.safe_dump({**BOX, "rungs": ["flash"]}))
    (finished / "nodes.yaml").write_text(yaml.safe_dump({**BOX, "nodes": 2, "batch_size": 4}))
    out = snakemake(finished, *arguments, status=1)
    assert [message for message in messages if message not in out] == [], out
    assert "Traceback (most recent call last)" not in out
    assert {path.parent.name for path in finished.glob("results/records/ladder/*/*")} == {"box"}


def test_a_mistake_in_the_configuration_is_told_by_its_message_alone(tmp_path: Path):
    configure(tmp_path, corpus="nothere.txt")
    out = snakemake(tmp_path, "-n", status=1)
    assert "\npicogpt: there is no text nothere.txt" in out
    assert ".smk" not in out


def test_the_report_of_snakemake_has_every_artifact(finished: Path):
    snakemake(finished, "--report", "report.html")
    page = (finished / "report.html").read_text()
    assert [artifact for artifact in ARTIFACTS if Path(artifact).name not in page] == []
    assert "a character bigram, a character transformer and GPT-2 (124M) are trained" in page
    for path in (ROOT, finished, Path.home(), sys.prefix):
        assert str(path) not in page, path


def test_a_second_run_does_nothing(finished: Path):
    assert "Nothing to be done" in snakemake(finished)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected", "rungs"),
    [
        ("small.yaml", "sample_characters: 100", "sample_characters: 50", "sample page", 0),
        ("small.yaml", "untrained_characters: 20", "untrained_characters: 30", "sample_untrained page", 0),
        ("small.yaml", "train.epochs=2", "train.epochs=1", "train sample sample_untrained loss_curve summary page bench_weights", 0),
        ("small.yaml", "sample_tokens: 30", "sample_tokens: 20", "sample_gpt2 page", 0),
        ("small.yaml", "throughput_runs: 2", "throughput_runs: 3", "bench_sampling bench_sampling_streams summary page", 0),
        ("small.yaml", "the king", "my lord", "evaluate summary page", 0),
        ("small.yaml", "train.steps=6", "train.steps=7", "train_gpt2 sample_gpt2 loss_curve evaluate bench_sampling bench_sampling_streams bench_weights summary page", 0),
        ("small.yaml", "- int8", "- float32", "evaluate bench_sampling summary page", 0),
        ("source/config/config.yaml", "drop_unseen: false", "drop_unseen: true", "tokenize_char train sample sample_untrained loss_curve summary page bench_weights", 0),
        ("source/config/models/char_bigram.yaml", "learning_rate: 0.07", "learning_rate: 0.05", "train sample sample_untrained loss_curve summary page bench_weights", 0),
        ("source/config/models/char_bigram.yaml", "log_interval: 10", "log_interval: 20", "", 0),
        ("source/config/published.csv", ",2.487851,", ",2.5,", "loss_curve throughput summary page", 0),
        ("small.yaml", "- box.yaml\n  set:", "- box.yaml\n  set:\n  - model.dropout=0.1", "bench_train throughput summary page", 2),
        ("box.yaml", "steps: 3", "steps: 4", "bench_train throughput summary page", 2),
        ("box.yaml", "- flash", "- flash\n- fused_loss", "bench_train throughput summary page", 1),
        ("box.yaml", "title: box", "title: another", "throughput page", 0),
    ],
)  # fmt: skip
def test_a_change_runs_what_depends_on_it(copied: Path, file: str, old: str, new: str, expected: str, rungs: int):
    replace(copied / file, old, new)
    counts = job_counts(snakemake(copied, "-n"))
    assert (set(counts), counts.get("bench_train", 0)) == (set(expected.split()), rungs)


def test_records_of_an_older_version_are_refused_by_name(copied: Path):
    replace(copied / "results/records/weights.json", '"schema_version": 2', '"schema_version": 0')
    out = snakemake(copied, "results/summary.csv", "--forcerun", "summary", status=1)
    assert "results/records/weights.json has schema version 0" in out


def test_where_openais_weights_are_here_the_page_shows_them(copied: Path):
    """Records as `evaluate` and `bench sample` write them where the weights are in the cache; test_pretrained.py makes such."""
    for name in ("evaluate", "sampling"):
        ours = json.loads((copied / f"results/records/{name}_gpt2_int8.json").read_text())
        theirs = {**ours, "model": "gpt2-pretrained"}
        if name == "evaluate":
            theirs["results"] = {"val_loss": 3.125, "texts": ["theirs, the first", "theirs, the second"]}
        (copied / f"results/records/{name}_gpt2-pretrained_int8.json").write_text(json.dumps(theirs))
    snakemake(copied, "results/report.md")
    page = (copied / "results/report.md").read_text()
    assert "the kingtheirs, the first" in page
    assert "| val loss, pretrained, int8 | – | 3.125 |" in page
    assert "| gpt2-pretrained | int8 | not measured" not in page


def test_planning_asks_no_network(finished: Path):
    with hub.running() as answering:
        out = snakemake(finished, "-n", HF_ENDPOINT=answering.address)  # another hub, which may have the weights
        assert jobs(out) == {"fetch_hub", "evaluate", "bench_sampling", "bench_weights", "summary", "page"}
        assert answering.requests == []


@pytest.mark.slow
def test_the_pretrained_rows_join_once_the_hub_answers(copied: Path):
    """Every run asks, and makes nothing else, until the hub has said what it would go on saying."""

    def times() -> dict[str, int]:
        files = (path for path in copied.rglob("*") if path.is_file() and ".snakemake" not in path.parts)
        return {str(path.relative_to(copied)): path.stat().st_mtime_ns for path in files}

    def asked(endpoint: str) -> tuple[set[str], str]:
        """Files that were written, and what the hub said."""
        before = times()
        snakemake(copied, HF_ENDPOINT=endpoint)
        written = {path for path, time in times().items() if before.get(path) != time}
        return written, json.loads((copied / "resources/hub.json").read_text())["files"]["pretrained"]["state"]

    only_the_answer = {"resources/hub.json", "logs/fetch_hub.log"}
    written, state = asked(NO_HUB["HF_ENDPOINT"])
    assert (state, "results/summary.csv" in written) == ("unreachable", True)
    assert asked(NO_HUB["HF_ENDPOINT"]) == (only_the_answer, "unreachable")
    with hub.running() as answering:
        answering.status = 501  # an answer that may be another one tomorrow
        assert asked(answering.address) == (only_the_answer, "unreachable")
        answering.status = 404
        written, state = asked(answering.address)
        assert (state, "results/summary.csv" in written) == ("refused", True)
        assert asked(answering.address) == (set(), "refused")


@pytest.mark.slow
def test_hellaswag_joins_once_its_items_can_be_had(copied: Path, tmp_path: Path):
    items, mirror = hellaswag_items(4), tmp_path / "mirror/hellaswag_val.jsonl"
    assets = yaml.safe_load((copied / "source/config/assets.yaml").read_text())
    assets["hellaswag"] |= {"size": len(items), "sha256": hashlib.sha256(items.encode()).hexdigest(), "addresses": []}
    (copied / "source/config/assets.yaml").write_text(yaml.safe_dump(assets))
    replace(copied / "small.yaml", "gpt2:\n", "gpt2:\n  hellaswag: true\n  pretrained: false\n")

    def row() -> dict[str, str]:
        snakemake(copied, "results/summary.csv", "results/report.md", PICOGPT_MIRROR=str(mirror.parent))
        with open(copied / "results/summary.csv", newline="") as file:
            return next(row for row in csv.DictReader(file) if row["metric"] == "acc_norm, ours, float32")

    absent = {"measured": "", "status": "not measured here", "note": "hellaswag_val.jsonl could not be fetched"}
    assert row().items() >= absent.items()
    mirror.parent.mkdir()
    mirror.write_text(items)
    measured = row()
    assert (measured["published"], measured["status"]) == ("0.2945", "not comparable")
    assert float(measured["measured"]) in (0, 0.25, 0.5, 0.75, 1)
    assert (
        f"| acc_norm, ours, float32 | 0.2945 | {measured['measured']} |" in (copied / "results/report.md").read_text()
    )
    assert "Nothing to be done" in snakemake(copied, "results/summary.csv", PICOGPT_MIRROR=str(mirror.parent))


@pytest.mark.slow
def test_a_pipeline_killed_in_the_middle_goes_on_to_the_same_results(finished: Path, copied: Path):
    run = Path("weights/char_transformer/pipeline")
    shutil.rmtree(copied / run)
    (copied / TRANSFORMER_SAMPLE).unlink()
    line, nothing = command(copied, TRANSFORMER_SAMPLE), subprocess.DEVNULL
    environment = {**os.environ, "HF_ENDPOINT": (copied / "hub.txt").read_text()}
    process = subprocess.Popen(line, stdout=nothing, stderr=nothing, start_new_session=True, env=environment)
    deadline = time.monotonic() + 120
    while not (copied / run / "checkpoints/last.pt").exists():
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (copied / run / "record.json").exists()

    snakemake(copied, TRANSFORMER_SAMPLE)
    ours, theirs = (records.read(folder / run / "record.json")["results"] for folder in (copied, finished))
    assert (ours["sessions"], ours["val_loss_after"]) == (2, theirs["val_loss_after"])
    assert (copied / TRANSFORMER_SAMPLE).read_text() == (finished / TRANSFORMER_SAMPLE).read_text()


@pytest.mark.parametrize(
    ("text", "made", "message"),
    [
        ("ab" * 95 + "zabababa", "char_tokenizer/pipeline/train.bin", "'z' (1 times)"),
        ("abc\n" * 5, "char_transformer/pipeline/best.pt", "block_size=16 needs at least 32"),
    ],
)
def test_a_failing_step_fails_the_pipeline_and_shows_its_message(copied: Path, text: str, made: str, message: str):
    """Also where its file is there already, made from another text."""
    (copied / "text.txt").write_text(text)
    assert message in snakemake(copied, f"weights/{made}", "--config", "corpus=text.txt", status=1)


def test_one_pipeline_at_a_time(tmp_path: Path, corpus: Path):
    configure(tmp_path, corpus=str(corpus))
    (tmp_path / ".snakemake").mkdir()
    with FileLock(tmp_path / ".snakemake/pipeline.lock"):
        assert "another pipeline is running in this folder" in snakemake(tmp_path, status=1)
    assert not (tmp_path / "weights").exists()


def test_without_any_source_the_error_says_what_to_do(tmp_path: Path):
    configure(tmp_path, corpus=["tinyshakespeare"])
    nobody = "http://127.0.0.1:9"  # a proxy that is not there cuts the network off
    cut_off = {"PICOGPT_MIRROR": str(tmp_path), "HTTPS_PROXY": nobody, "HTTP_PROXY": nobody}
    out = snakemake(tmp_path, "resources/corpus.txt", status=1, **cut_off)
    assert "cannot get tinyshakespeare.txt" in out
    assert "PICOGPT_MIRROR" in out
    assert not (tmp_path / "resources/corpus.txt").exists()


@pytest.mark.parametrize(("corpus", "fetched"), [("mine.txt", set()), ("tinyshakespeare", {"fetch_corpus"})])
def test_a_corpus_is_a_file_of_the_user_or_a_registered_name(tmp_path: Path, corpus: str, fetched: set[str]):
    (tmp_path / "mine.txt").write_text("abc\n" * 30)
    configure(tmp_path, corpus=corpus)
    planned = jobs(snakemake(tmp_path, "-n", "weights/char_tokenizer/pipeline/train.bin"))
    assert planned == {"tokenize_char"} | fetched


def test_what_changes_in_a_folder_of_texts_runs_what_depends_on_it(tmp_path: Path):
    for number, line in enumerate(text_of_words(800).splitlines()):
        write_text(tmp_path / f"my/{number:02}.txt", line)
    configure(tmp_path, corpus="my/")
    made = ["weights/char_bigram/pipeline/best.pt", "weights/gpt2_tokenizer/pipeline/train.bin"]
    snakemake(tmp_path, *made)
    for tokenizer in ("char", "gpt2"):
        log = (tmp_path / f"logs/tokenize_{tokenizer}.log").read_text()
        assert log.startswith("my: 9 of 100 documents are for validation, 9")
    changed, removed, added = (tmp_path / f"my/{name}" for name in ("01.txt", "02.txt", "more/a.txt"))
    before = {path: path.read_text() for path in (changed, removed)}
    dependent = {"tokenize_char", "tokenize_gpt2", "train"}
    write_text(changed, "the king and queen")
    assert jobs(snakemake(tmp_path, "-n", *made)) == dependent
    write_text(changed, before[changed])
    write_text(added, "of night")
    assert jobs(snakemake(tmp_path, "-n", *made)) == dependent
    added.unlink()
    removed.unlink()
    assert jobs(snakemake(tmp_path, "-n", *made)) == dependent
    write_text(removed, before[removed])
    (tmp_path / "my/.swap").touch()
    assert "Nothing to be done" in snakemake(tmp_path, *made)
    changed.write_bytes(b"caf\xe9")
    assert "my/01.txt is not UTF-8 text: byte 3 is 0xe9" in snakemake(tmp_path, *made, status=1)


def test_all_machines_of_the_write_up_are_planned_on_a_cluster(tmp_path: Path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    machines = [(path.stem, yaml.safe_load(path.read_text())) for path in (ROOT / "config/hardware").glob("*.yaml")]
    names = sorted(name for name, _ in machines)
    # What a cluster may call them; where nothing is said, any GPU serves.
    models = {"h100": "hopper", "h100x16": "sxm", "a30": "ampere", "default": "cheap"}
    values = ["gpus=2", f"gpu_model={json.dumps(models)}", f"ladder={{hardware: [{', '.join(names)}]}}"]
    configure(tmp_path)
    plan = " ".join(snakemake(tmp_path, "-n", "-p", "--workflow-profile", "slurm", "--config", *values).split())
    ranks = "torchrun --nproc_per_node=2 --max-restarts=1 --shutdown-timeout=100 --standalone -m picogpt train gpt2"
    assert ranks in plan
    assert f"bench_train {sum(len(machine['rungs']) for _, machine in machines)}" in plan
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
