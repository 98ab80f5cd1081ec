"""`picogpt train --dry-run`: says what a training needs, and changes nothing."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, SMALL_RUNTIME, small_experiment

from picogpt import hardware, records
from picogpt.config import Experiment
from picogpt.data.corpus import tokenize_chars
from picogpt.errors import Interrupted, PicogptError
from picogpt.files import exclusive_lock
from picogpt.train.dry_run import DryRun
from picogpt.train.loop import Trainer

TRAIN = ["train", "char-bigram", "--set=model.block_size=16", "--steps=40", "--device=cpu"]


def tree(folder: Path) -> dict[str, str | None]:
    """Every file and folder in `folder`, with a hash of each file."""
    paths = sorted(folder.rglob("*"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


def measured(experiment: Experiment, tokens, folder: Path, replace: bool = False) -> dict[str, tuple[str, str]]:
    """The rows of a dry run by their names, after which everything in `folder` is as it was."""
    before = tree(folder)
    rows = DryRun(experiment, tokens, folder).measure(replace)
    assert tree(folder) == before
    return {name.strip(): (value, remark) for name, value, remark in rows}


def interrupt(experiment: Experiment, tokens, folder: Path, step: int) -> None:
    """Leave a run in `folder` that was stopped after `step` steps."""
    trainer = Trainer(experiment, tokens, folder)
    trainer.callbacks.append(lambda it: signal.raise_signal(signal.SIGTERM) if it.progress.step == step - 1 else None)
    with pytest.raises(Interrupted):
        trainer.run()


def mebibytes(row: tuple[str, str]) -> float:
    return float(row[0].removesuffix(" MiB").replace(",", ""))


@pytest.fixture
def work(corpus: Path, tmp_path: Path) -> Path:
    """A folder with tokens of characters."""
    tokenize_chars(corpus, tmp_path / "weights/char_tokenizer/t")
    return tmp_path


def test_it_says_what_the_training_then_is(tokens, tmp_path):
    experiment = small_experiment(steps=35, micro_batch_size=2)
    rows = measured(experiment, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    results = Trainer(experiment, tokens, tmp_path / "run").run()["results"]
    evaluations = [row for row in records.read_lines(tmp_path / "run/metrics.jsonl") if "val_loss" in row]
    assert rows["run"] == ("new", str(tmp_path / "run"))
    assert rows["parameters"] == (f"{results['parameters']:,}", "char-transformer")
    assert rows["batch"] == ("4 sequences", "1 (ranks) x 2 (accumulation) x 2 (micro-batch)")
    assert rows["step"] == ("64 tokens", "in sequences of 16")
    assert rows["training"] == (f"{results['tokens']:,} tokens", "in 35 steps")
    assert rows["epochs"][0] == f"{results['epochs']:.2f}"
    assert rows["time"][1].startswith("35 steps 0:00:")
    assert f", {len(evaluations)} evaluations 0:00:" in rows["time"][1]


def test_memory_and_disk_are_what_is_then_there(tokens, tmp_path):
    model = {**SMALL_MODEL, "n_embd": 256}
    experiment = Experiment(model=model, train={"steps": 2, "batch_size": 2, "eval_interval": 1}, runtime=SMALL_RUNTIME)
    rows = measured(experiment, tokens, tmp_path / "new")
    interrupt(experiment, tokens, tmp_path, 1)
    for name in ("last.pt", "best.pt"):
        size = (tmp_path / "checkpoints" / name).stat().st_size / 2**20
        assert mebibytes(rows[name]) == pytest.approx(size, rel=0.02)
    assert mebibytes(rows["optimizer"]) == pytest.approx(2 * mebibytes(rows["weights"]), rel=0.02)  # AdamW's moments
    assert mebibytes(rows["last.pt"]) == pytest.approx(
        mebibytes(rows["weights"]) + mebibytes(rows["optimizer"]), abs=0.02
    )
    parts = 2 * mebibytes(rows["weights"]) + mebibytes(rows["optimizer"]) + mebibytes(rows["the rest"])
    assert mebibytes(rows["memory"]) == pytest.approx(parts, abs=0.05)
    assert mebibytes(rows["the rest"]) > 0


def test_a_run_that_was_stopped_would_be_resumed_and_is_not_touched(tokens, tmp_path):
    interrupt(small_experiment(), tokens, tmp_path, 17)
    (tmp_path / "checkpoints/.last.pt.0.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "checkpoints/last.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        rows = measured(small_experiment(), tokens, tmp_path)
    assert rows["run"] == ("resumed", f"{tmp_path}: goes on from step 14")
    assert rows["time"][1].startswith("26 steps")
    assert ", 3 evaluations" in rows["time"][1]  # after 20, 30 and 40 steps
    with (
        pytest.warns(UserWarning, match="checkpoint before it"),
        pytest.raises(PicogptError, match="holds a run of other settings"),
    ):
        measured(small_experiment(seed=5), tokens, tmp_path)
    with pytest.warns(UserWarning, match="checkpoint before it"):
        assert measured(small_experiment(seed=5), tokens, tmp_path, replace=True)["run"] == ("replaced", str(tmp_path))


def test_a_finished_run_has_nothing_left(tokens, tmp_path):
    Trainer(small_experiment(steps=3), tokens, tmp_path).run()
    (tmp_path / "checkpoints").mkdir()  # of a run that was killed just before its end
    assert measured(small_experiment(steps=3), tokens, tmp_path) == {
        "run": ("finished", f"{tmp_path}: nothing is left to train")
    }
    with pytest.raises(PicogptError, match="holds a run of other settings"):
        measured(small_experiment(), tokens, tmp_path)
    assert measured(small_experiment(), tokens, tmp_path, replace=True)["run"][0] == "replaced"


def test_the_share_of_the_peak_where_it_is_known(tokens, tmp_path, monkeypatch):
    model = {"kind": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    experiment = Experiment(model=model, train={"steps": 3, "batch_size": 2}, runtime=SMALL_RUNTIME)
    cost = measured(experiment, tokens, tmp_path)["cost of a token"]
    assert "TFLOP/s" in cost[1]
    assert "peak" not in cost[1]
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e12)
    value, remark = measured(experiment, tokens, tmp_path)["cost of a token"]
    assert value == cost[0]
    assert remark.endswith("% of the device's peak")
    assert "cost of a token" not in measured(small_experiment(), tokens, tmp_path)  # not counted for this model


def test_too_little_memory_says_what_needs_less(tokens, tmp_path):
    trial = DryRun(small_experiment(batch_size=6), tokens, tmp_path)

    def hungry(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    trial.step.forward = hungry
    with pytest.raises(
        PicogptError, match=r"too little memory for 6 sequences at once: --set train\.micro_batch_size=3"
    ):
        trial.measure()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--set=train.micro_batch_size=3"], 2, "train.micro_batch_size=3 does not divide the 4 sequences"),
        (["--set=train.sed=1"], 2, "did you mean seed?"),
        (["--data=nowhere"], 1, "nowhere/train.bin"),
        (["--name=busy"], 1, "another process is training in weights/char_bigram/busy"),
        (["--device=cuda:77"], 2, "cuda:77"),
    ],
)
def test_it_refuses_what_a_training_refuses(picogpt, work: Path, options: list[str], status: int, message: str):
    with exclusive_lock(work / "weights/char_bigram/busy", "training"):
        before = tree(work)
        for extra in ([], ["--dry-run"]):
            refused = picogpt(*TRAIN, *options, *extra)
            assert (refused.status, refused.out) == (status, "")
            assert message in refused.err
            before = before if extra else tree(work)
        assert tree(work) == before


def test_no_tokens_are_refused_too(picogpt, tmp_path: Path):
    refused = picogpt(*TRAIN, "--dry-run")
    assert (refused.status, "picogpt tokenize char makes one" in refused.err) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]])
def test_the_command_leaves_no_file_anywhere(work: Path, launcher: list[str]):
    """Neither does torch.compile, which keeps files in the home folder and the one for temporary files."""
    for name in ("home", "temporary"):
        (work / name).mkdir()
    places = {"HOME": str(work / "home"), "TMPDIR": str(work / "temporary")}
    # torchrun keeps folders of its own there.
    own = ["--log-dir", str(work.parent / f"{work.name}_log")] if launcher else []
    line = [
        sys.executable,
        "-m",
        *launcher[:1],
        *own,
        *launcher[1:],
        "picogpt",
        *TRAIN,
        "--dry-run",
        "--set=runtime.compile=auto",
        "--steps=10000000",  # so many that it pays to compile
    ]
    environment = {**os.environ, **places, "CXX": "/nonexistent/c++", "PYTHONDONTWRITEBYTECODE": "1"}
    before = tree(work)
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stderr  # it has tried
    assert tree(work) == before
    ranks = 2 if launcher else 1
    assert done.stdout.count(f"{ranks} (ranks) x 1 (accumulation) x {4 // ranks} (micro-batch)") == 1  # one rank speaks
