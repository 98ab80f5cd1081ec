"""What several commands share: folders, names of models, and the file that is used where none is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from picogpt.errors import Unreachable, UsageError
from picogpt.registry import MODELS, PRETRAINED

if TYPE_CHECKING:
    from picogpt.data.tokenizers import Tokenizer
    from picogpt.data.tokens import TokenData
    from picogpt.models.language_model import LanguageModel
    from picogpt.records import Key

KINDS = tuple(MODELS)
WEIGHTS = Path("weights")
RESOURCES = Path("resources")
RUN_PATTERN = "Name of the run's folder. [default: the time, as in 20260210_183518]"

Function = TypeVar("Function", bound=Callable[..., Any])


def model_options(function: Function) -> Function:
    """The options by which a trained model and its tokenizer are named."""
    options = (
        click.option(
            "--ckpt", type=click.Path(path_type=Path), help="Checkpoint, a best.pt. [default: that of the newest run]"
        ),
        click.option(
            "--tokenizer-dir",
            type=click.Path(path_type=Path),
            help="Folder of the tokenizer. [default: the one the checkpoint was trained with]",
        ),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "int8"]),
            default="float32",
            help="Of the weights; int8 (8-bit weights with a scale per row) is for GPT-2 only.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


optional_option = click.option(
    "--optional",
    is_flag=True,
    help="Do not download OpenAI's weights: where they are not in the cache, write a record that says so.",
)


def now() -> str:
    """A name for a run made by hand."""
    return datetime.now().strftime("%Y%m%d_%H%M%S")


def size_of(size: str) -> str:
    """cpu or gpu, where `size` is auto."""
    from picogpt.hardware import size_of_machine

    return size_of_machine() if size == "auto" else size


def newest(pattern: str, hint: str) -> Path:
    """The newest file of `pattern` in weights/. Raises UsageError with a hint when there is none."""
    files = sorted(WEIGHTS.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UsageError(f"no {WEIGHTS / pattern} is here: {hint}")
    return files[-1]


def token_folder(kind: str) -> Path:
    """The newest folder of token files for a kind of model."""
    tokenizer = MODELS[kind].tokenizer
    return newest(f"{tokenizer}_tokenizer/*/train.bin", f"picogpt tokenize {tokenizer} makes one").parent


def require_fitting(kind: str, data: TokenData) -> None:
    """Raises UsageError where the tokens are not those of the model."""
    from picogpt.data import bpe, fetch

    header, path = data.train.header, data.train.path
    of_gpt2, wanted = header.tokenizer_sha256 == fetch.find(bpe.RANKS).sha256, MODELS[kind].tokenizer
    if of_gpt2 != (wanted == "gpt2"):
        held = "GPT-2's tokens" if of_gpt2 else f"tokens of another tokenizer ({header.vocab_size} of them)"
        raise UsageError(f"{path} holds {held}, and {kind} needs others: picogpt tokenize {wanted} makes them")


def load_model(
    kind: str, ckpt: Path | None, tokenizer_dir: Path | None, untrained: bool = False, cached_only: bool = False
) -> tuple[LanguageModel, Tokenizer, str]:
    """A trained model, its tokenizer, and where the weights come from; with `cached_only` no hub is asked for them."""
    pretrained_name = kind.removeprefix("gpt2-") if kind in PRETRAINED else None
    if tokenizer_dir and (pretrained_name or MODELS[kind].tokenizer == "gpt2"):
        raise UsageError(f"{kind} has GPT-2's own tokenizer: leave out --tokenizer-dir")
    if pretrained_name:
        from picogpt.data import fetch
        from picogpt.data.bpe import GPT2Tokenizer

        if ckpt or untrained:
            raise UsageError(f"{kind} is OpenAI's: leave out --ckpt and --untrained")
        path = fetch.fetch_pretrained(pretrained_name, cached_only)
        from picogpt.models import pretrained  # loads torch, for nothing where there are no weights

        tokenizer = GPT2Tokenizer.fetched(RESOURCES)
        return pretrained.load(pretrained_name, path), tokenizer, fetch.pretrained()[pretrained_name].repository

    from picogpt.checkpoint import load_weights

    runs = "gpt2/*" if kind == "gpt2" else kind.replace("-", "_")
    weights = load_weights(ckpt or newest(f"{runs}/*/best.pt", f"picogpt train {kind} makes one"), kind)
    return weights.model(untrained), weights.tokenizer(tokenizer_dir), str(weights.path)


@contextmanager
def record_if_unavailable(key: Key, out: Path | None) -> Iterator[None]:
    """Where the hub cannot be reached: end well, with a record in `out` that says so; without `out`, fail."""
    try:
        yield
    except Unreachable as error:
        if out is None:
            raise
        from picogpt import records

        records.write(out, records.unreachable(key, str(error)))
        click.echo(f"{key}: not measured here: {records.HUB_UNREACHABLE}", err=True)
        raise click.exceptions.Exit(0) from error
