"""GPT-2 (Radford et al. 2019), exactly: the names and shapes of OpenAI's checkpoints, the numbers of its logits.

A token and its position are looked up and added; `n_layer` blocks each read the stream, normalized, and add to it,
first what attention gathers from earlier positions, then what a two-layer network makes of it; the token table,
used once more, turns the last stream into logits.

Linear layers store weights as (out, in), torch's way; OpenAI's files store (in, out), which `pretrained` turns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from picogpt.config import GPT2Config
from picogpt.models.attention import attend
from picogpt.models.cache import KVCache
from picogpt.models.language_model import LanguageModel
from picogpt.models.loss import linear_cross_entropy

INIT_STD = 0.02


class GPT2(LanguageModel):
    """The decoder, its two tables and its tied head."""

    config: GPT2Config

    def __init__(self, config: GPT2Config, vocab_size: int):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.n_embd)  # token table, and the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position table
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head: nn.Module = TiedHead(self.wte)
        self.loss = linear_cross_entropy  # what the ladder of benchmarks exchanges, as `attend` below
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the stream starts smaller the more layers add to it, so that its variance does not grow.
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of idx (B, T); with targets (B, T) the mean cross-entropy in nats; see LanguageModel."""
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.start(idx.size(1))
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        x = self.ln_f(x)
        if cache is not None:
            cache.advance(idx)
            x = x[:, -1:]  # nobody asks for the logits of the other positions
        if targets is None:
            return self.head(x)
        if isinstance(self.head, TiedHead):
            return self.loss(x.flatten(0, 1), self.wte.weight, targets.flatten())
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())  # specialized for sampling

    def flops_per_token(self) -> int:
        """6 for each weight in a matrix product, the head's included, and 12 L C T for attention, counted in full.

        The formula of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B).
        """
        c = self.config
        weights = self.wte.weight.numel() + sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def new_cache(self, batch_size: int, padding: torch.Tensor | None = None, fixed: bool = False) -> KVCache:
        """An empty cache for `batch_size` sequences."""
        return KVCache(self.config, batch_size, padding, fixed, like=self.ln_f.weight)


class Block(nn.Module):
    """Attention and a network of four times the width, each on the normalized stream, each added to it."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Every position gathers from itself and those before it, once for each head."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.attend = attend

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).transpose(1, 3).unbind(2)  # (B, H, T, D)
        y = self.attend(q, k, v, self.layer, cache, self.dropout if self.training else 0)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Each position by itself: four times the width, a bend, and back."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        # OpenAI's GELU is the one approximated by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415).
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class TiedHead(nn.Module):
    """Logits from the token table. It has no parameters of its own, as in OpenAI's files."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._tied = (embedding,)  # in a tuple, so that its weight is not listed twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V)."""
        return F.linear(x, self._tied[0].weight)
