"""Reference records: what may be kept, and how a changed one is found out."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from picogpt import hardware, records, reference
from picogpt.data import fetch
from picogpt.errors import PicogptError
from picogpt.records import Key
from picogpt.report.compare import read_references, write_summary

COMMIT = "0123456789" * 4
BASELINE = {name: 10.0 for _, _, name in (path.rpartition(".") for path in records.NUMBERS["ladder"])}
TRAINED = {name: 5.5 for _, _, name in (path.rpartition(".") for path in records.NUMBERS["train"])}
RESULTS = {"train": TRAINED, "ladder": BASELINE}


def record(key: Key, **change: object) -> dict:
    """A record of a clean checkout, on the published corpus."""
    corpus = {"name": "tinyshakespeare", "text_sha256": fetch.find("tinyshakespeare").sha256}
    config = {"train": {"seed": 1}, "hardware": {"batch_size": 1, "block_size": 1, "steps": 5}}
    return {
        **records.provenance(hardware.select("cpu")), **key._asdict(), "corpus": corpus, "config": config, "ranks": 1,
        "commit": COMMIT, "dirty": False, "results": RESULTS.get(key.task, {"mean": 1.0}), **change,
    }  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the pipeline has run."""
    monkeypatch.setattr(records, "commit", lambda: (COMMIT, False))
    (tmp_path / "media").mkdir()
    (tmp_path / "media/gpt2_cpu_throughput.png").write_bytes(b"a picture")
    (tmp_path / "media/gpt2_mine_loss.png").write_bytes(b"a picture of another run")
    no_instructions = {"not_measured": "no instructions for bfloat16", "results": {}}
    for path, tree in {
        "weights/gpt2/pipeline/tinyshakespeare/record.json": record(Key("train", "gpt2")),
        "weights/gpt2/20260210_183518/tinyshakespeare/record.json": record(Key("train", "gpt2"), ranks=2),
        "weights/char_bigram/pipeline/record.json": record(Key("train", "char-bigram")),
        "weights/char_transformer/pipeline/record.json": record(Key("train", "char-transformer")),
        "results/records/evaluate_gpt2_int8.json": record(Key("evaluate", "gpt2", dtype="int8")),
        "results/records/sampling_gpt2_int8.json": record(Key("sampling", "gpt2", dtype="int8")),
        "results/records/ladder/cpu/baseline.json": record(Key("ladder", "gpt2", "cpu", "baseline")),
        "results/records/ladder/cpu/bf16.json": record(Key("ladder", "gpt2", "cpu", "bf16"), **no_instructions),
        "results/records/theirs.json": records.unreachable(Key("evaluate", "gpt2-pretrained", dtype="int8"), "why"),
    }.items():
        records.write(tmp_path / path, tree)
    (tmp_path / "results/summary.csv").write_text("section,metric\n")
    (tmp_path / "results/report.md").write_text("![a](../media/gpt2_cpu_throughput.png)\n")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_measured_is_kept(measured: Path):
    kept, pictures = reference.keep(measured, "pipeline")
    assert kept.parent == measured / "results/reference"
    assert kept.name == reference.slug(records.provenance(hardware.select("cpu"))["device"])
    assert names(kept) == [
        "SHA256SUMS", "evaluate_gpt2_int8.json", "ladder_cpu_baseline.json", "ladder_cpu_bf16.json", "report.md",
        "sampling_gpt2_int8.json", "summary.csv", "train_char-bigram.json", "train_char-transformer.json",
        "train_gpt2.json",
    ]  # fmt: skip
    assert records.read(kept / "train_gpt2.json")["ranks"] == 1
    assert (pictures / "gpt2_cpu_throughput.png").read_bytes() == b"a picture"
    assert names(pictures) == ["SHA256SUMS", "gpt2_cpu_throughput.png"]
    link = (kept / "report.md").read_text().split("(")[1].split(")")[0]
    assert (kept / link).resolve() == (pictures / "gpt2_cpu_throughput.png").resolve()
    for folder in (kept, pictures):
        reference.check(folder)
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    (measured / "results/records/ladder/cpu/bf16.json").unlink()
    assert "ladder_cpu_bf16.json" not in names(reference.keep(measured, "pipeline")[0])


def test_the_command(measured: Path, picogpt):
    run = picogpt("reference")
    assert (run.status, run.out.count("files\n")) == (0, 2)
    before = sorted(measured.glob("results/reference/*/*"))
    run = picogpt("reference", "--run", "nobody")  # the benchmarks are no run's
    assert run.status == 1
    assert "lacks train char-bigram, train char-transformer, train gpt2: make report" in run.err
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
    path = measured / "weights/char_bigram/pipeline/record.json"
    records.write(path, record(Key("train", "char-bigram"), **change))
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


def test_a_changed_file_is_found_out(measured: Path):
    kept, pictures = reference.keep(measured, "pipeline")
    path = kept / "train_gpt2.json"
    whole = path.read_text()
    path.write_text(whole.replace("5.5", "4.5"))
    with pytest.raises(PicogptError, match=r"train_gpt2\.json was edited: its sha256 is"):
        read_references([path])
    path.unlink()
    with pytest.raises(PicogptError, match=r"train_gpt2\.json was added or deleted"):
        read_references([kept / "ladder_cpu_baseline.json"])
    path.write_text(whole)
    (kept / "SHA256SUMS").unlink()
    with pytest.raises(PicogptError, match=r"was added or deleted"):
        read_references([path])
    tree = json.loads(whole)
    tree["corpus"]["text_sha256"] = "0" * 64
    path.write_text(json.dumps(tree))
    reference.write_sums(kept)  # as somebody would who wants to hide a change
    with pytest.raises(PicogptError, match=r"train_gpt2\.json was measured on"):
        read_references([path])
    for page in (kept / "report.md", pictures / "gpt2_cpu_throughput.png"):
        page.write_bytes(page.read_bytes() + b"more")
        with pytest.raises(PicogptError, match=rf"{page.name} was edited: its sha256 is"):
            reference.check(page.parent)


def test_a_reference_number_is_shown_as_one(measured: Path, tmp_path: Path):
    folder = tmp_path / "reference/nvidia_h100"
    for rung, speed in (("baseline", 10.0), ("max_autotune", 120.0)):
        tree = record(Key("ladder", "gpt2", "h100", rung), results={**BASELINE, "tokens_per_second": speed})
        records.write(folder / f"{rung}.json", tree)
    reference.write_sums(folder)
    here = measured / "results/records/ladder/cpu/baseline.json"
    write_summary([here], folder.glob("*.json"), tmp_path / "summary.csv")
    rows = pd.read_csv(tmp_path / "summary.csv").set_index("metric")
    measured_number, status, note = rows.loc["h100, top rung", ["measured", "status", "note"]]
    assert (measured_number, status) == (12, "not measured here")
    assert note.startswith("needs H100; the number comes from a reference record of ")


def test_tracked_reference_records_are_whole_and_readable():
    """Those of schema version 1 named what was measured by words, as in their file names."""
    added = {1: [Key("streams", "gpt2"), Key("data")], 2: [Key("streams", "gpt2", streams="16")]}
    folders = sorted((ROOT / "results/reference").glob("*/"))
    assert folders
    for folder in folders:
        reference.check(ROOT / "media/reference" / folder.name)
        files = sorted(folder.glob("*.json"))
        found = read_references(files)
        assert [str(key).replace(" ", "_") for key in found] == [path.stem for path in files]
        assert all(record["schema_version"] == records.SCHEMA_VERSION for record in found.values())
        for key in (
            Key("train", "gpt2"), Key("ladder", "gpt2", "cpu", "flash"), Key("evaluate", "gpt2", dtype="int8"),
            Key("sampling", "gpt2", dtype="float32"), Key("weights"), *added[schema_version(files[0])],
        ):  # fmt: skip
            assert key in found


def schema_version(file: Path) -> int:
    return json.loads(file.read_text())["schema_version"]


def test_the_words_of_schema_version_1_may_name_a_machine(tmp_path: Path):
    for words, key in (
        ("train gpt2 h100x2", Key("train", "gpt2", "h100x2")),
        ("ladder my box bf16", Key("ladder", "gpt2", "my box", "bf16")),
    ):
        tree = {name: value for name, value in record(key).items() if name not in Key._fields}
        (tmp_path / "record.json").write_text(json.dumps(tree | {"schema_version": 1, "kind": words}))
        assert records.key(records.read(tmp_path / "record.json")) == key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 0}, "has schema version 0 and this picogpt reads 2"),
        ({"schema_version": 1, "kind": "tea"}, "has schema version 1"),
        ({"task": None}, r"not a complete result record, .*: task=null"),
        ({"device": {"name": 5, "kind": "cpu", "cores": 2}}, r"device\.name=5"),
        ({"device": "a CPU"}, r"device\.name=null, device\.kind=null"),
        ({"dtype": ["int8"]}, r"dtype=\[\"int8\"\]"),
        ({"created": "yesterday"}, 'created="yesterday"'),
        ({"results": {**TRAINED, "steps": "ten"}}, r'a wrong type: results\.steps="ten"'),
        ({"config": {"train": None}}, r"config\.train\.seed=null"),
        ({"missing": ["gpt2 MB"]}, "missing="),
    ],
)
def test_a_wrong_part_of_a_record_is_named(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record(Key("train", "gpt2")) | change))
    with pytest.raises(PicogptError, match=message) as caught:
        records.read(path)
    assert (caught.value.exit_status, str(path) in str(caught.value)) == (1, True)


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
