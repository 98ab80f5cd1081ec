"""Softmax, loss and gradient of the fused loss in one Triton kernel; `kernels` takes it on a GPU where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Columns of a row that a program holds at a time."""


@triton.jit
def _softmax_loss(logits, targets, losses, scale, vocab_size: tl.constexpr, columns: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row per program: write its loss, and replace its logits by `scale` times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    # The first pass keeps, for each column of the block, the largest logit and the sum of exponentials relative to it.
    largest = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, vocab_size, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # Where no logit was seen yet both are -inf, and their difference would be NaN.
        total = tl.where(new == -float("inf"), 0.0, total * tl.exp(largest - new) + tl.exp(x - new))
        largest = new
    top = tl.max(largest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # the logit of the target is overwritten below
    # The second pass finds the row in the L2 cache.
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)) * scale
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


def softmax_loss(
    logits: torch.Tensor, vocab_size: int, targets: torch.Tensor, losses: torch.Tensor, scale: float
) -> None:
    """As `kernels.softmax_loss`, for training: logits (N, padded), contiguous; targets (N,); losses (N,), float32."""
    grid = (len(logits),)
    _softmax_loss[grid](logits, targets, losses, scale, vocab_size, logits.size(1), BLOCK, num_warps=16)
