"""What decoding remembers: the keys and values of every layer, so that each new token costs one token's work."""

from __future__ import annotations

import torch

from picogpt.config import CharTransformerConfig, GPT2Config


class KVCache:
    """Keys and values of fixed size for `block_size` positions; `length` of them are filled.

    The model calls `start`, each layer `update`, and the model `advance` once all layers have. The first call may
    bring a whole prompt, each later one a single token.

    Prompts of different lengths are filled up on the left: `padding` (B,) says how many slots of each row hold none
    of its tokens. With `fixed`, a single token is attended over all slots behind a mask, and where it goes is known
    to the device alone, so that each step is the same sequence of kernels: what a CUDA graph needs. `like` is a tensor
    of the dtype and on the device that the cache shall have.
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
        self.mask: torch.Tensor | None = None  # (B or 1, 1, T, keys): what the tokens of this call may see
        self.causal = False

    def start(self, count: int) -> torch.Tensor:
        """Prepare for `count` new tokens a row; return their positions, (T,), or (B, T) with padding."""
        self._fixed_step = self.fixed and self.length > 0
        if self._fixed_step:
            queries, keys = self.slot, self.slots
        else:
            queries, keys = self.slots[self.length : self.length + count], self.slots[: self.length + count]
        self.mask, self.causal = None, count > 1
        if self.padding is not None:
            hidden = keys[None, None] < self.padding[:, None, None]  # (B, 1, keys)
            seen = (keys <= queries[:, None]) & ~hidden
            # A slot of padding sees itself: nothing uses what it makes, but nothing over no keys is not a number.
            self.mask, self.causal = (seen | (keys == queries[:, None]))[:, None], False
            return (queries - self.padding[:, None]).clamp(min=0)
        if self._fixed_step:
            self.mask = (keys <= queries)[None, None, None]
        return queries

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, T, D) behind what is there; return the keys and values that are attended."""
        keys, values = self.values[layer, 0], self.values[layer, 1]  # (B, H, S, D)
        if self._fixed_step:
            keys.index_copy_(2, self.slot, k.to(keys.dtype))
            values.index_copy_(2, self.slot, v.to(keys.dtype))
            return keys, values
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, idx: torch.Tensor) -> None:
        """Count the slots of the tokens idx (B, T) as filled."""
        self.length += idx.size(1)
        self.slot += idx.size(1)
        self.last.copy_(idx[:, -1:])

    def restart(self, padding: list[int] | None = None) -> None:
        """Forget all tokens, for contexts with this padding. The memory stays, and with it what a graph knows of it."""
        self.rewind(0)
        if self.padding is not None and padding is not None:
            self.padding.copy_(torch.tensor(padding))

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens."""
        self.length = length
        self.slot.fill_(length)
