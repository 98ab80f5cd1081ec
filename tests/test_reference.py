"""Reference records: what may be kept, and how a changed one is found out."""

import csv
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from picogpt import hardware, records, reference
from picogpt.data import fetch
from picogpt.errors import PicogptError
from picogpt.report.compare import read_references, write_summary

COMMIT = "0123456789" * 4
SPEEDS = {"tokens_per_second": 10.0, "final_loss": 9.0}


def record(kind: str, **change: object) -> dict:
    """A record of a clean checkout, on the published corpus."""
    corpus = {"name": "tinyshakespeare", "text_sha256": fetch.find("tinyshakespeare").sha256}
    corpus |= {"train_tokens": 301_966, "val_tokens": 36_059}
    tree = {
        **records.provenance(hardware.select("cpu")), "kind": kind, "corpus": corpus, "config": {}, "commit": COMMIT,
        "dirty": False, "results": {"val_loss_after": 5.5},
    }  # fmt: skip
    return tree | change


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the pipeline has run."""
    monkeypatch.setattr(records, "commit", lambda: (COMMIT, False))
    (tmp_path / "media").mkdir()
    (tmp_path / "media/gpt2_cpu_throughput.png").write_bytes(b"a picture")
    (tmp_path / "media/gpt2_mine_loss.png").write_bytes(b"a picture of another run")
    records.write(tmp_path / "weights/gpt2/pipeline/tinyshakespeare/record.json", record("train gpt2"))
    records.write(
        tmp_path / "weights/gpt2/20260210_183518/tinyshakespeare/record.json", record("train gpt2", results={})
    )
    for model in ("bigram", "transformer"):
        records.write(tmp_path / f"weights/char_{model}/pipeline/record.json", record(f"train char-{model}"))
    for kind in ("evaluate gpt2 int8", "sampling gpt2 int8"):
        records.write(tmp_path / f"results/records/{kind.replace(' ', '_')}.json", record(kind))
    records.write(tmp_path / "results/records/ladder/cpu/baseline.json", record("ladder cpu baseline", results=SPEEDS))
    unable = record("ladder cpu bf16", not_measured="no instructions for bfloat16", results={})
    records.write(tmp_path / "results/records/ladder/cpu/bf16.json", unable)
    missing = record("evaluate gpt2-pretrained int8", not_measured="hub unreachable", reason="", results={})
    records.write(tmp_path / "results/records/evaluate.json", missing)
    (tmp_path / "results/summary.csv").write_text("section,metric\n")
    (tmp_path / "results/report.md").write_text("![a](../media/gpt2_cpu_throughput.png)\n")
    return tmp_path


def test_what_was_measured_is_kept(measured: Path):
    kept, pictures = reference.keep(measured, "pipeline")
    assert kept.parent == measured / "results/reference"
    assert kept.name == reference.slug(records.provenance(hardware.select("cpu"))["device"])
    files = [
        "SHA256SUMS", "evaluate_gpt2_int8.json", "ladder_cpu_baseline.json", "ladder_cpu_bf16.json", "report.md",
        "sampling_gpt2_int8.json", "summary.csv", "train_char-bigram.json", "train_char-transformer.json",
        "train_gpt2.json",
    ]  # fmt: skip
    assert sorted(path.name for path in kept.iterdir()) == files
    assert json.loads((kept / "train_gpt2.json").read_text())["results"] == {"val_loss_after": 5.5}
    assert (pictures / "gpt2_cpu_throughput.png").read_bytes() == b"a picture"
    assert sorted(path.name for path in pictures.iterdir()) == ["SHA256SUMS", "gpt2_cpu_throughput.png"]
    link = (kept / "report.md").read_text().split("(")[1].split(")")[0]
    assert (kept / link).resolve() == (pictures / "gpt2_cpu_throughput.png").resolve()
    reference.check(kept)
    reference.check(pictures)
    (measured / "results/records/ladder/cpu/baseline.json").unlink()
    assert "ladder_cpu_baseline.json" not in [path.name for path in reference.keep(measured, "pipeline")[0].iterdir()]


def test_the_command(measured: Path, picogpt):
    run = picogpt("reference")
    assert (run.status, run.out.count("files\n")) == (0, 2)
    before = sorted(measured.glob("results/reference/*/*"))
    run = picogpt("reference", "--run", "nobody")  # the benchmarks are no run's
    assert (run.status, "lacks train char-bigram, train char-transformer, train gpt2: make report" in run.err) == (
        1,
        True,
    )
    assert sorted(measured.glob("results/reference/*/*")) == before
    shutil.rmtree(measured / "results/records")
    run = picogpt("reference", "--run", "nobody")
    assert (run.status, "has no records of the run 'nobody'" in run.err) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dirty": True}, r"record\.json was measured with uncommitted changes"),
        ({"commit": None, "dirty": None}, r"record\.json was measured at no commit"),
        ({"corpus": {"name": "words", "text_sha256": "0" * 64}}, r"was measured on words: .* tinyshakespeare"),
        ({"device": {"name": "another CPU", "kind": "cpu", "cores": 2}}, "records of one device"),
    ],
)
def test_what_could_mislead_is_not_kept(measured: Path, change: dict, message: str):
    records.write(measured / "weights/char_bigram/pipeline/record.json", record("train char-bigram", **change))
    with pytest.raises(PicogptError, match=message):
        reference.keep(measured, "pipeline")
    assert not (measured / "results/reference").exists()


@pytest.mark.parametrize(
    ("state", "message"), [((COMMIT, True), "has uncommitted changes"), ((None, None), "is no git checkout")]
)
def test_a_dirty_tree_is_refused(measured: Path, monkeypatch, state: tuple, message: str):
    monkeypatch.setattr(records, "commit", lambda: state)
    with pytest.raises(PicogptError, match=message):
        reference.keep(measured, "pipeline")


def sums(folder: Path) -> None:
    """Fit SHA256SUMS to the files, as somebody would who wants to hide a change."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_a_changed_record_is_found_out(measured: Path):
    kept, _ = reference.keep(measured, "pipeline")
    path = kept / "train_gpt2.json"
    whole = path.read_text()
    path.write_text(whole.replace("5.5", "4.5"))
    with pytest.raises(PicogptError, match=r"train_gpt2\.json was edited: its sha256 is"):
        read_references([path])
    path.write_text(json.dumps(json.loads(whole) | {"schema_version": 0}))
    sums(kept)
    with pytest.raises(PicogptError, match=r"train_gpt2\.json has schema version 0"):
        read_references([path])
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k not in ("commit", "device")}))
    sums(kept)
    with pytest.raises(PicogptError, match=r"train_gpt2\.json is not a complete result record: device, commit missing"):
        read_references([path])
    path.unlink()
    with pytest.raises(PicogptError, match=r"train_gpt2\.json is in .* and is not there"):
        read_references([kept / "ladder_cpu_baseline.json"])
    path.write_text(whole)
    (kept / "SHA256SUMS").unlink()
    with pytest.raises(PicogptError, match=r"is not in .*SHA256SUMS"):
        read_references([path])


@pytest.mark.parametrize("name", ["results/reference/*/report.md", "media/reference/*/gpt2_cpu_throughput.png"])
def test_a_changed_page_or_picture_is_found_out(measured: Path, name: str):
    reference.keep(measured, "pipeline")
    path = next(measured.glob(name))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(PicogptError, match=rf"{path.name} was edited: its sha256 is"):
        reference.check(path.parent)


def test_a_reference_number_is_shown_as_one(measured: Path, tmp_path: Path):
    speeds = record("ladder h100 baseline", results=SPEEDS)
    top = record("ladder h100 max_autotune", results={"tokens_per_second": 120.0, "final_loss": 9.0})
    folder = tmp_path / "reference/nvidia_h100"
    for tree in (speeds, top):
        records.write(folder / f"{tree['kind'].replace(' ', '_')}.json", tree)
    sums(folder)
    write_summary(
        [measured / "results/records/ladder/cpu/baseline.json"], folder.glob("*.json"), tmp_path / "summary.csv"
    )
    with open(tmp_path / "summary.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["metric"] == "h100, top rung")
    assert (row["measured"], row["status"]) == ("12", "not measured here")
    assert row["note"].startswith("needs H100; the number comes from a reference record of ")


def test_tracked_reference_records_are_whole():
    folders = sorted((ROOT / "results/reference").glob("*/"))
    assert folders
    for folder in folders:
        reference.check(folder)
        reference.check(ROOT / "media/reference" / folder.name)
        read_references(sorted(folder.glob("*.json")))


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("my.txt", False), ("results/reference/mine/a.json", False), ("picogpt/new.py", True), ("Snakefile", True), ("config/models/ours.yaml", True), ("picogpt/records.py", True), ("README.md", True)],
)  # fmt: skip
def test_a_checkout_is_dirty_where_its_source_differs(monkeypatch, tmp_path: Path, path: str, dirty: bool):
    for name in ("picogpt/records.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as committed")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "picogpt/records.py"))
    assert records.commit()[1] is False
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("otherwise")
    assert records.commit()[1] is dirty
