"""Optimizers and the learning-rate schedule.

With optimizer=adamw AdamW updates all parameters; with optimizer=muon Muon updates the matrices of the blocks (2-D parameters
named h.*, if there are any), and AdamW the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from picogpt import hardware
from picogpt.config import TrainConfig

# Coefficients (a, b, c) of three quintic Newton-Schulz iterations, each the minimax polynomial for the interval that the one
# before leaves (Amsel et al. 2025, arXiv:2505.16932): singular values in [0.005, 1] end in [0.5, 1.5]. Five iterations with
# the fixed coefficients of Muon's source amplify small singular values as much, and cost two thirds more.
NEWTON_SCHULZ = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))
NORM_MARGIN = 1.02
"""The first polynomial grows fast beyond 1, so rounding must not leave a singular value there."""


class Optimizer:
    """The optimizers of a model and their common schedule."""

    def __init__(self, model: nn.Module, config: TrainConfig, total_steps: int, fused: bool = True):
        """`fused`: one kernel for all of AdamW; otherwise torch's own choice."""
        self.config, self.total_steps = config, total_steps
        embeddings, matrices, rest = _group_parameters(model)
        groups = [
            {"params": embeddings, "lr": config.embedding_learning_rate or config.learning_rate, "weight_decay": 0.0},
            {"params": rest, "lr": config.learning_rate, "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon" and matrices:
            self.parts.append(Muon(matrices, config.matrix_learning_rate, config.momentum, config.weight_decay))
        else:
            groups.append({"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay})
        groups = [group for group in groups if group["params"]]
        self.parts.append(torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused or None))
        self._peak_rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, step: int) -> None:
        """Update the weights as step number `step`, counted from 0, and clear the gradients."""
        factor = learning_rate_factor(step, self.total_steps, self.config)
        for part, peaks in zip(self.parts, self._peak_rates, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state to resume from."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, with the update of each matrix replaced by the nearest orthogonal matrix.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices, those of the same shape as one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                buffers: list[torch.Tensor] = [
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params
                ]
                gradients = [p.grad for p in params if p.grad is not None]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
                # Muon's scale: lr * sqrt(max(1, rows / columns)).
                lr = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-lr)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of each matrix, (N, rows, columns), approximately: singular values land near 1.

    bfloat16 suffices, because the iteration corrects its own rounding; a CPU without bfloat16 instructions, where such
    products are many times slower, uses float32.
    """
    x = matrices.bfloat16() if hardware.multiplies_bfloat16(matrices.device.type) else matrices
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (NORM_MARGIN * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Fraction of the peak learning rate at `step` of `total_steps`.

    It rises to 1 in the warm-up, stays there until the last `decay_fraction` of all steps, and then falls towards
    `final_learning_rate_fraction` as the schedule says.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    remaining = min(1.0, (total_steps - step) / (config.decay_fraction * total_steps))  # of the decay, from 1 to near 0
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            height = remaining
        case "cosine":
            height = 0.5 * (1 - math.cos(math.pi * remaining))
    return config.final_learning_rate_fraction + (1 - config.final_learning_rate_fraction) * height


def _group_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters as (embeddings, matrices of the blocks, the rest: output layer, gains and biases)."""
    embedding_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings, matrices, rest = [], [], []
    for name, param in model.named_parameters():
        if id(param) in embedding_ids:
            embeddings.append(param)
        elif param.dim() == 2 and name.startswith("h."):
            matrices.append(param)
        else:
            rest.append(param)
    return embeddings, matrices, rest
