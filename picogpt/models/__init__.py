"""Models, by the `kind` of their configuration.

Each is an `nn.Module` with
    forward(idx, targets=None, cache=None)   idx (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean loss
    new_cache(batch_size)                    what decoding keeps between calls, or None where there is nothing to keep
    config.block_size                        the longest T
"""

from __future__ import annotations

import torch
from torch import nn

from picogpt.config import CharBigramConfig, CharTransformerConfig
from picogpt.models.bigram import CharBigram
from picogpt.models.char_transformer import CharTransformer


def build(config: CharBigramConfig | CharTransformerConfig, vocab_size: int, seed: int) -> nn.Module:
    """A model with fresh weights, on the CPU, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, CharBigramConfig):
            return CharBigram(config, vocab_size)
        return CharTransformer(config, vocab_size)
