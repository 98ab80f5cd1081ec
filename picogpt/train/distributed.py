"""Several processes that train one model: who is here, and what they tell one another.

`torchrun` starts the processes and names them in the environment; a process that it did not start is a world of one.
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
from picogpt.errors import PicogptError, UsageError, failure_mark

T = TypeVar("T")
_GROUPS: list[Any] = []
_LOST = re.compile(r"gloo|Broken pipe|[Cc]onnection (reset|refused|closed)|NCCL.*(remote|abort|timeout)")


@dataclass(frozen=True)
class World:
    """The ranks of a job and the place of this one. Ranks run on one device each."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    """A group on the CPUs for small messages, so that they never wait for a GPU."""

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this rank where `wanted` is asked for: each rank its own GPU.

        Raises UsageError when one GPU is named for several ranks.
        """
        if self.size == 1 or wanted == "cpu" or not torch.cuda.is_available():
            return wanted
        if ":" in wanted:
            raise UsageError(f"device {wanted!r} names one GPU for {self.size} ranks: leave out its number")
        return f"cuda:{self.local_rank}"

    def threads(self) -> int:
        """CPU threads of this rank: its share of the cores (torchrun would leave it a single one)."""
        return max(1, hardware.cpu_count() // self.local_size)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks, on its device."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
            value = value / self.size
        return value

    def sum(self, value: float) -> float:
        """Sum of a number over the ranks, in float64."""
        return self._reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        return self._reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on all of them; a PicogptError there is raised on all of them."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except PicogptError as error:
                answer[1] = error
        with _peers():
            dist.broadcast_object_list(answer, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def tree_from_first(self, make: Callable[[], T]) -> T:
        """As `from_first`, for dictionaries and lists with tensors in them: each tensor travels by itself, as it is."""
        if self.size == 1:
            return make()
        tensors: list[torch.Tensor] = []

        def outline() -> T:
            tree = make()
            tensors.extend(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
            return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)

        tree = self.from_first(outline)
        turn = iter(tensors)

        def receive(shape: torch.Tensor) -> torch.Tensor:
            tensor = next(turn).contiguous() if self.first else torch.empty_like(shape, device="cpu")
            with _peers():
                dist.broadcast(tensor, 0, group=self.control)
            return tensor

        return tree_map_only(torch.Tensor, receive, tree)

    def first_before_others(self, make: Callable[[], T]) -> T:
        """What `make` returns, on each rank its own; the first rank goes ahead, so that the others find what it fetched."""
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if self.first else make()

    def _reduce(self, value: torch.Tensor, operation: Any) -> float:
        if self.size > 1:
            with _peers():
                dist.all_reduce(value, op=operation, group=self.control)
        return value.item()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the other ranks that torchrun started; part from them at the end.

    NCCL carries gradients between GPUs, gloo between CPUs. Raises PicogptError when a rank is lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise UsageError(
                f"--nproc_per_node={local_size} needs as many GPUs and {torch.cuda.device_count()} are here;"
                " --device cpu trains on the CPU"
            )
        torch.cuda.set_device(local_rank)
    if local_rank == 0:
        failure_mark().unlink(missing_ok=True)
    with _peers():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # After a restart torchrun's store still has the addresses of the ranks before: each attempt its own names.
            # Where it gives each attempt a store of its own, nodes may count differently.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
        control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    with _peers():
        yield World(dist.get_rank(), size, local_rank, local_size, control)
    # A thread of gloo that lets go of the last message needs the interpreter; a destructor that waits for this thread
    # holds it. So the groups outlive whatever uses them.
    _GROUPS.extend([dist.group.WORLD, control])
    # Not after an error: with a peer gone, parting may wait for it for ever.
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the many ways in which a collective fails when a peer is gone into one error."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise PicogptError(
                f"another rank of this job has ended ({str(error).strip().splitlines()[0][:160]}). What was saved"
                " last is kept: the same command with --run continues from there, and torchrun --max-restarts=N does so itself"
            ) from error
        raise
