import csv
import json
from pathlib import Path

import pytest
from conftest import ROOT, small_experiment

from picogpt.config import Experiment
from picogpt.data import assets
from picogpt.data.tokens import TokenData
from picogpt.report import figures
from picogpt.report.published import CORPUS, Number, compare, numbers, value_of
from picogpt.train.loop import Trainer


def record(value: float | None, corpus: str = CORPUS) -> dict:
    text = assets.find(CORPUS).sha256 if corpus == CORPUS else "0" * 64
    identity = {"name": corpus, "text_sha256": text, "train_tokens": 1_003_854, "val_tokens": 111_540}
    return {"results": {"loss": value}, "device": {"name": "d"}, "corpus": identity}


@pytest.mark.parametrize(
    ("published", "tolerance", "better", "measured", "status"),
    [
        (2.0, 0.1, "lower", 2.05, "reproduced"),
        (2.0, 0.1, "lower", 1.95, "reproduced"),
        (2.0, 0.1, "lower", 1.5, "better"),
        (2.0, 0.1, "lower", 2.5, "differs"),
        (2.0, 0.1, "higher", 2.5, "better"),
        (2.0, 0.1, "higher", 1.5, "differs"),
        (2.0, 0.1, None, 1.5, "differs"),
        (None, 0.0, None, 1.5, "not comparable"),
        (2.0, 0.1, "lower", None, "not measured here"),
    ],
)
def test_the_status_says_how_a_number_compares(published, tolerance, better, measured, status):
    number = Number(
        section="s",
        metric="m",
        record="r",
        key="loss",
        unit="u",
        published=published,
        tolerance=tolerance,
        better=better,
    )
    assert compare(number, record(measured))["status"] == status


def test_another_corpus_is_never_compared_and_nothing_is_never_measured():
    number = Number(section="s", metric="m", record="r", key="loss", unit="u", published=2.0, tolerance=9)
    row = compare(number, record(2.0, corpus="words"))
    assert (row["status"], row["measured"]) == ("not comparable", 2.0)
    assert "words" in row["note"]
    another_split = record(2.0)
    another_split["corpus"]["train_tokens"] -= 1
    namesake = record(2.0)
    namesake["corpus"]["text_sha256"] = "0" * 64
    assert {compare(number, other)["status"] for other in (another_split, namesake)} == {"not comparable"}
    row = compare(number, None)
    assert (row["status"], row["device"], row["measured"]) == ("not measured here", None, None)


def test_a_number_of_another_device_may_come_from_a_reference_record_of_it():
    number = Number(
        section="s", metric="m", record="r", key="loss", unit="u", published=2.0, device="a GPU", on_corpus=False
    )
    there = {**record(1.5), "device": {"name": "a GPU"}, "created": "2026-02-03T00:00:00"}
    row = compare(number, record(7.0), there)
    assert (row["measured"], row["device"], row["status"]) == (1.5, "a GPU", "not measured here")
    assert row["note"] == "published for a GPU; this machine is d; the number is a reference record of 2026-02-03"
    assert compare(number, record(7.0), record(1.5))["measured"] is None  # of a third device


def test_the_published_numbers_of_the_character_models_are_all_there():
    metrics = {(number.section, number.metric) for number in numbers()}
    metrics = {(section, metric) for section, metric in metrics if section.startswith("char")}
    wanted = "train loss before|val loss before|train loss after|val loss after|best val loss|best epoch|final val loss"
    assert metrics == {
        (section, metric) for section in ("char bigram", "char transformer") for metric in wanted.split("|")
    }


def test_every_other_published_number_has_a_row():
    rows: dict[str, list[float]] = {}
    for number in numbers():
        if number.published is not None:
            rows.setdefault(number.section, []).append(number.published)
    assert rows["weights"] == [551, 475]
    openai, ours = [81.33, 80.44, 81.13, 81.70, 80.42, 81.0], [83.54, 83.50, 83.40, 84.44, 84.72, 83.92]
    for run in (*openai, *ours):
        assert run in rows["sampling throughput"]
    assert len(rows["sampling throughput"]) == 12
    assert rows["training ladder"] == [2.1, 3.5, 4.1, 2.8, 6, 7.8, 9.3]
    assert rows["ddp"] == [11, 6.5, 900_000]


@pytest.mark.parametrize(("key", "value"), [("a", [1, 2]), ("a.1", 2), ("a.2", None), ("b.0", None), ("c d", 3)])
def test_a_number_is_found_by_its_key(key: str, value: object):
    assert value_of({"a": [1, 2], "c d": 3}, key) == value


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: TokenData) -> Path:
    """A finished run of each model."""
    folder = tmp_path_factory.mktemp("runs")
    bigram = {
        "model": {"kind": "char-bigram", "block_size": 16},
        "train": {"steps": 30, "learning_rate": 0.1, "eval_interval": 10, "eval_train": "whole"},
    }
    Trainer(Experiment.model_validate(bigram), tokens, folder / "char_bigram").run()
    Trainer(small_experiment(), tokens, folder / "char_transformer").run()
    return folder


def test_the_summary_has_a_row_for_each_number_and_names_the_corpus(picogpt, runs: Path, tmp_path: Path):
    files = [runs / "char_bigram/record.json", runs / "char_transformer/record.json"]
    assert picogpt("report", "summary", *files, "--out", "summary.csv").status == 0
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["section", "metric", "published", "measured", "unit", "device", "status", "note"]
    assert len(rows) == len(numbers())
    assert {row["status"] for row in rows if row["measured"]} == {"not comparable"}
    assert all("words" in row["note"] for row in rows if row["measured"])
    results = json.loads(files[1].read_text())["results"]
    best = next(row for row in rows if (row["section"], row["metric"]) == ("char transformer", "best val loss"))
    assert float(best["measured"]) == pytest.approx(results["best_val_loss"], rel=1e-6)

    twice = picogpt("report", "summary", files[0], files[0], "--out", "twice.csv")
    assert (twice.status, "second record of train char-bigram" in twice.err) == (1, True)
    assert not (tmp_path / "twice.csv").exists()


@pytest.mark.parametrize("kind", ["char_bigram", "char_transformer"])
def test_the_loss_curve_is_a_picture_of_the_right_size(picogpt, runs: Path, tmp_path: Path, kind: str):
    import matplotlib.image

    assert picogpt("report", "loss-curve", "--run-folder", runs / kind, "--out", "a.png").status == 0
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1200
    assert picture.std() > 0.05


def test_the_page_is_filled_in(picogpt, runs: Path, tmp_path: Path):
    files = [runs / "char_bigram/record.json", runs / "char_transformer/record.json"]
    picogpt("report", "summary", *files, "--out", "summary.csv")
    samples = []
    for name in ("char_bigram", "char_transformer"):
        for stage in ("untrained", "trained"):
            (tmp_path / f"{name}_{stage}.txt").write_text(f"the {stage} {name} says " + "x" * 3000)
            samples += ["--sample", f"{name}_{stage}={tmp_path / f'{name}_{stage}.txt'}"]
    page = ["--summary", "summary.csv", *(f"--record={file}" for file in files), "--out", "report.md"]
    template = tmp_path / "character.j2"  # the part of the page that stands on these records
    template.write_text((ROOT / "workflow/report/report.md.j2").read_text().split("{% set gpt2 =")[0])
    assert picogpt("report", "page", "--template", template, *page, *samples).status == 0
    text = (tmp_path / "report.md").read_text()
    best = json.loads(files[1].read_text())["results"]["best_val_loss"]
    for part in ("Corpus: **words**", f"{best:.7g}", "the trained char_bigram says", "nothing below can be compared"):
        assert part in text
    assert "{{" not in text

    (tmp_path / "wrong.j2").write_text("{{ records.nothing }}")
    run = picogpt("report", "page", "--template", "wrong.j2", *page, *samples)
    assert (run.status, "wrong.j2 cannot be filled in" in run.err) == (1, True)
    assert (tmp_path / "report.md").read_text() == text


def test_a_published_loss_of_another_kind_is_no_validation_loss():
    fineweb = {"name": "fineweb-edu", "text_sha256": "0" * 64, "train_tokens": 10, "val_tokens": 5}
    run = {"kind": "train gpt2 h100x2", "results": {}, "corpus": fineweb}
    assert [line[:2] for line in figures._references(run)] == [(6.5, "published, measured in another way: 6.5000")]
    run = {"kind": "train char-transformer", "results": {}, "corpus": {**fineweb, "name": "words"}}
    assert [line[1] for line in figures._references(run)] == [
        "published, last validation (tinyshakespeare): 3.3808",
        "published, best validation (tinyshakespeare): 2.2701",
    ]
