"""What a training needs, from a few of its steps: time, memory, disk. Leaves no file behind."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from picogpt import hardware
from picogpt.progress import counting
from picogpt.train.evaluate import TOKENS_PER_PASS, evaluate
from picogpt.train.loop import Trainer

STEPS = 6
Row = tuple[str, str, str]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Delete in the end what torch keeps on disk when it compiles. To be entered before a model is made."""
    names = "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    with (
        tempfile.TemporaryDirectory(prefix="picogpt-", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, dict.fromkeys(names, folder)),
        patch.object(tempfile, "tempdir", folder),  # it has read TMPDIR before
    ):
        yield


class DryRun(Trainer):
    """A training of which only `STEPS` steps are made, to measure what all of it needs."""

    def measure(self, replace: bool = False) -> list[Row]:
        """Rows of (quantity, value, remark); the time is that of the steps that are left. Raises like `run`.

        The weights are those of the checkpoint to resume from, or random: OpenAI's are neither loaded nor asked for.
        """
        folder, broadcast = self.folder, self.world.broadcast_from_main
        broadcast(folder.require_free)
        if record := broadcast(lambda: folder.record(replace)):
            return [("run", "finished", f"{folder.path}: nothing is left to train")]
        state, _ = broadcast(lambda: folder.state(replace))
        run = ("run", "new" if record is state is None else "replaced", str(folder.path))
        if state:
            self._restore(state)
            run = ("run", "resumed", f"{folder.path}: goes on from step {self.progress.step:,}")
        done, seconds = self.progress.step, []
        with ExitStack() as held:
            held.callback(setattr, self.step, "forward", self.model)  # see Trainer.run
            advance = held.enter_context(counting("measuring", STEPS))
            self.step.distribute()
            for number in range(STEPS):
                self.progress.step = (done + number) % self.total_steps  # there may be fewer
                seconds.append(self._seconds(self._step))
                advance(1)
            ids = self.data.val.ids[: max(self.sampler.block_size, TOKENS_PER_PASS) * self.world.size + 1]
            passes = [self._seconds(lambda: evaluate(self.model, ids, self.device, world=self.world)) for _ in range(2)]
        self.progress.step = done
        return [run, *self._settings(), *self._time(seconds, min(passes) / len(ids)), *self._space()]

    def _seconds(self, action: Callable[[], object]) -> float:
        hardware.synchronize(self.device)
        began = time.perf_counter()
        action()
        hardware.synchronize(self.device)
        return time.perf_counter() - began

    def _settings(self) -> list[Row]:
        batch, ranks, micro_batch = self.config.batch_size, self.world.size, self.step.micro_batch_size
        how = f"{'' if self.step.compiled else 'not '}compiled, {torch.get_num_threads()} CPU threads a rank"
        parts = f"{ranks} (ranks) x {batch // ranks // micro_batch} (accumulation) x {micro_batch} (micro-batch)"
        text = f"{self.data.train.header.corpus}, {len(self.data.train.ids):,} tokens"
        return [
            ("device", self.device.type, f"{self.device.name}: {self.device.dtype}, {how}"),
            ("parameters", f"{self.model.parameter_count():,}", self.experiment.model.kind),
            ("batch", f"{batch:,} sequences", parts),
            ("step", f"{self.tokens_per_step:,} tokens", f"in sequences of {self.sampler.block_size:,}"),
            ("training", f"{self.total_steps * self.tokens_per_step:,} tokens", f"in {self.total_steps:,} steps"),
            ("epochs", f"{self.sampler.epoch(self.total_steps):.2f}", f"of {text}"),
        ]

    def _time(self, seconds: list[float], seconds_per_token: float) -> list[Row]:
        """What follows from the seconds of each step made, and of the evaluation of a token."""
        done, every, val = self.progress.step, self.config.eval_interval, len(self.data.val.ids)
        step, before, left = statistics.median(seconds[1:]), int(done == 0), self.total_steps - done
        evaluations = before + -(-self.total_steps // every) - done // every
        train = {"none": 0, "part": val, "whole": len(self.data.train.ids)}[self.config.eval_train]
        training = seconds[0] + (left - 1) * step if left else 0.0
        evaluating = seconds_per_token * (evaluations * val + (before + 1) * train)
        rate, flops = self.tokens_per_step / step, self.model.flops_per_token() or 0
        share = hardware.mfu(self.device, rate / self.world.size, flops)
        speed = f"{rate * flops / 1e12:.3g} TFLOP/s" + (f", {share:.1%} of the device's peak" if share else "")
        cost = [("cost of a token", f"{flops / 1e6:,.1f} MFLOP", speed)] if flops else []
        first = f"the first{', which compiles,' if self.step.compiled else ''} takes {seconds[0]:.3g} s"
        steps = f"{step:.3g} s a step, the median of {STEPS - 1}; {first}"
        parts = f"{left:,} steps {_clock(training)}, {evaluations:,} evaluations {_clock(evaluating)}; without saving"
        return [("speed", f"{rate:,.0f} tokens/s", steps), *cost, ("time", _clock(training + evaluating), parts)]

    def _space(self) -> list[Row]:
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        optimizer = sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(self.step.optimizer.state_dict()))
        peak = int(self.world.all_reduce_max(hardware.peak_memory_bytes(self.device)))
        memory = (hardware.gpu_memory_bytes(self.device) or hardware.memory_bytes()) / 2**30
        there = next(path for path in (self.folder.path, *self.folder.path.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        rest = "activations" if self.device.type == "cuda" else "activations and the program"
        return [
            ("memory", _size(peak), f"the peak of a rank, measured; {memory:,.1f} GiB are there"),
            ("  weights", _size(weights), "and as much for gradients"),
            ("  optimizer", _size(optimizer), ""),
            ("  the rest", _size(peak - 2 * weights - optimizer), rest),
            # While a file is written, the one that it replaces is still there.
            ("disk", _size(4 * weights + 2 * optimizer), f"at most; {free:,.1f} GiB are free"),
            ("  last.pt", _size(weights + optimizer), "and the one before it, until the end"),
            ("  best.pt", _size(weights), ""),
        ]


def _size(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
