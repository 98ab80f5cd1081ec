"""What there is to choose from, each said once: models, GPT-2's sizes, rungs of the training ladder. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from picogpt.hardware import Device


class Model(NamedTuple):
    """A model: where its settings and its network are defined, "module:class", and the tokenizer it is trained with."""

    settings: str
    network: str
    tokenizer: Literal["char", "gpt2"]


MODELS = {
    "char-bigram": Model("picogpt.config:CharBigramConfig", "picogpt.models.bigram:CharBigram", "char"),
    "char-transformer": Model(
        "picogpt.config:CharTransformerConfig", "picogpt.models.char_transformer:CharTransformer", "char"
    ),
    "gpt2": Model("picogpt.config:GPT2Config", "picogpt.models.gpt2:GPT2", "gpt2"),
}


def settings_class(model: str) -> Any:
    """The class of a model's settings."""
    return resolve_name(MODELS[model].settings)


GPT2_SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
"""n_layer, n_head and n_embd of the published GPT-2s, by number of parameters."""
PRETRAINED = ("gpt2-pretrained", "gpt2-pretrained-medium", "gpt2-pretrained-large", "gpt2-pretrained-xl")
"""Names of OpenAI's models on the command line."""


@dataclass(frozen=True)
class Rung:
    """An optimization of the training ladder: its label in figures, and what a device must have for it.

    `changes` are fields of `picogpt.train.step.Switches`, set on top of those of earlier rungs; a later value replaces an earlier one.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    needs: Literal["", "bfloat16", "TF32", "GPU", "CPU"] = ""

    def why_unsupported(self, device: Device) -> str | None:
        """Why `device` cannot run this rung, or None if it can."""
        on_gpu, bfloat16 = device.type == "cuda", device.dtype == "bfloat16"
        reasons = {
            "bfloat16": None if bfloat16 else f"{device.name} has no instructions for bfloat16",
            "TF32": None if on_gpu and bfloat16 else f"{device.name} has no TF32",  # both came with Ampere
            "GPU": None if on_gpu else f"{device.name} is no GPU",
            "CPU": "not needed on a GPU: torch keeps freed GPU memory already" if on_gpu else None,
        }
        return reasons.get(self.needs)


RUNGS = {
    "baseline": Rung("baseline: float32, AdamW"),
    "tf32": Rung("+ TF32", {"tf32": True}, "TF32"),
    "bf16": Rung("+ bfloat16 autocast", {"bfloat16": True}, "bfloat16"),
    "compile": Rung("+ torch.compile", {"compile": "default"}),
    "flash": Rung("+ flash attention", {"attention": "flash"}),
    "padded_vocab": Rung("+ padded vocabulary", {"loss": "padded"}),
    "fused_adamw": Rung("+ fused AdamW, decay groups", {"fused_optimizer": True}),
    "fused_loss": Rung("+ fused head and loss", {"loss": "fused"}),
    "best_attention": Rung("+ fastest attention kernel", {"attention": "fastest"}),
    "bf16_residual": Rung("+ bfloat16 residual stream", {"residual": "bfloat16"}, "bfloat16"),
    "kept_memory": Rung("+ malloc keeps freed memory", {"keep_memory": True}, "CPU"),
    "cuda_graphs": Rung("+ CUDA graphs", {"compile": "reduce-overhead"}, "GPU"),
    "max_autotune": Rung("+ max-autotune", {"compile": "max-autotune"}, "GPU"),
}
"""In the order in which they are added."""
