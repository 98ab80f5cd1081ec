"""Models, one a file, built from the `kind` of their configuration."""

from __future__ import annotations

import torch

from picogpt.config import CharBigramConfig, ModelConfig
from picogpt.models.bigram import CharBigram
from picogpt.models.char_transformer import CharTransformer
from picogpt.models.language_model import LanguageModel


def build(config: ModelConfig, vocab_size: int, seed: int) -> LanguageModel:
    """A model with fresh weights, on the CPU, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, CharBigramConfig):
            return CharBigram(config, vocab_size)
        return CharTransformer(config, vocab_size)
