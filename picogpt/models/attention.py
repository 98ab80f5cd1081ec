"""Causal self-attention, in training and, over a KV cache, in decoding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from picogpt.models.cache import KVCache

ROWS = 128
"""Queries per block on a CPU: enough to fill its matrix units, few enough to fit its caches."""


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0, cache: KVCache | None = None, dropout: float = 0
) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v for q, k, v (B, H, T, D), with each query attending to itself and to earlier keys.

    With a cache, k and v are appended to it, and the queries attend to all of its keys. `dropout` is the dropout
    probability of the attention weights.
    """
    if cache is not None:
        k, v = cache.update(layer, k, v)
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=cache.mask, is_causal=cache.causal)
    if in_blocks(q) and torch.is_grad_enabled() and q.requires_grad and not dropout:
        return BlockedAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def in_blocks(q: torch.Tensor) -> bool:
    """Whether BlockedAttention is faster than torch's flash kernel for such queries: on a CPU, in bfloat16, outside of a graph.

    In float32 they take the same time, and the flash kernel less memory (docs/performance.md).
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


class BlockedAttention(torch.autograd.Function):
    """Causal attention for training on a CPU: matrix products over blocks of queries, each only up to its last key.

    It stores the attention weights of the lower triangle of blocks, (T / ROWS + 1) / 2 times B H T ROWS numbers, where a
    flash kernel recomputes them; that and its large matrix products make it faster than torch's kernel. Under autocast
    scores and weights are rounded to bfloat16, as in attention written out; a flash kernel keeps scores in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        ctx.scale = D**-0.5
        q, k, v = (x.reshape(B * H, T, D) for x in (q * ctx.scale, k, v))
        y = torch.empty(B, T, H, D, dtype=v.dtype).transpose(1, 2)  # the memory layout that the output projection reads
        weights = []
        above = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype).triu(1)
        for first in range(0, T, ROWS):
            end = min(first + ROWS, T)
            scores = q[:, first:end] @ k[:, :end].mT  # (BH, rows, end)
            scores[:, :, first:] += above[: end - first, : end - first]
            weights.append(torch.softmax(scores, dim=-1))
            y[:, :, first:end] = (weights[-1] @ v[:, :end]).view(B, H, end - first, D)
        ctx.save_for_backward(q, k, v, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v."""
        q, k, v, *weights = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(q.shape)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)  # sums over blocks, in float32
        for block, weight in enumerate(weights):
            first, end = block * ROWS, block * ROWS + weight.size(1)
            g = grad[:, first:end]
            dv[:, :end] += weight.mT @ g
            # Softmax: dscores = weight * (dweight - sum(weight * dweight)), summed over keys.
            dscores = torch._softmax_backward_data(g @ v[:, :end].mT, weight, -1, weight.dtype)
            dq[:, first:end] = dscores @ k[:, :end]
            dk[:, :end] += dscores.mT @ q[:, first:end]
        return (dq * ctx.scale).view(shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape)
