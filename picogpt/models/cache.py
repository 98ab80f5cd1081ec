"""What decoding remembers: the keys and values of every layer, so that each new token costs one token's work."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of fixed size for `block_size` positions; `length` of them are filled.

    A layer calls `update`; the model calls `advance` once all layers have.
    """

    def __init__(self, n_layer: int, batch_size: int, n_head: int, block_size: int, head_size: int, like: torch.Tensor):
        shape = (n_layer, 2, batch_size, n_head, block_size, head_size)
        self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0
        self.last: torch.Tensor | None = None  # (B, 1), the token at `length - 1`

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, T, D) behind what is there; return all keys and values, (B, H, length + T, D)."""
        end = self.length + k.size(2)
        self.values[layer, 0, :, :, self.length : end] = k
        self.values[layer, 1, :, :, self.length : end] = v
        return self.values[layer, 0, :, :, :end], self.values[layer, 1, :, :, :end]

    def advance(self, idx: torch.Tensor) -> None:
        """Count the positions of the tokens idx (B, T) as filled."""
        self.length += idx.size(1)
        self.last = idx[:, -1:]
