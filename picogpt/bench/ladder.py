"""The training ladder: the speed-up of each optimization on a machine; each rung is a process and includes those before it.

A step is the trainer's own, with AdamW and without clipping, on the same batches from the same weights. Steps are timed one
by one. The first rung is what a textbook writes down; the losses of all show that they train the same model.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from picogpt import hardware, machines, models, records
from picogpt.config import GPT2Config, MachineConfig, TrainConfig
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError, is_compile_error, is_out_of_memory
from picogpt.progress import counting
from picogpt.registry import RUNGS
from picogpt.train.distributed import World
from picogpt.train.step import BASELINE, GRAPH_MODES, Step, Switches

TRAIN = TrainConfig(seed=1337, steps=1, learning_rate=1e-4, betas=(0.9, 0.95), schedule="constant")
FUSED = ("flash", "fmha", "cudnn_sdp", "cudnn_generated", "efficient_attention", "blockedattention")
"""Parts of the names of fused attention kernels."""
UNITS = {
    "step_seconds": "s, each timed step",
    "tokens_per_second": "of all ranks, by the median step",
    "mfu": "tokens_per_second * flops_per_token / (peak_flops of a device * ranks)",
    "first_step_seconds": "s; compilation happens here, on several ranks with a step of each alone before it",
    "losses": "nats per token, of each step, including the untimed ones",
    "peak_memory_bytes": "of one rank: resident on a CPU, allocated on a GPU",
    "kernels": "s of one step under the profiler",
}


def switches_of(machine: MachineConfig, rung: str, device: hardware.Device) -> Switches:
    """The changes of all rungs up to `rung`, without those that the device lacks."""
    switches = BASELINE
    for name in machine.rungs[: machine.rungs.index(rung) + 1]:
        if not RUNGS[name].why_unsupported(device):
            switches = replace(switches, **RUNGS[name].changes)
    return switches


def measure(
    name: str, machine: MachineConfig, rung: str, config: GPT2Config, data: TokenData, world: World
) -> dict[str, Any]:
    """The record of one rung; if memory does not suffice, with the largest micro-batch that fits.

    Raises UsageError on another device or with another number of ranks than the machine has, PicogptError when a loss
    is not finite.
    """
    device = hardware.select(world.device("cpu" if machine.kind == "cpu" else "auto"))
    machines.require(name, machine, device, world.size)
    hardware.prepare(device, world.threads())
    switches = switches_of(machine, rung, device)
    config = config.model_copy(update={"block_size": machine.block_size})
    dtype, decay = "bfloat16" if switches.bfloat16 else "float32", 0.1 if switches.fused_optimizer else 0.0
    train = TRAIN.model_copy(update={"batch_size": machine.batch_size, "dtype": dtype, "weight_decay": decay})
    record = {
        **records.provenance(device),
        **records.Key("ladder", "gpt2", name, rung)._asdict(),
        "corpus": data.corpus(),
        "config": {
            "hardware": machine.model_dump(mode="json"),
            "rung": rung,
            "model": config.model_dump(),
            "train": train.model_dump(mode="json"),
        },
        "units": UNITS,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        "results": {},
    }
    if missing := RUNGS[rung].why_unsupported(device):
        return {**record, "not_measured": missing}
    return record | _largest_that_fits(_Ladder(machine, rung, config, train, data, device, world), switches)


def _largest_that_fits(ladder: _Ladder, switches: Switches) -> dict[str, Any]:
    """What a record says of a rung: the results with the largest micro-batch that fits, or why it was `not_measured`."""
    machine, ranks, micro_batch = ladder.machine, ladder.world.size, ladder.machine.micro_batch_size
    while True:
        if switches.compile in GRAPH_MODES and micro_batch * ranks < machine.batch_size:
            reason = f"gradients summed over micro-batches of {micro_batch} would lie in memory that a graph uses again"
            return {"not_measured": reason}
        try:
            results = ladder.climb(switches, micro_batch)
            smaller = micro_batch < machine.micro_batch_size
            results |= {"micro_batch_size": micro_batch, "out_of_memory": smaller}
            return {"setup": asdict(switches), "results": results}
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            if switches.compile and is_compile_error(error):
                if "compile" in RUNGS[ladder.rung].changes:
                    return {"not_measured": f"torch.compile does not work here: {reason}"}
                switches = replace(switches, compile=None)
            elif not is_out_of_memory(error):
                raise
            elif micro_batch == 1:
                return {"not_measured": f"out of memory with one sequence: {reason}"}
            else:
                share = machine.batch_size // ranks
                micro_batch = max(size for size in range(1, micro_batch) if share % size == 0)
        gc.collect()
        if ladder.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class _Ladder:
    """What stays the same in every attempt at a rung."""

    machine: MachineConfig
    rung: str
    config: GPT2Config
    train: TrainConfig
    data: TokenData
    device: hardware.Device
    world: World

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.data.train.ids, self.machine.block_size, self.machine.batch_size, self.train.seed)

    def climb(self, switches: Switches, micro_batch: int) -> dict[str, Any]:
        """Train for the configured steps; returns the results of a record."""
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = models.build(self.config, self.data.vocab_size, self.train.seed)
        step = Step(model, self.train, 1, self.device, self.world, micro_batch, switches)
        alone_seconds = self._require_memory(step)
        step.distribute()
        seconds, losses = [], []
        total = self.machine.warmup_steps + self.machine.steps
        with counting(self.rung, total) as advance:
            for number in range(total):
                took, loss = self._timed(step, number)
                if not math.isfinite(loss):
                    raise PicogptError(f"the loss of rung {self.rung} is {loss} at step {number + 1}: nothing is kept")
                seconds.append(took)
                losses.append(loss)
                advance(1)
        peak_memory = hardware.peak_memory_bytes(self.device)
        kernels = _kernels(lambda: self._timed(step, total), self.device)
        timed = seconds[self.machine.warmup_steps :]
        median, first = statistics.median(timed), alone_seconds + seconds[0]
        rate = self.machine.batch_size * self.machine.block_size / median
        flops = model.flops_per_token()
        return {
            "step_seconds": timed,
            "median": median,
            "fastest": min(timed),
            "slowest": max(timed),
            "tokens_per_second": rate,
            "flops_per_token": flops,
            "parameters": model.parameter_count(),
            "mfu": hardware.mfu(self.device, rate / self.world.size, flops),
            "first_step_seconds": first,
            "compile_seconds": max(0.0, first - median * (2 if alone_seconds else 1)) if switches.compile else None,
            "losses": losses,
            "final_loss": losses[-1],
            "peak_memory_bytes": peak_memory,
            "kernels": dict(list(kernels.items())[:12]),
            "attention": next((name for name in kernels if any(part in name.lower() for part in FUSED)), None),
        }

    def _timed(self, step: Step, number: int) -> tuple[float, float]:
        """(seconds, loss) of a step; the batch is on the device before the clock starts."""
        arrays = self.sampler.batch(number, self.world.rank, self.world.size)
        self.data.train.check(arrays[0])
        inputs, targets = (torch.from_numpy(array).to(self.device.torch_name) for array in arrays)
        hardware.synchronize(self.device)
        began = time.perf_counter()
        loss = step(inputs, targets, 0)
        hardware.synchronize(self.device)
        return time.perf_counter() - began, loss.item()

    def _require_memory(self, step: Step) -> float:
        """On several ranks, raise on all if a micro-batch does not fit on one, for which the others would wait in a step.

        Returns the seconds it took; 0 on one rank, where nothing is done.
        """
        if self.world.size == 1:
            return 0.0
        began, failed = time.perf_counter(), None
        try:
            shape = step.micro_batch_size, self.machine.block_size
            tokens = torch.zeros(shape, dtype=torch.int64, device=self.device.torch_name)
            step.forward_backward(tokens, tokens)
            step.model.zero_grad(set_to_none=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = error
        if self.world.all_reduce_max(float(failed is not None)):
            raise failed or MemoryError("not enough memory on another rank")
        hardware.synchronize(self.device)
        return time.perf_counter() - began


def _kernels(step: Callable[[], object], device: hardware.Device) -> dict[str, float]:
    """The kernels (operators on a CPU) of one more step by time, longest first: name and seconds."""
    on_gpu, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profile:
        step()
    events = [event for event in profile.key_averages() if not event.is_user_annotation]
    if on_gpu:  # operators have the time of their kernels too, which would count twice
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: dict[str, float] = defaultdict(float)
    for event in events:  # names of templates go on for pages; those that begin alike are one entry
        spent[event.key[:120]] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return {name: seconds for name, seconds in sorted(spent.items(), key=lambda item: -item[1]) if seconds > 0}
