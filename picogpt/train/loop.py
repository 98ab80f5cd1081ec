"""The training loop, the same for every model.

A run lives in one folder:

    checkpoints/    last.pt, last.previous.pt, best.pt, metrics.jsonl: written while it runs, removed at its end
    best.pt         the weights with the lowest validation loss
    metrics.jsonl   losses by step
    record.json     the numbers, and where they come from; written last, so it says that the run is finished
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picogpt import hardware, models, records
from picogpt.config import Experiment
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import TokenData
from picogpt.errors import Interrupted, PicogptError
from picogpt.files import locked, place, write_text
from picogpt.models.bigram import closed_form_loss
from picogpt.progress import Training
from picogpt.train import checkpoint
from picogpt.train.evaluate import autocast, evaluate
from picogpt.train.optim import Optimizer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Progress:
    """How far a run is: all of its state beside weights and optimizer. Data order and dropout follow from `step`."""

    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    """Losses of the initial weights."""
    after: dict[str, float] = field(default_factory=dict)
    """Losses of the latest evaluation."""
    interval_loss: float | torch.Tensor = 0.0
    """Sum of the losses since the last line of the metrics."""
    interval_steps: int = 0
    interval_seconds: float = 0.0
    train_seconds: float = 0.0
    first_step_seconds: float = 0.0
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    sessions: int = 0
    """How often the run was started or resumed; starts that were killed before a checkpoint leave no trace."""


class Trainer:
    """One run: model, optimizer, data and progress.

    Raises PicogptError when the folder holds a run of other settings, the loss is not finite, or a file cannot
    be written; Interrupted when a signal stopped it, with everything saved.
    """

    def __init__(self, experiment: Experiment, data: TokenData, folder: str | Path):
        self.experiment, self.data, self.folder = experiment, data, Path(folder)
        self.config, self.runtime = experiment.train, experiment.runtime
        self.work = self.folder / "checkpoints"
        self.last, self.metrics = self.work / "last.pt", self.work / "metrics.jsonl"
        self.fingerprint = experiment.fingerprint(data.vocab_size, data.train.header.data_sha256)

        self.device = hardware.select(self.runtime.device, self.config.dtype)
        torch.set_num_threads(self.runtime.threads or hardware.cpu_count())
        # TF32 for the float32 matrix products that remain, on GPUs that have it.
        torch.set_float32_matmul_precision("high")

        self.sampler = Sampler(data.train.ids, experiment.model.block_size, self.config.batch_size, self.config.seed)
        self.total_steps = self.config.steps or self.sampler.steps(self.config.epochs or 1)
        self.micro_batch_size = self.config.micro_batch_size or self.config.batch_size
        self.tokens_per_step = self.config.batch_size * experiment.model.block_size

        self.model = models.build(experiment.model, data.vocab_size, self.config.seed).to(self.device.torch_name)
        self.optimizer = Optimizer(self.model, self.config, self.total_steps)
        # The raw module is the one that is evaluated, sampled and saved; a compiled one shares its weights.
        self.forward: Callable[..., torch.Tensor] = self.model
        if self.runtime.compile != "off":
            self.forward = torch.compile(self.model)
        self.progress = Progress()

    def run(self, replace: bool = False) -> dict[str, Any]:
        """Train to the end, from the last checkpoint where there is one; return the record.

        With `replace`, a run of other settings in the folder is deleted instead of refused.
        """
        with locked(self.folder, "training"), _stop_on_signals() as stop:
            finished = self._finished(replace)
            if finished:
                return finished
            bar = Training(self.experiment.model.kind, self.total_steps, self._resume(replace))
            with bar, open(self.metrics, "a", encoding="utf-8") as metrics:
                self._loop(bar, stop, lambda **values: print(json.dumps(self._row(values)), file=metrics, flush=True))
            return self._publish()

    def _loop(self, bar: Training, stop: list[int], log: Callable[..., None]) -> None:
        p, runtime = self.progress, self.runtime
        self._mark = time.perf_counter()
        if p.step == 0:
            p.before = self._evaluate(also_train=True)
            log(**p.before)
            bar.say(f"before training: {_listed(p.before)}")
        first, val_loss = p.step, p.after.get("val_loss")
        while p.step < self.total_steps:
            began = p.train_seconds
            loss = self._step(p.step)
            p.step += 1
            p.interval_loss = p.interval_loss + loss
            p.interval_steps += 1
            ended = p.step == self.total_steps
            if p.step == first + 1:  # compilation happens here
                self._charge("train_seconds")
                p.first_step_seconds += p.train_seconds - began
            if p.step % runtime.log_interval == 0 or ended:
                self._charge("train_seconds")
                mean = float(p.interval_loss) / p.interval_steps
                self._require_finite(mean, p.step)
                rate = p.interval_steps * self.tokens_per_step / p.interval_seconds
                log(train_loss=mean, tokens_per_second=round(rate, 1))
                bar.update(p.step, mean, rate, val_loss)
                p.interval_loss, p.interval_steps, p.interval_seconds = 0.0, 0, 0.0
            if p.step % self.config.eval_interval == 0 or ended:
                p.after = self._evaluate(also_train=ended)
                val_loss = p.after["val_loss"]
                log(**p.after)
                bar.say(f"step {p.step}: {_listed(p.after)}")
                if val_loss < p.best_val_loss:
                    p.best_val_loss, p.best_step = val_loss, p.step
                    self._save_best()
                    self._charge("save_seconds")
            if p.step % runtime.checkpoint_interval == 0 or ended or stop:
                self._charge("train_seconds")
                self._save()
                self._charge("save_seconds")
            if stop and not ended:
                raise Interrupted(
                    stop[0],
                    f"stopped by {signal.Signals(stop[0]).name} at step {p.step} of {self.total_steps}; everything is saved:"
                    f" the same command with --run {self.folder.name} goes on from there",
                )

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; the mean loss of its batch, left on the device."""
        # Dropout too is a function of the step alone, so that there is no random state to save.
        torch.manual_seed((self.config.seed << 32) + step)
        self.model.train()
        inputs, targets = (torch.from_numpy(array) for array in self.sampler.batch(step))
        micro_batches = len(inputs) // self.micro_batch_size
        loss = torch.zeros((), device=self.device.torch_name)
        for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            loss += self._forward_backward(x.to(self.device.torch_name), y.to(self.device.torch_name), micro_batches)
        if self.device.kind == "cpu":  # on a GPU reading the loss would wait for it; there each log line is checked
            self._require_finite(loss.item(), step + 1)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step(step)
        return loss

    def _forward_backward(self, x: torch.Tensor, y: torch.Tensor, micro_batches: int) -> torch.Tensor:
        """Add the gradient of one micro-batch; return its share of the mean loss."""
        try:
            with autocast(self.device):
                loss = self.forward(x, y) / micro_batches
            loss.backward()
        except Exception as error:
            # Compilation happens at the first call, and fails where there is no working C++ compiler.
            if self.forward is self.model or self.runtime.compile == "on" or not _is_compile_error(error):
                raise
            warnings.warn(f"torch.compile does not work here, going on without it: {_first_line(error)}", stacklevel=2)
            self.forward = self.model
            return self._forward_backward(x, y, micro_batches)
        return loss.detach()

    def _evaluate(self, also_train: bool) -> dict[str, float]:
        """Exact losses of the weights as they are; raises PicogptError when one is not finite."""
        self._charge("train_seconds")
        losses = {"val_loss": evaluate(self.model, self.data.val.ids, self.device)}
        if also_train and self.config.eval_train != "none":
            count = len(self.data.val.ids) if self.config.eval_train == "part" else None
            losses["train_loss_exact"] = evaluate(self.model, self.data.train.ids[:count], self.device)
        self._charge("eval_seconds")
        self._require_finite(losses["val_loss"], self.progress.step)
        return losses

    def _require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise PicogptError(
                f"the loss is {loss} at step {step}; the weights of the last good checkpoint are in {self.work}."
                " A lower learning rate, a longer warm-up or train.grad_clip=1 usually helps."
            )

    def _charge(self, account: str) -> None:
        """Add the time since the last call to an account of `progress`."""
        if self.device.kind == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        setattr(self.progress, account, getattr(self.progress, account) + now - self._mark)
        if account == "train_seconds":
            self.progress.interval_seconds += now - self._mark
        self._mark = now

    def _row(self, values: dict[str, float]) -> dict[str, Any]:
        """A line of the metrics file."""
        p = self.progress
        return {
            "step": p.step,
            "epoch": round(self.sampler.epoch(p.step), 4),
            **values,
            "train_seconds": round(p.train_seconds, 3),
            "eval_seconds": round(p.eval_seconds, 3),
        }

    def _save(self) -> None:
        # On a GPU the loss is not read at every step; what is not finite must not replace a good checkpoint.
        self._require_finite(float(self.progress.interval_loss), self.progress.step)
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            self._require_finite(math.nan, self.progress.step)
        with open(self.metrics, "rb") as metrics:
            os.fsync(metrics.fileno())  # the lines up to this step must outlive a power cut if the checkpoint does
        state = {
            "fingerprint": self.fingerprint,
            "progress": {**vars(self.progress), "interval_loss": float(self.progress.interval_loss)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        checkpoint.save_state(self.last, state)

    def _save_best(self) -> None:
        checkpoint.save_weights(
            self.work / "best.pt",
            self.model,
            self.experiment,
            self.data.vocab_size,
            self.data.corpus(),
            self.progress.best_step,
            self.progress.best_val_loss,
        )

    def _finished(self, replace: bool) -> dict[str, Any] | None:
        """The record of a run that is finished already; with `replace`, one of other settings is deleted."""
        path = self.folder / "record.json"
        if not path.exists():
            return None
        try:
            record = records.read(path)
            if record.get("fingerprint") == self.fingerprint and (self.folder / "best.pt").exists():
                return record
        except PicogptError as error:
            if not replace:
                raise
            warnings.warn(f"{error}; it is replaced", stacklevel=2)
        self._refuse_unless(replace)
        for name in ("record.json", "best.pt", "metrics.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        return None

    def _resume(self, replace: bool) -> int:
        """Load the last checkpoint, if there is one; return the step to go on from."""
        self.work.mkdir(exist_ok=True)
        if self.last.exists():
            state = self._load_state(replace)
            if state and state["fingerprint"] == self.fingerprint:
                checkpoint.load_tensors(self.model, state["model"], self.last)
                self.optimizer.load_state_dict(state["optimizer"])
                self.progress = Progress(**state["progress"])
            else:
                self._refuse_unless(replace)
                shutil.rmtree(self.work)
                self.work.mkdir()
        self.progress.sessions += 1
        # Lines after the checkpoint will be written again; the last one may be torn.
        kept = _lines_until(self.metrics, self.progress.step) if self.progress.sessions > 1 else []
        write_text(self.metrics, "".join(line + "\n" for line in kept))
        return self.progress.step

    def _load_state(self, replace: bool) -> dict[str, Any] | None:
        """The last good state; with `replace`, None where none can be read."""
        try:
            state, warning = checkpoint.load_state(self.last)
        except PicogptError as error:
            if not replace:
                raise PicogptError(f"{error}; --replace starts over") from error
            state, warning = None, f"{error}; starting over"
        if warning:
            warnings.warn(warning, stacklevel=3)
        return state

    def _refuse_unless(self, replace: bool) -> None:
        if not replace:
            raise PicogptError(
                f"{self.folder} holds a run of other settings or data: choose another --run, or --replace it"
            )

    def _publish(self) -> dict[str, Any]:
        """Give the results their final names, the record last, and remove the working files."""
        p, model, train = self.progress, self.experiment.model, self.data.train
        results = {
            "val_loss_before": p.before["val_loss"],
            "train_loss_before": p.before.get("train_loss_exact"),
            "val_loss_after": p.after["val_loss"],
            "train_loss_after": p.after.get("train_loss_exact"),
            "best_val_loss": p.best_val_loss,
            "best_step": p.best_step,
            "best_epoch": round(self.sampler.epoch(p.best_step), 4),
            "steps": p.step,
            "epochs": round(self.sampler.epoch(p.step), 4),
            "windows_per_epoch": self.sampler.windows,
            "tokens": p.step * self.tokens_per_step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train_seconds": p.train_seconds,
            "first_step_seconds": p.first_step_seconds,
            "eval_seconds": p.eval_seconds,
            "save_seconds": p.save_seconds,
            "sessions": p.sessions,
        }
        if model.kind == "char-bigram":
            results["closed_form_train_loss"] = closed_form_loss(
                torch.from_numpy(np.array(train.ids)), self.data.vocab_size
            )
        record = {
            **records.provenance(self.device),
            "kind": f"train {model.kind}",
            "fingerprint": self.fingerprint,
            "corpus": self.data.corpus(),
            "config": self.experiment.model_dump(mode="json"),
            "units": {"loss": "nats a token, mean over the whole split", "seconds": "s"},
            "threads": torch.get_num_threads(),
            "compiled": self.forward is not self.model,
            "results": results,
        }
        for name in ("best.pt", "metrics.jsonl"):
            place(self.work / name, self.folder / name)  # both names, until the record is written
        records.write(self.folder / "record.json", record)
        shutil.rmtree(self.work)
        return record


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collect signals that ask for a stop; a second one of the same kind has its usual effect at once."""
    received: list[int] = []

    previous = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, remember)
    try:
        yield received
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def _lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    return kept


def _is_compile_error(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.6f}" for name, value in losses.items())
