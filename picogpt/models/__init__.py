"""Models, one per file, built from the `kind` of their configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from picogpt.config import CharBigramConfig, CharTransformerConfig, Experiment, GPT2Config, ModelConfig
from picogpt.errors import UsageError
from picogpt.models.bigram import CharBigram
from picogpt.models.char_transformer import CharTransformer
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel
from picogpt.models.loss import linear_cross_entropy


def build(config: ModelConfig, vocab_size: int, seed: int) -> LanguageModel:
    """A model with initial weights, on the CPU; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, CharBigramConfig):
            return CharBigram(config, vocab_size)
        if isinstance(config, CharTransformerConfig):
            return CharTransformer(config, vocab_size)
        return GPT2(config, vocab_size)


def compiled(model: LanguageModel, mode: str | None = None) -> Callable[..., torch.Tensor]:
    """`model` under torch.compile, for training; `mode` as torch names it.

    GPT-2's chunked loss stays outside of the graph: its loops would be unrolled, which takes minutes to compile. It is
    marked here and not where it is defined, because importing the compiler takes two seconds.
    """
    if isinstance(model, GPT2) and model.loss is linear_cross_entropy:
        model.loss = torch.compiler.disable(linear_cross_entropy)
    return torch.compile(model, mode=mode)


def initial(experiment: Experiment, vocab_size: int) -> LanguageModel:
    """The model at the start of training: with weights drawn from the seed, or with OpenAI's.

    Raises PicogptError when OpenAI's weights are not available, UsageError when there are none of that shape.
    """
    name = source(experiment, vocab_size)
    if name == "scratch":
        return build(experiment.model, vocab_size, experiment.train.seed)
    from picogpt.models import pretrained

    assert isinstance(experiment.model, GPT2Config)  # ensured by source
    return pretrained.load_for(name, experiment.model, vocab_size)


def source(experiment: Experiment, vocab_size: int) -> str:
    """Where the initial weights come from: scratch, or the name of OpenAI's. Does not download them.

    Raises UsageError when there are none of that shape.
    """
    if experiment.train.init == "scratch":
        return "scratch"
    from picogpt.models import pretrained  # imports the hub client, which nothing else needs

    if not isinstance(experiment.model, GPT2Config):
        raise UsageError(f"train.init=pretrained: there are pretrained weights of gpt2, not of {experiment.model.kind}")
    return pretrained.name_for(experiment.model, vocab_size)
