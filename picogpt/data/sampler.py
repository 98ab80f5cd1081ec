"""The order of the data: a pure function of (seed, step, rank, world size), with no state to save."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from picogpt.errors import PicogptError


class Ids(Protocol):
    """Token ids, shape (count,): an array, or many files read like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


class Sampler:
    """Draws windows of `block_size` tokens and their successors, without replacement within an epoch.

    An epoch cuts the tokens into non-overlapping windows, beginning at an offset that changes with the epoch, and visits
    them in a seeded random order. Batches follow one another without a gap, also across epochs, so that every batch is
    full. The batch of a step is the same for every world size: a rank takes its part of it.

    Raises PicogptError when the tokens do not fill one window.
    """

    def __init__(self, ids: Ids, block_size: int, batch_size: int, seed: int):
        self.ids, self.block_size, self.batch_size, self.seed = ids, block_size, batch_size, seed
        # One block is reserved for the random offset, and one token for the last target.
        self.windows = (len(ids) - block_size) // block_size
        if self.windows < 1:
            needed = f"block_size={block_size} needs at least {2 * block_size:,}"
            remedy = "use a longer text or a smaller model.block_size"
            raise PicogptError(f"the training text has {len(ids):,} tokens; {needed}: {remedy}")

    def steps(self, epochs: float) -> int:
        """Optimizer steps that make `epochs` passes, rounded up."""
        return max(1, -int(-epochs * self.windows // self.batch_size))

    def epoch(self, step: float) -> float:
        """Passes over the data after `step` steps."""
        return step * self.batch_size / self.windows

    def starts(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """First positions of the windows of a step on one rank, shape (batch_size // world_size,)."""
        share = self.batch_size // world_size
        starts = np.empty(share, dtype=np.int64)
        for row in range(share):
            epoch, position = divmod(step * self.batch_size + rank * share + row, self.windows)
            offset, order = _order(self.seed, epoch, self.windows, self.block_size)
            starts[row] = offset + order[position] * self.block_size
        return starts

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step on one rank: int64 arrays of shape (batch_size // world_size, block_size)."""
        starts = self.starts(step, rank, world_size).tolist()
        tokens = np.stack([self.ids[start : start + self.block_size + 1] for start in starts]).astype(np.int64)
        return tokens[:, :-1], tokens[:, 1:]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, windows: int, block_size: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(block_size)), random.permutation(windows)


def sequential(ids: Ids, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens once, in order: batches of (inputs, targets), int64, shape (at most batch_size, block_size).

    The last window is shorter when the tokens do not divide, and comes in a batch of its own, so that every token but the
    first is a target exactly once.
    """
    full = (len(ids) - 1) // block_size
    for first in range(0, full, batch_size):
        count = min(batch_size, full - first)
        tokens = ids[first * block_size : (first + count) * block_size + 1].astype(np.int64)
        yield tokens[:-1].reshape(count, block_size), tokens[1:].reshape(count, block_size)
    rest = ids[full * block_size :].astype(np.int64)
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
