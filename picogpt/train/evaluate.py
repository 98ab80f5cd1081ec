"""Exact evaluation: every token of a split once, in order."""

from __future__ import annotations

import torch

from picogpt.data.sampler import Ids, sequential
from picogpt.hardware import Device
from picogpt.models.language_model import LanguageModel
from picogpt.train.distributed import World

TOKENS_PER_PASS = 1 << 13


def autocast(device: Device) -> torch.autocast:
    """Autocast of matrix products to the device's dtype; everything else is float32."""
    dtype = getattr(torch, device.dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def evaluate(
    model: LanguageModel, ids: Ids, device: Device, batch_size: int | None = None, world: World | None = None
) -> float:
    """Mean cross-entropy, in nats per token, over the N - 1 targets of `ids` (N,).

    The tokens are split into windows of the model's block size that do not overlap; the context of a prediction is what
    precedes it in its window. `batch_size` and the number of ranks change speed and memory, not the result.
    """
    world = world or World()
    block_size = model.config.block_size
    if batch_size is None:
        batch_size = max(1, TOKENS_PER_PASS // block_size)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device.torch_name if device.type != "mps" else "cpu")
    for turn, (inputs, targets) in enumerate(sequential(ids, block_size, batch_size)):
        if turn % world.size != world.rank:
            continue
        x, y = (torch.from_numpy(a).to(device.torch_name) for a in (inputs, targets))
        with autocast(device):
            total += model(x, y).to(total) * targets.size
    model.train(was_training)
    return world.sum(total.item()) / (len(ids) - 1)
