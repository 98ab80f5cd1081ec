"""Commands that download data and turn it into tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from picogpt.cli.common import PATH, RESOURCES, RUN_PATTERN, WEIGHTS, run_folder, run_name
from picogpt.errors import Refused, Unreachable, UsageError

if TYPE_CHECKING:
    from picogpt.data.fetch import Answer
    from picogpt.data.tokens import TokenData

FINEWEB = "fineweb-edu"

run_option = click.option("--name", "--run", "run", callback=run_name, help=RUN_PATTERN)
corpus_option = click.option("--corpus", help="Name of the text in results. [default: its registered or file name]")
FRACTION = click.FloatRange(0, 1, min_open=True, max_open=True)
val_fraction_option = click.option("--val-fraction", type=FRACTION, default=0.1, help="Share for validation.")
threads_option = click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0 is one per core.")
shard_option = click.option(
    "--shard", "shards", type=click.IntRange(0), multiple=True, help="Of fineweb-edu; repeatable."
)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--first", is_flag=True, help="Fetch only the first of the names that is available.")
@click.option("--folder", type=PATH, default=RESOURCES, help="Folder for the downloaded files.")
@click.option("--out", type=PATH, help="Also copy the file to this path (with one name, or --first).")
@click.option("--status", type=PATH, help="JSON file for what could be had; a missing file is no error.")
@click.option("--attempt", type=click.IntRange(1), default=1, help="Number of this attempt, for the file of --status.")
@shard_option
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
    A file that is here already is verified and not downloaded again.
    """
    from picogpt.data.fetch import HubStatus, endpoint, fetch_first
    from picogpt.files import atomic_write, write_text

    if not names and not status:
        return _list(folder)
    if bool(shards) != (FINEWEB in names):
        from picogpt.data.fineweb import dataset

        held = f"{len(dataset().shards)} shards, {dataset().size / 1e9:.1f} GB together"
        raise UsageError(f"{FINEWEB} comes in {held}, chosen by number: picogpt fetch {FINEWEB} --shard 0 --shard 1")
    chosen = [f"{FINEWEB}/{shard}" for shard in shards]
    files = [part for name in names for part in (chosen if name == FINEWEB else [name])]
    from_hub = [name for name in files if _from_hub(name)]
    if status:
        answers = {name: _ask(name, folder, status) for name in files}
        asked = HubStatus(attempt=attempt, endpoint=endpoint(), files=answers)
        return write_text(status, asked.model_dump_json(indent=2) + "\n")
    if out and len(files) > 1 and not first:
        raise UsageError("--out takes one file: name one asset, or pass --first")
    if first and from_hub:
        raise UsageError(f"--first chooses among files of config/assets.yaml, and {from_hub[0]} comes from the hub")
    for name, path in [fetch_first(files, folder)] if first else [(name, _fetch(name, folder)) for name in files]:
        click.echo(f"{name}: {path}")
        if out:
            with open(path, "rb") as source, atomic_write(out) as file:
                shutil.copyfileobj(source, file)
            click.echo(f"{name}: {out}")


def _list(folder: Path) -> None:
    from picogpt.data import fetch, fineweb

    for name, asset in fetch.registry().items():
        here = "here" if fetch.is_whole(folder / asset.file, asset) else "not here"
        click.echo(f"{name:24}{asset.size:>12,} bytes  {here:9} {asset.title} ({asset.licence})")
    for name in fetch.pretrained():
        click.echo(f"{name:53} OpenAI's GPT-2, from the hub (MIT)")
    data = fineweb.dataset()
    about = f"{data.title}, in {len(data.shards)} shards, from the hub ({data.licence})"
    click.echo(f"{FINEWEB:20}{data.size:>16,} bytes  {'':9} {about}")


def _from_hub(name: str) -> bool:
    """Whether the hub has the file, and not a source in config/assets.yaml. Raises UsageError for an unknown shard."""
    from picogpt.data import fetch, fineweb

    data_set, _, number = name.partition("/")
    return bool(data_set == FINEWEB and fineweb.shard(number)) or name in fetch.pretrained()


def _fetch(name: str, folder: Path) -> Path:
    from picogpt.data import bpe, fetch, fineweb

    data_set, _, number = name.partition("/")
    if data_set == FINEWEB:
        return fineweb.fetch_shard(number)
    if name in fetch.pretrained():
        return fetch.fetch_pretrained(name)
    return bpe.fetch_ranks(folder) if name == bpe.RANKS else fetch.fetch(name, folder)


def _ask(name: str, folder: Path, status: Path) -> Answer:
    """Fetch a file; that it is not available is an answer, not an error."""
    from picogpt.data.fetch import Answer

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
@click.option("--text", type=PATH, help="A file or a folder. [default: the first corpus in resources/]")
@run_option
@corpus_option
@val_fraction_option
@click.option("--drop-unseen", is_flag=True, help="Remove validation characters that the training text does not have.")
def char(text: Path | None, run: str | None, corpus: str | None, val_fraction: float, drop_unseen: bool) -> None:
    """Characters as tokens. Writes tokenizer.json, train.bin and val.bin to weights/char_tokenizer/RUN/.

    A text is a UTF-8 file, which is one document; a .jsonl, .jsonl.gz or .parquet with a document in the field `text` of
    each line or row; or a folder of such files. Whole documents are for validation, or the end of a single one.
    """
    from picogpt.data.corpus import first_corpus, tokenize_chars

    text = text or first_corpus(RESOURCES)
    with run_folder(WEIGHTS / "char_tokenizer", run) as folder:
        data = tokenize_chars(text, folder, corpus, val_fraction, drop_unseen)
    click.echo(f"{data.train.header.corpus}: {data.vocab_size} characters, {_counts(data)}: {folder}/")


@tokenize.command()
@click.option("--text", "texts", type=PATH, multiple=True, help="As of char; repeatable.")
@run_option
@corpus_option
@val_fraction_option
@threads_option
def gpt2(texts: tuple[Path, ...], run: str | None, corpus: str | None, val_fraction: float, threads: int) -> None:
    """GPT-2's byte-pair encoding, 50,257 tokens. Writes train.bin and val.bin to weights/gpt2_tokenizer/RUN/.

    The merges are downloaded at first use and kept in resources/. Texts are read and split as by picogpt tokenize char.
    Documents are separated by the token <|endoftext|>; where a document has these characters, they are ordinary text.
    """
    from picogpt.data.bpe import GPT2Tokenizer
    from picogpt.data.corpus import first_corpus, tokenize_gpt2

    texts = texts or (first_corpus(RESOURCES),)
    with run_folder(WEIGHTS / "gpt2_tokenizer", run) as folder:
        data = tokenize_gpt2(texts, folder, GPT2Tokenizer.fetched(RESOURCES), corpus, val_fraction, threads)
    click.echo(f"{data.train.header.corpus}: {_counts(data, ' tokens')}: {folder}/")


@tokenize.command(FINEWEB)
@shard_option
@click.option("--join", "count", type=click.IntRange(1), help="Number of shards to join; writes manifest.json.")
@click.option("--folder", type=PATH, default=WEIGHTS / "gpt2_tokenizer" / FINEWEB, help="For the tokens of all shards.")
@click.option("--parquet", type=PATH, help="Parquet file of the shard. [default: the one in the hub client's cache]")
@click.option("--val-documents", type=click.IntRange(1), default=1000, help="Validation documents, from shard 0.")
@threads_option
def fineweb_edu(
    shards: tuple[int, ...], count: int | None, folder: Path, parquet: Path | None, val_documents: int, threads: int
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

    if bool(shards) == (count is not None):
        raise UsageError("give either --shard, to tokenize one, or --join, with how many there are")
    if parquet and len(shards) != 1:
        raise UsageError("--parquet is the file of one shard: name that with --shard")
    if count is not None:
        data = fineweb.join(folder, count)
        return click.echo(f"{FINEWEB}: {_counts(data, ' tokens')}, in {count} shards: {folder}/")
    tokenizer = GPT2Tokenizer.fetched(RESOURCES)
    for number in shards:
        path = fineweb.tokenize(number, folder, tokenizer, val_documents, parquet, threads)
        click.echo(f"{FINEWEB} shard {number}: {path}")


def _counts(data: TokenData, unit: str = "") -> str:
    return f"{data.train.header.count:,}{unit} for training, {data.val.header.count:,} for validation"
