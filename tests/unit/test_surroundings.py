"""More situations from public bug reports: links, devices and odd values, and what a user's environment brings along."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode_documents, small_experiment

from picogpt import checkpoint, models, plan, records
from picogpt.cli.common import run_folder
from picogpt.config import load_experiment, read_yaml
from picogpt.data import bpe
from picogpt.data.corpus import tokenize_chars
from picogpt.data.tokenizers import CharTokenizer
from picogpt.errors import PicogptError, UsageError
from picogpt.files import atomic_write, write_text
from picogpt.report.figures import draw_loss_curve
from picogpt.sample import Decoding, generate
from picogpt.train.loop import Trainer

MODEL = "model: {kind: char-bigram}\ntrain: {steps: 2}\n"


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Trainer(small_experiment(steps=2), tokens, folder).run()
    return folder


def test_a_file_behind_a_link_is_replaced_and_not_the_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/file")
    for text in ("new", "newer"):  # the first one makes the file
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/file").read_text() == text


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path):
    """As /dev/null must stay what it is, also for root."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_system_that_cannot_flush_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_link_to_a_disk_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "weights").symlink_to(tmp_path / "unmounted")
    with (
        pytest.raises(OSError, match=r"weights is a file, or a link .*is its disk mounted"),
        run_folder(tmp_path / "weights/char_bigram", None),
    ):
        pass
    with pytest.raises(PicogptError, match="is its disk mounted"), atomic_write(tmp_path / "weights/x/file"):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODEL + "model: {kind: gpt2}\n", "model is there twice.*line 3"),
        ("model: {kind: char-bigram}\ntrain: {steps: 2, seed: 1, steps: 3}\n", "steps is there twice"),
        ("[" * 20000, "is not YAML"),
        ("model: {block_size: 16, typo: 3}\ntrain: {steps: 2}\n", "there is no kind None: there are char-bigram"),
        ("model: {kind: [a]}\ntrain: {steps: 2}\n", r"there is no kind \['a'\]"),
        ("model: {kind: char-bigram}\ntrain: {steps: 2, betas: [1.5, 0.9]}\n", "less than 1"),
        ("model: {kind: char-bigram}\ntrain: {steps: 2, batch_size: 1000000000000}\n", "less than or equal"),
        ("model: {kind: char-bigram}\ntrain: {steps: 2}\nruntime: {threads: 1000000}\n", "less than or equal"),
    ],
)
def test_a_mistake_in_settings_is_a_message(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_experiment(tmp_path / "a.yaml")


def test_keys_that_come_from_an_anchor_may_be_set_again(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["b"] == {"x": 1, "y": 3}


def test_a_value_that_grows_without_bound_is_not_shown_whole(tmp_path: Path):
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "model: *a8", "train: *a8\n"]))
    with pytest.raises(UsageError) as error:
        load_experiment(tmp_path / "a.yaml")
    assert len(str(error.value)) < 100_000


def test_json_that_is_nested_too_deeply_is_no_record_and_no_tokenizer(tmp_path: Path):
    for name in ("record.json", "tokenizer.json"):
        (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(PicogptError, match="is not a result record"):
        records.read(tmp_path / "record.json")
    with pytest.raises(PicogptError, match="line 1"):
        records.read_lines(tmp_path / "record.json")
    with pytest.raises(PicogptError, match="is not a character tokenizer"):
        CharTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "char-bigram", "--name", "../../x"], "is not a folder name"),
        (["train", "char-bigram", "--name", "a/b"], "is not a folder name"),
        (["train", "char-bigram", "--name", "."], "is not a folder name"),
        (["train", "char-bigram", "--name", ""], "is not a folder name"),
        (["tokenize", "char", "--name", " "], "is not a folder name"),
        (["train", "char-bigram", "--folder", ""], "the path is empty"),
        (["train", "char-bigram", "--config", ""], "there are no settings called"),
        (["sample", "char-bigram", "--out", ""], "the path is empty"),
        (["tokenize", "char", "--text", ""], "the path is empty"),
        (["report", "summary", "--out", ""], "the path is empty"),
        (["sample", "char-bigram", "-n", "99999999999999999999"], "is not in the range"),
        (["sample", "char-bigram", "--num-samples", "99999999999"], "is not in the range"),
        (
            ["tokenize", "char", "--text", "a.txt", "--val-fraction", "nan"],
            "--val-fraction nan must be between 0 and 1",
        ),
    ],
)
def test_a_value_of_an_option_that_cannot_be_is_a_message(picogpt, tmp_path: Path, arguments: list, message: str):
    (tmp_path / "a.txt").write_text("some text " * 10)
    done = picogpt(*arguments)
    assert (done.status, message in done.err) == (2, True), done.err


def test_in_a_folder_that_was_deleted_the_module_says_so(tmp_path: Path):
    command = f"rmdir {tmp_path / 'gone'} && exec {sys.executable} -m picogpt runs"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "the working folder was deleted" in done.stderr


def test_a_figure_is_the_same_whatever_the_user_has_set_in_matplotlib(finished: Path, tmp_path: Path):
    draw_loss_curve(finished, tmp_path / "plain.png")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\naxes.facecolor: black\n")
    command = [sys.executable, "-m", "picogpt", "report", "loss-curve", f"--run-folder={finished}", "--out=theirs.png"]
    environment = {**os.environ, "MPLBACKEND": "module://a_notebook.backend_inline"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_asking_for_the_commit_leaves_the_index_of_git_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise a commit that the user makes at that moment fails: the index is locked."""
    (tmp_path / "picogpt").mkdir()
    (tmp_path / "file").write_text("text")

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", "file")
    git("commit", "-m", "a")
    os.utime(tmp_path / "file", (1, 1))  # git status would note the new time in the index
    index = tmp_path / ".git/index"
    before = hashlib.sha256(index.read_bytes()).digest()
    monkeypatch.setattr(records, "__file__", str(tmp_path / "picogpt/records.py"))
    assert records.commit()[1] is False
    assert hashlib.sha256(index.read_bytes()).digest() == before


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_of_nans_makes_no_text(finished: Path, cached: bool):
    weights = checkpoint.load_weights(finished / "best.pt")
    model = models.build(weights.experiment.model, weights.vocab_size, 1).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(PicogptError, match="computes NaN"):
        generate(model, [torch.tensor([1, 2])], 3, Decoding(), 1, cached=cached)


def test_the_loss_of_a_model_of_nans_is_no_result(picogpt, finished: Path, tokens_folder: Path, tmp_path: Path):
    tree = torch.load(finished / "best.pt", weights_only=True)
    for tensor in tree["model"].values():
        tensor.fill_(float("nan"))
    torch.save(tree, tmp_path / "nan.pt")
    options = ["--ckpt=nan.pt", f"--data={tokens_folder}", f"--tokenizer-dir={tokens_folder}", "--device=cpu"]
    done = picogpt("evaluate", "char-transformer", *options, "--out=record.json")
    assert (done.status, "its weights are damaged" in done.err) == (1, True), done.err
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_million_blanks_before_a_word_are_tokenized_as_a_thousand_are(gpt2, blank: str):
    long, short = ("x" + blank * (count // len(blank)) + "word, x" for count in (1_200_000, 2000))
    ids = encode_documents(gpt2, [long])
    assert gpt2.decode(ids) == long
    end = gpt2.encode(short)
    np.testing.assert_array_equal(ids[-3:], end[-3:])


@pytest.mark.parametrize("text", ["x" + " " * 1500 + "y z", "a" + "\n" * 1100 + "\tb", " " * 2000, "\x1c" * 1500 + "a"])
def test_a_cut_before_the_last_blank_changes_no_id(gpt2, text: str):
    parts = [gpt2.encode(part) for part in bpe.LAST_BLANK.split(text)]
    np.testing.assert_array_equal(np.concatenate(parts), gpt2.encode(text))


def test_a_pointer_of_git_lfs_is_neither_a_text_nor_a_checkpoint(tmp_path: Path):
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n")
    with pytest.raises(PicogptError, match="git lfs pull brings it"):
        tokenize_chars(tmp_path / "a.txt", tmp_path / "tokens")
    with pytest.raises(PicogptError, match="git lfs pull brings it"):
        checkpoint.load_weights(tmp_path / "a.txt")


def test_another_text_in_place_of_the_first_is_noticed_whatever_its_time(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identities = []
    for text in ("first", "other"):
        (tmp_path / "my.txt").write_text(text)
        os.utime("my.txt", (1, 1))
        identities.append(plan.make({"corpus": "my.txt"}, "configuration").text_identity)
    assert identities[0] != identities[1]
    assert plan.make({"corpus": ["tinyshakespeare"]}, "configuration").text_identity == {}


def test_a_text_from_the_future_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("text")
    os.utime("my.txt", (2**32, 2**32))
    with pytest.raises(UsageError, match=r"my\.txt has a modification time in the future.*touch my\.txt"):
        plan.make({"corpus": "my.txt"}, "configuration")
