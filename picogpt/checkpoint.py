"""Checkpoints: `best.pt`, the weights to sample from, and `last.pt`, the state to resume from.

Both hold tensors and plain values only and load with `weights_only=True`; nothing in them is ever executed.
"""

from __future__ import annotations

import pickle
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from picogpt import models
from picogpt.config import Experiment, parse
from picogpt.data.tokenizers import CharTokenizer, Tokenizer
from picogpt.errors import PicogptError, UsageError, is_out_of_memory
from picogpt.files import LFS_POINTER, atomic_write, place
from picogpt.models.language_model import LanguageModel, check_tensors, shapes_only
from picogpt.registry import MODELS

HEADER = {"format": "picogpt-checkpoint", "version": 1}
WEIGHTS: dict[str, type] = {
    "experiment": dict,
    "vocab_size": int,
    "corpus": dict,
    "step": int,
    "val_loss": float,
    "model": dict,
}
STATE: dict[str, type] = {"fingerprint": str, "progress": dict, "model": dict, "optimizer": list}
CONTENTS: dict[Any, tuple[str, dict[str, type]]] = {
    "weights": ("weights only (best.pt)", WEIGHTS),
    "state": ("the state of a training (last.pt)", STATE),
}


@dataclass(frozen=True)
class Weights:
    """A trained model as read from `best.pt`."""

    path: Path
    experiment: Experiment
    vocab_size: int
    corpus: dict[str, Any]
    step: int
    val_loss: float
    state: dict[str, torch.Tensor]

    def model(self, untrained: bool = False) -> LanguageModel:
        """The model, in evaluation mode; with `untrained`, with its initial weights.

        Raises PicogptError when the tensors are not those of the model.
        """
        with shapes_only():  # compare shapes before allocating: a hostile file may claim any size
            model = models.build(self.experiment.model, self.vocab_size, 0)
        check_tensors(model, self.state, self.path)
        if untrained:
            return models.initial(self.experiment, self.vocab_size).eval()
        if any(True for _ in model.buffers()):  # buffers that are not saved have to be computed
            model = models.build(self.experiment.model, self.vocab_size, 0)
        model.load_state_dict(self.state, assign=True)  # skips drawing initial weights, which takes a second
        return model.eval()

    def tokenizer(self, folder: str | Path | None = None) -> Tokenizer:
        """The tokenizer that the model was trained with, as described at `models.load`. Raises PicogptError without it."""
        wanted = self.corpus.get("tokenizer_sha256")
        if MODELS[self.experiment.model.kind].tokenizer == "gpt2":
            from picogpt.data.bpe import GPT2Tokenizer

            tokenizer: Tokenizer = GPT2Tokenizer.fetched("resources")
            if tokenizer.sha256 != wanted:
                raise PicogptError(f"{self.path} was trained with another tokenizer than GPT-2's (sha256 {wanted})")
            return tokenizer
        for candidate in [Path(folder)] if folder else self._tokenizer_folders():
            try:
                tokenizer = CharTokenizer.load(candidate)
            except PicogptError:
                if folder:
                    raise
                continue  # one of several; another may fit
            if tokenizer.sha256 == wanted:
                return tokenizer
        if folder:
            raise PicogptError(f"the tokenizer in {folder} is not the one that {self.path} was trained with")
        raise PicogptError(
            f"no tokenizer in weights/char_tokenizer/ fits {self.path}: give its folder with --tokenizer-dir"
        )

    def _tokenizer_folders(self) -> Iterator[Path]:
        for parent in (Path("weights"), *self.path.resolve().parents):
            yield from (file.parent for file in sorted(parent.glob("char_tokenizer/*/tokenizer.json")))


def save_weights(
    path: Path,
    state: dict[str, torch.Tensor],
    experiment: Experiment,
    vocab_size: int,
    corpus: dict,
    step: int,
    val_loss: float,
) -> None:
    """Write `best.pt` atomically: the state_dict of a model and what belongs to it."""
    values = (experiment.model_dump(), vocab_size, corpus, step, val_loss, state)
    _save(path, {"content": "weights", **dict(zip(WEIGHTS, values, strict=True))})


def load_weights(path: str | Path, kind: str | None = None) -> Weights:
    """Read a `best.pt`.

    Raises PicogptError when it is missing, torn, holds code, or is of another model than `kind`.
    """
    path = Path(path)
    tree = _load(path, "weights")
    try:
        experiment = parse(Experiment, _lists(tree["experiment"]), f"{path}, experiment")
    except UsageError as error:  # a broken file, not a wrong request
        raise PicogptError(str(error)) from error
    found = experiment.model.kind
    if kind and found != kind:
        there = f"picogpt sample {found} --ckpt {shlex.quote(str(path))}"
        raise PicogptError(f"{path} holds a {found}, not a {kind}: name that model, as in {there}")
    return Weights(path, experiment, *(tree[key] for key in list(WEIGHTS)[1:]))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `last.pt` atomically and keep the previous one as `last.previous.pt`."""
    if path.exists():
        place(path, previous(path))  # a hard link, not a rename, so that last.pt exists at every moment
    _save(path, {"content": "state", **state})


def load_state(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read `last.pt`, or the previous one if it is truncated; returns the state and a warning.

    Raises PicogptError when neither can be used.
    """
    try:
        return _load(path, "state"), None
    except PicogptError as error:
        if not previous(path).exists():
            raise
        return _load(previous(path), "state"), f"{error}; going on from the checkpoint before it"


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _save(path: Path, tree: dict[str, Any]) -> None:
    try:
        with atomic_write(path) as file:
            torch.save({**HEADER, **tree}, file)
    except RuntimeError as error:  # torch's writer wraps the OSError of a full disk
        raise PicogptError(f"cannot write {path}: {error.__context__ or error}") from error


def _load(path: Path, content: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            whole = zipfile.is_zipfile(file)  # the directory of a zip file is at its end: a truncated one has none
            file.seek(0)
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise PicogptError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if pointer:
        raise PicogptError(f"{path} only says where Git LFS keeps the checkpoint: git lfs pull brings it")
    if not whole:
        raise PicogptError(f"{path} is incomplete, or not a checkpoint")
    try:
        # Memory-mapped, so that a model of half a gigabyte loads at once.
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=content == "weights")
    except pickle.UnpicklingError as error:
        raise PicogptError(
            f"{path} is damaged, or holds more than tensors and plain values, which could be code:"
            " it is refused, and nothing of it was run"
        ) from error
    except Exception as error:  # a damaged archive can raise any type
        if is_out_of_memory(error):
            raise  # the file may be whole
        raise PicogptError(f"{path} is damaged, or not a checkpoint: {error}") from error
    if not isinstance(tree, dict) or tree.get("format") != HEADER["format"]:
        raise PicogptError(f"{path} is not a checkpoint of picogpt")
    if tree.get("version") != HEADER["version"]:
        raise PicogptError(f"{path} has version {tree.get('version')}; this picogpt reads version {HEADER['version']}")
    if tree.get("content") != content:
        held = CONTENTS.get(tree.get("content"), ("something unknown",))[0]
        raise PicogptError(f"{path} holds {held}; {CONTENTS[content][0]} is needed here")
    wrong = [key for key, cls in CONTENTS[content][1].items() if not isinstance(tree.get(key), cls)]
    if wrong or not all(isinstance(tensor, torch.Tensor) for tensor in tree["model"].values()):
        raise PicogptError(
            f"{path} is incomplete or damaged: {', '.join(wrong) or 'model'} missing or of the wrong type"
        )
    return tree


def _lists(value: Any) -> Any:
    # torch.save keeps tuples; the settings were checked from YAML, which has lists.
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, (list, tuple)) else value
