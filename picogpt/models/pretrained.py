"""Loads OpenAI's weights into our GPT-2.

Their files are safetensors, which hold tensors only and cannot run code. OpenAI stores linear layers as (in, out), we as
(out, in); everything else is the same.
"""

from __future__ import annotations

from pathlib import Path

import torch

from picogpt import models
from picogpt.config import GPT2Config, ModelConfig
from picogpt.data import fetch
from picogpt.errors import PicogptError, UsageError
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel, check_tensors, shapes_only
from picogpt.registry import GPT2_SIZES

VOCAB_SIZE = 50257
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers of the causal mask in older files."""


def load(name: str, path: Path | None = None) -> GPT2:
    """The pretrained model `name`, on the CPU, in evaluation mode, from `path` or downloaded. Raises like `fetch.fetch_pretrained`."""
    return load_safetensors(path or fetch.fetch_pretrained(name), fetch.pretrained()[name].config(), VOCAB_SIZE)


def load_for(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """OpenAI's model of the shape of `config`, with its dropout, in training mode. Raises like `name_for` and `fetch.fetch_pretrained`."""
    path = fetch.fetch_pretrained(name_for(config, vocab_size))
    assert isinstance(config, GPT2Config)  # ensured by name_for
    return load_safetensors(path, config, vocab_size).train()


def name_for(config: ModelConfig, vocab_size: int) -> str:
    """The name of the pretrained model of the shape of `config`. Raises UsageError when OpenAI published none."""
    if not isinstance(config, GPT2Config):
        raise UsageError(f"train.init=pretrained: there are pretrained weights of gpt2, not of {config.kind}")
    for name, asset in fetch.pretrained().items():
        if asset.config() == config.model_copy(update={"dropout": 0.0}) and vocab_size == VOCAB_SIZE:
            return name
    sizes = "; ".join(f"{name}: {layers}, {heads}, {width}" for name, (layers, heads, width) in GPT2_SIZES.items())
    raise UsageError(
        f"no pretrained weights fit n_layer={config.n_layer}, n_head={config.n_head}, n_embd={config.n_embd},"
        f" block_size={config.block_size} with {vocab_size:,} tokens; there are, with 1,024 and 50,257: {sizes}"
    )


def load_safetensors(path: Path, config: GPT2Config, vocab_size: int) -> GPT2:
    """A GPT-2 from a safetensors file with OpenAI's names, with or without `transformer.` before them.

    Raises PicogptError when the file is damaged, or its tensors are not those of the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise PicogptError(f"{path} is not a complete safetensors file: {error}") from error
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise PicogptError(f"{path} does not fit the model: its lm_head.weight is not wte.weight; GPT-2's head is tied")
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(MASKS):
            continue
        if not tensor.is_floating_point():
            raise PicogptError(
                f"{path} does not fit the model: {name} holds {tensor.dtype}, not floating-point numbers"
            )
        transposed = name.endswith(TRANSPOSED) and tensor.dim() == 2
        state[name] = tensor.float().T.contiguous() if transposed else tensor.float()
    with shapes_only():
        model = models.build(config, vocab_size, 0)
    check_tensors(model, state, path)
    model.load_state_dict(state, assign=True)
    model.eval()
    assert isinstance(model, GPT2)
    return model
