"""The interface of a model for training, evaluation and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from picogpt.errors import PicogptError

if TYPE_CHECKING:
    from picogpt.config import ModelConfig
    from picogpt.data.sampler import Ids
    from picogpt.models.cache import KVCache


class LanguageModel(nn.Module):
    """Predicts the next token at every position.

    `forward(idx, targets=None, cache=None)` takes idx (B, T), int64, T at most `config.block_size`, and returns
    logits (B, T, V); with targets (B, T) the mean cross-entropy in nats, float32; with a cache, whose tokens come
    before idx, the logits of the last position alone, (B, 1, V).
    """

    config: ModelConfig

    def new_cache(self, batch_size: int, padding: torch.Tensor | None = None, fixed: bool = False) -> KVCache | None:
        """An empty KV cache for decoding; None for a model that has no use for one."""
        return None

    def parameter_count(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int | None:
        """Floating-point operations of training on one token, forward and backward; None where they are not counted."""
        return None

    def lower_bound(self, ids: Ids) -> float | None:
        """The lowest loss on `ids` that a model of this kind can reach, in nats per token; None where it is not known."""
        return None

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """See the class."""
        raise NotImplementedError


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules without memory and without initial weights: to compare shapes, or to be filled from a file."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    # On the meta device torch's init functions import torch._dynamo, which takes 1 to 2 s, so they are skipped.
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.normal_ or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def check_tensors(model: nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Raises PicogptError where the tensors of `state` are not those of `model`."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, not {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    if problems:
        raise PicogptError(f"{source} does not fit the model: {'; '.join(sorted(problems)[:5])}")
