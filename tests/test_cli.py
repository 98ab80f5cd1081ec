import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt import config
from picogpt.cli import common
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import tokenize_chars, tokenize_gpt2
from picogpt.data.fetch import MIRROR_VARIABLE


def test_help_is_there_without_torch():
    script = (
        "import sys; from picogpt import cli; cli.cli(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "picogpt train char-transformer" in run.stdout
    assert run.stdout.endswith("False\n")


def test_the_module_runs_as_the_command():
    run = subprocess.run([sys.executable, "-m", "picogpt", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("picogpt, version")


def test_the_kinds_on_the_command_line_are_those_of_the_settings():
    assert common.KINDS == config.MODEL_KINDS


def test_the_help_of_train_lists_every_setting(picogpt):
    shown = picogpt("train", "--help").out
    for cls, prefix in ((config.TrainConfig, "train"), (config.RuntimeConfig, "runtime")):
        for key, _, _ in config.describe(cls, f"{prefix}."):
            assert key in shown


def test_a_first_model_by_hand(picogpt, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert picogpt("tokenize", "char", "--text", corpus).out.startswith("words: ")
    trained = picogpt("train", "char-bigram", "--run", "a", "--steps", 20, "--seed", 3, "--set", "model.block_size=16")
    assert trained.status == 0
    assert "before training: val loss" in trained.err
    assert "weights/char_bigram/a/best.pt: validation loss" in trained.out
    record = json.loads((tmp_path / "weights/char_bigram/a/record.json").read_text())
    assert (record["config"]["train"]["seed"], record["config"]["train"]["steps"]) == (3, 20)
    assert picogpt("sample", "char-bigram", "-n", 10).status == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "char-bigram"], 2, "picogpt tokenize char makes one"),
        (["train", "gpt-17"], 2, "'char-bigram', 'char-transformer'"),
        (["train", "char-bigram", "--set", "train.sed=1"], 2, "did you mean seed?"),
        (["train", "char-bigram", "--config", "missing.yaml"], 1, "missing.yaml"),
        (["train", "char-bigram", "--data", "nowhere"], 1, "nowhere/train.bin"),
        (["train", "char-bigram", "--steps", "0"], 2, "train.steps=0"),
        (["train", "char-bigram", "--seed", "5000000000"], 2, "train.seed=5000000000"),
        (["train", "char-bigram", "--set", "train.epochs=.inf"], 2, "finite"),
        (["train", "char-bigram", "--set", "train.seed=2024-13-45"], 2, "not YAML"),
        (["train", "char-bigram", "--set", "runtime.compile=maybe"], 2, "'auto', 'on' or 'off'"),
        (["tokenize", "char", "--text", "tinyshakespeare.txt"], 2, "not the registered tinyshakespeare"),
        (["train", "char-bigram", "--device", "cuda:77", "--data", "t"], 2, "cuda:77"),
        (["sample", "char-bigram"], 2, "picogpt train char-bigram makes one"),
        (["tokenize", "char"], 2, "picogpt fetch tinyshakespeare"),
        (["tokenize", "char", "--text", "missing.txt"], 1, "missing.txt"),
        (["tokenize", "char", "--text", "empty.txt"], 1, "empty.txt is empty"),
        (["fetch", "tinyshakespear"], 2, "tinyshakespeare, gutenberg-shakespeare"),
        (["fetch", "tinyshakespeare", "gutenberg-shakespeare", "--out", "x"], 2, "--out takes one file"),
        (["report", "summary", "missing.json", "--out", "s.csv"], 1, "missing.json"),
        (["report", "loss-curve", "--run-folder", "nowhere", "--out", "a.png"], 1, "nowhere/record.json"),
        (["frobnicate"], 2, "No such command"),
        (["plan", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["train", "gpt2", "--config", "gpt2_fine"], 2, "no settings called gpt2_fine"),
        (["report", "page", "--template", "t", "--summary", "s", "--set", "a", "--out", "o"], 2, "NAME=VALUE"),
        (["fetch", "gpt2-ranks", "--status", "s.json"], 2, "--status is for files of the hub"),
    ],
)
def test_bad_input_is_one_message_and_a_status(picogpt, corpus, tmp_path, arguments: list, status: int, message: str):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tinyshakespeare.txt").write_text("mine " * 50)
    from picogpt.data.corpus import tokenize_chars

    tokenize_chars(corpus, tmp_path / "t")
    run = picogpt(*arguments)
    assert (run.status, run.out) == (status, "")
    assert message in run.err


def test_fetch_lists_takes_from_the_mirror_and_needs_it_once(picogpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listed = picogpt("fetch").out
    assert "tinyshakespeare" in listed
    assert "not here" in listed
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "mirror"))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/tinyshakespeare.txt").write_text("To be")
    run = picogpt("fetch", "tinyshakespeare")
    assert run.status == 1
    assert "serves another file" in run.err


@pytest.mark.skipif(
    MIRROR_VARIABLE not in os.environ, reason=f"{MIRROR_VARIABLE} is not set: the real corpus is not here"
)
def test_the_real_corpus_makes_the_known_split(picogpt, tmp_path: Path):
    assert picogpt("fetch", "tinyshakespeare", "--out", "copy.txt").status == 0
    run = picogpt("tokenize", "char")
    assert "tinyshakespeare: 65 characters, 1,003,854 for training, 111,540 for validation" in run.out
    assert (tmp_path / "copy.txt").read_bytes() == (tmp_path / "resources/tinyshakespeare.txt").read_bytes()


def test_a_closed_pipe_is_no_error(corpus: Path, tmp_path: Path):
    command = f"{sys.executable} -m picogpt train --help | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "Traceback" not in run.stderr


def train_command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "picogpt",
        "train",
        "char-bigram",
        "--run",
        "a",
        "--set=model.block_size=16",
        *arguments,
    ]


def test_a_full_disk_ends_a_training_with_a_message_and_keeps_the_last_good_checkpoint(corpus: Path, tmp_path: Path):
    tokenize_chars(corpus, tmp_path / "weights/char_tokenizer/t")
    # No file may grow beyond 4 KiB: the first checkpoint does not fit.
    command = [
        "bash",
        "-c",
        'ulimit -f 4; exec "$@"',
        "bash",
        *train_command("--steps", "20", "--set=runtime.checkpoint_interval=5"),
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "cannot write weights/char_bigram/a/checkpoints/" in run.stderr
    assert "Traceback" not in run.stderr
    left = {path.name for path in (tmp_path / "weights/char_bigram/a/checkpoints").iterdir()}
    assert left <= {"metrics.jsonl"}


def test_a_second_training_in_the_same_folder_is_refused(picogpt, corpus: Path, tmp_path: Path):
    from picogpt.files import exclusive_lock

    tokenize_chars(corpus, tmp_path / "weights/char_tokenizer/t")
    with exclusive_lock(tmp_path / "weights/char_bigram/a", "training"):
        run = picogpt(*train_command("--steps", "5")[3:])
    assert (run.status, run.out) == (1, "")
    assert "another process is training in weights/char_bigram/a" in run.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_with_its_status_and_says_how_to_go_on(
    corpus: Path, tmp_path: Path, number: signal.Signals, status: int
):
    tokenize_chars(corpus, tmp_path / "weights/char_tokenizer/t")
    command = train_command("--steps", "1000000", "--set=runtime.log_interval=1")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert "before training" in process.stderr.readline()
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert f"stopped by {number.name} at step" in errors
    assert "everything is saved in weights/char_bigram/a/checkpoints: the same command continues from there" in errors
    assert "Traceback" not in errors


def test_a_stopped_run_without_a_name_says_which_name_goes_on(
    picogpt, corpus: Path, tmp_path: Path, gpt2: GPT2Tokenizer
):
    tokenize_gpt2([corpus], tmp_path / "weights/gpt2_tokenizer/t", gpt2, "words")
    small = ["--set=model.n_layer=1", "--set=model.n_head=1", "--set=model.n_embd=8", "--set=model.block_size=8"]
    command = [sys.executable, "-m", "picogpt", "train", "gpt2", "--steps", "1000000", *small]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert "before training" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    (folder,) = (tmp_path / "weights/gpt2").iterdir()
    assert f"the same command with --run {folder.name} continues from there" in errors
    again = picogpt(*command[3:6], "4", "--run", folder.name, *small)  # other settings, not a new run
    assert (again.status, "holds a run of other settings" in again.err) == (1, True)


def test_memory_that_runs_out_is_a_message(picogpt, monkeypatch: pytest.MonkeyPatch):
    from picogpt import machines

    def hungry() -> list[str]:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(machines, "names", hungry)
    run = picogpt("hardware")
    assert run.status == 1
    assert run.err.startswith("picogpt: out of memory (")
    assert "--num-samples" in run.err
