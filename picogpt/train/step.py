"""The training step of every model, in training and in the training ladder: micro-batches, all-reduce, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from picogpt import hardware
from picogpt.config import ModelConfig, TrainConfig
from picogpt.errors import UsageError
from picogpt.models import kernels
from picogpt.models.language_model import LanguageModel
from picogpt.train.distributed import World
from picogpt.train.evaluate import autocast
from picogpt.train.optim import Optimizer

TOKENS_PER_PASS = {"cpu": 1 << 12, "cuda": 1 << 16, "mps": 1 << 14}
"""Most tokens of a forward pass where train.micro_batch_size is not set, by device type; larger passes are no faster."""
BYTES_PER_TOKEN_LAYER_CHANNEL = 40
"""Of activations: 17 values of 2 bytes, with a margin."""
INDUCTOR_OPTIONS = {"triton.mix_order_reduction": False}
"""Set for every compiled training. With this and a bfloat16 residual stream a step of GPT-2 on an H100 takes 126 ms, else 133."""
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that capture CUDA graphs."""


@dataclass(frozen=True)
class Switches:
    """What makes a step fast. These defaults train; the training ladder begins with `BASELINE` and adds one after another."""

    tf32: bool = True
    """TF32 for the float32 matrix products that are left, on GPUs that have it."""
    bfloat16: bool = True
    """Autocast of matrix products to bfloat16, on devices that are fast with it."""
    compile: str | None = "default"
    """The mode of torch.compile; None: eager."""
    attention: Literal["written_out", "flash", "fastest"] = "fastest"
    """Attention kernel; `fastest` also sets the order of torch's backends."""
    loss: Literal["plain", "padded", "fused"] = "fused"
    """Output layer and cross-entropy of GPT-2."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Residual stream of GPT-2, where products are in bfloat16."""
    fused_optimizer: bool = True
    """AdamW by one kernel; otherwise by torch's default implementation."""
    keep_memory: bool = True
    """On a CPU, malloc keeps freed memory."""


BASELINE = Switches(
    False, False, compile=None, attention="written_out", loss="plain", fused_optimizer=False, keep_memory=False
)
"""All optimizations off: the first rung of the ladder."""


class Step:
    """A model on its device, its optimizer, and one optimizer step of them."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        total_steps: int,
        device: hardware.Device,
        world: World,
        micro_batch_size: int,
        switches: Switches,
    ):
        self.config, self.world, self.switches, self.micro_batch_size = config, world, switches, micro_batch_size
        self.device = device if switches.bfloat16 else replace(device, dtype="float32")
        torch.set_float32_matmul_precision("high" if switches.tf32 else "highest")
        if switches.keep_memory:
            hardware.keep_memory(device)
        # The raw module is evaluated, sampled and saved; the compiled and distributed ones share its weights.
        self.model = model.to(device.torch_name)
        self.optimizer = Optimizer(model, config, total_steps, switches.fused_optimizer)
        # Reading a loss synchronizes with a GPU, so there losses are read when a line is logged, and before weights are saved.
        self.reads_each_loss = device.type != "cuda"
        self.compiled = switches.compile is not None
        self.forward: Callable[..., torch.Tensor] = self._compile()

    def _compile(self) -> Callable[..., torch.Tensor]:
        """The forward pass, compiled if it is to be; kernels that torch.compile handles badly are excluded from its graph."""
        switches, compile_device = self.switches, self.device if self.compiled else None
        residual = switches.residual if self.device.dtype == "bfloat16" else "float32"
        kernels.use(self.model, switches.attention, switches.loss, residual, compile_device)
        if not self.compiled:
            return self.model
        import torch._inductor as inductor

        options = {**inductor.list_mode_options(switches.compile or "default"), **INDUCTOR_OPTIONS}
        known = {name: value for name, value in options.items() if name in inductor.list_options()}
        return torch.compile(self.model, options=known)

    def distribute(self) -> None:
        """Average gradients over the ranks (all-reduce) at the end of each step from now on."""
        if self.world.size > 1:
            ids = [self.world.local_rank] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=ids, gradient_as_bucket_view=True)

    def stop_compiling(self) -> None:
        """Go on in eager mode, where torch.compile does not work."""
        self.compiled = False
        self.model.zero_grad(set_to_none=True)
        distributed = isinstance(self.forward, DistributedDataParallel)
        self.forward = self._compile()
        if distributed:
            self.distribute()

    def forward_backward(self, x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> torch.Tensor:
        """Accumulate the gradient of x, y (B, T), one of `parts` micro-batches; return its mean loss divided by `parts`."""
        best_backend = hardware.attention(self.device) if self.switches.attention == "fastest" else nullcontext()
        with autocast(self.device), best_backend:
            loss = self.forward(x, y) / parts
        loss.backward()
        return loss.detach()

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        """Step number `step`, from 0, on this rank's inputs and targets (B, T), int64, on its device.

        Returns the mean loss over all ranks, on the device; NaN where the loss or the gradient is not finite. Then the
        weights do not change, but on a GPU, where the host learns of it later, they are spoiled.
        """
        self.model.train()
        parts = list(zip(inputs.split(self.micro_batch_size), targets.split(self.micro_batch_size), strict=True))
        total = torch.zeros((), device=inputs.device)
        for index, (x, y) in enumerate(parts):
            if self.switches.compile in GRAPH_MODES and self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # graphs may use the memory of the step before
            # The all-reduce of gradients happens once per step; no_sync must be set before the forward pass.
            only_accumulate = isinstance(self.forward, DistributedDataParallel) and index < len(parts) - 1
            with self.forward.no_sync() if only_accumulate else nullcontext():  # type: ignore[attr-defined]
                total += self.forward_backward(x, y, len(parts))
        loss = self.world.mean(total)
        if self.config.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            loss = torch.where(torch.isfinite(norm), loss, math.nan)  # a non-finite gradient counts as such a loss
        if not self.reads_each_loss or math.isfinite(loss.item()):
            self.optimizer.step(step)
        return loss


def tokens_at_once(device: hardware.Device, model: ModelConfig) -> int:
    """Tokens of a forward pass without a configured micro-batch: on a GPU, as many as fit into half of its memory."""
    most = TOKENS_PER_PASS[device.type]
    memory, layers = hardware.gpu_memory_bytes(device), getattr(model, "n_layer", 0)
    if memory is None or not layers:
        return most
    settings: Any = model
    return min(most, memory // 2 // (BYTES_PER_TOKEN_LAYER_CHANNEL * layers * settings.n_embd))


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
            f" with {batch_size} sequences, --nproc_per_node of {_listed(_divisors(batch_size))} would"
        )
    share = batch_size // ranks
    if wanted is None:
        return max(divisor for divisor in _divisors(share) if divisor <= most)
    if share % wanted:
        raise UsageError(
            f"train.micro_batch_size={wanted} does not divide the {share} sequences of each of {ranks} ranks"
            f" (train.batch_size={batch_size}); these do: {_listed(_divisors(share))}"
        )
    return wanted


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
