import copy
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
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import forked
import numpy as np
import pytest
import rank
import torch
from conftest import SMALL_MODEL, SMALL_RUNTIME, gpt2_config, small_experiment

from picogpt import checkpoint, models, records
from picogpt.config import Experiment, RuntimeConfig
from picogpt.errors import Interrupted, PicogptError
from picogpt.hardware import Device
from picogpt.train import loop, signals
from picogpt.train.evaluate import evaluate
from picogpt.train.loop import Trainer

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
OTHER_SETTINGS = "holds a run of other settings or data"


def test_what_is_forked_has_torch_already():
    assert forked.loaded() == list(forked.LOADED)


def learned(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and metrics of a finished run, without the times."""
    times = {"train_seconds", "eval_seconds", "tokens_per_second"}
    rows = records.read_lines(folder / "metrics.jsonl")
    kept = [{key: value for key, value in row.items() if key not in times} for row in rows]
    return checkpoint.load_weights(folder / "best.pt").state, kept


def assert_same_run(one: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = learned(one), learned(other)
    assert metrics == other_metrics
    assert same_tensors(weights, other_weights)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def saved_step(folder: Path) -> int | None:
    """The step of last.pt, if there is one."""
    last = folder / "checkpoints/last.pt"
    return checkpoint.load_state(last)[0]["progress"]["step"] if last.exists() else None


def at(step: int, action: Callable[[Trainer], object]) -> Callable[[Trainer], None]:
    """A callback that calls `action` before this step."""
    return lambda trainer: action(trainer) if trainer.progress.step == step else None


def interrupted(folder: Path, tokens, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Leave a run in `folder` that a signal stopped after `step` steps."""
    trainer = Trainer(small_experiment(), tokens, folder)
    trainer.callbacks.append(at(step - 1, lambda trainer: signal.raise_signal(number)))
    with pytest.raises(Interrupted, match=f"stopped by {number.name} at step {step} of 40") as stop:
        trainer.run()
    assert stop.value.exit_status == 128 + number
    assert saved_step(folder) == step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tokens) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    Trainer(small_experiment(), tokens, folder).run()
    return folder


def test_a_run_killed_again_and_again_learns_the_same_bit_for_bit(straight, tokens_folder, tmp_path):
    # Before the first checkpoint (7), in the first save, between two, right after one, between evaluation (10) and log (12).
    deaths = {"die:0:3": None, "save:1": None, "die:0:13": 7, "save:2": 14, "die:0:21": 21, "die:0:39": 35}
    run = ["rank", tmp_path, tokens_folder, small_experiment().model_dump_json()]
    for death, saved in deaths.items():
        assert forked.run(*run, death).returncode == -signal.SIGKILL
        assert saved_step(tmp_path) == saved
        assert not (tmp_path / "record.json").exists()
    assert forked.run(*run, "none").returncode == 0
    assert_same_run(straight, tmp_path)
    assert records.read(tmp_path / "record.json")["results"]["sessions"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step(straight, tokens, tmp_path, number: signal.Signals):
    interrupted(tmp_path, tokens, 10, number)
    Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


def test_a_closed_terminal_saves_too(straight, tokens, tokens_folder, tmp_path):
    terminal, ours = pty.openpty()
    line = [sys.executable, rank.__file__, tmp_path, tokens_folder, small_experiment().model_dump_json(), "linger"]
    streams = {"stdin": ours, "stdout": ours, "stderr": ours}
    own_terminal = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    with subprocess.Popen(line, **streams, **own_terminal) as process:
        os.close(ours)
        while not (tmp_path / "ready0").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.close(terminal)  # the kernel sends SIGHUP
        assert process.wait(timeout=300) == 128 + signal.SIGHUP
    assert 5 < saved_step(tmp_path) < 40
    Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("ignored", [True, False])
def test_under_nohup_a_closed_terminal_stops_nothing(ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        received: list[int] = []
        with signals.collect_stop_signals(received):
            signal.raise_signal(signal.SIGHUP)
        assert received == ([] if ignored else [signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("launched", [True, False])
def test_a_second_signal_ends_the_process_unless_torchrun_passed_on_the_first_again(monkeypatch, launched: bool):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    # A shell that starts the tests in the background has SIGINT ignored.
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    received: list[int] = []
    try:
        with signals.collect_stop_signals(received):
            signal.raise_signal(signal.SIGINT)
            with nullcontext() if launched else pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT] * (2 if launched else 1)
        assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == (not launched)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda last: last.write_bytes(last.read_bytes()[:-1000]), r"last\.pt is incomplete, or not a checkpoint"),
        (lambda last: last.unlink(), r"cannot read the checkpoint .*last\.pt"),
    ],
)
def test_a_torn_or_lost_checkpoint_falls_back_to_the_one_before_it(straight, tokens, tmp_path, damage, message: str):
    interrupted(tmp_path, tokens, 17)
    damage(tmp_path / "checkpoints/last.pt")
    with pytest.warns(UserWarning, match=rf"{message}.*going on from the checkpoint before it"):
        Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


def test_replace_starts_over_where_nothing_can_be_read(straight, tokens, tmp_path):
    interrupted(tmp_path, tokens, 5)
    (tmp_path / "checkpoints/last.pt").write_bytes(b"torn")
    with pytest.raises(PicogptError, match="--replace starts over"):
        Trainer(small_experiment(), tokens, tmp_path).run()
    with pytest.warns(UserWarning, match="starting over"):
        Trainer(small_experiment(), tokens, tmp_path).run(replace=True)
    assert_same_run(straight, tmp_path)


def test_a_folder_with_a_run_of_other_settings_is_refused_and_kept(tokens, tmp_path):
    interrupted(tmp_path, tokens, 10)
    with pytest.raises(PicogptError, match=OTHER_SETTINGS):
        Trainer(small_experiment(seed=5), tokens, tmp_path).run()
    assert saved_step(tmp_path) == 10
    results = Trainer(small_experiment(seed=5, steps=12), tokens, tmp_path).run(replace=True)["results"]
    assert (results["steps"], results["sessions"]) == (12, 1)
    with pytest.raises(PicogptError, match=OTHER_SETTINGS):  # a finished one too
        Trainer(small_experiment(), tokens, tmp_path).run()
    assert (tmp_path / "best.pt").exists()


def test_a_finished_run_is_not_repeated_and_without_its_weights_says_so(straight, tokens, tmp_path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    before = (run / "record.json").read_bytes()
    assert Trainer(small_experiment(), tokens, run).run() == json.loads(before)
    assert not (run / "checkpoints").exists()
    (run / "best.pt").unlink()
    with pytest.raises(PicogptError, match=r"run is finished, but its best\.pt is missing: .*--replace"):
        Trainer(small_experiment(), tokens, run).run()
    assert (run / "record.json").read_bytes() == before


def test_a_crash_while_publishing_is_made_good(straight, tokens, tmp_path, monkeypatch):
    replace = os.replace
    for name in ("best.pt", "metrics.jsonl", "record.json"):

        def fail(source: str, target: str | Path, name: str = name) -> None:
            if Path(target) == tmp_path / name:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises((OSError, PicogptError)):
            Trainer(small_experiment(), tokens, tmp_path).run()
        assert not (tmp_path / "record.json").exists()
    monkeypatch.undo()
    Trainer(small_experiment(), tokens, tmp_path).run()
    assert_same_run(straight, tmp_path)


def test_the_record_says_where_its_numbers_come_from(straight, tokens, tmp_path):
    record = records.read(straight / "record.json")
    assert record["corpus"] == tokens.corpus()
    assert record["config"]["train"]["seed"] == 1337
    assert record["device"]["kind"] == "cpu"
    assert record["software"]["torch"] == torch.__version__
    assert record["results"]["best_val_loss"] <= record["results"]["val_loss_before"]
    record["results"] = None
    del record["commit"]
    (tmp_path / "edited.json").write_text(json.dumps(record))
    with pytest.raises(PicogptError, match=r"not a complete result record, .*: commit=null, results=null"):
        records.read(tmp_path / "edited.json")


def test_accumulation_equals_one_batch(tokens, tmp_path):
    def final_loss(**train: object) -> float:
        settings = {"steps": 10, "batch_size": 4, **train}
        experiment = Experiment(model=gpt2_config(), train=settings, runtime=SMALL_RUNTIME)
        return Trainer(experiment, tokens, tmp_path / str(len(train))).run()["results"]["val_loss_after"]

    assert final_loss() == pytest.approx(final_loss(micro_batch_size=1), abs=2e-4)


def test_clipping_bounds_the_gradient(tokens, tmp_path):
    trainer, norms = Trainer(small_experiment(grad_clip=1e-3), tokens, tmp_path), []
    gradients = (p.grad for p in trainer.model.parameters() if p.grad is not None)
    trainer.step.optimizer.step = lambda step: norms.append(math.hypot(*(g.norm().item() for g in gradients)))
    idx = torch.randint(tokens.vocab_size, (4, 16))
    trainer.step(idx, idx, 0)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("batch_size", [None, 1, 3, 64])
def test_evaluation_is_the_mean_over_every_target_whatever_the_batch_size(tokens, batch_size: int | None):
    model = models.build(small_experiment().model, tokens.vocab_size, 1).eval()
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ids, losses = tokens.val.ids[:100], []
    for first in range(0, 99, 16):
        window = torch.from_numpy(np.array(ids[first : first + 17])).long()
        logits = model(window[None, :-1])[0]
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert len(losses) == 99
    loss = evaluate(model, ids, Device("test", "cpu", "float32"), batch_size)
    assert loss == pytest.approx(sum(losses) / 99, abs=1e-6)


def test_the_best_weights_are_kept_not_the_last(tokens, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, world: next(losses))
    results = Trainer(small_experiment(), tokens, tmp_path).run()["results"]
    assert (results["best_val_loss"], results["best_step"], results["val_loss_after"]) == (2.0, 20, 6.0)
    assert checkpoint.load_weights(tmp_path / "best.pt").step == 20


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(tokens, tmp_path, device: str):
    """On a GPU losses are read where a line is logged or a checkpoint saved; until then the weights in memory are spoiled."""
    train, runtime = {"steps": 20, "batch_size": 4}, {**SMALL_RUNTIME, "device": device, "log_interval": 100}
    trainer = Trainer(Experiment(model=gpt2_config(), train=train, runtime=runtime), tokens, tmp_path)
    before = {}

    def spoil(trainer: Trainer) -> None:
        before.update(copy.deepcopy(trainer.model.state_dict()))
        forward = trainer.step.forward
        trainer.step.forward = lambda x, y: forward(x, y) * float("nan")

    trainer.callbacks.append(at(11, spoil))
    with pytest.raises(PicogptError, match=r"loss is nan at step 12 .*checkpoints"):
        trainer.run()
    assert same_tensors(trainer.model.state_dict(), before) == (device == "cpu")
    assert saved_step(tmp_path) == 7


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tokens, tmp_path):
    def spoil(trainer: Trainer) -> None:  # a pair of characters that the text lacks: the loss stays finite
        trainer.model.wte_pairs.weight.data[0, 0] = float("inf")

    trainer = Trainer(small_experiment(), tokens, tmp_path)
    trainer.callbacks.append(at(12, spoil))
    with pytest.raises(PicogptError, match="loss is nan at step 14"):
        trainer.run()
    assert saved_step(tmp_path) == 7


def test_the_bigram_comes_near_its_closed_form(tokens, tmp_path):
    train = {"epochs": 20, "batch_size": 8, "learning_rate": 0.1, "eps": 1e-12, "eval_train": "whole"}
    experiment = Experiment(model={"kind": "char-bigram", "block_size": 16}, train=train, runtime=SMALL_RUNTIME)
    results = Trainer(experiment, tokens, tmp_path).run()["results"]
    floor = checkpoint.load_weights(tmp_path / "best.pt").model().lower_bound(tokens.train.ids)
    assert results["closed_form_train_loss"] == floor
    assert 0 < results["train_loss_after"] - floor < 0.01


def test_without_a_working_compiler_training_goes_on_with_one_warning(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "TOKENS_TO_COMPILE", 3 * 2 * 16)
    runtime = {**SMALL_RUNTIME, "compile": "auto"}
    experiment = Experiment(model=gpt2_config(), train={"steps": 3, "batch_size": 2}, runtime=runtime)
    broken = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True})
    with broken, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = Trainer(experiment, tokens, tmp_path).run()
    assert record["compiled"] is False
    assert sum("torch.compile does not work here" in str(warning.message) for warning in caught) == 1


def test_a_training_shorter_than_its_compilation_is_not_compiled(tokens, tmp_path):
    experiment = small_experiment().model_copy(update={"runtime": RuntimeConfig(device="cpu", compile="auto")})
    assert not Trainer(experiment, tokens, tmp_path).step.compiled
    long = experiment.model_copy(
        update={"train": experiment.train.model_copy(update={"steps": loop.TOKENS_TO_COMPILE})}
    )
    assert Trainer(long, tokens, tmp_path).step.compiled


def test_the_best_weights_are_written_with_the_checkpoint_that_follows(tokens, tmp_path, monkeypatch):
    """At most once a checkpoint interval, as writing half a gigabyte would stop a GPU for a second each time."""
    losses, written = iter([5.0, 4.0, 3.0, 6.0, 6.0, 6.0]), []
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, world: next(losses))
    monkeypatch.setattr(loop.Trainer, "_save", recording(loop.Trainer._save, tmp_path / "checkpoints/best.pt", written))
    trainer = Trainer(small_experiment(eval_interval=3, steps=14), tokens, tmp_path)
    kept = {}
    trainer.callbacks.append(at(6, lambda trainer: kept.update(copy.deepcopy(trainer.model.state_dict()))))
    trainer.run()
    assert written == [(7, None, 6), (14, 6, 6)]  # (step, best.pt before, best.pt after)
    assert same_tensors(checkpoint.load_weights(tmp_path / "best.pt").state, kept)


def recording(save, best: Path, written: list):
    """`save`, which notes the step, and that of `best` before and after."""

    def step() -> int | None:
        return checkpoint.load_weights(best).step if best.exists() else None

    def noting(trainer: Trainer) -> None:
        before = step()
        save(trainer)
        written.append((trainer.progress.step, before, step()))

    return noting


@pytest.mark.parametrize(("kind", "optimizer"), [("char-transformer", "muon"), ("gpt2", "adamw")])
def test_compiled_training_learns_the_same_and_saves_plain_names(tokens, tmp_path, kind: str, optimizer: str):
    def train(mode: str) -> tuple[float, set[str]]:
        model = {**SMALL_MODEL, "kind": kind, "n_layer": 1, "dropout": 0.0}
        settings = {"steps": 10, "batch_size": 2, "optimizer": optimizer}
        experiment = Experiment(model=model, train=settings, runtime={**SMALL_RUNTIME, "compile": mode})
        record = Trainer(experiment, tokens, tmp_path / mode).run()
        assert record["compiled"] == (mode == "on")
        return record["results"]["val_loss_after"], set(checkpoint.load_weights(tmp_path / mode / "best.pt").state)

    (eager, names), (compiled, compiled_names) = train("off"), train("on")
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert names == compiled_names


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_a_gpu_trains(tokens, tmp_path, device: str):
    train = {"steps": 40, "optimizer": "muon"}
    experiment = Experiment(model=SMALL_MODEL, train=train, runtime={"device": device, "compile": "auto"})
    record = Trainer(experiment, tokens, tmp_path).run()
    assert record["device"]["kind"] == "cuda"
    assert record["results"]["best_val_loss"] < record["results"]["val_loss_before"]


def test_the_share_of_the_peak_is_the_rate_times_what_a_token_costs(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.hardware, "peak_flops", lambda device: 1e9)
    experiment = Experiment(model=gpt2_config(), train={"steps": 3, "batch_size": 2}, runtime=SMALL_RUNTIME)
    results = Trainer(experiment, tokens, tmp_path).run()["results"]
    assert results["mfu"] == results["tokens_per_second"] * results["flops_per_token"] / 1e9


def test_too_little_memory_says_what_needs_less(tokens, tmp_path):
    trainer = Trainer(small_experiment(batch_size=6), tokens, tmp_path)

    def hungry(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    trainer.step.forward = hungry
    advice = r"too little memory for 6 sequences at once: --set train\.micro_batch_size=3"
    with pytest.raises(PicogptError, match=advice):
        trainer.run()
