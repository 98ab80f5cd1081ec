"""What training, evaluation and sampling ask of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from picogpt.config import ModelConfig
    from picogpt.models.cache import KVCache


class LanguageModel(nn.Module):
    """Predicts the next token at every position.

    `forward(idx, targets=None, cache=None)` takes idx (B, T), int64, T at most `config.block_size`, and returns
    logits (B, T, V); with targets (B, T) the mean cross-entropy in nats, float32.
    """

    config: ModelConfig

    def new_cache(self, batch_size: int) -> KVCache | None:
        """What decoding keeps between calls; None where there is nothing worth keeping."""
        return None

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """See the class."""
        raise NotImplementedError
