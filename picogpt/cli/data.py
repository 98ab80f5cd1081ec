"""Commands that download data and turn it into tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from picogpt.cli.common import PRETRAINED, RESOURCES, RUN_PATTERN, WEIGHTS, now
from picogpt.errors import Refused, Unreachable, UsageError

if TYPE_CHECKING:
    from picogpt.hub import Answer, HubFile

FINEWEB = "fineweb-edu"

val_fraction_option = click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Share of the text, at its end, for validation.",
)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--first", is_flag=True, help="Fetch only the first of the names that is available.")
@click.option("--folder", type=click.Path(path_type=Path), default=RESOURCES, help="Folder for the downloaded files.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also copy the file to this path (with one name, or --first)."
)
@click.option(
    "--status",
    type=click.Path(path_type=Path),
    help="Write a JSON file that says for each name whether the hub provided it; if not, that is then no error.",
)
@click.option(
    "--attempt", type=click.IntRange(1), default=1, help="Number of this attempt, noted in the file of --status."
)
@click.option("--shard", "shards", type=click.IntRange(0), multiple=True, help="Shard of fineweb-edu; repeatable.")
def fetch(
    names: tuple[str, ...],
    first: bool,
    folder: Path,
    out: Path | None,
    status: Path | None,
    attempt: int,
    shards: tuple[int, ...],
) -> None:
    """Download files registered in config/assets.yaml and verify their hashes; without names, list them.

    `pretrained`, pretrained-medium, pretrained-large and pretrained-xl are OpenAI's weights (config/pretrained.yaml). They
    are stored in the cache of the Hugging Face client, like the shards of `fineweb-edu`, a text for longer trainings.

    $PICOGPT_MIRROR, a folder or a URL, is tried first, then the registered URLs; $HF_ENDPOINT is the URL of the hub.
    A file that is here already is verified and not downloaded again; an interrupted download is resumed.
    """
    from picogpt.data import assets, fineweb
    from picogpt.files import atomic_write

    if not names:
        for name, asset in assets.registry().items():
            here = "here" if assets.is_whole(folder / asset.file, asset) else "not here"
            click.echo(f"{name:24}{asset.size:>12,} bytes  {here:9} {asset.title} ({asset.licence})")
        for name in PRETRAINED:
            click.echo(f"{name.removeprefix('gpt2-'):24}{'':>18}  {'':9} OpenAI's GPT-2, from the hub (MIT)")
        data = fineweb.dataset()
        click.echo(
            f"{fineweb.NAME:20}{data.size:>16,} bytes  {'':9} {data.title}, in {len(data.shards)} shards,"
            f" from the hub ({data.licence})"
        )
        return
    if shards or FINEWEB in names:
        names = _with_shards(names, shards)
    if status:
        if elsewhere := [name for name in names if not _hub_file(name)]:
            raise UsageError(f"--status is for files of the hub, and {elsewhere[0]} is none")
        from picogpt import hub

        answers = {name: _ask(name, folder, status) for name in names}
        hub.write_status(status, hub.HubStatus(attempt=attempt, endpoint=hub.endpoint(), files=answers))
        return
    if out and len(names) > 1 and not first:
        raise UsageError("--out takes one file: name one asset, or pass --first")
    if first and (from_hub := [name for name in names if _hub_file(name)]):
        raise UsageError(f"--first chooses among files of config/assets.yaml, and {from_hub[0]} comes from the hub")
    fetched = [assets.fetch_first(names, folder)] if first else [(name, _fetch(name, folder)) for name in names]
    for name, path in fetched:
        click.echo(f"{name}: {path}")
        if out:
            with open(path, "rb") as source, atomic_write(out) as file:
                shutil.copyfileobj(source, file)
            click.echo(f"{name}: {out}")


def _with_shards(names: Sequence[str], shards: Sequence[int]) -> tuple[str, ...]:
    """The names, each chosen shard of a data set by its own: fineweb-edu/3."""
    from picogpt.data import fineweb

    if fineweb.NAME not in names:
        raise UsageError(f"--shard goes with {fineweb.NAME}: picogpt fetch {fineweb.NAME} --shard 0")
    if not shards:
        data = fineweb.dataset()
        raise UsageError(
            f"{fineweb.NAME} has {len(data.shards)} shards, {data.size / 1e9:.1f} GB together: say which, as in"
            " --shard 0 --shard 1"
        )
    chosen = [f"{fineweb.NAME}/{shard}" for shard in shards]
    return tuple(part for name in names for part in (chosen if name == fineweb.NAME else [name]))


def _hub_file(name: str) -> HubFile | None:
    """The file on the hub that this name stands for, if it does for one."""
    if f"gpt2-{name}" in PRETRAINED:
        from picogpt import hub

        return hub.registry()[name].weights(name)
    data_set, _, shard = name.partition("/")
    if data_set == FINEWEB and shard:
        from picogpt.data import fineweb

        if not shard.isdigit():
            raise UsageError(f"{name}: shards have numbers, as in picogpt fetch {FINEWEB} --shard 0")
        return fineweb.parquet(int(shard))
    return None


def _fetch(name: str, folder: Path) -> Path:
    from picogpt.data import assets, bpe

    if file := _hub_file(name):
        from picogpt import hub

        return hub.obtain(file)
    return bpe.fetch_ranks(folder) if name == bpe.RANKS else assets.fetch(name, folder)


def _ask(name: str, folder: Path, status: Path) -> Answer:
    """Fetch a file of the hub; that it is not available is an answer, not an error."""
    from picogpt.hub import Answer

    try:
        return Answer(state="here", path=str(_fetch(name, folder)))
    except Unreachable as error:
        click.echo(f"{name}: not measured here: {error}", err=True)
        if isinstance(error, Refused):
            click.echo(f"a pipeline asks this hub again when {status} is deleted", err=True)
        return Answer(state="refused" if isinstance(error, Refused) else "unreachable", reason=str(error))


@click.group()
def tokenize() -> None:
    """Turn a text into token files."""


@tokenize.command()
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text. [default: the first corpus in resources/]")
@click.option("--run", help=RUN_PATTERN)
@click.option("--corpus", help="Name of the text in all results. [default: its registered name, or the file name]")
@val_fraction_option
@click.option(
    "--drop-unseen",
    is_flag=True,
    help="Remove characters from the validation text that do not occur in the training text.",
)
def char(text: Path | None, run: str | None, corpus: str | None, val_fraction: float, drop_unseen: bool) -> None:
    """Characters as tokens. Writes tokenizer.json, train.bin and val.bin to weights/char_tokenizer/RUN/."""
    from picogpt.data.corpus import tokenize_chars

    text = text or _corpus_here()
    corpus = _name_of([text], corpus)
    folder = WEIGHTS / "char_tokenizer" / (run or now())
    data = tokenize_chars(text, folder, corpus, val_fraction, drop_unseen)
    click.echo(
        f"{data.train.header.corpus}: {data.vocab_size} characters,"
        f" {data.train.header.count:,} for training, {data.val.header.count:,} for validation: {folder}/"
    )


@tokenize.command()
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A UTF-8 text; repeatable, each file is a document. [default: the first corpus in resources/]",
)
@click.option("--run", help=RUN_PATTERN)
@click.option("--corpus", help="Name of the text in all results. [default: its registered name, or the file name]")
@val_fraction_option
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0 is one per core.")
def gpt2(texts: tuple[Path, ...], run: str | None, corpus: str | None, val_fraction: float, threads: int) -> None:
    """GPT-2's byte-pair encoding, 50,257 tokens. Writes train.bin and val.bin to weights/gpt2_tokenizer/RUN/.

    The merges are downloaded at first use and kept in resources/. The last part of each text is for validation.
    Documents are separated by <|endoftext|>, which a text may contain already.
    """
    from picogpt.data.bpe import GPT2Tokenizer
    from picogpt.data.corpus import tokenize_gpt2

    texts = texts or (_corpus_here(),)
    corpus = _name_of(texts, corpus)
    folder = WEIGHTS / "gpt2_tokenizer" / (run or now())
    tokenizer = GPT2Tokenizer.fetched(RESOURCES)
    data = tokenize_gpt2(texts, folder, tokenizer, corpus, val_fraction, threads)
    click.echo(
        f"{corpus}: {data.train.header.count:,} tokens for training, {data.val.header.count:,} for validation: {folder}/"
    )


@tokenize.command(FINEWEB)
@click.option("--shard", "numbers", type=click.IntRange(0), multiple=True, help="Shard to tokenize; repeatable.")
@click.option("--join", "count", type=click.IntRange(1), help="Number of shards to join; writes manifest.json.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=WEIGHTS / "gpt2_tokenizer" / FINEWEB,
    help="Folder for the tokens of all shards.",
)
@click.option(
    "--parquet",
    type=click.Path(path_type=Path),
    help="Parquet file of the shard. [default: the one in the cache of the hub client]",
)
@click.option(
    "--val-documents", type=click.IntRange(1), default=1000, help="Documents of shard 0 that are for validation."
)
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0 is one per core.")
def fineweb_edu(
    numbers: tuple[int, ...], count: int | None, folder: Path, parquet: Path | None, val_documents: int, threads: int
) -> None:
    """GPT-2's tokens of FineWeb-Edu, shard by shard. Writes train-00000.bin, ..., val.bin and manifest.json.

    Shards are downloaded before, by picogpt fetch; this command needs no network. Shards can be tokenized on several
    machines, in any order; a complete one is not tokenized again. Joining them comes last.

    \b
      picogpt fetch fineweb-edu --shard 0 --shard 1
      picogpt tokenize fineweb-edu --shard 0
      picogpt tokenize fineweb-edu --shard 1
      picogpt tokenize fineweb-edu --join 2
    """
    from picogpt.data import fineweb
    from picogpt.data.bpe import GPT2Tokenizer

    if bool(numbers) == (count is not None):
        raise UsageError("give either --shard, to tokenize one, or --join, with how many there are")
    if parquet and len(numbers) != 1:
        raise UsageError("--parquet is the file of one shard: name that with --shard")
    if count is not None:
        data = fineweb.join(folder, count)
        click.echo(
            f"{FINEWEB}: {data.train.header.count:,} tokens for training, {data.val.header.count:,} for validation,"
            f" in {count} shards: {folder}/"
        )
        return
    tokenizer = GPT2Tokenizer.fetched(RESOURCES)
    for number in numbers:
        path = fineweb.tokenize(number, folder, tokenizer, val_documents, parquet, threads)
        click.echo(f"{FINEWEB} shard {number}: {path}")


def _corpus_here() -> Path:
    """The first registered corpus that has been fetched."""
    from picogpt.data import assets

    corpora = [RESOURCES / asset.file for asset in assets.registry().values() if asset.kind == "corpus"]
    here = [path for path in corpora if path.exists()]
    if not here:
        raise UsageError("no corpus is in resources/: run picogpt fetch tinyshakespeare, or pass --text FILE")
    return here[0]


def _name_of(texts: Sequence[Path], corpus: str | None) -> str:
    """The name of a corpus in all results. Raises UsageError when it is that of a registered one, and it is not that."""
    from picogpt.data import assets
    from picogpt.files import sha256_file

    registered = assets.identify(sha256_file(texts[0])) if len(texts) == 1 and texts[0].is_file() else None
    name = corpus or registered or texts[0].stem
    if name != registered and name in assets.registry():
        raise UsageError(f"{texts[0]} is not the registered {name}, whose name it bears: name yours with --corpus")
    return name
