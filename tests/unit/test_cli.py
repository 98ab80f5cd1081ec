import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt import config
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import tokenize_chars, tokenize_gpt2
from picogpt.data.fetch import MIRROR_VARIABLE
from picogpt.files import exclusive_lock

MODULE = [sys.executable, "-m", "picogpt"]
TRAIN = ["train", "char-bigram", "--run", "a", "--set=model.block_size=16"]
FOLDER = "weights/char_bigram/a"


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def work(corpus: Path, tmp_path: Path) -> Path:
    """A folder with tokens of characters."""
    tokenize_chars(corpus, tmp_path / "weights/char_tokenizer/t")
    return tmp_path


@pytest.mark.parametrize("command", [[], ["train"]])
def test_help_is_there_without_torch(command: list[str]):
    show = f"cli.cli({[*command, '--help']}, standalone_mode=False)"
    shown = run(
        sys.executable, "-c", f"import sys; from picogpt import cli; {show}; print('torch' in sys.modules)"
    ).stdout
    assert "picogpt train char-transformer" in shown
    assert shown.endswith("False\n")


def test_the_module_runs_as_the_command():
    assert run(*MODULE, "--version").stdout.startswith("picogpt, version")


def test_the_help_of_train_lists_every_setting(picogpt):
    shown = picogpt("train", "--help").out
    for cls, prefix in ((config.TrainConfig, "train"), (config.RuntimeConfig, "runtime")):
        for key, _, _ in config.describe(cls, f"{prefix}."):
            assert key in shown


def test_a_first_model_by_hand(picogpt, corpus: Path, tmp_path: Path):
    assert picogpt("tokenize", "char", "--text", corpus).out.startswith("words: ")
    trained = picogpt(*TRAIN, "--steps", 20, "--seed", 3)
    assert trained.status == 0
    assert "before training: val loss" in trained.err
    assert f"{FOLDER}/best.pt: validation loss" in trained.out
    settings = json.loads((tmp_path / FOLDER / "record.json").read_text())["config"]["train"]
    assert (settings["seed"], settings["steps"]) == (3, 20)
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
    ],
)
def test_bad_input_is_one_message_and_a_status(picogpt, corpus, tmp_path, arguments: list, status: int, message: str):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tinyshakespeare.txt").write_text("mine " * 50)
    tokenize_chars(corpus, tmp_path / "t")
    refused = picogpt(*arguments)
    assert (refused.status, refused.out) == (status, "")
    assert message in refused.err


def test_fetch_lists_takes_from_the_mirror_and_needs_it_once(picogpt, tmp_path: Path, monkeypatch):
    listed = picogpt("fetch").out
    assert "tinyshakespeare" in listed
    assert "not here" in listed
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "mirror"))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/tinyshakespeare.txt").write_text("To be")
    refused = picogpt("fetch", "tinyshakespeare")
    assert (refused.status, "serves another file" in refused.err) == (1, True)


@pytest.mark.skipif(MIRROR_VARIABLE not in os.environ, reason=f"{MIRROR_VARIABLE} is not set: no real corpus")
def test_the_real_corpus_makes_the_known_split(picogpt, tmp_path: Path):
    assert picogpt("fetch", "tinyshakespeare", "--out", "copy.txt").status == 0
    split = "tinyshakespeare: 65 characters, 1,003,854 for training, 111,540 for validation"
    assert split in picogpt("tokenize", "char").out
    assert (tmp_path / "copy.txt").read_bytes() == (tmp_path / "resources/tinyshakespeare.txt").read_bytes()


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    closed = run("bash", "-c", '"$@" | head -1', "bash", *MODULE, "train", "--help", cwd=tmp_path)
    assert (closed.returncode, "Traceback" in closed.stderr) == (0, False)


def test_a_full_disk_ends_a_training_with_a_message_and_keeps_the_last_good_checkpoint(work: Path):
    # No file may grow beyond 4 KiB: the first checkpoint does not fit.
    training = [*MODULE, *TRAIN, "--steps", "20", "--set=runtime.checkpoint_interval=5"]
    failed = run("bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *training, cwd=work)
    assert failed.returncode == 1
    assert f"cannot write {FOLDER}/checkpoints/" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert {path.name for path in (work / FOLDER / "checkpoints").iterdir()} <= {"metrics.jsonl"}


def test_a_second_training_in_the_same_folder_is_refused(picogpt, work: Path):
    with exclusive_lock(work / FOLDER, "training"):
        refused = picogpt(*TRAIN, "--steps", "5")
    assert (refused.status, refused.out) == (1, "")
    assert f"another process is training in {FOLDER}" in refused.err


def stopped(number: signal.Signals, *command: str, cwd: Path) -> tuple[int, str]:
    """Exit status and messages of a training that gets a signal after its first evaluation."""
    command = (*MODULE, *command, "--steps", "1000000")
    with subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True) as process:
        assert "before training" in process.stderr.readline()
        process.send_signal(number)
        errors = process.communicate(timeout=300)[1]
    assert "Traceback" not in errors
    return process.returncode, errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_with_its_status_and_says_how_to_go_on(work: Path, number: signal.Signals, status: int):
    ended, errors = stopped(number, *TRAIN, "--set=runtime.log_interval=1", cwd=work)
    assert ended == status
    assert f"stopped by {number.name} at step" in errors
    assert f"everything is saved in {FOLDER}/checkpoints: the same command continues from there" in errors


@pytest.mark.slow
def test_a_stopped_run_without_a_name_says_which_name_goes_on(
    picogpt, corpus: Path, tmp_path: Path, gpt2: GPT2Tokenizer
):
    tokenize_gpt2([corpus], tmp_path / "weights/gpt2_tokenizer/t", gpt2, "words")
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    small = ["train", "gpt2", *(f"--set=model.{key}={value}" for key, value in sizes.items())]
    ended, errors = stopped(signal.SIGTERM, *small, cwd=tmp_path)
    assert ended == 143
    (folder,) = (tmp_path / "weights/gpt2").iterdir()
    assert f"the same command with --name {folder.name} continues from there" in errors
    again = picogpt(*small, "--steps", 4, "--run", folder.name)  # other settings, not a new run
    assert (again.status, "holds a run of other settings" in again.err) == (1, True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_a_message(picogpt, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def hungry() -> None:
        raise error

    monkeypatch.setattr("picogpt.machines.names", hungry)
    failed = picogpt("hardware")
    assert failed.status == 1
    assert failed.err.startswith(f"picogpt: out of memory ({str(error) or 'MemoryError'}): process fewer")
    assert "--num-samples" in failed.err
