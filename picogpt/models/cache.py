"""The KV cache: keys and values of every layer, so that decoding computes only the new token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from picogpt.config import CharTransformerConfig, GPT2Config


class KVCache:
    """Keys and values of fixed size for `block_size` positions; `length` of them are filled.

    The model calls `start`, each layer `attention`, and the model `advance` once all layers have. The first call may
    bring a whole prompt, each later one a single token.

    Prompts of different lengths are padded on the left: `padding` (B,) is the number of padding slots of each row.
    With `fixed`, a single token attends to all slots through a mask, and its position is kept on the device, so that each
    step is the same sequence of kernels, as a CUDA graph requires. `like` is a tensor with the dtype and device of the
    cache.
    """

    def __init__(
        self,
        config: CharTransformerConfig | GPT2Config,
        batch_size: int,
        padding: torch.Tensor | None,
        fixed: bool,
        like: torch.Tensor,
    ):
        c = config
        shape = (c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.padding, self.fixed = padding, fixed
        self.length = 0
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)  # `length`, on the device
        self.slots = torch.arange(c.block_size, device=like.device)
        self.last = torch.zeros(batch_size, 1, dtype=torch.int64, device=like.device)  # the newest token of each row
        self.mask: torch.Tensor | None = None  # (B or 1, 1, T, keys): the keys that each query may attend to
        self.causal = False

    def start(self, count: int) -> torch.Tensor:
        """Prepare for `count` new tokens per row; return their positions, (T,), or (B, T) with padding."""
        self._fixed_step = self.fixed and self.length > 0
        if self._fixed_step:
            queries, keys = self.slot, self.slots
        else:
            queries, keys = self.slots[self.length : self.length + count], self.slots[: self.length + count]
        self.mask, self.causal = None, count > 1
        if self.padding is not None:
            hidden = keys[None, None] < self.padding[:, None, None]  # (B, 1, keys)
            seen = (keys <= queries[:, None]) & ~hidden
            # Padding attends to itself: softmax over a fully masked row is NaN.
            self.mask, self.causal = (seen | (keys == queries[:, None]))[:, None], False
            return (queries - self.padding[:, None]).clamp(min=0)
        if self._fixed_step:
            self.mask = (keys <= queries)[None, None, None]
        return queries

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append k and v (B, H, T, D); return the attention of the queries q over all keys so far, (B, H, T, D)."""
        keys, values = self.values[layer, 0], self.values[layer, 1]  # (B, H, S, D)
        if self._fixed_step:
            keys.index_copy_(2, self.slot, k.to(keys.dtype))
            values.index_copy_(2, self.slot, v.to(keys.dtype))
        else:
            end = self.length + k.size(2)
            keys[:, :, self.length : end] = k
            values[:, :, self.length : end] = v
            keys, values = keys[:, :, :end], values[:, :, :end]
        return F.scaled_dot_product_attention(
            q.to(keys.dtype), keys, values, attn_mask=self.mask, is_causal=self.causal
        )

    def advance(self, idx: torch.Tensor) -> None:
        """Count the slots of the tokens idx (B, T) as filled."""
        self.length += idx.size(1)
        self.slot += idx.size(1)
        self.last.copy_(idx[:, -1:])

    def restart(self, padding: list[int]) -> None:
        """Empty the cache for contexts with this padding, in the same memory, so that a CUDA graph stays valid."""
        self.rewind(0)
        if self.padding is not None:
            self.padding.copy_(torch.tensor(padding))

    def rewind(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        self.length = length
        self.slot.fill_(length)
