"""GPT-2 (Radford et al. 2019), exactly: the parameter names and shapes of OpenAI's checkpoints, and the same logits.

Token and position embeddings are added into the residual stream. Each of `n_layer` blocks adds to it the output of causal
self-attention, then that of an MLP, both on the normalized stream (pre-norm). A final LayerNorm and the output layer, whose
weights are the token embedding (tied), give the logits.

Linear layers store weights as (out, in), like torch; OpenAI's files store (in, out), which `pretrained` transposes.
`kernels` may replace `sdpa`, `loss` and the linear layers by faster ones with the same results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from picogpt.config import GPT2Config
from picogpt.models.cache import KVCache
from picogpt.models.language_model import LanguageModel

INIT_STD = 0.02


class GPT2(LanguageModel):
    """Embeddings, `n_layer` blocks, a final LayerNorm and a tied output layer."""

    config: GPT2Config

    def __init__(self, config: GPT2Config, vocab_size: int):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.n_embd)  # token embedding, and weights of the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head: nn.Module = TiedHead(self.wte)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Projections into the residual stream are scaled by 1 / sqrt(2 n_layer): its variance does not grow with depth.
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of idx (B, T); with targets (B, T) the mean cross-entropy in nats; see LanguageModel."""
        x = self.hidden(idx, cache)
        if targets is not None:
            return self.loss(x, targets)
        if cache is not None:
            cache.advance(idx)
            x = x[:, -1:]  # only the logits of the last position are needed
        return self.head(x)  # (B, T, V)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The final hidden states (B, T, C) of idx (B, T), which the output layer turns into logits."""
        positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.start(idx.size(1))
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats, of the logits of x (B, T, C) against targets (B, T); a float32 scalar."""
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())

    def flops_per_token(self) -> int:
        """6 per weight in a matrix product, including the output layer, plus 12 L C T for attention, the full T x T square.

        The formula of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B).
        """
        c = self.config
        weights = self.wte.weight.numel() + sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def new_cache(self, batch_size: int, padding: torch.Tensor | None = None, fixed: bool = False) -> KVCache:
        """An empty cache for `batch_size` sequences."""
        return KVCache(self.config, batch_size, padding, fixed, like=self.ln_f.weight)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

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
    """Multi-head causal self-attention."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.sdpa = F.scaled_dot_product_attention

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).transpose(1, 3)  # (B, H, 3, T, D)
        q, k, v = qkv.unbind(2)  # (B, H, T, D)
        if cache is None:
            y = self.sdpa(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)  # (B, H, T, D)
        else:
            y = cache.attention(self.layer, q, qkv[:, :, 1:].movedim(2, 0))
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Position-wise MLP: expand to 4 n_embd, GELU, project back."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        # OpenAI uses the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class TiedHead(nn.Module):
    """The output layer, tied to the token embedding; no parameters of its own, as in OpenAI's files."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._tied = (embedding,)  # in a tuple, so that the shared weight is registered once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V)."""
        return F.linear(x, self._tied[0].weight)
