"""Linear layers for sampling, where the cost of a token is reading every weight once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from picogpt import hardware
from picogpt.models.gpt2 import GPT2

FEW_ROWS = 4
"""Up to this many rows the int8 kernel is faster than converting the weights to bfloat16 first."""
WIDENED = 1 << 19
"""Weights converted to float32 at a time, two megabytes, which a cache holds."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output; inputs and outputs are bfloat16."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale.bfloat16())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), bfloat16."""
        rows = x.reshape(-1, x.size(-1)).bfloat16()
        if len(rows) <= FEW_ROWS and rows.device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm"):
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = bfloat16_product(rows, self.weight.bfloat16()) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A linear layer with weights in oneDNN's memory layout, which a CPU reads 1.5 times as fast as row-major weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())  # opaque, (out, in)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")


class Bfloat16Linear(nn.Module):
    """A linear layer in bfloat16 for a CPU that has no instructions for it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight.detach())  # (out, in)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        y = bfloat16_product(x.reshape(-1, x.size(-1)), self.weight)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def bfloat16_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N, in) times weight (out, in)', both bfloat16, sums in float32, rounded to bfloat16: (N, out).

    On a CPU without bfloat16 instructions many rows are multiplied in float32: the same sums, several times as fast.
    """
    if len(x) <= FEW_ROWS or hardware.multiplies_bfloat16(x.device.type):
        return F.linear(x, weight)
    rows = x.float()
    # In pieces, so that the float32 copy is used while it is in the cache.
    y = x.new_empty(len(x), len(weight))
    size = max(1, WIDENED // weight.size(1))
    for part, out in zip(weight.split(size), y.split(size, dim=1), strict=True):
        out.copy_(F.linear(rows, part.float()))
    return y


def specialize(model: GPT2, layer: type[Int8Linear] | type[PackedLinear] | type[Bfloat16Linear]) -> GPT2:
    """Replace every linear layer of a GPT-2 by `layer`, in place, and the output layer by one with its own copy of the table."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.head = layer(model.wte.weight, None)
    return model


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the oneDNN operators of PackedLinear, and this CPU the instructions oneDNN needs for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
