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
    With `fixed`, a single token attends to all slots through a mask that is added to its scores, and its position is known
    to the device alone (`slot`), so that each step is the same sequence of kernels, as a CUDA graph requires. `like` is a
    tensor with the dtype and device of the cache.
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
        shape = (2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        # Keys and values of each layer; tensors of their own, which a compiled step can change in place.
        self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(c.n_layer)]
        self.padding, self.fixed = padding, fixed
        # In float32 on a GPU torch has no fast kernel for one query with a mask.
        self.written_out = like.device.type == "cuda" and like.dtype == torch.float32
        self.length = 0
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)  # the next one to fill
        self.slots = torch.arange(c.block_size, device=like.device)
        self.last = torch.zeros(batch_size, 1, dtype=torch.int64, device=like.device)  # the newest token of each row
        self.mask: torch.Tensor | None = None  # (B or 1, 1, T, keys): which keys a query attends to, or numbers to add
        self.causal = False

    def start(self, count: int) -> torch.Tensor:
        """Prepare for `count` new tokens per row; return their positions, (T,), or (B, T) with padding."""
        self._fixed_step = self.fixed and count == 1
        if self._fixed_step:
            queries, keys = self.slot, self.slots
        else:
            queries, keys = self.slots[self.length : self.length + count], self.slots[: self.length + count]
        mask, positions = None, queries
        if self.padding is not None:
            hidden = keys[None, None] < self.padding[:, None, None]  # (B, 1, keys)
            seen = (keys <= queries[:, None]) & ~hidden
            # Padding attends to itself: softmax over a fully masked row is NaN.
            mask = (seen | (keys == queries[:, None]))[:, None]
            positions = (queries - self.padding[:, None]).clamp(min=0)
        elif self._fixed_step:
            mask = (keys <= queries)[None, None, None]
        if mask is not None and self._fixed_step:  # in numbers, made once for all layers
            mask = torch.where(mask, 0.0, -torch.inf).to(self.values[0].dtype)
        self.mask, self.causal = mask, count > 1 and mask is None
        return positions

    def attention(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Append keys and values kv (2, B, H, T, D); return the attention of q (B, H, T, D) over all so far, (B, H, T, D)."""
        held = self.values[layer]  # (2, B, H, S, D)
        if self._fixed_step:
            held.index_copy_(3, self.slot, kv.to(held.dtype))
        else:
            end = self.length + kv.size(3)
            held[:, :, :, self.length : end] = kv
            held = held[:, :, :, :end]
        keys, values = held
        if self.written_out and self._fixed_step and self.mask is not None:
            return attention_of_one(q, keys, values, self.mask)
        return F.scaled_dot_product_attention(
            q.to(keys.dtype), keys, values, attn_mask=self.mask, is_causal=self.causal
        )

    def advance(self, idx: torch.Tensor) -> None:
        """Count the slots of the tokens idx (B, T) as filled."""
        if not self._fixed_step:  # whose code, compiled once, must not depend on a number of the host
            self.length += idx.size(1)
        self.slot.add_(idx.size(1))
        self.last.copy_(idx[:, -1:])

    def restart(self, padding: list[int]) -> None:
        """Empty the cache for contexts with this padding, in the same memory, so that a CUDA graph stays valid."""
        self.length = 0
        self.slot.zero_()
        if self.padding is not None:
            self.padding.copy_(torch.tensor(padding))


def attention_of_one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of one query, q (B, H, 1, D), over keys and values (B, H, S, D), with a mask to add, (B or 1, 1, 1, S).

    Written out, in float32. torch.compile makes sums of products of it, which read keys and values once.
    """
    scores = (q.float() * q.size(-1) ** -0.5) @ keys.float().mT + mask  # (B, H, 1, S)
    return (scores.softmax(-1) @ values.float()).to(values.dtype)
