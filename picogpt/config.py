"""The settings of an experiment: typed, checked, documented; the one source of truth.

A YAML file becomes an `Experiment`; `--set train.seed=7` overrides a value.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from picogpt.errors import UsageError
from picogpt.files import read_text
from picogpt.registry import GPT2_SIZES, MODELS, RUNGS, settings_class

MOST = 1 << 20
"""Sequences of a step. Far more could not even be counted, in the time that anybody waits for an error."""
SHORT = reprlib.Repr()
SHORT.maxlevel = 2
Decay = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Base of all settings: unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        numbers = (int, float, int | None, float | None)
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in numbers:
            raise ValueError(
                f"a number is needed, and {str(value).lower()} (YAML: yes, no, on, off too) is a truth value"
            )
        return value


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field with a default value, a description and pydantic's limits."""
    return Field(default, description=description, **limits)


class ModelConfig(Settings):
    """Base of the settings of a model; `kind` is its name in the registry."""

    kind: str
    block_size: int


class CharBigramConfig(ModelConfig):
    """A table of logits: row, the current character; column, the next one."""

    kind: Literal["char-bigram"]
    block_size: int = setting(256, "length of a training sequence, in characters; only the last one is used", ge=1)


class CharTransformerConfig(ModelConfig):
    """A decoder-only transformer over characters."""

    kind: Literal["char-transformer"]
    n_layer: int = setting(4, "number of blocks", ge=1, le=4096)
    n_head: int = setting(4, "attention heads of a block", ge=1)
    n_embd: int = setting(256, "width of the residual stream", ge=2)
    block_size: int = setting(256, "context length, in characters", ge=2)
    dropout: float = setting(0.0, "dropout on the embedding and on each branch", ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> CharTransformerConfig:
        if self.n_embd % (2 * self.n_head):  # rotary embeddings pair the two halves of each head
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head={2 * self.n_head}")
        return self


class GPT2Config(ModelConfig):
    """GPT-2, of a published size or of any other."""

    kind: Literal["gpt2"]
    size: Literal["124M", "355M", "774M", "1558M"] | None = setting(
        None, "a published size, 124M, 355M, 774M or 1558M: sets n_layer, n_head, n_embd", exclude=True
    )
    n_layer: int = setting(12, "number of blocks", ge=1, le=4096)
    n_head: int = setting(12, "attention heads of a block", ge=1)
    n_embd: int = setting(768, "width of the residual stream", ge=1)
    block_size: int = setting(1024, "context length, in tokens", ge=2)
    dropout: float = setting(0.0, "dropout on the embedding, the attention and each branch", ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, tree: Any) -> Any:
        # Equal models have equal settings, so the size itself is not kept.
        if isinstance(tree, dict) and (shape := GPT2_SIZES.get(str(tree.get("size")))):
            return {**tree, "size": None, **dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True))}
        return tree

    @model_validator(mode="after")
    def _heads_fit(self) -> GPT2Config:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        return self


class TrainConfig(Settings):
    """Everything that changes what is learned."""

    seed: int = setting(1337, "seed of the initial weights, the data order and dropout", ge=0, lt=2**31)
    init: Literal["scratch", "pretrained"] = setting("scratch", "initial weights; pretrained: OpenAI's (gpt2 only)")
    epochs: float | None = setting(None, "passes over the training text (this or steps)", gt=0)
    steps: int | None = setting(None, "optimizer steps (this or epochs)", ge=1)
    batch_size: int = setting(16, "sequences per optimizer step, over all ranks", ge=1, le=MOST)
    micro_batch_size: int | None = setting(None, "sequences of a forward pass on a rank; default: by device", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products; auto: bfloat16 where fast")
    residual_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of GPT-2's residual stream, where matrix products are in bfloat16: half its memory traffic"
    )
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: for the matrices of the blocks; AdamW for the rest")
    learning_rate: float = setting(3e-3, "peak learning rate of AdamW", gt=0)
    embedding_learning_rate: float | None = setting(None, "for the embeddings; default: learning_rate", gt=0)
    matrix_learning_rate: float = setting(0.02, "peak learning rate of Muon", gt=0)
    betas: tuple[Decay, Decay] = setting((0.9, 0.95), "AdamW's decay rates of the two moments")
    eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    momentum: float = setting(0.95, "Muon's Nesterov momentum", ge=0, lt=1)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices; never of gains, biases or embeddings", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "how it decays; constant: not at all")
    warmup_steps: int = setting(0, "steps of linear warm-up", ge=0)
    decay_fraction: float = setting(1.0, "last share of the steps, in which the rate decays", gt=0, le=1)
    final_learning_rate_fraction: float = setting(0.0, "last rate / peak rate; not of constant", ge=0, le=1)
    grad_clip: float = setting(0.0, "clip the global gradient norm to this; 0: no clipping", ge=0)
    eval_interval: int = setting(100, "steps between evaluations on the whole validation text", ge=1)
    eval_train: Literal["none", "part", "whole"] = setting(
        "none", "also evaluate on the training text, before and after; part: as many tokens as for validation"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class RuntimeConfig(Settings):
    """How to run: where, how fast, how chatty. A run can be resumed under other values."""

    device: str = setting("auto", "device: auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "torch.compile; auto: for 10 million tokens and more, where it works; a shorter training would wait longer",
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        # YAML reads a bare on or off as a boolean.
        return ("off", "on")[value] if isinstance(value, bool) else value

    threads: int = setting(0, "CPU threads; 0: one per core", ge=0, le=4096)
    log_interval: int = setting(10, "steps between lines of the metrics file", ge=1)
    checkpoint_interval: int = setting(100, "steps between checkpoints (last.pt)", ge=1)
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "gets the metrics too; tensorboard writes to the folder of the run"
    )


class Experiment(Settings):
    """A model and how to train it: one file of `config/models/`."""

    model: SerializeAsAny[ModelConfig]
    train: TrainConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @field_validator("model", mode="wrap")
    @classmethod
    def _by_kind(cls, value: Any, check: Callable[[Any], ModelConfig]) -> ModelConfig:
        if not isinstance(value, dict):
            return check(value)
        if value.get("kind") not in list(MODELS):  # of any type, also one that cannot be a key
            raise ValueError(f"there is no kind {value.get('kind')!r}: there are {', '.join(MODELS)}")
        return settings_class(value["kind"]).model_validate(value)

    def fingerprint(self, vocab_size: int, data_sha256: str) -> str:
        """Hash of all that decides the learned weights: model, training, data; not of `runtime`."""
        train = self.train.model_dump(exclude={"micro_batch_size"})
        if train["residual_dtype"] == "float32":  # as in runs that are older than this setting
            del train["residual_dtype"]
        identity = [self.model.model_dump(), train, vocab_size, data_sha256]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class MachineConfig(Settings):
    """A machine of the write-up, `config/hardware/NAME.yaml`: how to tell it, and what it trains on it."""

    title: str = Field(description="name in figures")
    device: str = Field(description="regular expression that matches the full name of its device")
    kind: Literal["cpu", "cuda"] = Field(description="device type of torch")
    nodes: int = Field(1, ge=1, description="number of nodes")
    ranks: int = Field(1, ge=1, description="ranks per node, each with a GPU of its own")
    batch_size: int = Field(ge=1, le=MOST, description="sequences per optimizer step, over all ranks")
    micro_batch_size: int = Field(ge=1, description="sequences of one forward pass on one rank")
    block_size: int = Field(1024, ge=2, description="tokens per sequence")
    warmup_steps: int = Field(ge=1, description="untimed steps at the start; compilation happens in the first")
    steps: int = Field(ge=3, description="timed steps, each timed separately")
    rungs: list[str] = Field(description="optimizations that the device has, each including those before it")
    training: str | None = Field(None, pattern=r"^[a-z0-9_]+$", description="long training: a name in config/models/")

    @model_validator(mode="after")
    def _consistent(self) -> MachineConfig:
        if self.rungs[:1] != ["baseline"] or self.rungs != [rung for rung in RUNGS if rung in self.rungs]:
            raise ValueError(f"rungs must begin with baseline, be of these and keep this order: {', '.join(RUNGS)}")
        if self.batch_size % (self.world_size * self.micro_batch_size):
            one_pass = f"micro_batch_size={self.micro_batch_size} on {self.world_size} ranks"
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of {one_pass}")
        try:
            re.compile(self.device)
        except re.error as error:
            raise ValueError(f"device={self.device!r} is no regular expression: {error}") from error
        return self

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks


AnySettings = TypeVar("AnySettings", bound=Settings)


def config_folder() -> Path:
    """`config/`: $PICOGPT_CONFIG (UsageError if it is not a folder), or that of the source tree or the installed package."""
    if chosen := os.environ.get("PICOGPT_CONFIG"):
        if not Path(chosen).is_dir():
            raise UsageError(f"PICOGPT_CONFIG={chosen} is not a folder: unset it, or set it to a folder like config/")
        return Path(chosen)
    installed = Path(__file__).resolve().parent / "_config"
    return installed if installed.is_dir() else installed.parents[1] / "config"


def model_file(name: str | Path) -> str | Path:
    """The settings file that `name` stands for: a path, or the name of a file in `config/models/` such as gpt2_fineweb.

    A model without a file, which has its defaults, stays a name. Raises UsageError, listing the names, when there is none.
    """
    path, folder = Path(name), config_folder() / "models"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    file = folder / f"{str(name).replace('-', '_')}.yaml"
    if file.exists():
        return file
    if name in MODELS:
        return name
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise UsageError(f"there are no settings called {name}: give the path of a YAML file, or one of {names}")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment, a file or the defaults of a model, and apply `overrides` like "train.seed=7" (values in YAML).

    Raises UsageError naming the file, the key and what is allowed; PicogptError when it cannot be read.
    """
    tree = {"model": {"kind": path}, "train": {}} if path in MODELS else read_yaml(path)
    for override in overrides:
        _override(tree, override)
    source = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
    return parse(Experiment, tree, source)


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, as YAML does; PyYAML would take the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, stream: IO[str] | None = None) -> dict:
    """Read a YAML mapping from `path`, or from `stream`, which `path` then names in errors. Raises like `load_experiment`."""
    try:
        tree = yaml.load(stream or read_text(path), UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    return tree


def parse(cls: type[AnySettings], tree: dict, source: str) -> AnySettings:
    """Check `tree` against `cls`. Raises UsageError that names each wrong key or value and what is allowed."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        wrong = [_explain(cls, tree, detail) for detail in error.errors()]
        raise UsageError("\n  ".join([f"{source}:", *wrong])) from error


def describe(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key after `prefix`, default, description) of every setting of `cls`."""
    for name, field in cls.model_fields.items():
        default = "" if field.is_required() else json.dumps(field.default)
        choices = f" [{'|'.join(get_args(field.annotation))}]" if get_origin(field.annotation) is Literal else ""
        yield prefix + name, default, (field.description or "") + choices


def _override(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r} is not of the form key=value, as in train.seed=7")
    *parents, last = key.split(".")
    try:
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
        node[last] = yaml.load(value, UniqueKeys)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"--set {override!r}: {key} lies inside a value that is not a group of settings") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise UsageError(f"--set {override!r}: the value is not YAML") from error
    # Of the two ways to say how long to train, the one given last holds.
    if key in ("train.steps", "train.epochs"):
        node.pop("epochs" if last == "steps" else "steps", None)


def _explain(cls: Any, tree: dict, detail: Any) -> str:
    """One error of pydantic in a line: the key, the value and what is allowed."""
    # pydantic puts the branch of a union of types into the location. It is no key of the file.
    branch = re.compile(r"str|int|constrained-\w+|(list|dict|literal)\[.*\]")
    path = [str(part) for part in detail["loc"] if not branch.fullmatch(str(part))]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        for part in path[:-1]:
            tree = tree[part]
            cls = settings_class(tree["kind"]) if part == "model" else cls.model_fields[part].annotation
        return f"{key}: unknown key{did_you_mean(path[-1], cls.model_fields)}; allowed: {', '.join(cls.model_fields)}"
    if detail["type"] == "missing":
        return f"{key}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}"
    value = detail["input"]
    # Not all of what is nested: aliases in a YAML file can make it grow without bound.
    shown = SHORT.repr(value) if isinstance(value, dict | list) else json.dumps(value, default=str)
    return f"{key}={shown}: {message[0].lower()}{message[1:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the most similar of the `known` words, for an error message; empty where none is similar."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
