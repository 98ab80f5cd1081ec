"""The training ladder: the speed-up of each optimization on a machine; each rung is a process and includes those before it.

A step is forward, backward and AdamW on the same batches from the same weights, without clipping. Steps are timed one
by one. The first rung is what a textbook writes down; the losses of all show that they train the same model.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from picogpt import hardware, machines, models, records
from picogpt.config import GPT2Config, MachineConfig, TrainConfig
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError, is_compile_error, is_out_of_memory
from picogpt.models.attention import causal_attention
from picogpt.models.gpt2 import GPT2, Attention
from picogpt.models.loss import COLUMNS, linear_cross_entropy
from picogpt.progress import counting
from picogpt.train.distributed import World
from picogpt.train.optim import Optimizer

TRAIN = TrainConfig(seed=1337, steps=1, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1, schedule="constant")
GRAPH_MODES = ("reduce-overhead", "max-autotune")
LISTED_KERNELS = 12
FUSED = ("flash", "fmha", "cudnn_sdp", "cudnn_generated", "efficient_attention", "blockedattention")
"""Parts of the names of fused attention kernels."""


def attention_written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v with all its intermediate results in memory: q, k, v (B, H, T, D) -> (B, H, T, D)."""
    T, D = q.shape[-2:]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """The same by torch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of x (N, C) weight' (V, C)' against targets (N,), all logits at once."""
    return F.cross_entropy(F.linear(x, weight), targets)


def padded_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same with the table padded to a multiple of 64 rows, which are excluded from the softmax."""
    V = weight.size(0)
    logits = F.linear(x, F.pad(weight, (0, 0, 0, -V % COLUMNS)))
    beyond = torch.arange(logits.size(1), device=x.device) >= V
    return F.cross_entropy(logits.masked_fill(beyond, -torch.inf), targets)


@dataclass(frozen=True)
class Setup:
    """The configuration of a training step."""

    tf32: bool = False
    bfloat16: bool = False
    compile: str | None = None
    attention: Callable[..., torch.Tensor] = attention_written_out
    loss: Callable[..., torch.Tensor] = plain_loss
    fused_optimizer: bool = False
    best_backend: bool = False
    kept_memory: bool = False


CHANGES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "tf32": {"tf32": True},
    "bf16": {"bfloat16": True},
    "compile": {"compile": "default"},
    "flash": {"attention": flash_attention},
    "padded_vocab": {"loss": padded_loss},
    "fused_adamw": {"fused_optimizer": True},
    "fused_loss": {"loss": linear_cross_entropy},
    "best_attention": {"best_backend": True, "attention": causal_attention},
    "kept_memory": {"kept_memory": True},
    "cuda_graphs": {"compile": "reduce-overhead"},
    "max_autotune": {"compile": "max-autotune"},
}
"""What each rung changes."""


GRAPHS = ("cuda_graphs", "max_autotune")


def lacks(rung: str, device: hardware.Device) -> str | None:
    """Why `device` cannot run `rung`, or None if it can."""
    on_gpu = device.kind == "cuda"
    if rung == "bf16" and device.dtype != "bfloat16":
        return f"{device.name} has no instructions for bfloat16"
    if rung == "tf32" and not (on_gpu and device.dtype == "bfloat16"):  # both came with Ampere
        return f"{device.name} has no TF32"
    if rung in GRAPHS and not on_gpu:
        return f"{device.name} is no GPU"
    if rung == "kept_memory" and on_gpu:
        return "torch keeps the memory of a GPU by itself"
    return None


def setup_of(machine: MachineConfig, rung: str, device: hardware.Device) -> Setup:
    """The changes of all rungs up to `rung`, without those that the device lacks."""
    setup = Setup()
    for name in machine.rungs[: machine.rungs.index(rung) + 1]:
        if not lacks(name, device):
            setup = replace(setup, **CHANGES[name])
    return setup


class Rung:
    """A model, its optimizer, and a training step configured by `setup`."""

    def __init__(
        self,
        config: GPT2Config,
        vocab_size: int,
        machine: MachineConfig,
        setup: Setup,
        device: hardware.Device,
        world: World,
        micro_batch_size: int,
    ):
        self.setup, self.device, self.micro_batch_size = setup, device, micro_batch_size
        torch.set_float32_matmul_precision("high" if setup.tf32 else "highest")
        if setup.kept_memory:
            hardware.keep_memory(device)
        model = models.build(config, vocab_size, TRAIN.seed).to(device.torch_name)
        assert isinstance(model, GPT2)
        model.loss = setup.loss
        attention = setup.attention
        if setup.compile and attention is causal_attention and device.kind == "cpu" and setup.bfloat16:
            # Blocked attention stays outside of the graph: inside it torch's own kernel is used, as in float32.
            attention = torch.compiler.disable(causal_attention)
            # Otherwise the index of each layer makes it a variant of its own, and torch compiles at most eight variants.
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
        for module in model.modules():
            if isinstance(module, Attention):
                module.attention = attention
        if setup.fused_optimizer:
            self.optimizer: Any = Optimizer(model, TRAIN, total_steps=1)
        else:
            self.optimizer = torch.optim.AdamW(
                model.parameters(), lr=TRAIN.learning_rate, betas=TRAIN.betas, eps=TRAIN.eps, weight_decay=0
            )
        self.flops_per_token = model.flops_per_token()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.forward: Any = models.compiled(model, setup.compile) if setup.compile else model
        if world.size > 1:
            ids = [world.local_rank] if device.kind == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=ids, gradient_as_bucket_view=True)

    def try_one(self, tokens: torch.Tensor) -> None:
        """Forward and backward pass of tokens (B, T) on this rank only; the gradients are discarded."""
        autocast = torch.autocast(self.device.kind, torch.bfloat16, enabled=self.setup.bfloat16)
        module = self.forward.module if isinstance(self.forward, DistributedDataParallel) else self.forward
        with autocast, hardware.attention(self.device) if self.setup.best_backend else nullcontext():
            module(tokens, tokens).backward()
        module.zero_grad(set_to_none=True)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One optimizer step on inputs and targets (B, T) of this rank; returns its mean loss, on the device."""
        parts = list(zip(inputs.split(self.micro_batch_size), targets.split(self.micro_batch_size), strict=True))
        total = torch.zeros((), device=inputs.device)
        for index, (x, y) in enumerate(parts):
            alone = isinstance(self.forward, DistributedDataParallel) and index < len(parts) - 1
            if self.device.kind == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # graphs may use the memory of the step before
            with self.forward.no_sync() if alone else nullcontext():
                autocast = torch.autocast(self.device.kind, torch.bfloat16, enabled=self.setup.bfloat16)
                with autocast, hardware.attention(self.device) if self.setup.best_backend else nullcontext():
                    loss = self.forward(x, y) / len(parts)
                loss.backward()
            total += loss.detach()
        if self.setup.fused_optimizer:
            self.optimizer.step(0)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


def measure(
    name: str, machine: MachineConfig, rung: str, config: GPT2Config, data: TokenData, world: World
) -> dict[str, Any]:
    """The record of one rung; if memory does not suffice, with the largest micro-batch that fits.

    Raises UsageError on another device or with another number of ranks than the machine has, PicogptError when a loss
    is not finite.
    """
    device = hardware.select(world.device("cpu" if machine.kind == "cpu" else "auto"))
    machines.require(name, machine, device, world.size)
    torch.set_num_threads(world.threads())
    if device.kind == "cuda":
        torch.cuda.set_device(device.torch_name)
    setup = setup_of(machine, rung, device)
    config = config.model_copy(update={"block_size": machine.block_size})
    train = TRAIN.model_copy(
        update={
            "batch_size": machine.batch_size,
            "dtype": "bfloat16" if setup.bfloat16 else "float32",
            "weight_decay": TRAIN.weight_decay if setup.fused_optimizer else 0.0,
        }
    )
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
        "units": {
            "step_seconds": "s, each timed step",
            "tokens_per_second": "of all ranks, by the median step",
            "mfu": "tokens_per_second * flops_per_token / (peak_flops of a device * ranks)",
            "first_step_seconds": "s; compilation happens here, on several ranks with a step of each alone before it",
            "losses": "nats per token, of each step, including the untimed ones",
            "peak_memory_bytes": "of one rank: resident on a CPU, allocated on a GPU",
            "kernels": "s of one step under the profiler",
        },
        "threads": torch.get_num_threads(),
        "ranks": world.size,
    }
    missing = lacks(rung, device)
    if missing:
        return {**record, "not_measured": missing, "results": {}}
    share = machine.batch_size // world.size
    most = machine.micro_batch_size
    out_of_memory = False
    while True:
        if setup.compile in GRAPH_MODES and most * world.size < machine.batch_size:
            reason = f"its gradients, summed over micro-batches of {most}, would lie in memory that a graph uses again"
            return {**record, "not_measured": reason, "results": {}}
        reason = ""
        try:
            results = _climb(machine, rung, setup, config, data, device, world, most)
            break
        except Exception as error:
            if setup.compile and is_compile_error(error):
                if rung in ("compile", "cuda_graphs", "max_autotune"):
                    reason = f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
                    return {**record, "not_measured": reason, "results": {}}
                setup = replace(setup, compile=None)
            elif not is_out_of_memory(error):
                raise
            else:
                out_of_memory, reason = True, str(error).strip().splitlines()[0]
        gc.collect()
        if device.kind == "cuda":
            torch.cuda.empty_cache()
        if not reason:
            continue
        if most == 1:
            return {**record, "not_measured": f"out of memory with one sequence: {reason}", "results": {}}
        most = max(size for size in range(1, most) if share % size == 0)
    return {
        **record,
        "setup": {
            "bfloat16": setup.bfloat16,
            "tf32": setup.tf32,
            "compile": setup.compile,
            "attention": setup.attention.__name__,
            "loss": setup.loss.__name__,
            "optimizer": "fused AdamW, decay groups" if setup.fused_optimizer else "AdamW",
            "best_backend": setup.best_backend,
            "kept_memory": setup.kept_memory,
        },
        "results": {**results, "micro_batch_size": most, "out_of_memory": out_of_memory},
    }


def _climb(
    machine: MachineConfig,
    rung: str,
    setup: Setup,
    config: GPT2Config,
    data: TokenData,
    device: hardware.Device,
    world: World,
    micro_batch_size: int,
) -> dict[str, Any]:
    """Train for the configured steps; returns the results of a record."""
    torch.compiler.reset()
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    climber = Rung(config, data.vocab_size, machine, setup, device, world, micro_batch_size)
    alone_seconds = _require_memory(climber, machine, world)
    sampler = Sampler(data.train.ids, machine.block_size, machine.batch_size, TRAIN.seed)

    def step(number: int) -> tuple[float, float]:
        """(seconds, loss) of a step; the batch is on the device before the clock starts."""
        arrays: tuple[np.ndarray, np.ndarray] = sampler.batch(number, world.rank, world.size)
        data.train.check(arrays[0])
        inputs, targets = (torch.from_numpy(array).to(device.torch_name) for array in arrays)
        _synchronize(device)
        began = time.perf_counter()
        loss = climber.step(inputs, targets)
        _synchronize(device)
        return time.perf_counter() - began, world.mean(loss).item()

    seconds, losses = [], []
    total = machine.warmup_steps + machine.steps
    with counting(f"{rung}", total) as advance:
        for number in range(total):
            took, loss = step(number)
            if not math.isfinite(loss):
                raise PicogptError(f"the loss is {loss} at step {number + 1} of rung {rung}: its numbers mean nothing")
            seconds.append(took)
            losses.append(loss)
            advance(1)
    peak_memory = hardware.peak_memory_bytes(device)
    kernels = _kernels(lambda: step(total), device)
    fused = next((name for name in kernels if any(part in name.lower() for part in FUSED)), None)
    timed = seconds[machine.warmup_steps :]
    median = statistics.median(timed)
    rate = machine.batch_size * machine.block_size / median
    flops = climber.flops_per_token
    peak = hardware.peak_flops(device)
    first = alone_seconds + seconds[0]
    return {
        "step_seconds": timed,
        "median": median,
        "fastest": min(timed),
        "slowest": max(timed),
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "parameters": climber.parameters,
        "mfu": rate * flops / (peak * world.size) if peak and flops else None,
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - median * (2 if alone_seconds else 1)) if setup.compile else None,
        "losses": losses,
        "final_loss": losses[-1],
        "peak_memory_bytes": peak_memory,
        "kernels": dict(list(kernels.items())[:LISTED_KERNELS]),
        "attention": fused,
    }


def _require_memory(climber: Rung, machine: MachineConfig, world: World) -> float:
    """On several ranks, raise on all of them if a micro-batch does not fit on one, for which the others would wait in a step.

    Returns the seconds it took; 0 on one rank, where nothing is done.
    """
    if world.size == 1:
        return 0.0
    began = time.perf_counter()
    failed: Exception | None = None
    try:
        tokens = torch.zeros(climber.micro_batch_size, machine.block_size, dtype=torch.int64)
        climber.try_one(tokens.to(climber.device.torch_name))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    if world.all_reduce_max(float(failed is not None)):
        raise failed or MemoryError("not enough memory on another rank")
    _synchronize(climber.device)
    return time.perf_counter() - began


def _synchronize(device: hardware.Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def _kernels(step: Callable[[], object], device: hardware.Device) -> dict[str, float]:
    """The kernels (operators on a CPU) of one more step by time, longest first: name and seconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.kind == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = [event for event in profile.key_averages() if not event.is_user_annotation]
    if device.kind == "cuda":  # operators have the time of their kernels too, which would count twice
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    attribute = "self_device_time_total" if device.kind == "cuda" else "self_cpu_time_total"
    spent: dict[str, float] = {}
    for event in events:  # names of templates go on for pages; those that begin alike are one entry
        spent[event.key[:120]] = spent.get(event.key[:120], 0.0) + getattr(event, attribute) / 1e6
    return {name: seconds for name, seconds in sorted(spent.items(), key=lambda item: -item[1]) if seconds > 0}
