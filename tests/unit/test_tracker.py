"""Trackers: the real packages where they are installed, and a package that fails where none may be needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL_RUNTIME, small_experiment

from picogpt import records
from picogpt.config import Experiment, RuntimeConfig
from picogpt.errors import PicogptError, UsageError
from picogpt.train.loop import Trainer

LOSSES = ("train_loss", "val_loss")
INSTALL = "not a dependency: pip install {} to run this test"


def experiment(tracker: str, **train: object) -> Experiment:
    runtime = RuntimeConfig.model_validate({**SMALL_RUNTIME, "tracker": tracker})
    return small_experiment(**train).model_copy(update={"runtime": runtime})


def train(folder: Path, tokens, tracker: str, replace: bool = False, **settings: object) -> None:
    Trainer(experiment(tracker, **settings), tokens, folder).run(replace)


def train_with_a_crash(folder: Path, tokens, tracker: str) -> None:
    """The first process ends at step 12 of 40, after lines of steps 9, 10 and 12 behind the checkpoint of step 7."""

    def crash(trainer: Trainer) -> None:
        if trainer.progress.step == 12:
            raise ZeroDivisionError

    first = Trainer(experiment(tracker), tokens, folder)
    first.callbacks.append(crash)
    with pytest.raises(ZeroDivisionError):
        first.run()
    train(folder, tokens, tracker)


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of the metrics file, by loss."""
    rows = records.read_lines(folder / "metrics.jsonl")
    return {name: [(row["step"], pytest.approx(row[name])) for row in rows if name in row] for name in LOSSES}


def events(folder: Path) -> Any:
    pytest.importorskip("tensorboard", reason=INSTALL.format("tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in LOSSES}


def test_tensorboard_gets_each_line_once_although_the_first_process_crashed(tmp_path: Path, tokens):
    pytest.importorskip("tensorboard", reason=INSTALL.format("tensorboard"))
    train_with_a_crash(tmp_path, tokens, "tensorboard")
    assert scalars(tmp_path) == logged(tmp_path)
    (settings,) = events(tmp_path).Tensors("settings/text_summary")
    assert '"n_embd": 16' in settings.tensor_proto.string_val[0].decode()
    assert not (tmp_path / "checkpoints").exists()


def test_replacing_a_run_deletes_what_tensorboard_shows_of_it(tmp_path: Path, tokens):
    pytest.importorskip("tensorboard", reason=INSTALL.format("tensorboard"))
    train(tmp_path, tokens, "tensorboard", steps=20)
    train(tmp_path, tokens, "tensorboard", replace=True, steps=10)
    assert scalars(tmp_path) == logged(tmp_path)
    train(tmp_path, tokens, "none", replace=True, steps=5)
    assert not (tmp_path / "tensorboard").exists()


def test_trackio_gets_each_line_once_although_the_first_process_crashed(tmp_path: Path, tokens, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason=INSTALL.format("trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    train_with_a_crash(folder, tokens, "trackio")
    rows = SQLiteStorage.get_logs("picogpt", folder.as_posix())
    found = {name: sorted((row["step"], row[name]) for row in rows if name in row) for name in LOSSES}
    assert found == logged(folder)


def test_wandb_offline_writes_one_run_of_two_processes_to_the_folder(tmp_path: Path, tokens, monkeypatch):
    pytest.importorskip("wandb", reason=INSTALL.format("wandb"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_with_a_crash(tmp_path / "run", tokens, "wandb")
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_message_before_the_first_step(tmp_path: Path, tokens, monkeypatch, tracker: str):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, tracker, None)  # Python's own way to say that it is not there
    with pytest.raises(UsageError, match=rf"runtime\.tracker={tracker} needs .*: pip install {tracker}$"):
        train(tmp_path, tokens, tracker)
    assert not (tmp_path / "checkpoints").exists()


def test_a_missing_package_leaves_the_run_that_was_to_be_replaced(tmp_path: Path, tokens, monkeypatch):
    train(tmp_path, tokens, "none", steps=2)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train(tmp_path, tokens, "wandb", replace=True, steps=3)
    assert {"best.pt", "metrics.jsonl", "record.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a package called trackio that writes what it gets to a file, with this line in its `log`."""

    def make(line: str, start: str = "pass") -> Path:
        got = tmp_path / "got.jsonl"
        (tmp_path / "trackio.py").write_text(
            "import json\n"
            f"def write(**values): print(json.dumps(values), file=open({str(got)!r}, 'a'))\n"
            "class Run:\n"
            f"    def log(self, values, step):\n        {line}\n        write(step=step, **values)\n"
            "    def finish(self): write(finished=True)\n"
            f"def init(project, name, **settings):\n    {start}\n    write(name=name, **settings)\n    return Run()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "trackio", raising=False)
        return got

    yield make
    sys.modules.pop("trackio", None)


def test_a_tracker_gets_name_settings_and_every_line_and_the_fingerprint_is_the_same(tmp_path: Path, tokens, stub):
    got = stub("pass")
    folder = tmp_path / "run"
    train_with_a_crash(folder, tokens, "trackio")
    first, *rest = records.read_lines(got)
    assert (first["name"], first["resume"], first["config"]["model"]["n_embd"]) == (folder.as_posix(), "never", 16)
    (again,) = [line for line in rest if "name" in line]
    assert again["resume"] == "allow"
    assert sum("finished" in line for line in rest) == 2
    rows = [line for line in rest if "step" in line]
    assert {name: [(row["step"], row[name]) for row in rows if name in row] for name in LOSSES} == logged(folder)
    record = json.loads((folder / "record.json").read_text())
    assert record["fingerprint"] == Trainer(experiment("none"), tokens, tmp_path / "other").folder.fingerprint


def test_a_tracker_that_fails_later_is_one_warning_and_the_training_goes_on(tmp_path: Path, tokens, stub):
    got = stub("if step > 10: raise ConnectionError('the server is gone')")
    with pytest.warns(UserWarning, match="trackio failed, going on without it: the server is gone") as caught:
        train(tmp_path / "run", tokens, "trackio")
    assert sum("going on without it" in str(each.message) for each in caught) == 1
    assert (tmp_path / "run/record.json").exists()
    assert max(line.get("step", 0) for line in records.read_lines(got)) == 10


def test_a_tracker_that_cannot_start_is_one_error_before_the_first_step(tmp_path: Path, tokens, stub):
    stub("pass", start="raise PermissionError('no API key')")
    with pytest.raises(PicogptError, match=r"does not start: no API key; --set runtime\.tracker=none"):
        train(tmp_path / "run", tokens, "trackio")
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("tracker", ["trackio", "none"])
def test_a_folder_checkpoints_of_others_is_not_touched(tmp_path: Path, tokens, stub, tracker: str):
    stub("pass", start="raise PermissionError('no API key')")
    others = tmp_path / "run/checkpoints/epoch-3/model.bin"
    others.parent.mkdir(parents=True)
    others.write_text("weeks of work")
    with pytest.raises(PicogptError, match=r"run/checkpoints would be removed, and picogpt did not write epoch-3"):
        train(tmp_path / "run", tokens, tracker)
    assert [path for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()] == [others]


def test_a_tracker_that_cannot_start_again_leaves_the_checkpoint(tmp_path: Path, tokens, stub):
    stub("pass", start="if settings['resume'] == 'allow': raise PermissionError('no API key')")
    with pytest.raises(PicogptError, match="does not start: no API key"):
        train_with_a_crash(tmp_path / "run", tokens, "trackio")
    train(tmp_path / "run", tokens, "none")
    assert json.loads((tmp_path / "run/record.json").read_text())["results"]["sessions"] == 2


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_without_a_login_a_training_is_one_line_and_leaves_no_run(tmp_path: Path, tokens_folder: Path, stub, tracker):
    """The real Weights & Biases where it is installed, and a package that fails as it does."""
    if tracker == "wandb":
        pytest.importorskip("wandb", reason=INSTALL.format("wandb"))
    stub("pass", start="raise PermissionError('No API key configured.')")
    line = f"-m picogpt train char-bigram --name x --steps 2 --device cpu --data {tokens_folder} --set"
    settings = f"runtime.tracker={tracker}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *line.split(), settings, "--set", "model.block_size=16"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ended.returncode == 1
    (message,) = ended.stderr.splitlines()
    assert message.startswith(f"picogpt: {settings} does not start: No API key configured")
    assert message.endswith("; --set runtime.tracker=none trains without it")
    assert [path.name for path in (tmp_path / "weights/char_bigram/x").iterdir()] == [".lock"]
