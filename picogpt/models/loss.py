"""The output layer and cross-entropy of a language model in one function, without the logits of the whole batch."""

from __future__ import annotations

from typing import Any

import torch

LOGITS_BYTES = 1 << 28
"""Upper limit of the logits in memory, 256 MiB; on a GPU the same again in float32."""
ROWS_IN_CACHE = 32
"""On a CPU, the number of rows of logits whose float32 copy fits the caches."""
COLUMNS = 64
"""The vocabulary is padded to a multiple of this inside the product, for full tiles of matrix units."""


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the logits x weight' against `targets`; a float32 scalar.

    x (N, C), weight (V, C), targets (N,) int64. Under autocast the products use its dtype; softmax and loss are always
    float32. Gradients are computed chunk by chunk in the forward pass: logits are neither stored nor recomputed.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, training: bool
    ) -> torch.Tensor:
        V = weight.size(0)
        padded = -(-V // COLUMNS) * COLUMNS
        inputs = x.detach().to(dtype)
        table = torch.zeros(padded, weight.size(1), dtype=dtype, device=x.device)  # (padded, C)
        table[:V] = weight.detach()
        losses = torch.empty(targets.shape, device=x.device)
        dx = torch.empty_like(inputs) if training else inputs
        dweight: torch.Tensor | None = None
        rows = max(ROWS_IN_CACHE, LOGITS_BYTES // (padded * table.element_size()))
        for part, target, loss, dpart in zip(
            inputs.split(rows), targets.split(rows), losses.split(rows), dx.split(rows),
            strict=True,
        ):  # fmt: skip
            logits = part @ table.T  # (rows, padded)
            _softmax_loss(logits, V, target, loss, 1 / len(targets) if training else None)
            if training:  # `logits` now holds their gradient
                dpart.copy_(logits @ table)
                product = logits.T @ part
                dweight = product if dweight is None else dweight.float().add_(product)
        if dweight is not None:
            ctx.save_for_backward(dx, dweight[:V])
            ctx.dtypes = x.dtype, weight.dtype
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx * grad).to(ctx.dtypes[0]), (dweight * grad).to(ctx.dtypes[1]), None, None, None


def _softmax_loss(
    logits: torch.Tensor, vocab_size: int, targets: torch.Tensor, losses: torch.Tensor, scale: float | None
) -> None:
    """Write the loss of each row of `logits` (N, padded); with `scale`, turn the logits into scale times its gradient.

    The padding columns beyond the vocabulary are excluded from the softmax and get no gradient.
    """
    rows = ROWS_IN_CACHE if logits.device.type == "cpu" else max(1, LOGITS_BYTES // (4 * vocab_size))
    rows = min(rows, len(logits))
    buffer = torch.empty(rows, vocab_size, device=logits.device)
    minus_one = losses.new_full((rows, 1), -1)
    if scale is not None:
        logits[:, vocab_size:] = 0
    for block, target, loss in zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True):
        log_p = buffer[: len(block)]
        torch.log_softmax(block[:, :vocab_size], dim=-1, dtype=torch.float32, out=log_p)
        torch.neg(log_p.gather(1, target[:, None])[:, 0], out=loss)
        if scale is not None:
            gradient = log_p.exp_().scatter_add_(1, target[:, None], minus_one)  # softmax, less one at the target
            torch.mul(gradient, scale, out=block[:, :vocab_size])
