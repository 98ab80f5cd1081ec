"""The training loop, the same for every model, on one device or on many.

Under torchrun every rank computes its share of each batch, and all ranks make the same step. Rank 0 writes files.
"""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picogpt import checkpoint, hardware, models, records
from picogpt.config import Experiment
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import TokenData
from picogpt.errors import Interrupted, PicogptError, is_compile_error, is_out_of_memory
from picogpt.progress import Training
from picogpt.train.distributed import World
from picogpt.train.evaluate import evaluate
from picogpt.train.folder import RunFolder
from picogpt.train.signals import collect_stop_signals
from picogpt.train.step import Step, Switches, micro_batch_size, tokens_at_once
from picogpt.train.tracker import Row, require, tracking

TOKENS_TO_COMPILE = 10_000_000
"""Of a whole training; of one of 0.6 million tokens of GPT-2 on an H100, 17.7 of 19.5 s were compilation."""
CALLBACKS: list[Callable[[Trainer], None]] = []
"""Functions that every trainer calls before each step; `trainer.callbacks` holds those of one trainer."""


@dataclass
class Progress:
    """The state of a run besides weights and optimizer. Data order and dropout follow from `step`."""

    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    """Losses of the initial weights."""
    after: dict[str, float] = field(default_factory=dict)
    """Losses of the latest evaluation."""
    interval_loss: float = 0.0
    """Sum of the losses of the `interval_steps` steps since the last line of the metrics."""
    interval_steps: int = 0
    interval_seconds: float = 0.0
    train_seconds: float = 0.0
    first_step_seconds: float = 0.0
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    sessions: int = 0
    """How often the run was started or resumed; a start that was killed before its first checkpoint does not count."""


class Trainer:
    """One run: model, optimizer, data and progress.

    Raises UsageError when the batch does not divide, PicogptError when the folder holds a run of other settings, the
    loss is not finite, or a file cannot be written; Interrupted when a signal stopped it, with everything saved.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: TokenData,
        folder: str | Path,
        world: World | None = None,
        machine: str | None = None,
    ):
        self.experiment, self.data, self.world = experiment, data, world or World()
        self.machine = machine  # its name in config/hardware/, for the record
        self.config, self.runtime = experiment.train, experiment.runtime
        self.folder = RunFolder(folder, experiment.fingerprint(data.vocab_size, data.train.header.data_sha256))
        self.device = hardware.select(self.world.device(self.runtime.device), self.config.dtype)
        hardware.prepare(self.device, self.runtime.threads or self.world.threads())
        self.provenance = records.provenance(self.device)  # now: the source may be edited while it runs
        self.progress = Progress()
        self.stop_signals: list[int] = []
        self.callbacks = list(CALLBACKS)
        self._losses: list[torch.Tensor] = []  # of the steps since the last read, on the device
        self._best: dict[str, torch.Tensor] = {}  # the best weights, if they are not in the folder yet

        block_size = experiment.model.block_size
        self.sampler = Sampler(data.train.ids, block_size, self.config.batch_size, self.config.seed)
        self.total_steps = self.config.steps or self.sampler.steps(self.config.epochs or 1)
        self.tokens_per_step = self.config.batch_size * block_size
        most = max(1, tokens_at_once(self.device, experiment.model) // block_size)
        micro_batch = micro_batch_size(self.config.batch_size, self.world.size, self.config.micro_batch_size, most)
        if self.config.init == "pretrained":  # its weights are loaded in _resume, if there is no checkpoint
            from picogpt.models import pretrained

            pretrained.name_for(experiment.model, data.vocab_size)
        model = models.build(experiment.model, data.vocab_size, self.config.seed)
        long = self.total_steps * self.tokens_per_step >= TOKENS_TO_COMPILE
        compiled = self.runtime.compile == "on" or (self.runtime.compile == "auto" and long)
        switches = Switches(compile="default" if compiled else None, residual=self.config.residual_dtype)
        self.step = Step(model, self.config, self.total_steps, self.device, self.world, micro_batch, switches)
        self.model = self.step.model

    def run(self, replace: bool = False) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if there is one; return the record.

        With `replace`, a run with other settings in the folder is deleted instead of refused.
        """
        with ExitStack() as held, collect_stop_signals(self.stop_signals):
            self.world.broadcast_from_main(lambda: held.enter_context(self.folder.held()))
            if replace:  # before anything is deleted
                self.world.broadcast_from_main(lambda: require(self.runtime.tracker))
            if finished := self.world.broadcast_from_main(lambda: self.folder.finished(replace)):
                return finished
            cut = self._resume(replace)
            # Delete the distributed wrapper before the process group: its destructor joins a gloo thread while holding
            # the GIL, and that thread may be waiting for the GIL.
            held.callback(setattr, self.step, "forward", self.model)
            self.step.distribute()
            log = self._writer(held, cut)
            bar = Training(self.experiment.model.kind, self.total_steps, self.progress.step, shown=self.world.is_main)
            with bar:
                self._loop(bar, log)
            record = self._record()
            self.world.broadcast_from_main(lambda: self.folder.publish(record))
            return record

    def _writer(self, held: ExitStack, cut: list[Row] | None) -> Callable[..., None]:
        """A function that appends a line to the metrics file on rank 0, for the tracker too, and does nothing elsewhere."""
        trackers: list[Callable[[Row], None]] = []
        if (kind := self.runtime.tracker) != "none":
            made = tracking(kind, self.folder.path, self.experiment.model_dump(mode="json"), cut)
            self.world.broadcast_from_main(lambda: trackers.append(held.enter_context(made)))
        if not self.world.is_main:
            return lambda **values: None
        metrics = held.enter_context(open(self.folder.metrics, "a", encoding="utf-8"))

        def write(**values: float) -> None:
            p = self.progress
            row = {"step": p.step, "epoch": round(self.sampler.epoch(p.step), 4), **values}
            row |= {"train_seconds": round(p.train_seconds, 3), "eval_seconds": round(p.eval_seconds, 3)}
            print(json.dumps(row), file=metrics, flush=True)
            for track in trackers:
                track(row)

        return write

    def _loop(self, bar: Training, log: Callable[..., None]) -> None:
        p, runtime = self.progress, self.runtime
        self._mark = time.perf_counter()
        if p.step == 0:
            p.before = self._evaluate(also_train=True)
            log(**p.before)
            bar.say(f"before training: {_listed(p.before)}")
            if self.config.init == "pretrained":  # training may not improve on it
                self._keep_best(p.before["val_loss"], saves_now=False)
        first = p.step
        while p.step < self.total_steps:
            for callback in self.callbacks:
                callback(self)
            began = p.train_seconds
            self._losses.append(self._step())
            p.step += 1
            ended = p.step == self.total_steps
            if p.step == first + 1:  # compilation happens here
                self._add_time_to("train_seconds")
                p.first_step_seconds += p.train_seconds - began
            if p.step % runtime.log_interval == 0 or ended:
                self._log_interval(bar, log)
            saves_now = p.step % runtime.checkpoint_interval == 0 or ended
            if p.step % self.config.eval_interval == 0 or ended:
                p.after = self._evaluate(also_train=ended)
                log(**p.after)
                bar.say(f"step {p.step}: {_listed(p.after)}")
                if p.after["val_loss"] < p.best_val_loss:
                    self._keep_best(p.after["val_loss"], saves_now)
            # Every rank learns of a signal that any rank got, so that all stop after the same step.
            stop_signal = int(self.world.all_reduce_max(self.stop_signals[0] if self.stop_signals else 0))
            if saves_now or stop_signal:
                self._add_time_to("train_seconds")
                self._save()
                self._add_time_to("save_seconds")
            if stop_signal and not ended:
                name = signal.Signals(stop_signal).name
                message = f"stopped by {name} at step {p.step} of {self.total_steps}; everything is saved in"
                raise Interrupted(stop_signal, f"{message} {self.folder.work}")

    def _step(self) -> torch.Tensor:
        """Make the next step; returns the mean loss of its batch over all ranks, on the device."""
        p, world = self.progress, self.world
        # Dropout is a function of the step and the rank alone, so there is no random state to save.
        torch.manual_seed((self.config.seed << 32) + (world.rank << 40) + p.step)
        batch = self.sampler.batch(p.step, world.rank, world.size)
        for array in batch:
            self.data.train.check(array)
        inputs, targets = (self._to_device(array) for array in batch)
        try:
            loss = self.step(inputs, targets, p.step)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory() from error
            # Compilation happens at the first call, and fails without a working C++ compiler.
            if not self.step.compiled or self.runtime.compile == "on" or not is_compile_error(error):
                raise
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile does not work here, going on without it: {reason}", stacklevel=2)
            self.step.stop_compiling()
            return self._step()
        if self.step.reads_each_loss and not math.isfinite(loss.item()):
            raise self._not_finite(loss.item(), p.step + 1)
        return loss

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # a copy from pinned memory is asynchronous
            return tensor.pin_memory().to(self.device.torch_name, non_blocking=True)
        return tensor.to(self.device.torch_name)

    def _out_of_memory(self) -> PicogptError:
        most, advice = self.step.micro_batch_size, "a shorter model.block_size or a smaller model needs less"
        if most > 1:
            less = micro_batch_size(self.config.batch_size, self.world.size, None, most // 2)
            advice = f"--set train.micro_batch_size={less} trains the same with less"
        return PicogptError(f"{self.device.name} has too little memory for {most} sequences at once: {advice}")

    def _log_interval(self, bar: Training, log: Callable[..., None]) -> None:
        """Log the mean loss and the throughput since the last line of the metrics."""
        p = self.progress
        self._read_losses()
        self._add_time_to("train_seconds")
        mean = p.interval_loss / p.interval_steps
        rate = p.interval_steps * self.tokens_per_step / p.interval_seconds
        log(train_loss=mean, tokens_per_second=round(rate, 1))
        bar.update(p.step, mean, rate, p.after.get("val_loss"))
        p.interval_loss, p.interval_steps, p.interval_seconds = 0.0, 0, 0.0

    def _evaluate(self, also_train: bool) -> dict[str, float]:
        """Exact losses of the current weights; raises PicogptError when one is not finite."""
        self._read_losses()
        self._add_time_to("train_seconds")
        losses = {"val_loss": evaluate(self.model, self.data.val.ids, self.device, world=self.world)}
        if also_train and self.config.eval_train != "none":
            count = len(self.data.val.ids) if self.config.eval_train == "part" else None
            ids = self.data.train.ids[:count]
            losses["train_loss_exact"] = evaluate(self.model, ids, self.device, world=self.world)
        self._add_time_to("eval_seconds")
        if not math.isfinite(losses["val_loss"]):
            raise self._not_finite(losses["val_loss"], self.progress.step)
        return losses

    def _read_losses(self) -> None:
        """Read the losses from the device; raises PicogptError naming the first step whose loss is not finite."""
        p = self.progress
        losses = torch.stack(self._losses).tolist() if self._losses else []
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._not_finite(loss, p.step - len(losses) + index + 1)
        p.interval_loss += sum(losses)
        p.interval_steps += len(losses)
        self._losses.clear()

    def _not_finite(self, loss: float, step: int) -> PicogptError:
        last = self.folder.last
        kept = f"the last good checkpoint is {last}" if last.exists() else "nothing was saved before"
        return PicogptError(
            f"the loss is {loss} at step {step} (or its gradient); {kept}."
            " A lower learning rate, a longer warm-up or train.grad_clip=1 usually helps."
        )

    def _add_time_to(self, field: str) -> None:
        """Add the time since the last call to this field of `progress`."""
        hardware.synchronize(self.device)
        now = time.perf_counter()
        setattr(self.progress, field, getattr(self.progress, field) + now - self._mark)
        if field == "train_seconds":
            self.progress.interval_seconds += now - self._mark
        self._mark = now

    def _save(self) -> None:
        """Write the checkpoint, and before it the best weights if they are better than those in the folder."""
        self._read_losses()
        self._require_finite_weights()
        p, data, optimizer = self.progress, self.data, self.step.optimizer

        def write() -> None:
            if self._best:
                values = (self.experiment, data.vocab_size, data.corpus(), p.best_step, p.best_val_loss)
                checkpoint.save_weights(self.folder.best, self._best, *values)
                self._best = {}
            self.folder.save(
                {"progress": vars(p), "model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
            )

        self.world.broadcast_from_main(write)

    def _require_finite_weights(self) -> None:
        """A step with a finite loss can still produce non-finite weights, which must not replace good ones."""
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise self._not_finite(math.nan, self.progress.step)

    def _keep_best(self, val_loss: float, saves_now: bool) -> None:
        """Keep these weights until the next checkpoint, which writes them; a copy, unless it is written at this step."""
        self._require_finite_weights()  # the validation text need not use every weight
        p = self.progress
        p.best_val_loss, p.best_step = val_loss, p.step
        if self.world.is_main:
            state = self.model.state_dict()
            self._best = state if saves_now else {name: tensor.clone() for name, tensor in state.items()}
        self._add_time_to("save_seconds")

    def _resume(self, replace: bool) -> list[Row] | None:
        """Load the last checkpoint, if there is one, on every rank; the lines of the metrics after it, or None for a new run."""
        state = self.world.broadcast_from_main(lambda: self.folder.load(replace))
        if state:
            self._restore(state)
        elif self.config.init == "pretrained":
            # The other ranks get the weights from rank 0 when the distributed wrapper is made.
            self.world.broadcast_from_main(self._load_pretrained)
        self.progress.sessions += 1
        cut = self.world.broadcast_from_main(lambda: self.folder.cut_metrics(self.progress.step))
        return cut if state else None

    def _restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint. Raises PicogptError when it does not fit."""
        checkpoint.check_tensors(self.model, state["model"], self.folder.last)
        self.model.load_state_dict(state["model"])
        try:
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        except (TypeError, ValueError, KeyError) as error:
            raise PicogptError(f"{self.folder.last} is damaged, or of another version: {error}") from error

    def _load_pretrained(self) -> None:
        initial = models.initial(self.experiment, self.data.vocab_size)
        self.model.load_state_dict(initial.state_dict())

    def _record(self) -> dict[str, Any]:
        """The record of the finished run: its numbers and their provenance."""
        p, model, train = self.progress, self.experiment.model, self.data.train
        steps, seconds = p.step - p.sessions, p.train_seconds - p.first_step_seconds
        if steps < 1:  # every step was the first of a session
            steps, seconds = p.step, p.train_seconds
        rate = steps * self.tokens_per_step / seconds
        flops = self.model.flops_per_token()
        results = {
            "val_loss_before": p.before["val_loss"],
            "train_loss_before": p.before.get("train_loss_exact"),
            "val_loss_after": p.after["val_loss"],
            "train_loss_after": p.after.get("train_loss_exact"),
            "best_val_loss": p.best_val_loss,
            "val_bits_per_byte": records.bits_per_byte(p.best_val_loss, self.data.corpus()),
            "best_step": p.best_step,
            "best_epoch": round(self.sampler.epoch(p.best_step), 4),
            "steps": p.step,
            "epochs": round(self.sampler.epoch(p.step), 4),
            "windows_per_epoch": self.sampler.windows,
            "tokens": p.step * self.tokens_per_step,
            "tokens_per_second": rate,
            "flops_per_token": flops,
            "mfu": hardware.mfu(self.device, rate / self.world.size, flops),
            "parameters": self.model.parameter_count(),
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
            "train_seconds": p.train_seconds,
            "first_step_seconds": p.first_step_seconds,
            "eval_seconds": p.eval_seconds,
            "save_seconds": p.save_seconds,
            "sessions": p.sessions,
        }
        if (bound := self.model.lower_bound(train.ids)) is not None:
            results["closed_form_train_loss"] = bound
        return {
            **self.provenance,
            **records.Key("train", model.kind, self.machine)._asdict(),
            "fingerprint": self.folder.fingerprint,
            "corpus": self.data.corpus(),
            "config": self.experiment.model_dump(mode="json"),
            "units": {
                "loss": "nats per token, mean over the whole split",
                "val_bits_per_byte": records.BITS_PER_BYTE,
                "seconds": "s",
                "tokens_per_second": "of training alone, all ranks together, without the first step of a session",
                "mfu": "tokens_per_second * flops_per_token / (peak_flops of a device * ranks)",
                "peak_memory_bytes": "of one rank: resident on a CPU, allocated on a GPU",
            },
            "threads": torch.get_num_threads(),
            "ranks": self.world.size,
            "micro_batch_size": self.step.micro_batch_size,
            "compiled": self.step.compiled,
            "results": results,
        }


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.6f}" for name, value in losses.items())
