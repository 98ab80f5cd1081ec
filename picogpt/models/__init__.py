"""Models, one file each: made from their settings, loaded from checkpoints."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

import torch

from picogpt.config import Experiment, ModelConfig
from picogpt.data.tokenizers import Tokenizer
from picogpt.models.language_model import LanguageModel
from picogpt.registry import MODELS


def build(config: ModelConfig, vocab_size: int, seed: int) -> LanguageModel:
    """A model with initial weights, on the CPU, with the fastest kernels; the same weights for the same seed."""
    from picogpt.models import kernels

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resolve_name(MODELS[config.kind].network)(config, vocab_size)
    kernels.use(model)
    return model


def load(path: str | Path, tokenizer_folder: str | Path | None = None) -> tuple[LanguageModel, Tokenizer]:
    """A trained model, in evaluation mode on the CPU, and its tokenizer, from a `best.pt`.

    The tokenizer of a character model is searched beside the checkpoint's folders and in `weights/`, or read from
    `tokenizer_folder`; GPT-2's is in `resources/`, or is fetched.

    Raises PicogptError when one of the two is missing, damaged, or of another training.
    """
    from picogpt.checkpoint import load_weights

    weights = load_weights(path)
    return weights.model(), weights.tokenizer(tokenizer_folder)


def initial(experiment: Experiment, vocab_size: int) -> LanguageModel:
    """The model at the start of training: with weights drawn from the seed, or with OpenAI's.

    Raises PicogptError when OpenAI's weights are not available, UsageError when there are none of that shape.
    """
    if experiment.train.init == "scratch":
        return build(experiment.model, vocab_size, experiment.train.seed)
    from picogpt.models import pretrained

    return pretrained.load_for(experiment.model, vocab_size)
