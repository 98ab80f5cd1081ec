"""What several commands share: folders, names of models, and the file that is used where none is named."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from picogpt.errors import Unreachable, UsageError
from picogpt.files import make_folder
from picogpt.registry import MODELS, PRETRAINED

if TYPE_CHECKING:
    from picogpt.checkpoint import Weights
    from picogpt.data.tokenizers import Tokenizer
    from picogpt.data.tokens import TokenData
    from picogpt.models.language_model import LanguageModel
    from picogpt.records import Key

    Loaded = tuple[LanguageModel, Tokenizer, str]

KINDS = tuple(MODELS)
WEIGHTS = Path("weights")
RESOURCES = Path("resources")
RUN_PATTERN = "Name of the run and of its folder. [default: the time, as in 20260210_183518]"
TOKENS = click.IntRange(1, 10**8)
STREAMS = click.IntRange(1, 10**5)

Function = TypeVar("Function", bound=Callable[..., Any])


class _Named(click.Path):
    """A path that is not empty, as it is where a variable of the shell is not set; pathlib would take it for this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Named(path_type=Path)


def run_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """The value of --name. Raises UsageError where it is not the name of one folder, which `picogpt runs` would find."""
    if name is not None and (not name.strip() or name.startswith(".") or {"/", os.sep} & set(name)):
        raise UsageError(f"--name {name!r} is not a folder name: it may not be empty, have a / or begin with a dot")
    return name


def model_options(function: Function) -> Function:
    """The argument and the options by which a trained model and its tokenizer are named."""
    dtypes = click.Choice(["float32", "bfloat16", "int8"])
    options = (
        click.argument("kind", type=click.Choice([*KINDS, *PRETRAINED])),
        click.option("--ckpt", type=PATH, help="Checkpoint, a best.pt. [default: that of the newest run]"),
        click.option("--tokenizer-dir", type=PATH, help="Its tokenizer. [default: the one it was trained with]"),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--dtype", type=dtypes, default="float32", help="Of the weights; int8 is for GPT-2 only."),
    )
    for option in reversed(options):
        function = option(function)
    return function


data_option = click.option("--data", type=PATH, help="Folder of token files. [default: the newest in weights/]")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable."
)
record_option = click.option("--out", type=PATH, help="File for a record of the result.")
optional_option = click.option(
    "--optional",
    is_flag=True,
    help="Download nothing: if OpenAI's weights or the data are not here, or the device cannot measure it, record that.",
)
compile_option = click.option(
    "--compile/--no-compile", "compiled", default=False, help="On a GPU, compile the step: for long samples."
)


def now() -> str:
    """The name of a run that was given none."""
    return datetime.now().strftime("%Y%m%d_%H%M%S")


@contextmanager
def run_folder(parent: Path, name: str | None) -> Iterator[Path]:
    """The folder `name` in `parent`; without a name a new one, called by the time, that no other command gets.

    A new folder is removed again where nothing was written into it.
    """
    if name:
        yield parent / name
        return
    stamp = now()
    make_folder(parent)
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


def newest(patterns: Sequence[str], hint: str) -> Path:
    """The newest file of any of `patterns` in weights/. Raises UsageError with a hint when there is none."""
    if files := [file for pattern in patterns for file in WEIGHTS.glob(pattern)]:
        return max(files, key=lambda path: path.stat().st_mtime)
    raise UsageError(f"no {WEIGHTS / patterns[0]} is here: {hint}")


def token_folder(kind: str) -> Path:
    """The newest folder of token files for a kind of model."""
    tokenizer = MODELS[kind].tokenizer
    return newest([f"{tokenizer}_tokenizer/*/train.bin"], f"picogpt tokenize {tokenizer} makes one").parent


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
) -> Loaded:
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

    weights = trained(kind, ckpt, untrained)
    return weights.model(untrained), weights.tokenizer(tokenizer_dir), str(weights.path)


def trained(kind: str, ckpt: Path | None, untrained: bool = False) -> Weights:
    """The weights of a model trained here: of `ckpt`, or of the newest run; says on stderr which these are."""
    from picogpt.checkpoint import load_weights

    runs = "gpt2/*/*" if kind == "gpt2" else f"{kind.replace('-', '_')}/*"
    patterns = [f"{runs}/best.pt", f"{runs}/checkpoints/best.pt"]
    weights = load_weights(ckpt or newest(patterns, f"picogpt train {kind} makes one"), kind)
    unfinished = " of a run that is not finished" if weights.path.parent.name == "checkpoints" else ""
    where = (
        "the initial weights of its training"
        if untrained
        else f"step {weights.step}, validation loss {weights.val_loss:.4f}"
    )
    click.echo(f"{weights.path}{unfinished}: {where}", err=True)
    return weights


@contextmanager
def or_record(key: Key, out: Path | None, optional: bool, why: str) -> Iterator[None]:
    """With `optional`, where a file for the measurement `key` cannot be had, record `why` nothing was measured and end well."""
    try:
        yield
    except Unreachable as error:
        if out is None or not optional:
            raise
        from picogpt import records

        records.write(out, records.unreachable(key, str(error), why))
        click.echo(f"{key}: not measured here: {why}", err=True)
        raise click.exceptions.Exit(0) from error


def load_or_record(key: Key, out: Path | None, optional: bool, ckpt: Path | None, tokenizer_dir: Path | None) -> Loaded:
    """`load_model` for the measurement `key`. With `optional` and without OpenAI's weights, end well and record that."""
    from picogpt import records

    with or_record(key, out, optional, records.HUB_UNREACHABLE):
        return load_model(str(key.model), ckpt, tokenizer_dir, cached_only=optional)


def aligned(rows: Sequence[Sequence[str]], right: range) -> str:
    """Columns two spaces apart, those in `right` aligned at their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{'>' if index in right else '<'}{width}}}" for index, width in enumerate(widths)]
    return "\n".join("  ".join(forms).format(*row).rstrip() for row in rows)
