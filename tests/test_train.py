import fcntl
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import warnings
from collections.abc import Callable
from pathlib import Path

import driver
import forked
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, SMALL_RUNTIME, small_experiment

from picogpt import checkpoint, models, records
from picogpt.config import Experiment
from picogpt.data.corpus import tokenize_chars
from picogpt.data.tokens import TokenData
from picogpt.errors import Interrupted, PicogptError
from picogpt.hardware import Device
from picogpt.train import loop
from picogpt.train.evaluate import evaluate
from picogpt.train.loop import Trainer

CPU = Device("test", "cpu", "float32")


def train_in_a_process(folder: Path, tokens: Path, death: str) -> int:
    """Exit status of tests/driver.py; negative: the signal that ended it."""
    return forked.run("driver", folder, tokens, death).returncode


def test_what_is_forked_has_torch_already():
    assert forked.loaded() == list(forked.LOADED)


def learned(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and metrics of a finished run, without the times."""
    rows = records.read_lines(folder / "metrics.jsonl")
    times = {"train_seconds", "eval_seconds", "tokens_per_second"}
    kept = [{key: value for key, value in row.items() if key not in times} for row in rows]
    return checkpoint.load_weights(folder / "best.pt").state, kept


def assert_same_run(one: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = learned(one), learned(other)
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tokens: TokenData) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    Trainer(small_experiment(), tokens, folder).run()
    return folder


def test_a_run_killed_again_and_again_learns_the_same_bit_for_bit(straight: Path, tokens_folder: Path, tmp_path: Path):
    # Before the first checkpoint (7), between two, right after one, between evaluation (10) and log (12), at the end.
    for step in (3, 13, 21, 30, 39):
        assert train_in_a_process(tmp_path, tokens_folder, f"step:{step}") == -signal.SIGKILL
        assert not (tmp_path / "record.json").exists()
    assert train_in_a_process(tmp_path, tokens_folder, "never") == 0
    assert_same_run(straight, tmp_path)
    assert records.read(tmp_path / "record.json")["results"]["sessions"] == 5


@pytest.mark.parametrize("save", [1, 3])
def test_a_save_killed_between_write_and_rename_leaves_the_one_before(straight, tokens_folder, tmp_path, save: int):
    assert train_in_a_process(tmp_path, tokens_folder, f"save:{save}") == -signal.SIGKILL
    last = tmp_path / "checkpoints/last.pt"
    assert last.exists() == (save > 1)
    if save > 1:
        assert checkpoint.load_state(last)[0]["progress"]["step"] == 7 * (save - 1)
    assert train_in_a_process(tmp_path, tokens_folder, "never") == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step(straight, tokens_folder, tmp_path, number: signal.Signals):
    command = [sys.executable, driver.__file__, tmp_path, tokens_folder, "linger:9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert f"stopped by {number.name} at step" in errors
    step = checkpoint.load_state(tmp_path / "checkpoints/last.pt")[0]["progress"]["step"]
    assert 10 <= step < 40
    assert train_in_a_process(tmp_path, tokens_folder, "never") == 0
    assert_same_run(straight, tmp_path)


def test_a_closed_terminal_saves_too(straight: Path, tokens_folder: Path, tmp_path: Path):
    terminal, ours = pty.openpty()
    command = [sys.executable, driver.__file__, tmp_path, tokens_folder, "linger:9"]
    with subprocess.Popen(
        command,
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(ours)
        while b"ready" not in os.read(terminal, 4096):
            pass
        os.close(terminal)  # the kernel sends SIGHUP
        assert process.wait(timeout=60) == 1
    assert 10 <= checkpoint.load_state(tmp_path / "checkpoints/last.pt")[0]["progress"]["step"] < 40
    assert train_in_a_process(tmp_path, tokens_folder, "never") == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("ignored", [True, False])
def test_under_nohup_a_closed_terminal_stops_nothing(ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        received: list[int] = []
        with loop._stop_on_signals(received):
            signal.raise_signal(signal.SIGHUP)
        assert received == ([] if ignored else [signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(folder: Path, tokens: TokenData, step: int) -> None:
    """Leave a run in `folder` that a signal stopped after `step` steps."""
    trainer = Trainer(small_experiment(), tokens, folder)
    trainer.callbacks.append(
        lambda trainer: signal.raise_signal(signal.SIGTERM) if trainer.progress.step == step - 1 else None
    )
    with pytest.raises(Interrupted) as stop:
        trainer.run()
    assert stop.value.exit_status == 128 + signal.SIGTERM


@pytest.mark.parametrize("launched", [True, False])
def test_a_signal_that_torchrun_passes_on_again_ends_nothing(monkeypatch: pytest.MonkeyPatch, launched: bool):
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    # A shell that starts the tests in the background has SIGINT ignored.
    before = {number: signal.getsignal(number) for number in loop.STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        received: list[int] = []
        with loop._stop_on_signals(received):
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            if launched:
                signal.raise_signal(signal.SIGINT)
                assert received == [signal.SIGINT] * 2
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == (not launched)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda last: last.write_bytes(last.read_bytes()[:-1000]), r"last\.pt is torn, or no checkpoint"),
        (lambda last: last.unlink(), r"cannot read the checkpoint .*last\.pt"),
    ],
)
def test_a_torn_or_lost_checkpoint_falls_back_to_the_one_before_it(
    straight: Path, tokens: TokenData, tmp_path: Path, damage: Callable[[Path], object], message: str
):
    interrupted(tmp_path, tokens, 17)
    damage(tmp_path / "checkpoints/last.pt")
    with pytest.warns(UserWarning, match=rf"{message}.*going on from the checkpoint before it"):
        Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


def test_accumulation_equals_one_batch(straight: Path, tokens: TokenData, tmp_path: Path):
    def final_loss(**train: object) -> float:
        experiment = small_experiment(**train)
        no_dropout = experiment.model.model_copy(update={"dropout": 0.0})
        trainer = Trainer(experiment.model_copy(update={"model": no_dropout}), tokens, tmp_path / str(len(train)))
        return trainer.run()["results"]["val_loss_after"]

    assert final_loss(steps=10) == pytest.approx(final_loss(steps=10, micro_batch_size=1), abs=2e-4)


def test_clipping_bounds_the_gradient(tokens: TokenData, tmp_path: Path):
    trainer = Trainer(small_experiment(grad_clip=1e-3), tokens, tmp_path)
    norms = []
    trainer.step.optimizer.step = lambda step, skip: norms.append(
        math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters() if p.grad is not None))
    )
    trainer._step()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_evaluation_does_not_depend_on_the_batch_size(straight: Path, tokens: TokenData, batch_size: int):
    model = checkpoint.load_weights(straight / "best.pt").model()
    expected = evaluate(model, tokens.val.ids, CPU)
    assert evaluate(model, tokens.val.ids, CPU, batch_size) == pytest.approx(expected, abs=1e-6)


def test_evaluation_is_the_mean_over_every_target(tokens: TokenData):
    model = models.build(small_experiment().model, tokens.vocab_size, 1)
    model.head.weight.data.normal_()
    ids = tokens.val.ids[:100]
    losses = []
    for first in range(0, 99, 16):
        window = torch.from_numpy(np.array(ids[first : first + 17])).long()
        logits = model.eval()(window[None, :-1])[0]
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert len(losses) == 99
    assert evaluate(model, ids, CPU) == pytest.approx(sum(losses) / 99, abs=1e-6)


def test_the_best_weights_are_kept_not_the_last(tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = iter([5.0, 3.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, world: next(losses))
    results = Trainer(small_experiment(), tokens, tmp_path).run()["results"]
    assert (results["best_val_loss"], results["best_step"], results["val_loss_after"]) == (2.0, 20, 6.0)
    assert checkpoint.load_weights(tmp_path / "best.pt").step == 20


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(tokens, tmp_path):
    trainer = Trainer(small_experiment(), tokens, tmp_path)
    forward, calls, before = trainer.step.forward, [], {}

    def poisoned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 10:
            before.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
            return forward(x, y) * float("nan")
        return forward(x, y)

    trainer.step.forward = poisoned
    with pytest.raises(PicogptError, match=r"loss is nan at step 10 .*checkpoints"):
        trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert checkpoint.load_state(tmp_path / "checkpoints/last.pt")[0]["progress"]["step"] == 7


def test_a_folder_with_a_run_of_other_settings_is_refused_and_kept(tokens: TokenData, tmp_path: Path):
    interrupted(tmp_path, tokens, 10)
    with pytest.raises(PicogptError, match="holds a run of other settings or data"):
        Trainer(small_experiment(seed=5), tokens, tmp_path).run()
    assert (tmp_path / "checkpoints/last.pt").exists()
    results = Trainer(small_experiment(seed=5, steps=12), tokens, tmp_path).run(replace=True)["results"]
    assert (results["steps"], results["sessions"]) == (12, 1)
    with pytest.raises(PicogptError, match="holds a run of other settings or data"):
        Trainer(small_experiment(), tokens, tmp_path).run()
    assert (tmp_path / "best.pt").exists()


def test_a_finished_run_is_not_repeated(straight: Path, tokens: TokenData):
    before = (straight / "record.json").read_bytes()
    record = Trainer(small_experiment(), tokens, straight).run()
    assert json.loads(before) == record
    assert (straight / "record.json").read_bytes() == before
    assert not (straight / "checkpoints").exists()


def test_a_finished_run_without_its_weights_says_so(straight: Path, tokens: TokenData, tmp_path: Path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "best.pt").unlink()
    with pytest.raises(PicogptError, match=r"run is finished, and its best\.pt is gone: .*--replace"):
        Trainer(small_experiment(), tokens, run).run()
    assert (run / "record.json").exists()


def test_the_record_says_where_its_numbers_come_from(straight: Path, tokens: TokenData):
    record = records.read(straight / "record.json")
    assert record["corpus"] == tokens.corpus()
    assert record["config"]["train"]["seed"] == 1337
    assert record["device"]["kind"] == "cpu"
    assert record["software"]["torch"] == torch.__version__
    assert record["results"]["best_val_loss"] <= record["results"]["val_loss_before"]
    record["results"] = None
    del record["commit"]
    path = straight.parent / "edited.json"
    path.write_text(json.dumps(record))
    with pytest.raises(PicogptError, match=r"not a complete result record, .*: commit=null, results=null"):
        records.read(path)


def test_the_bigram_comes_near_its_closed_form(tmp_path: Path, corpus: Path):
    data = tokenize_chars(corpus, tmp_path / "tokens")
    tree = {
        "model": {"kind": "char-bigram", "block_size": 16},
        "train": {
            "epochs": 20,
            "batch_size": 8,
            "learning_rate": 0.1,
            "eps": 1e-12,
            "eval_interval": 100,
            "eval_train": "whole",
        },
        "runtime": SMALL_RUNTIME,
    }
    results = Trainer(Experiment.model_validate(tree), data, tmp_path / "run").run()["results"]
    floor = checkpoint.load_weights(tmp_path / "run/best.pt").model().lower_bound(data.train.ids)
    assert results["closed_form_train_loss"] == floor
    assert 0 < results["train_loss_after"] - floor < 0.01


def test_without_a_working_compiler_training_goes_on_with_one_warning(tokens: TokenData, tmp_path: Path):
    tree = {
        "model": {**SMALL_MODEL, "n_layer": 1},
        "train": {"steps": 3, "batch_size": 2},
        "runtime": {**SMALL_RUNTIME, "compile": "auto"},
    }
    broken = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True})
    with broken, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = Trainer(Experiment.model_validate(tree), tokens, tmp_path).run()
    assert record["compiled"] is False
    assert sum("torch.compile does not work here" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl", "record.json"])
def test_a_crash_while_publishing_is_made_good(straight, tokens, tmp_path, monkeypatch, name: str):
    import os

    replace = os.replace

    def fail(source: str, target: str | Path) -> None:
        if Path(target) == tmp_path / name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises((OSError, PicogptError)):
            Trainer(small_experiment(), tokens, tmp_path).run()
    assert not (tmp_path / "record.json").exists()
    Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


def test_replace_starts_over_where_nothing_can_be_read(straight: Path, tokens: TokenData, tmp_path: Path):
    interrupted(tmp_path, tokens, 5)
    (tmp_path / "checkpoints/last.pt").write_bytes(b"torn")
    with pytest.raises(PicogptError, match="--replace starts over"):
        Trainer(small_experiment(), tokens, tmp_path).run()
    with pytest.warns(UserWarning, match="starting over"):
        Trainer(small_experiment(), tokens, tmp_path).run(replace=True)
    assert_same_run(straight, tmp_path)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tokens: TokenData, tmp_path: Path):
    interrupted(tmp_path, tokens, 10)
    trainer = Trainer(small_experiment(), tokens, tmp_path)
    trainer._resume(replace=False)
    trainer.model.head.weight.data[0, 0] = float("inf")
    with pytest.raises(PicogptError, match="loss is nan at step 10"):
        trainer._save()
    assert checkpoint.load_state(tmp_path / "checkpoints/last.pt")[0]["progress"]["step"] == 10


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), [("char-transformer", "muon"), ("gpt2", "adamw")])
def test_compiled_training_learns_the_same_and_saves_plain_names(
    tokens: TokenData, tmp_path: Path, kind: str, optimizer: str
):
    def train(mode: str) -> tuple[float, set[str]]:
        tree = {
            "model": {**SMALL_MODEL, "kind": kind, "n_layer": 1, "dropout": 0.0},
            "train": {"steps": 10, "batch_size": 2, "optimizer": optimizer},
            "runtime": {**SMALL_RUNTIME, "compile": mode},
        }
        record = Trainer(Experiment.model_validate(tree), tokens, tmp_path / mode).run()
        assert record["compiled"] == (mode == "on")
        return record["results"]["val_loss_after"], set(checkpoint.load_weights(tmp_path / mode / "best.pt").state)

    (eager, names), (compiled, compiled_names) = train("off"), train("on")
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert names == compiled_names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_a_gpu_trains(tokens: TokenData, tmp_path: Path):
    experiment = small_experiment()
    experiment = experiment.model_copy(
        update={"runtime": experiment.runtime.model_copy(update={"device": "cuda", "compile": "auto"})}
    )
    record = Trainer(experiment, tokens, tmp_path).run()
    assert record["device"]["kind"] == "cuda"
    assert record["results"]["best_val_loss"] < record["results"]["val_loss_before"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu_a_loss_that_is_no_number_never_reaches_the_weights(tokens: TokenData, tmp_path: Path):
    """There losses are read where a line is logged; the step itself is left out by the kernel."""
    model = {"kind": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    runtime = {**SMALL_RUNTIME, "device": "cuda", "log_interval": 100}
    tree = {"model": model, "train": {"steps": 20, "batch_size": 4, "eval_interval": 100}, "runtime": runtime}
    trainer = Trainer(Experiment.model_validate(tree), tokens, tmp_path)
    forward, calls = trainer.step.forward, []

    def poisoned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return forward(x, y) * (float("nan") if len(calls) == 3 else 1.0)

    trainer.step.forward = poisoned
    with pytest.raises(PicogptError, match="loss is nan at step 3"):
        trainer.run()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_step_that_is_to_be_skipped_changes_nothing(tokens: TokenData, tmp_path: Path):
    trainer = Trainer(small_experiment(optimizer="adamw"), tokens, tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for skip, changed in ((True, False), (False, True)):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if skip else 1.0)
        trainer.step.optimizer.step(5, skip=torch.tensor(skip))
        now = trainer.model.state_dict()
        assert any(not torch.equal(now[name], tensor) for name, tensor in before.items()) == changed
        assert all(tensor.isfinite().all() for tensor in now.values())


def gpt2_experiment(batch_size: int) -> Experiment:
    model = {"kind": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    train = {"steps": 3, "batch_size": batch_size}
    return Experiment.model_validate({"model": model, "train": train, "runtime": SMALL_RUNTIME})


def test_the_share_of_the_peak_is_the_rate_times_what_a_token_costs(tokens: TokenData, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop.hardware, "peak_flops", lambda device: 1e9)
    results = Trainer(gpt2_experiment(2), tokens, tmp_path).run()["results"]
    assert results["mfu"] == results["tokens_per_second"] * results["flops_per_token"] / 1e9


def test_too_little_memory_says_what_needs_less(tokens: TokenData, tmp_path: Path):
    trainer = Trainer(gpt2_experiment(6), tokens, tmp_path)

    def hungry(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    trainer.step.forward = hungry
    with pytest.raises(
        PicogptError, match=r"too little memory for 6 sequences at once: --set train\.micro_batch_size=3"
    ):
        trainer.run()
