"""The training loop, the same for every model, on one device or on many.

Under torchrun every rank computes its share of each batch, and all ranks make the same step. Rank 0 writes files.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from picogpt import hardware, models, records
from picogpt.config import CharBigramConfig, Experiment, ModelConfig
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import TokenData
from picogpt.errors import Interrupted, PicogptError, UsageError, is_compile_error, is_out_of_memory
from picogpt.models.bigram import closed_form_loss
from picogpt.progress import Training
from picogpt.train import checkpoint
from picogpt.train.distributed import World
from picogpt.train.evaluate import autocast, evaluate
from picogpt.train.folder import RunFolder
from picogpt.train.optim import Optimizer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 16, "mps": 1 << 14}
"""Tokens of a forward pass by device type, without a configured micro-batch; more of them are no faster."""
CALLBACKS: list[Callable[[Trainer], None]] = []
BYTES_PER_ACTIVATION = 40
"""Activation memory per token, layer and channel: 17 values in bfloat16, with a margin."""


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
        # Read at the start: the source may be edited while it runs.
        self.provenance = records.provenance(self.device)
        # TF32 for the remaining float32 matrix products, on GPUs that have it.
        torch.set_float32_matmul_precision("high")

        block_size = experiment.model.block_size
        self.sampler = Sampler(data.train.ids, block_size, self.config.batch_size, self.config.seed)
        self.total_steps = self.config.steps or self.sampler.steps(self.config.epochs or 1)
        self.tokens_per_step = self.config.batch_size * block_size
        most = max(1, tokens_at_once(self.device, experiment.model) // block_size)
        self.micro_batch_size = micro_batch_size(
            self.config.batch_size, self.world.size, self.config.micro_batch_size, most
        )
        # Reading a loss synchronizes with a GPU, so there losses are read only when a line is logged.
        self.reads_each_loss = self.device.kind != "cuda" or self.config.optimizer == "muon"

        models.source(
            experiment, data.vocab_size
        )  # checks the shape; OpenAI's weights are loaded in _resume, if there is no checkpoint
        model = models.build(experiment.model, data.vocab_size, self.config.seed)
        self.model = model.to(self.device.torch_name)
        self.optimizer = Optimizer(self.model, self.config, self.total_steps)
        # The raw module is evaluated, sampled and saved; the compiled and distributed ones share its weights.
        self.forward: Callable[..., torch.Tensor] = self.model
        if self.runtime.compile != "off":
            self.forward = models.compiled(self.model)
        self.compiled = self.forward is not self.model
        self.progress = Progress()
        self.stop_signals: list[int] = []
        self._losses: list[torch.Tensor] = []  # of the steps since the last read, on the device

    def run(self, replace: bool = False) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if there is one; return the record.

        With `replace`, a run with other settings in the folder is deleted instead of refused.
        """
        with ExitStack() as held, _stop_on_signals() as self.stop_signals:
            self.world.broadcast_from_main(lambda: self._enter(held))
            finished = self.world.broadcast_from_main(lambda: self.folder.finished(replace))
            if finished:
                return finished
            self._resume(replace)
            if self.world.size > 1:
                self.forward = self._distributed(self.forward)
                # Delete the wrapper before the process group: its destructor joins a gloo thread while holding the GIL,
                # and that thread may be waiting for the GIL.
                held.callback(setattr, self, "forward", self.model)
            bar = Training(self.experiment.model.kind, self.total_steps, self.progress.step, shown=self.world.is_main)
            with bar, hardware.attention(self.device):
                self._loop(bar, self.stop_signals, self._writer(held))
            record = self._record()
            self.world.broadcast_from_main(lambda: self.folder.publish(record))
            return record

    def _enter(self, held: ExitStack) -> None:
        held.enter_context(self.folder.held())

    def _writer(self, held: ExitStack) -> Callable[..., None]:
        """A function that appends a line to the metrics file on rank 0, and does nothing elsewhere."""
        if not self.world.is_main:
            return lambda **values: None
        metrics = held.enter_context(open(self.folder.metrics, "a", encoding="utf-8"))
        return lambda **values: print(json.dumps(self._row(values)), file=metrics, flush=True)

    def _distributed(self, module: Any) -> Callable[..., torch.Tensor]:
        """`module` with gradients averaged over the ranks (all-reduce) at the end of each step."""
        ids = [self.world.local_rank] if self.device.kind == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def _loop(self, bar: Training, stop: list[int], log: Callable[..., None]) -> None:
        p, runtime = self.progress, self.runtime
        self._mark = time.perf_counter()
        if p.step == 0:
            p.before = self._evaluate(also_train=True)
            log(**p.before)
            bar.say(f"before training: {_listed(p.before)}")
            if self.config.init == "pretrained":  # training may not improve on it
                self._keep_best(p.before["val_loss"])
        first, val_loss = p.step, p.after.get("val_loss")
        while p.step < self.total_steps:
            began = p.train_seconds
            for callback in CALLBACKS:
                callback(self)
            self._losses.append(self._step(p.step))
            p.step += 1
            ended = p.step == self.total_steps
            if p.step == first + 1:  # compilation happens here
                self._charge("train_seconds")
                p.first_step_seconds += p.train_seconds - began
            if p.step % runtime.log_interval == 0 or ended:
                self._read_losses()
                self._charge("train_seconds")
                mean = p.interval_loss / p.interval_steps
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
                    self._keep_best(val_loss)
            stopped_by = int(self.world.all_reduce_max(stop[0] if stop else 0))
            if p.step % runtime.checkpoint_interval == 0 or ended or stopped_by:
                self._charge("train_seconds")
                self._save()
                self._charge("save_seconds")
            if stopped_by and not ended:
                raise Interrupted(
                    stopped_by,
                    f"stopped by {signal.Signals(stopped_by).name} at step {p.step} of {self.total_steps}; everything is"
                    f" saved in {self.folder.work}",
                )

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; returns the mean loss of its batch over all ranks, on the device."""
        # Dropout is a function of the step and the rank alone, so there is no random state to save.
        torch.manual_seed((self.config.seed << 32) + (self.world.rank << 40) + step)
        self.model.train()
        batch = self.sampler.batch(step, self.world.rank, self.world.size)
        for array in batch:
            self.data.train.check(array)
        inputs, targets = (self._to_device(array) for array in batch)
        micro_batches = len(inputs) // self.micro_batch_size
        loss = torch.zeros((), device=self.device.torch_name)
        parts = zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        for index, (x, y) in enumerate(parts):
            loss += self._forward_backward(x, y, micro_batches, last=index == micro_batches - 1)
        loss = self.world.mean(loss)
        if self.config.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            loss = torch.where(
                torch.isfinite(norm), loss, math.nan
            )  # a non-finite gradient counts as a non-finite loss
        finite = torch.isfinite(loss)
        if self.reads_each_loss and not finite.item():
            raise self._not_finite(loss.item(), step + 1)
        # Where the loss is read later, fused AdamW skips a non-finite step through found_inf, without synchronization.
        self.optimizer.step(step, skip=None if self.reads_each_loss else ~finite)
        return loss

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.kind == "cuda":  # a copy from pinned memory is asynchronous
            return tensor.pin_memory().to(self.device.torch_name, non_blocking=True)
        return tensor.to(self.device.torch_name)

    def _forward_backward(self, x: torch.Tensor, y: torch.Tensor, micro_batches: int, last: bool) -> torch.Tensor:
        """Accumulate the gradient of one micro-batch; return its share of the mean loss."""
        try:
            # The all-reduce of gradients happens once per step; no_sync must be set before the forward pass.
            alone = isinstance(self.forward, DistributedDataParallel) and not last
            with self.forward.no_sync() if alone else nullcontext():  # type: ignore[attr-defined]
                with autocast(self.device):
                    loss = self.forward(x, y) / micro_batches
                loss.backward()
        except Exception as error:
            if is_out_of_memory(error):
                much, advice = self.micro_batch_size, "a shorter model.block_size or a smaller model needs less"
                if much > 1:
                    less = micro_batch_size(self.config.batch_size, self.world.size, None, much // 2)
                    advice = f"--set train.micro_batch_size={less} trains the same with less"
                raise PicogptError(
                    f"{self.device.name} has too little memory for {much} sequences at once: {advice}"
                ) from error
            # Compilation happens at the first call, and fails without a working C++ compiler.
            if not self.compiled or self.runtime.compile == "on" or not is_compile_error(error):
                raise
            warnings.warn(f"torch.compile does not work here, going on without it: {_first_line(error)}", stacklevel=2)
            self.compiled = False
            self.forward = self.model if self.world.size == 1 else self._distributed(self.model)
            return self._forward_backward(x, y, micro_batches, last)
        return loss.detach()

    def _evaluate(self, also_train: bool) -> dict[str, float]:
        """Exact losses of the current weights; raises PicogptError when one is not finite."""
        self._charge("train_seconds")
        losses = {"val_loss": evaluate(self.model, self.data.val.ids, self.device, world=self.world)}
        if also_train and self.config.eval_train != "none":
            count = len(self.data.val.ids) if self.config.eval_train == "part" else None
            losses["train_loss_exact"] = evaluate(
                self.model, self.data.train.ids[:count], self.device, world=self.world
            )
        self._charge("eval_seconds")
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
        kept = (
            f"the last good checkpoint is {self.folder.last}"
            if self.folder.last.exists()
            else "nothing was saved before"
        )
        return PicogptError(
            f"the loss is {loss} at step {step} (or its gradient); {kept}."
            " A lower learning rate, a longer warm-up or train.grad_clip=1 usually helps."
        )

    def _charge(self, account: str) -> None:
        """Add the time since the last call to this field of `progress`."""
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
        self._read_losses()
        # A step with a finite loss can still produce non-finite weights, which must not replace good ones.
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise self._not_finite(math.nan, self.progress.step)
        self.world.broadcast_from_main(
            lambda: self.folder.save(
                {
                    "progress": vars(self.progress),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
            )
        )

    def _keep_best(self, val_loss: float) -> None:
        self.progress.best_val_loss, self.progress.best_step = val_loss, self.progress.step
        self.world.broadcast_from_main(self._save_best)
        self._charge("save_seconds")

    def _save_best(self) -> None:
        checkpoint.save_weights(
            self.folder.best,
            self.model,
            self.experiment,
            self.data.vocab_size,
            self.data.corpus(),
            self.progress.best_step,
            self.progress.best_val_loss,
        )

    def _resume(self, replace: bool) -> None:
        """Load the last checkpoint, if there is one, on every rank."""
        state = self.world.broadcast_tree_from_main(lambda: self.folder.load(replace))
        if state:
            checkpoint.load_tensors(self.model, state["model"], self.folder.last)
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        elif self.config.init == "pretrained":
            model = self.world.main_first(lambda: models.initial(self.experiment, self.data.vocab_size))
            self.model.load_state_dict(model.state_dict())
        self.progress.sessions += 1
        self.world.broadcast_from_main(lambda: self.folder.cut_metrics(self.progress.step))

    def _record(self) -> dict[str, Any]:
        """The record of the finished run: its numbers and their provenance."""
        p, model, train = self.progress, self.experiment.model, self.data.train
        steps, seconds = p.step - p.sessions, p.train_seconds - p.first_step_seconds
        if steps < 1:  # every step was the first of a session
            steps, seconds = p.step, p.train_seconds
        rate = steps * self.tokens_per_step / seconds
        flops = self.model.flops_per_token()
        peak = hardware.peak_flops(self.device)
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
            "tokens_per_second": rate,
            "flops_per_token": flops,
            "mfu": rate * flops / (peak * self.world.size) if peak and flops else None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
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
        return {
            **self.provenance,
            "kind": f"train {model.kind}" + (f" {self.machine}" if self.machine else ""),
            "fingerprint": self.folder.fingerprint,
            "corpus": self.data.corpus(),
            "config": self.experiment.model_dump(mode="json"),
            "units": {
                "loss": "nats per token, mean over the whole split",
                "seconds": "s",
                "tokens_per_second": "of training alone, all ranks together, without the first step of a session",
                "mfu": "tokens_per_second * flops_per_token / (peak_flops of a device * ranks)",
                "peak_memory_bytes": "of one rank: resident on a CPU, allocated on a GPU",
            },
            "threads": torch.get_num_threads(),
            "ranks": self.world.size,
            "micro_batch_size": self.micro_batch_size,
            "compiled": self.compiled,
            "results": results,
        }


def tokens_at_once(device: hardware.Device, model: ModelConfig) -> int:
    """Tokens of a forward pass without a configured micro-batch: on a GPU, as many as fit into half of its memory."""
    most = TOKENS_AT_ONCE[device.kind]
    memory = hardware.gpu_memory_bytes(device)
    if memory is None or isinstance(model, CharBigramConfig):
        return most
    return min(most, memory // 2 // (BYTES_PER_ACTIVATION * model.n_layer * model.n_embd))


def micro_batch_size(batch_size: int, ranks: int, wanted: int | None, most: int) -> int:
    """Sequences of one forward pass on one rank: `wanted`, or the largest divisor of the rank's share up to `most`.

    Raises UsageError, saying what would divide, when the batch does not divide over the ranks, or the share of a rank
    into micro-batches.
    """
    if batch_size % ranks:
        more = batch_size + ranks - batch_size % ranks
        near = f"{more - ranks} or {more}" if more > ranks else f"{more}"
        raise UsageError(
            f"train.batch_size={batch_size} does not divide over {ranks} ranks: with {ranks} ranks, {near} would;"
            f" with {batch_size} sequences, --nproc_per_node of {_listed_divisors(batch_size)} would"
        )
    share = batch_size // ranks
    if wanted is None:
        return max(divisor for divisor in _divisors(share) if divisor <= most)
    if share % wanted:
        raise UsageError(
            f"train.micro_batch_size={wanted} does not divide the {share} sequences of each of {ranks} ranks"
            f" (train.batch_size={batch_size}); these do: {_listed_divisors(share)}"
        )
    return wanted


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed_divisors(number: int) -> str:
    return ", ".join(map(str, _divisors(number)))


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collect the stop signals that arrive; a second one of the same kind has its usual effect at once.

    Not under torchrun: it forwards signals that SLURM or a terminal has already sent to all processes. The second one would
    end a rank before the others have saved, and torchrun then ends the rest.
    """
    received: list[int] = []
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    previous = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}

    def remember(number: int, frame: object) -> None:
        received.append(number)
        if not launched:
            signal.signal(number, previous[number])

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, remember)
    try:
        yield received
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.6f}" for name, value in losses.items())
