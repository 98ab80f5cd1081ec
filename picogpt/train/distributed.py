"""Distributed training: the ranks of a job and their collectives.

`torchrun` starts the ranks and numbers them in the environment; a process without a launcher is a job of one rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from picogpt import hardware
from picogpt.errors import PicogptError, UsageError
from picogpt.ranks import from_environment

T = TypeVar("T")
_GROUPS: list[Any] = []
_LOST = re.compile(r"gloo|Broken pipe|[Cc]onnection (reset|refused|closed)|NCCL.*(remote|abort|timeout)")


@dataclass(frozen=True)
class World:
    """The ranks of a job and the index of this one. Each rank has a device of its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    """A gloo group: small messages go over the CPU; NCCL would queue them behind the work of a GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this rank where `wanted` is configured: each rank gets its own GPU.

        Raises UsageError when one GPU is named for several ranks.
        """
        if self.size == 1 or wanted == "cpu" or not torch.cuda.is_available():
            return wanted
        if ":" in wanted:
            raise UsageError(f"device {wanted!r} names one GPU for {self.size} ranks: leave out its number")
        return f"cuda:{self.local_rank}"

    def threads(self) -> int:
        """CPU threads of this rank: its share of the cores (torchrun sets a single one)."""
        return max(1, hardware.cpu_count() // self.local_size)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks, on its device; the tensor itself is overwritten."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
            value = value / self.size
        return value

    def sum(self, value: float) -> float:
        """Sum of a number over the ranks, in float64."""
        return self._reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)

    def all_reduce_max(self, value: float) -> float:
        """Maximum of a number over the ranks."""
        return self._reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX)

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on all ranks; a PicogptError there is raised on all ranks.

        Tensors in it are broadcast one by one, without a copy of the whole.
        """
        if self.size == 1:
            return make()
        tensors: list[torch.Tensor] = []
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                tree = make()
                tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
                answer[0] = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)
            except PicogptError as error:
                answer[1] = error
        with _lost_rank_as_error():
            dist.broadcast_object_list(answer, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        sources = iter(tensors)

        def receive(shape: torch.Tensor) -> torch.Tensor:
            tensor = next(sources).contiguous() if self.is_main else torch.empty_like(shape, device="cpu")
            with _lost_rank_as_error():
                dist.broadcast(tensor, 0, group=self.control)
            return tensor

        return tree_map_only(torch.Tensor, receive, answer[0])

    def _reduce(self, value: torch.Tensor, operation: Any) -> float:
        if self.size > 1:
            with _lost_rank_as_error():
                dist.all_reduce(value, op=operation, group=self.control)
        return value.item()


@contextmanager
def init_distributed(device: str) -> Iterator[World]:
    """Initialize the process group of the ranks that a launcher started; destroy it at the end.

    NCCL carries gradients between GPUs, gloo between CPUs. Raises PicogptError when a rank is lost, UsageError when the
    environment does not describe ranks.
    """
    _, size, local_rank, local_size = from_environment()
    if size == 1:
        yield World()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise UsageError(
                f"--nproc_per_node={local_size} needs as many GPUs and {torch.cuda.device_count()} are here;"
                " --device cpu trains on the CPU"
            )
        torch.cuda.set_device(local_rank)
    with _lost_rank_as_error():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # After a restart torchrun's store still has the addresses of the previous ranks, so each attempt uses its own
            # keys. Where torchrun gives each attempt a store of its own, nodes may count attempts differently.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
        control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    with _lost_rank_as_error():
        yield World(dist.get_rank(), size, local_rank, local_size, control)
    # Keep the process groups alive: destroying gloo while holding the GIL can deadlock with its thread.
    _GROUPS.extend([dist.group.WORLD, control])
    # Not after an error: if a rank is gone, this could wait for it forever.
    dist.destroy_process_group()


@contextmanager
def _lost_rank_as_error() -> Iterator[None]:
    """Turn whatever torch raises in a collective when another rank is gone into one PicogptError."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise PicogptError(
                f"another rank of this job has ended ({str(error).strip().splitlines()[0][:160]}). What was saved"
                " last is kept: the same command with --name continues from there, and torchrun --max-restarts=N does so itself"
            ) from error
        raise
