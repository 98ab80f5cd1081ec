"""The list of trainings and the comparison of two, on runs that the command line has trained."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from picogpt import cli

SMALL = ("--set=model.block_size=16", "--set=train.eval_interval=5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with two runs of a bigram."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            ["tokenize", "char", "--text", str(corpus), "--run", "words"],
            ["train", "char-bigram", "--run", "short", "--steps", "10", *SMALL],
            ["train", "char-bigram", "--run", "long", "--steps", "20", *SMALL],
        ):
            cli.cli(command, standalone_mode=False)
    return folder


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the working folder of the command line is around it."""
    return Path(shutil.copytree(trained / "weights", tmp_path / "weights"))


def change(record: Path, edit: Callable[[dict], object]) -> dict:
    """Edit a record; returns it."""
    tree = json.loads(record.read_text())
    edit(tree)
    record.write_text(json.dumps(tree))
    return tree


def begin(folder: Path, metrics: str) -> None:
    """A run that was stopped, or still goes on."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/metrics.jsonl").write_text(metrics)


def test_both_layouts_are_listed_the_newest_first(picogpt, weights: Path):
    shutil.copytree(weights / "char_bigram/short", weights / "gpt2/mine/words")
    for second, run in ((5, "char_bigram/short"), (4, "char_bigram/long"), (6, "gpt2/mine/words")):
        created = {"created": f"2026-01-02T03:04:0{second}+00:00"}
        record = change(weights / run / "record.json", lambda tree, created=created: tree.update(created))
    run = picogpt("runs")
    assert (run.status, run.err) == (0, "")
    header, *lines = run.out.splitlines()
    assert header.split("  ")[0] == "run"
    assert [line.split()[0] for line in lines] == ["mine", "short", "long"]
    assert {line.index("char-bigram") for line in lines} == {header.index("model")}
    results, line = record["results"], lines[0].split()
    assert line[1:4] == ["char-bigram", "words", f"{results['parameters']:,}"]
    assert line[4:7] == ["10", f"({results['epochs']:.2f})", f"{results['best_val_loss']:.4f}"]
    assert record["device"]["name"] in lines[0]


def test_a_run_that_is_not_finished_says_how_far_it_came(picogpt, weights: Path):
    rows = [{"step": 0, "val_loss": 4.0}, {"step": 5, "epoch": 0.5, "val_loss": 3.0}, {"step": 7, "val_loss": 3.5}]
    for name, last in (("stopped", '{"step": 8, "val'), ("odd", '{"step": "eight"}'), ("list", "[8]")):
        begin(weights / f"gpt2/{name}/words", "".join(json.dumps(row) + "\n" for row in rows) + last)
    (weights / "char_transformer/begun/checkpoints").mkdir(parents=True)
    lines = {line.split()[0]: line for line in picogpt("runs").out.splitlines()}
    for name in ("stopped", "odd", "list"):
        assert "unfinished: 7 (0.50)    3.0000" in lines[name]
        assert lines[name].split()[1:3] == ["gpt2", "words"]
    assert "unfinished: no step" in lines["begun"]
    assert "unfinished" not in lines["long"]


def test_the_list_for_machines_and_for_one_model(picogpt, weights: Path):
    begin(weights / "gpt2/stopped/words", "")
    listed = {run["name"]: run for run in json.loads(picogpt("runs", "--json").out)}
    assert {name: run["finished"] for name, run in listed.items()} == {"stopped": False, "short": True, "long": True}
    assert listed["stopped"].keys() == listed["short"].keys()
    results = json.loads((weights / "char_bigram/short/record.json").read_text())["results"]
    for key in ("parameters", "steps", "epochs", "best_val_loss", "tokens_per_second", "train_seconds"):
        assert listed["short"][key] == results[key]
    (only,) = json.loads(picogpt("runs", "--model", "gpt2", "--json").out)
    assert only["folder"] == "weights/gpt2/stopped/words"
    nothing = picogpt("runs", "--model", "char-transformer")
    assert (nothing.status, nothing.out, "picogpt train char-transformer makes one" in nothing.err) == (0, "", True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "is not a result record"),
        (lambda text: text.replace('"steps": 10', '"stepz": 10'), "results.steps"),
        (lambda text: text.replace('"parameters": ', '"parameters": "x'), "is not a result record"),
        (lambda text: text.replace('"created": "', '"created": "once '), "created="),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 9'), "schema version 9"),
        (lambda text: text.replace('"task": "train"', '"task": "weights"'), "not of a training"),
        (lambda text: "[]", "is not a result record"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_listed(picogpt, weights: Path, damage, message: str):
    record = weights / "char_bigram/short/record.json"
    text = record.read_text()
    record.write_text(damage(text))
    assert record.read_text() != text
    for arguments in ([], ["--json"]):
        run = picogpt("runs", *arguments)
        assert run.status == 1
        assert "long" in run.out
        assert "weights/char_bigram/short/record.json" in run.err
        assert message in run.err


def test_the_difference_is_all_that_is_shown(picogpt, weights: Path):
    def edit(tree: dict) -> None:
        tree["software"]["torch"], tree["commit"] = "2.11.0", "0123456789" * 4
        tree["results"]["best_val_loss"] = 1234.5

    change(weights / "char_bigram/short/record.json", edit)
    longer = json.loads((weights / "char_bigram/long/record.json").read_text())["results"]["best_val_loss"]
    shown = picogpt("runs", "diff", "short", "weights/char_bigram/long").out
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert shown.split()[:3] == ["weights/char_bigram/short", "weights/char_bigram/long", "difference"]
    assert lines["train.steps"] == ["10", "20", "+10"]
    assert lines["torch"][0] == "2.11.0"
    assert lines["commit"][0] == "012345678901"
    assert lines["best_val_loss"] == ["1,234.5", f"{longer:.7g}", f"{longer - 1234.5:+,.7g}"]
    assert not {"corpus", "device", "train.seed", "model.kind", "parameters", "created"} & set(lines)


def test_it_says_so_where_nothing_or_only_the_result_differs(picogpt, weights: Path):
    copy = Path(shutil.copytree(weights / "char_bigram/short", weights / "char_bigram/again"))
    change(copy / "record.json", lambda tree: tree.update(created="2026-01-02T03:04:05+00:00"))
    run = picogpt("runs", "diff", "short", "again")
    assert (run.status, run.out) == (0, "weights/char_bigram/short and weights/char_bigram/again: nothing differs\n")
    change(
        copy / "record.json", lambda tree: tree["results"].update(train_seconds=tree["results"]["train_seconds"] + 1)
    )
    _, section, line, words = picogpt("runs", "diff", "short", "again").out.splitlines()
    assert (section, line.split()[-1]) == ("results", "+1")
    assert words == "the same settings, corpus, device, software and execution"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["diff", "shirt", "long"], 2, "no run is called shirt; there are: char_bigram/long, char_bigram/short, gpt2/short"),
        (["diff", "short", "long"], 2, "several runs are called short: char_bigram/short, gpt2/short/words"),
        (["diff", "char_bigram", "long"], 2, "no run is called char_bigram"),
        (["diff", "gpt2/short", "long"], 1, "weights/gpt2/short/words is not finished"),
        (["diff", "short/words", "long"], 1, "weights/gpt2/short/words is not finished"),
        (["diff", "long"], 2, "SECOND"),
        (["--json", "diff", "long", "long"], 2, "leave them out before diff"),
        (["--model", "gpt-17"], 2, "'char-bigram', 'char-transformer'"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_say_which_is_one_message(picogpt, weights: Path, arguments, status: int, message: str):
    begin(weights / "gpt2/short/words", "")
    run = picogpt("runs", *arguments)
    assert (run.status, run.out) == (status, "")
    assert message in run.err


def test_without_any_training_it_says_how_to_make_one(picogpt):
    assert (picogpt("runs").status, picogpt("runs", "--json").out) == (0, "[]\n")
    run = picogpt("runs", "diff", "a", "b")
    assert (run.status, "picogpt train char-bigram makes one" in run.err) == (2, True)


def test_neither_needs_torch(weights: Path):
    script = "import sys; from picogpt import cli; cli.cli(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    for arguments in (["runs"], ["runs", "diff", "short", "long"]):
        command = [sys.executable, "-c", script, *arguments]
        run = subprocess.run(command, cwd=weights.parent, capture_output=True, text=True, check=True, env=os.environ)
        assert run.stdout.endswith("False\n")


def test_the_losses_of_runs_finished_or_not_are_drawn_in_one_picture(picogpt, weights: Path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **settings: (figures.append(self), save(self, *a, **settings))
    )
    begin(weights / "gpt2/_odd 中/words", '{"step": 0, "epoch": 0, "val_loss": 4.0}\n{"step": 8, "val')
    begin(weights / f"gpt2/{'x' * 150}/words", '{"step": 0, "epoch": 0, "val_loss": 4.0}\n')
    run = picogpt("runs", "plot", "short", "char_bigram/long", "_odd 中", "x" * 150, "--by", "step", "--out", "all.png")
    assert (run.status, run.out.strip(), run.err) == (0, "all.png", "")
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    validation, training = figure.axes
    assert [line.get_xdata().tolist() for line in validation.lines] == [[0, 5, 10], [0, 5, 10, 15, 20], [0], [0]]
    assert [len(line.get_xdata()) for line in training.lines] == [1, 2, 0, 0]
    best = [json.loads((weights / f"char_bigram/{name}/record.json").read_text())["results"]["best_val_loss"] for name in ("short", "long")]  # fmt: skip
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        f"{best[0]:.4f}  short",
        f"{best[1]:.4f}  char_bigram/long",
        "4.0000  _odd U+4E2D",
        f"4.0000  …{'x' * 89}",
    ]
    assert validation.get_ylabel() == "loss, nats per character"


def test_a_picture_that_cannot_be_drawn_says_why(picogpt, weights: Path):
    (weights / "gpt2/begun/words/checkpoints").mkdir(parents=True)
    (weights / "char_bigram/short/metrics.jsonl").write_text('{"step": 0, "epoch": 0, "val_loss": "low"}\n')
    for arguments, status, message in (
        (["long", "--out", "all.pdf"], 2, "--out all.pdf: the picture is a PNG file"),
        (["lnog", "--out", "all.png"], 2, "no run is called lnog; there are: char_bigram/long"),
        (["begun", "--out", "all.png"], 1, "begun has no validation loss yet"),
        (["short", "--out", "all.png"], 1, "short has a loss that is not a number"),
    ):
        run = picogpt("runs", "plot", *arguments)
        assert (run.status, message in run.err) == (status, True), run.err
    assert not list(Path().glob("*.png"))
