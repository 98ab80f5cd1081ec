"""Situations from public bug reports of programs like this one, each met as its user met it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import small_experiment
from pipeline import BOX

from picogpt import checkpoint, models, plan, records
from picogpt.cli.common import run_folder
from picogpt.config import GPT2Config, load_experiment
from picogpt.data.corpus import open_data, tokenize_chars, tokenize_gpt2
from picogpt.data.tokenizers import CharTokenizer
from picogpt.data.tokens import open_tokens, write_tokens
from picogpt.errors import PicogptError, UsageError
from picogpt.export import export_folder
from picogpt.files import own_name
from picogpt.progress import Training
from picogpt.report.figures import draw_loss_curve, drawable
from picogpt.report.page import _ticks
from picogpt.train.loop import Trainer

GREEK = "αβγδε ζηθ\n" * 40
LIMIT = """
import resource, sys
import torch
from picogpt import cli
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
cli.main()
"""


@pytest.fixture
def greek(tmp_path: Path) -> Path:
    """A folder with a finished run on Greek text, called a."""
    text = tmp_path / "greek.txt"
    text.write_text(GREEK, encoding="utf-8")
    data = tokenize_chars(text, tmp_path / "weights/char_tokenizer/t")
    Trainer(small_experiment(steps=2), data, tmp_path / "weights/char_transformer/a").run()
    return tmp_path


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "picogpt", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, env={**os.environ, **environment}, timeout=120)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_characters_that_the_output_cannot_hold_are_replaced_with_a_warning(greek: Path, encoding: str):
    done = run("sample", "char-transformer", "-n", "50", "--device=cpu", cwd=greek, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 51
    assert b"?" in done.stdout
    assert b" lacks some characters, which were replaced by ?" in done.stderr
    whole = run(
        "sample", "char-transformer", "-n", "50", "--device=cpu", "--out=o.txt", cwd=greek, PYTHONIOENCODING=encoding
    )
    assert whole.returncode == 0
    assert set((greek / "o.txt").read_text()) <= set(GREEK)


def test_the_checkpoint_that_is_sampled_is_named_also_of_a_run_that_is_not_finished(greek: Path):
    run_folder = greek / "weights/char_transformer"
    (run_folder / "b/checkpoints").mkdir(parents=True)
    os.link(run_folder / "a/best.pt", run_folder / "b/checkpoints/best.pt")
    os.utime(run_folder / "b/checkpoints/best.pt")
    (run_folder / "a/best.pt").unlink()
    done = run("sample", "char-transformer", "-n", "5", "--device=cpu", cwd=greek)
    assert done.returncode == 0, done.stderr
    named = b"weights/char_transformer/b/checkpoints/best.pt of a run that is not finished: step 2, validation loss"
    assert named in done.stderr


def test_a_text_from_a_pipe_is_read_once(tmp_path: Path):
    pipe, content = tmp_path / "pipe", GREEK.encode()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    data = tokenize_chars(pipe, tmp_path / "tokens")
    writer.join()
    assert data.train.header.text_sha256 == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_is_no_character(tmp_path: Path):
    (tmp_path / "a.txt").write_text(GREEK, encoding="utf-8-sig")
    tokenize_chars(tmp_path / "a.txt", tmp_path / "tokens")
    assert "\ufeff" not in CharTokenizer.load(tmp_path / "tokens").characters


def test_a_validation_text_of_one_token_is_refused_where_it_is_made_and_where_it_is_read(tmp_path: Path, gpt2):
    (tmp_path / "short.txt").write_text("the king and queen a")
    with pytest.raises(PicogptError, match="the validation text of short has 1 tokens: 2 are the least"):
        tokenize_gpt2([tmp_path / "short.txt"], tmp_path / "tokens", gpt2)
    (tmp_path / "longer.txt").write_text("the king and queen of night")
    data = tokenize_gpt2([tmp_path / "longer.txt"], tmp_path / "tokens", gpt2, val_fraction=0.5)
    write_tokens(data.val.path, data.val.header, [(1, data.val.ids[:1])])
    train = open_tokens(data.train.path)
    write_tokens(data.val.path, train.header.model_copy(update={"split": "val"}), [(1, data.train.ids[:1])])
    with pytest.raises(PicogptError, match=r"val\.bin"):
        open_data(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["sample", "char-transformer", "-n", "5", "--num-samples", "100000"], ""),
        (["bench", "sample", "char-transformer", "-n", "5", "--batch-size", "100000"], ""),
        (["evaluate", "char-transformer", "--ckpt", "large.pt"], "unable to mmap"),  # and no "damaged": it is whole
    ],
)
def test_out_of_memory_of_a_model_in_use_is_a_message(greek: Path, arguments: list[str], cause: str):
    if "large.pt" in arguments:
        tree = torch.load(greek / "weights/char_transformer/a/best.pt", weights_only=True)
        tree["model"]["large"] = torch.zeros(80 << 20)  # 320 MiB
        torch.save(tree, greek / "large.pt")
    command = [sys.executable, "-c", LIMIT, *arguments, "--device=cpu"]
    done = subprocess.run(command, cwd=greek, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"picogpt: out of memory ({cause}" in done.stderr
    assert "()" not in done.stderr
    assert "damaged" not in done.stderr


@pytest.mark.slow
def test_a_ladder_finds_the_micro_batch_that_fits_into_the_memory_of_a_cpu(tmp_path: Path, corpus: Path, gpt2):
    tokenize_gpt2([corpus], tmp_path / "tokens", gpt2)
    batch = {"batch_size": 16, "micro_batch_size": 16, "block_size": 64}  # 200 MiB of logits
    (tmp_path / "box.yaml").write_text(json.dumps({**BOX, **batch, "rungs": ["baseline"]}))
    small = ["--set=model.n_layer=1", "--set=model.n_embd=16", "--set=model.n_head=2"]
    arguments = [
        "bench",
        "train",
        "--hardware=box.yaml",
        "--rung=baseline",
        "--data=tokens",
        "--out=record.json",
        *small,
    ]
    limit = LIMIT.replace("import torch", "import picogpt.bench.ladder").replace("300", "700")
    done = subprocess.run(
        [sys.executable, "-c", limit, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    results = records.read(tmp_path / "record.json")["results"]
    assert results["out_of_memory"]
    assert results["micro_batch_size"] < 16


def test_out_of_memory_on_a_cpu_is_a_message(greek: Path):
    """The real error of the allocator, under a limit of the address space."""
    settings = [
        "--set=model.n_embd=32768",
        "--set=model.n_head=1",
        "--set=model.block_size=16",
        "--set=runtime.compile=off",
    ]
    arguments = ["train", "char-transformer", "--device=cpu", "--steps=1", "--name=big", *settings]
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, *arguments], cwd=greek, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "picogpt: out of memory" in done.stderr or "too little memory" in done.stderr


@pytest.mark.parametrize("name", ["us$ \\frac {x} $ b", "$5 and $6_x", "文字 и буквы", "a" * 200])
def test_any_name_of_a_text_can_be_drawn(greek: Path, name: str):
    folder = greek / "weights/char_transformer/a"
    record = records.read(folder / "record.json")
    record["corpus"]["name"] = name
    records.write(folder / "record.json", record)
    draw_loss_curve(folder, greek / "loss.png")
    assert (greek / "loss.png").stat().st_size > 10_000


def test_what_a_font_lacks_is_written_as_code_points():
    assert drawable("文 и x", 20) == "U+6587 и x"
    assert drawable("文" * 20, 20) == "U+6587U+6587U+6587U…"


@pytest.mark.parametrize(
    ("text", "least", "expected"), [("f(x)", 1, "`"), ("a `b` c", 1, "``"), ("```\nx\n```", 3, "````")]
)
def test_backticks_in_a_text_do_not_end_its_code(text: str, least: int, expected: str):
    assert _ticks(text, least) == expected


def test_texts_never_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    paths = [
        "мой.txt",
        "твой.txt",
        "a b.txt",
        "a_b.txt",
        "x/data.txt",
        "y/data.txt",
        "data.txt",
        "data.md",
        "mytext",
    ]
    for path in paths:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(GREEK)
    names = {path: plan.make({"corpus": path}, "configuration").corpus for path in paths}
    assert len(set(names.values())) == len(paths)
    assert (names["мой.txt"], names["data.txt"], names["mytext"]) == ("мой", "data", "mytext")
    assert own_name("a b").startswith("a_b-")
    assert own_name("../..") not in ("..", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": 20260210183518}, "run: YAML reads this as 20260210183518, which is no text: put it in quotes in a file for --configfile"),
        ({"corpus": 5}, "corpus: YAML reads this as 5, which is no text"),
        ({"corpus": "a{b}.txt"}, "Snakemake takes braces in a path for a wildcard: rename the file"),
        ({"corpus": "nothing"}, "there is no text nothing: .*or one of tinyshakespeare"),
        ({"ladder": {"hardware": ["my box.yaml"]}}, "the name of the file 'my box' may have letters a to z, digits, - and _ alone"),
    ],
)  # fmt: skip
def test_a_value_that_yaml_reads_as_something_else_is_explained(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        plan.make({"corpus": "tinyshakespeare", **change}, "configuration")


@pytest.mark.parametrize("key", ["train.steps", "train.learning_rate", "runtime.threads"])
def test_a_truth_value_is_no_number(key: str):
    with pytest.raises(UsageError, match=f"{key}: a number is needed, and true"):
        load_experiment("char-bigram", [f"{key}=true"])


def test_a_reader_of_the_output_that_goes_away_stops_no_training(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with Training("x", 10, 0) as bar:
            bar.update(1, 1.0, 1.0, None)
            bar.say("step 1")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.write("x\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


def test_a_damaged_checkpoint_never_replaces_the_good_one_before_it(tokens, tmp_path: Path):
    trainer = Trainer(small_experiment(), tokens, tmp_path)
    trainer.callbacks.append(lambda trainer: trainer.stop_signals.append(15) if trainer.progress.step == 16 else None)
    with pytest.raises(PicogptError):
        trainer.run()
    last = trainer.folder.last
    last.write_bytes(b"torn")
    good = checkpoint.previous(last).read_bytes()
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        Trainer(small_experiment(), tokens, tmp_path).folder.load(replace=False)
    checkpoint.save_state(last, checkpoint.load_state(checkpoint.previous(last))[0])
    assert (last.with_name("last.damaged.pt").read_bytes(), checkpoint.previous(last).read_bytes()) == (b"torn", good)


def test_an_exported_model_has_the_permissions_of_the_umask(tmp_path: Path, gpt2):
    model = models.build(GPT2Config(kind="gpt2", n_layer=1, n_head=1, n_embd=4, block_size=8), gpt2.vocab_size, 1)
    before = os.umask(0o027)
    try:
        export_folder(model, gpt2, tmp_path / "out", str)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_commands_of_the_same_second_have_folders_of_their_own(tmp_path: Path):
    with run_folder(tmp_path, None) as first, run_folder(tmp_path, None) as second:
        assert first != second
        (second / "file").touch()
    assert [each.name for each in tmp_path.iterdir()] == [second.name]  # nothing was written into the first


@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_streams_stop_nothing(greek: Path, closed: str):
    train = f"{sys.executable} -m picogpt train char-bigram --steps=2 --device=cpu --name=x --set model.block_size=16 {closed}>&-"
    done = subprocess.run(["bash", "-c", train], cwd=greek, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (greek / "weights/char_bigram/x/record.json").exists()


@pytest.mark.parametrize("program", [[sys.executable, "-m", "picogpt"], [str(Path(sys.executable).parent / "picogpt")]])
def test_files_of_any_name_in_the_folder_change_nothing(greek: Path, program: list[str]):
    for name in ("json.py", "torch.py", "click.py", "numpy.py", "weights.py"):
        (greek / name).write_text("raise SystemExit('a file of the user was run')\n")
    command = ["sample", "char-transformer", "-n", "5", "--device=cpu"]
    done = subprocess.run([*program, *command], cwd=greek, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
