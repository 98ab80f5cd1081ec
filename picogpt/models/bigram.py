"""The character bigram: the next character depends only on the current one."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from picogpt.config import CharBigramConfig
from picogpt.data.sampler import Ids
from picogpt.models.cache import KVCache
from picogpt.models.language_model import LanguageModel


class CharBigram(LanguageModel):
    """One table of logits, (vocab_size, vocab_size): the pair statistics of the text, learned by gradient descent."""

    def __init__(self, config: CharBigramConfig, vocab_size: int):
        super().__init__()
        self.config = config
        # N(0, 1) logits are confidently wrong, so the initial loss exceeds ln(vocab_size).
        self.embedding = nn.Embedding(vocab_size, vocab_size)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of `idx` (B, T); with `targets` (B, T), the mean cross-entropy in nats, float32."""
        logits = self.embedding(idx)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def lower_bound(self, ids: Ids) -> float:
        """The lowest loss on `ids` (N + 1,) that any bigram can reach, in nats: the conditional entropy of the pair counts.

        H = -1/N * sum over pairs (a, b) of n(a, b) * ln(n(a, b) / n(a)), with N the number of pairs.
        """
        vocab_size, tokens = self.embedding.num_embeddings, torch.from_numpy(np.array(ids)).long()
        pairs = torch.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
        counts = pairs.view(vocab_size, vocab_size).double()
        # xlogy is 0 where a pair never occurs.
        entropy = torch.xlogy(counts, counts) - torch.xlogy(counts, counts.sum(1, keepdim=True))
        return -entropy.sum().item() / counts.sum().item()
