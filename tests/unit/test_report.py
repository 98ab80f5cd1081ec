import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, small_experiment

from picogpt.config import Experiment
from picogpt.data import fetch
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError
from picogpt.records import Key
from picogpt.report import compare, figures
from picogpt.report.compare import CORPUS, PUBLISHED_COLUMNS, published
from picogpt.report.page import write_page
from picogpt.train.loop import Trainer

KEY = Key("train", "gpt2", "m")


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Write a file of one published number in place of the shipped one; the row is given from `published` on."""

    def write(row: str) -> None:
        lines = [",".join(PUBLISHED_COLUMNS), f"s,m,train,gpt2,m,,,,loss,u,{row}", ""]
        (tmp_path / "published.csv").write_text("\n".join(lines))
        monkeypatch.setattr(compare, "config_folder", lambda: tmp_path)
        published.cache_clear()

    yield write
    published.cache_clear()


def record(value: float | None, corpus: str = CORPUS, device: str = "d", **change: object) -> dict:
    text = fetch.find(CORPUS).sha256 if corpus == CORPUS else "0" * 64
    identity = {"name": corpus, "text_sha256": text, "train_tokens": 1_003_854, "val_tokens": 111_540}
    results = {} if value is None else {"loss": value}
    created = "2026-02-03T00:00:00"
    return {"results": results, "device": {"name": device}, "corpus": identity, "created": created, **change}


def row_of(measured: dict | None, reference: dict | None = None) -> dict:
    """The row of the comparison of these records."""
    records, references = ({KEY: tree} if tree else {} for tree in (measured, reference))
    return compare.compare(records, references).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("number", "measured", "status", "note"),
    [
        ("2.0,,0.1,lower,,yes,yes,why", 2.05, "reproduced", "within 0.1"),
        ("2.0,,0.1,lower,,yes,yes,why", 1.95, "reproduced", "within 0.1"),
        ("2.0,,0.1,lower,,yes,yes,why", 1.5, "better", "why"),
        ("2.0,,0.1,lower,,yes,yes,why", 2.5, "differs", "why"),
        ("2.0,,0.1,higher,,yes,yes,why", 2.5, "better", "why"),
        ("2.0,,0.1,higher,,yes,yes,why", 1.5, "differs", "why"),
        ("2.0,,0.1,,,yes,yes,why", 1.5, "differs", "why"),
        ("2.0,,,,,yes,yes,why", 2.0, "reproduced", "within 0"),
        (",,,,,yes,yes,", 1.5, "not comparable", "nothing is published"),
        ("2.0,,0.1,,,yes,no,measured otherwise", 2.0, "not comparable", "measured otherwise"),
        ("2.0,,0.1,lower,,yes,yes,why", None, "not measured here", "not in the records of this run"),
    ],
)
def test_the_status_says_how_a_number_compares(publish, number: str, measured: float | None, status: str, note: str):
    publish(number)
    row = row_of(record(measured))
    assert (row["status"], row["note"], row["measured"]) == (status, note, measured)
    assert row["device"] == (None if measured is None else "d")


def test_another_text_is_never_compared_and_nothing_is_never_measured(publish):
    publish("2.0,,9,,,yes,yes,")
    row = row_of(record(2.0, corpus="words"))
    assert (row["status"], row["measured"]) == ("not comparable", 2.0)
    assert "words" in row["note"]
    known = record(2.0)["corpus"]
    for change in ({"train_tokens": 5}, {"text_sha256": "0" * 64}):  # another split; a text of the same name
        assert row_of(record(2.0, **{"corpus": {**known, **change}}))["status"] == "not comparable"
    row = row_of(None)
    assert (row["status"], row["device"], row["measured"]) == ("not measured here", None, None)
    for change in ({"not_measured": "hub unreachable"}, {"missing": {"loss": "hub unreachable"}}):
        assert row_of(record(None, **change))["note"] == "hub unreachable"


def test_a_number_of_another_device_may_come_from_a_reference_record_of_it(publish):
    publish("2.0,,0.1,,a GPU,no,yes,")
    there = record(1.5, device="a GPU")
    row = row_of(record(7.0), there)
    assert (row["measured"], row["device"], row["status"]) == (1.5, "a GPU", "not measured here")
    note = "published for a GPU; this machine is d; the number comes from a reference record of 2026-02-03"
    assert row["note"] == note
    assert row_of(record(7.0), record(1.5, device="a third"))["measured"] is None
    assert row_of(there)["status"] == "differs"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2.0,,0.1,lowr,,yes,yes,", "line 2: better is 'lowr', not higher or lower"),
        ("2.0,,0.1,,,maybe,yes,", "line 2: depends_on_text is 'maybe'"),
        ("two,,0.1,,,yes,yes,", "cannot read .*published.csv: .*two"),
        ("2.0,,0.1,,,yes,yes,\ns,m,train,gpt2,,,,,loss,u,2.0,,0.1,,,yes,yes,", "line 3: duplicate metric 'm'"),
    ],
)
def test_a_wrong_value_of_the_table_is_named(publish, row: str, message: str):
    publish(row)
    with pytest.raises(PicogptError, match=message):
        published()


def test_every_published_number_has_a_row():
    rows = published()
    wanted = "train loss before|val loss before|train loss after|val loss after|best val loss|best val loss, bits per byte|best epoch"
    for section in ("char bigram", "char transformer"):
        assert list(rows.metric[rows.section == section]) == wanted.split("|")
    known = rows[rows.published.notna()]
    numbers = {section: list(group.published) for section, group in known.groupby("section")}
    assert numbers["weights"] == [551, 475]
    openai, ours = [81.33, 80.44, 81.13, 81.70, 80.42, 81.0], [83.54, 83.50, 83.40, 84.44, 84.72, 83.92]
    assert numbers["sampling throughput"] == [*openai, *ours]
    assert numbers["training ladder"] == [2.1, 3.5, 4.1, 2.8, 6, 7.8, 9.3]
    assert numbers["ddp"] == [11, 6.5, 900_000]
    assert known.source.all(), "each published number says where it stands"


def test_numbers_are_found_in_lists_and_under_names_with_spaces():
    tree = {"results": {"a": [1, 2.5], "c d": 3, "text": "x", "flag": True, "none": None, "texts": ["x"]}}
    for key, value in {"a.0": 1, "a.1": 2.5, "c d": 3}.items():
        assert compare.number(tree, key) == value
    for key in ("a", "a.2", "a.b", "text", "flag", "none", "texts.0", "nothing"):
        assert compare.number(tree, key) is None


def test_in_bits_per_byte_all_models_compare():
    """Also those of the kept records, which do not say how many bytes their text has."""
    files = sorted((ROOT / "results/reference/amd_epyc_family_25_model_1_2_cores").glob("*.json"))
    found = compare.read_references(files)
    bits = {str(key): compare.number(record, "val_bits_per_byte") for key, record in found.items()}
    for name, expected in {
        "train char-bigram": 3.587, "train char-transformer": 2.107, "train gpt2": 2.575, "evaluate gpt2 float32": 2.575,
    }.items():  # fmt: skip
        assert bits[name] == pytest.approx(expected, abs=5e-4)
    assert bits["sampling gpt2 float32"] is bits["ladder cpu baseline"] is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: TokenData) -> Path:
    """A finished run of each model."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"steps": 30, "learning_rate": 0.1, "eval_interval": 10, "eval_train": "whole"}
    bigram = Experiment.model_validate({"model": {"kind": "char-bigram", "block_size": 16}, "train": train})
    Trainer(bigram, tokens, folder / "char_bigram").run()
    Trainer(small_experiment(), tokens, folder / "char_transformer").run()
    return folder


@pytest.fixture
def files(runs: Path) -> list[Path]:
    return [runs / "char_bigram/record.json", runs / "char_transformer/record.json"]


def test_the_summary_has_a_row_for_each_number_and_names_the_corpus(picogpt, files: list[Path], tmp_path: Path):
    assert picogpt("report", "summary", *files, "--out", "summary.csv").status == 0
    rows = pd.read_csv(tmp_path / "summary.csv")
    assert list(rows) == ["section", "metric", "published", "measured", "unit", "device", "status", "note"]
    assert len(rows) == len(published())
    here = rows[rows.measured.notna()]
    assert set(here.status) == {"not comparable"}
    assert here.note.str.contains("words").all()
    best = here[(here.section == "char transformer") & (here.metric == "best val loss")].measured.item()
    assert best == pytest.approx(json.loads(files[1].read_text())["results"]["best_val_loss"], rel=1e-6)

    twice = picogpt("report", "summary", files[0], files[0], "--out", "twice.csv")
    assert (twice.status, "second record of train char-bigram" in twice.err) == (1, True)
    assert not (tmp_path / "twice.csv").exists()


@pytest.mark.parametrize("model", ["char_bigram", "char_transformer"])
def test_the_loss_curve_is_a_picture_of_the_right_size(picogpt, runs: Path, tmp_path: Path, model: str):
    import matplotlib.image

    assert picogpt("report", "loss-curve", "--run-folder", runs / model, "--out", "a.png").status == 0
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1200
    assert picture.std() > 0.05


@pytest.mark.parametrize(
    ("metrics", "message"),
    [('{"epoch": 0.1, "train_loss": "low"}', "a loss that is not a number"), ("3", "metrics.jsonl, line 1")],
)
def test_wrong_metrics_are_named(picogpt, files: list[Path], tmp_path: Path, metrics: str, message: str):
    (tmp_path / "record.json").write_text(files[0].read_text())
    (tmp_path / "metrics.jsonl").write_text(metrics)
    run = picogpt("report", "loss-curve", "--run-folder", ".", "--out", "a.png")
    assert (run.status, message in run.err, (tmp_path / "a.png").exists()) == (1, True, False)


def test_the_page_is_filled_in(picogpt, files: list[Path], tmp_path: Path):
    picogpt("report", "summary", *files, "--out", "summary.csv")
    samples = []
    for name in ("char_bigram", "char_transformer"):
        for stage in ("untrained", "sample"):
            (tmp_path / f"{name}_{stage}.txt").write_text(f"the {stage} {name} says " + "x" * 3000)
            samples += ["--sample", tmp_path / f"{name}_{stage}.txt"]
    page = ["--summary", "summary.csv", *(f"--record={file}" for file in files), "--out", "report.md"]
    template = tmp_path / "character.j2"  # the part of the page that stands on these records
    shutil.copy(ROOT / "workflow/report/sentences.j2", tmp_path)
    template.write_text((ROOT / "workflow/report/report.md.j2").read_text().split("{% set gpt2 =")[0])
    assert picogpt("report", "page", "--template", template, *page, *samples).status == 0
    text = (tmp_path / "report.md").read_text()
    best = json.loads(files[1].read_text())["results"]["best_val_loss"]
    for part in ("Corpus: **words**", f"{best:.7g}", "the sample char_bigram says", "nothing below can be compared"):
        assert part in text
    assert "{{" not in text
    bits = best / math.log(2)  # a character of this text is a byte
    assert f" parameters | {best:.4f} nats/char | {bits:.3f} |" in text

    for template, message in (
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ record('train', 'gpt2', 'a30').results }}", "there is no record of train gpt2 a30"),
        ("{{ record('train', 'char-bigram').results.nothing }}", "'nothing'"),
    ):
        (tmp_path / "wrong.j2").write_text(template)
        run = picogpt("report", "page", "--template", "wrong.j2", *page, *samples)
        assert (run.status, "wrong.j2 cannot be filled in" in run.err, message in run.err) == (1, True, True)
    assert (tmp_path / "report.md").read_text() == text
    for arguments, status, message in (
        (["--set", "first_dtype"], 2, "--set 'first_dtype' is not of the form NAME=VALUE"),
        (["--summary", "missing.csv"], 1, "cannot read missing.csv"),
    ):
        run = picogpt("report", "page", "--template", "wrong.j2", *page, *arguments)
        assert (run.status, message in run.err) == (status, True)


def test_no_text_ends_a_cell_of_a_table(tmp_path: Path):
    """Cells of the real template, but for those of the training ladder, whose texts have the same filter."""
    values = {
        "metric": "a|b",
        "published": "1",
        "measured": "",
        "unit": "u",
        "status": "s",
        "note": "measured on x|y\nz",
    }
    (tmp_path / "summary.csv").write_text(pd.DataFrame([{"section": "s", **values}]).to_csv(index=False))
    page = (ROOT / "workflow/report/report.md.j2").read_text()
    macro = page[page.index("{% macro table") : page.index("{% set bigram")]
    (tmp_path / "t.j2").write_text(macro + '{{ table(sections["s"]) }}')
    write_page(tmp_path / "t.j2", tmp_path / "summary.csv", [], [], {}, [], [], tmp_path / "page.md")
    assert r"| a\|b | 1 | – | u | s | measured on x\|y z |" in (tmp_path / "page.md").read_text().splitlines()


def test_a_published_loss_of_another_kind_is_no_validation_loss():
    run = {"task": "train", "model": "gpt2", "machine": "h100x2", "results": {}, "corpus": {"name": "fineweb-edu"}}
    assert [line[:2] for line in figures.reference_lines(run)] == [(6.5, "published, measured differently: 6.5000")]
    run = {"task": "train", "model": "char-transformer", "results": {}, "corpus": {"name": "words"}}
    assert [line[1] for line in figures.reference_lines(run)] == [
        "published, final validation (tinyshakespeare): 3.3808",
        "published, best validation (tinyshakespeare): 2.2701",
    ]
