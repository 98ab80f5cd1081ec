"""A small decoder-only transformer over characters, designed to learn fast from one megabyte of text.

Differences from GPT-2, and the reasons:
- rotary position embeddings (Su et al. 2021, arXiv:2104.09864): between characters the distance matters, not the position;
- RMSNorm without gains, and normalized queries and keys (Henry et al. 2020, arXiv:2010.04245): stays stable at
  the large learning rates of Muon;
- squared ReLU (So et al. 2021, arXiv:2109.08668): as good as GELU and cheaper;
- an embedding of each pair of characters, added to that of the character: a table lookup replaces what a first layer
  would have to learn;
- output projections that start at zero: each block begins as the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from picogpt.config import CharTransformerConfig
from picogpt.models.cache import KVCache
from picogpt.models.language_model import LanguageModel

ROTARY_BASE = 1000.0
LOGIT_CAP = 15.0


class CharTransformer(LanguageModel):
    """Embeddings, `n_layer` blocks, a linear output layer."""

    config: CharTransformerConfig
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: CharTransformerConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wte_pairs = nn.Embedding((vocab_size + 1) * vocab_size, config.n_embd)  # row: (previous or none, current)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        for embedding in (self.wte, self.wte_pairs):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)  # the initial loss is ln(vocab_size)
        cos, sin = rotary_tables(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V), float32; with `targets` (B, T), the mean cross-entropy in nats.

        With a cache, `idx` are the tokens that follow those in it, first a prompt, then one at a time; only the logits of
        the last position are returned, (B, 1, V).
        """
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.start(idx.size(1))
        before = idx[:, :1] if cache is None else cache.last
        previous = torch.cat((before, idx[:, :-1]), dim=1)  # (B, T)
        previous = torch.where(positions == 0, self.vocab_size, previous)  # the first position has none
        x = self.wte(idx) + self.wte_pairs(previous * self.vocab_size + idx)  # (B, T, C)
        x = F.dropout(norm(x), self.config.dropout, self.training)
        cos, sin = (table[positions].unsqueeze(-3) for table in (self.cos, self.sin))  # (1, T, D/2) or (B, 1, T, D/2)
        for block in self.h:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.advance(idx)
            x = x[:, -1:]
        logits = self.head(norm(x)).float()  # (B, T, V)
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)  # bounded, so no character gets all of the probability
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int, padding: torch.Tensor | None = None, fixed: bool = False) -> KVCache:
        """An empty cache for `batch_size` sequences."""
        return KVCache(self.config, batch_size, padding, fixed, like=self.wte.weight)


class Block(nn.Module):
    """Pre-norm block: attention, then an MLP of four times the width, each added to the residual stream."""

    def __init__(self, config: CharTransformerConfig, layer: int):
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_out = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.c_out.weight)
        self.sdpa = F.scaled_dot_product_attention  # `kernels` may replace it by a faster one

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + F.dropout(self.attention(norm(x), cos, sin, cache), self.dropout, self.training)
        hidden = F.relu(self.c_fc(norm(x))).square()  # (B, T, 4C)
        return x + F.dropout(self.c_out(hidden), self.dropout, self.training)

    def attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Causal self-attention, (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2).chunk(3, dim=1)
        q, k = rotate(norm(q), cos, sin).to(v.dtype), rotate(norm(k), cos, sin).to(v.dtype)  # (B, H, T, D)
        y = self.sdpa(q, k, v, is_causal=True) if cache is None else cache.attention(self.layer, q, torch.stack((k, v)))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def norm(x: torch.Tensor) -> torch.Tensor:
    """Divide each vector by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), without a gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (block_size, head_size / 2), of the angle of every position and frequency."""
    if torch.get_default_device().type == "meta":  # see shapes_only: the power operator would import torch's compiler
        return torch.empty(block_size, head_size // 2), torch.empty(block_size, head_size // 2)
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, head_size // 2)
    angles = torch.outer(torch.arange(block_size).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head, (B, H, T, D), by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
