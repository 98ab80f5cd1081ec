"""Faster kernels for the models, all plugged in here: `use` for training and evaluation, `specialize` for sampling.

A model calls `sdpa` for attention without a cache, and `loss`; a linear layer is an `nn.Linear`. By themselves the model files use
torch's functions there, so they can be read without this file. What each kernel brings is measured in docs/performance.md.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from picogpt import hardware
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel

ROWS = 128
"""Queries per block of attention on a CPU: enough to fill its matrix units, few enough to fit its caches."""
LOGITS_BYTES = 1 << 28
"""Upper limit of the logits in memory on a CPU, 256 MiB."""
ROWS_ON_GPU = 1 << 14
"""Rows of logits at a time on a GPU, 1.6 GB in bfloat16: as fast as all at once. At most a 32nd of the GPU's memory."""
ROWS_IN_CACHE = 32
"""The number of rows of logits whose float32 copy fits the caches of a CPU."""
COLUMNS = 64
"""The vocabulary is padded to a multiple of this inside the product, for full tiles of matrix units."""
FEW_ROWS = 4
"""Up to this many rows a kernel for few rows is faster than converting the weights of the layer first."""
WIDENED = 1 << 19
"""Weights converted to float32 at a time, two megabytes, which a cache holds."""


def use(
    model: LanguageModel,
    attention: str = "fastest",
    loss: str = "fused",
    residual: str = "float32",
    compile_for: hardware.Device | None = None,
) -> None:
    """Let `model` train with these kernels: names of ATTENTION and, for GPT-2, of LOSSES and RESIDUALS.

    `compile_for` is the device of a model that will be compiled: kernels that must not be traced are excluded from its graph.
    """
    sdpa, mean_loss = ATTENTION[attention], LOSSES[loss]
    if compile_for:  # not where they are defined: torch.compiler.disable imports the compiler, which takes two seconds
        if attention == "fastest" and (compile_for.type, compile_for.dtype) == ("cpu", "bfloat16"):
            sdpa = torch.compiler.disable(sdpa)  # inside the graph BlockedAttention would not be used
        if loss == "fused":
            mean_loss = torch.compiler.disable(mean_loss)  # its loops would be unrolled, for minutes
    for module in model.modules():
        if hasattr(module, "sdpa"):
            module.sdpa = sdpa
    if isinstance(model, GPT2):
        model.loss = MethodType(mean_loss, model)  # type: ignore[method-assign]
        model.drop.forward = MethodType(RESIDUALS[residual], model.drop)  # type: ignore[method-assign]


def specialize(model: GPT2, layer: type[Bfloat16Linear] | type[PackedLinear] | type[SplitLinear]) -> GPT2:
    """Replace every linear layer of a GPT-2 by `layer`, in place, and the output layer by one with its own copy of the table."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.head = layer(model.wte.weight, None)
    model.loss = MethodType(GPT2.loss, model)  # type: ignore[method-assign]  # of the logits of the new layer
    return model


def fastest_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = True
) -> torch.Tensor:
    """Causal attention by BlockedAttention for training in bfloat16 on a CPU: 83 to 86 ms a layer, torch's flash kernel 130.

    In float32 both take the same time, and torch's less memory.
    """
    blocked = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and torch.is_grad_enabled()
    if blocked and not dropout_p and not torch.compiler.is_compiling():
        return BlockedAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)


def written_out_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = True
) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v with all its intermediate results in memory: q, k, v (B, H, T, D) -> (B, H, T, D)."""
    T, D = q.shape[-2:]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(later, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


class BlockedAttention(torch.autograd.Function):
    """Causal attention for training on a CPU: matrix products over blocks of queries, each only up to its last key.

    It stores the attention weights of the lower triangle of blocks, (T / ROWS + 1) / 2 times B H T ROWS numbers, where a
    flash kernel recomputes them; that and its large matrix products make it faster than torch's kernel. Under autocast
    scores and weights are rounded to bfloat16, as in attention written out; a flash kernel keeps scores in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        ctx.scale = D**-0.5
        q, k, v = (x.reshape(B * H, T, D) for x in (q * ctx.scale, k, v))
        y = torch.empty(B, T, H, D, dtype=v.dtype).transpose(1, 2)  # the memory layout that the output projection reads
        weights = []
        above = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype).triu(1)
        for first in range(0, T, ROWS):
            end = min(first + ROWS, T)
            scores = q[:, first:end] @ k[:, :end].mT  # (BH, rows, end)
            scores[:, :, first:] += above[: end - first, : end - first]
            weights.append(torch.softmax(scores, dim=-1))
            y[:, :, first:end] = (weights[-1] @ v[:, :end]).view(B, H, end - first, D)
        ctx.save_for_backward(q, k, v, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v."""
        q, k, v, *weights = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(q.shape)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)  # sums over blocks, in float32
        for block, weight in enumerate(weights):
            first, end = block * ROWS, block * ROWS + weight.size(1)
            g = grad[:, first:end]
            dv[:, :end] += weight.mT @ g
            # Softmax: dscores = weight * (dweight - sum(weight * dweight)), summed over keys.
            dscores = torch._softmax_backward_data(g @ v[:, :end].mT, weight, -1, weight.dtype)
            dq[:, first:end] = dscores @ k[:, :end]
            dk[:, :end] += dscores.mT @ q[:, first:end]
        return (dq * ctx.scale).view(shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape)


def padded_loss(model: GPT2, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `GPT2.loss`, with the table padded to a multiple of 64 rows, which are excluded from the softmax."""
    weight = model.wte.weight
    logits = F.linear(x.flatten(0, 1), F.pad(weight, (0, 0, 0, -len(weight) % COLUMNS)))
    beyond = torch.arange(logits.size(1), device=x.device) >= len(weight)
    return F.cross_entropy(logits.masked_fill(beyond, -torch.inf), targets.flatten())


def fused_loss(model: GPT2, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `GPT2.loss`: logits and their gradient are made part by part, so they are never in memory as a whole."""
    return linear_cross_entropy(x.flatten(0, 1), model.wte.weight, targets.flatten())


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the logits x weight' against `targets`; a float32 scalar.

    x (N, C), weight (V, C), targets (N,) int64. Under autocast the products use its dtype; softmax and loss are always
    float32. Gradients are computed chunk by chunk in the forward pass: logits are neither stored nor recomputed.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, training: bool
    ) -> torch.Tensor:
        V = weight.size(0)
        padded = -(-V // COLUMNS) * COLUMNS
        inputs = x.detach().to(dtype)
        table = torch.zeros(padded, weight.size(1), dtype=dtype, device=x.device)  # (padded, C)
        table[:V] = weight.detach()
        losses = torch.empty(targets.shape, device=x.device)
        dx = torch.empty_like(inputs) if training else inputs
        dweight: torch.Tensor | None = None
        rows = _rows_at_once(padded * table.element_size(), x.device)
        softmax = _softmax_for(x.device) if training else softmax_loss
        for part, target, loss, dpart in zip(
            inputs.split(rows), targets.split(rows), losses.split(rows), dx.split(rows),
            strict=True,
        ):  # fmt: skip
            logits = part @ table.T  # (rows, padded)
            softmax(logits, V, target, loss, 1 / len(targets) if training else None)
            if training:  # `logits` now holds their gradient
                torch.mm(logits, table, out=dpart)
                dweight = _add_product(dweight, logits.T, part)
        if dweight is not None:
            ctx.save_for_backward(dx, dweight[:V])
            ctx.dtypes = x.dtype, weight.dtype
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (dx * grad).to(ctx.dtypes[0]), (dweight * grad).to(ctx.dtypes[1]), None, None, None


def _rows_at_once(bytes_per_row: int, device: torch.device) -> int:
    if device.type != "cuda":
        return max(ROWS_IN_CACHE, LOGITS_BYTES // bytes_per_row)
    share = torch.cuda.get_device_properties(device).total_memory // 32
    return max(1, min(ROWS_ON_GPU, share // bytes_per_row))


def _softmax_for(device: torch.device) -> Any:
    """For training on a GPU the Triton kernel: 25 of 90 ms a step of GPT-2 on an H100 were torch's softmax, it takes 7 of 126."""
    if device.type == "cuda" and find_spec("triton"):
        from picogpt.models import triton_loss

        return triton_loss.softmax_loss
    return softmax_loss


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a b; from the second product on in float32, as sums in bfloat16 would lose small terms."""
    if a.device.type == "cuda" and a.dtype == torch.bfloat16 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        if total is None:
            total = torch.zeros(a.size(0), b.size(1), device=a.device)
        # This one sums in float32 inside the product.
        return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    product = a @ b
    return product if total is None else total.float().add_(product)


def softmax_loss(
    logits: torch.Tensor, vocab_size: int, targets: torch.Tensor, losses: torch.Tensor, scale: float | None
) -> None:
    """Write the loss of each row of `logits` (N, padded); with `scale`, turn the logits into scale times its gradient.

    The padding columns beyond the vocabulary are excluded from the softmax and get no gradient.
    """
    rows = min(len(logits), ROWS_IN_CACHE if logits.device.type == "cpu" else max(1, LOGITS_BYTES // (4 * vocab_size)))
    buffer = torch.empty(rows, vocab_size, device=logits.device)
    minus_one = losses.new_full((rows, 1), -1)
    if scale is not None:
        logits[:, vocab_size:] = 0
    for block, target, loss in zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True):
        log_p = buffer[: len(block)]
        torch.log_softmax(block[:, :vocab_size], dim=-1, dtype=torch.float32, out=log_p)
        torch.neg(log_p.gather(1, target[:, None])[:, 0], out=loss)
        if scale is not None:
            gradient = log_p.exp_().scatter_add_(1, target[:, None], minus_one)  # softmax, less one at the target
            torch.mul(gradient, scale, out=block[:, :vocab_size])


def bfloat16_residual(drop: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """The residual stream begins in bfloat16 and stays there: half the memory traffic of its additions and norms."""
    return nn.Dropout.forward(drop, x).bfloat16()


ATTENTION: dict[str, Any] = {
    "written_out": written_out_attention,
    "flash": F.scaled_dot_product_attention,
    "fastest": fastest_attention,
}
LOSSES: dict[str, Any] = {"plain": GPT2.loss, "padded": padded_loss, "fused": fused_loss}
RESIDUALS: dict[str, Any] = {"float32": nn.Dropout.forward, "bfloat16": bfloat16_residual}


class Bfloat16Linear(nn.Module):
    """A linear layer in bfloat16 for a CPU without instructions for it: 16 rows take 1.8 ms, by torch's product 4.3."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight.detach())  # (out, in)
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (N, in), bfloat16, times weight': (N, out)."""
        return bfloat16_product(rows, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), bfloat16."""
        y = self.product(x.reshape(-1, x.size(-1)).bfloat16())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Linear(Bfloat16Linear):
    """A linear layer with int8 weights and one scale per output, for sampling: 77 tokens/s on a CPU, float32 37."""

    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        super().__init__((weight.float() / scale[:, None]).round().to(torch.int8), bias)
        self.register_buffer("scale", scale.bfloat16())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (N, in), bfloat16, times weight': (N, out)."""
        # Where a row ends within a vector register, torch's kernel also reads the memory behind it.
        whole = rows.size(1) % 64 == 0
        if whole and len(rows) <= FEW_ROWS and rows.device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm"):
            return torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return bfloat16_product(rows, self.weight.bfloat16()) * self.scale


class SplitLinear(nn.Module):
    """A linear layer that adds its bias after the product, which torch.compile then turns into a fast kernel for one row."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight.detach())  # (out, in)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """A linear layer with weights in oneDNN's memory layout, for sampling on a CPU: 17 to 19 ms a token, row-major 28 to 30."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())  # opaque, (out, in)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")


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


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the oneDNN operators of PackedLinear, and this CPU the instructions oneDNN needs for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
