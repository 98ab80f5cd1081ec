"""The command line: parses, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from picogpt import __version__
from picogpt.errors import PicogptError, UsageError

KINDS = ("char-bigram", "char-transformer")
WEIGHTS = Path("weights")
RESOURCES = Path("resources")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
RUN_PATTERN = "names a folder; the default is the time, as in 20260210_183518"


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="picogpt")
def cli() -> None:
    """GPT from scratch as a reproducible experiment.

    By hand, the first model takes four commands:

    \b
      picogpt fetch tinyshakespeare                       the text, verified
      picogpt tokenize char                               characters to numbers, 90/10 split
      picogpt train char-transformer                      stops and goes on at any step
      picogpt sample char-transformer -n 500              from the newest run

    `make report` runs all of it, and writes every figure and table.
    """


def main() -> None:
    """Entry point. A user's mistake ends in one message and exit status 2, a failure in one message and 1."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except PicogptError as error:
        print(f"picogpt: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output has left, as in `picogpt sample … | head`.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"picogpt: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)


# Fetching and tokenizing


@cli.command()
@click.argument("names", nargs=-1)
@click.option("--first", is_flag=True, help="Take the first of the names that can be had, instead of all.")
@click.option("--folder", type=click.Path(path_type=Path), default=RESOURCES, help="Where to keep what arrives.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write a copy under this name (with one name, or --first)."
)
def fetch(names: tuple[str, ...], first: bool, folder: Path, out: Path | None) -> None:
    """Fetch assets of config/assets.yaml and verify them; without names, list them.

    $PICOGPT_MIRROR, a folder or an address, is asked first, then the registered addresses. What is here already
    is verified and not fetched again; what broke off goes on where it stopped.
    """
    from picogpt.data import assets
    from picogpt.files import atomic_write

    if not names:
        for name, asset in assets.registry().items():
            here = "here" if assets.is_whole(folder / asset.file, asset) else "not here"
            click.echo(f"{name:24}{asset.size:>12,} bytes  {here:9} {asset.title} ({asset.licence})")
        return
    if out and len(names) > 1 and not first:
        raise UsageError("--out takes one file: name one asset, or pass --first")
    fetched = [assets.fetch_first(names, folder)] if first else [(name, assets.fetch(name, folder)) for name in names]
    for name, path in fetched:
        click.echo(f"{name}: {path}")
        if out:
            with atomic_write(out) as file:
                file.write(path.read_bytes())
            click.echo(f"{name}: {out}")


@cli.group()
def tokenize() -> None:
    """Turn a text into token files and a tokenizer."""


@tokenize.command()
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text. [default: the first corpus in resources/]")
@click.option("--run", help=RUN_PATTERN)
@click.option("--corpus", help="Name of the corpus in all results. [default: the registered name, or the file's]")
@click.option("--val-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1)
@click.option("--drop-unseen", is_flag=True, help="Leave out of the validation text what the training text lacks.")
def char(text: Path | None, run: str | None, corpus: str | None, val_fraction: float, drop_unseen: bool) -> None:
    """One token a character. Writes tokenizer.json, train.bin, val.bin to weights/char_tokenizer/RUN/."""
    from picogpt.data import assets, tokens
    from picogpt.files import sha256_file

    if text is None:
        here = [RESOURCES / asset.file for asset in assets.registry().values() if (RESOURCES / asset.file).exists()]
        if not here:
            raise UsageError(
                "no corpus is in resources/: picogpt fetch tinyshakespeare brings one, or give --text FILE"
            )
        text = here[0]
    registered = assets.identify(sha256_file(text)) if text.is_file() else None
    corpus = corpus or registered or text.stem
    if corpus != registered and corpus in assets.registry():
        raise UsageError(f"{text} is not the registered {corpus}, whose name it bears: name yours with --corpus")
    folder = WEIGHTS / "char_tokenizer" / (run or _now())
    data = tokens.tokenize_chars(text, folder, corpus, val_fraction, drop_unseen)
    click.echo(
        f"{data.train.header.corpus}: {data.vocab_size} characters,"
        f" {data.train.header.count:,} for training, {data.val.header.count:,} for validation: {folder}/"
    )


# Training


class TrainCommand(click.Command):
    """Lists every setting, from the types that check them, at the end of its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from picogpt.config import (
            CharBigramConfig,
            CharTransformerConfig,
            RuntimeConfig,
            Settings,
            TrainConfig,
            describe,
        )

        sections: dict[str, tuple[str, type[Settings]]] = {
            "model of char-bigram": ("model", CharBigramConfig),
            "model of char-transformer": ("model", CharTransformerConfig),
            "train: what changes the result": ("train", TrainConfig),
            "runtime: where and how to run": ("runtime", RuntimeConfig),
        }
        formatter.write_paragraph()
        formatter.write_text("Settings, in the YAML file and for --set (the shipped files differ from these defaults):")
        for title, (prefix, cls) in sections.items():
            rows = [
                (f"{key}{f'={default}' if default not in ('', 'null') else ''}", text)
                for key, default, text in describe(cls, f"{prefix}.")
                if key != "model.kind"
            ]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=44)


@cli.command(cls=TrainCommand)
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of token files. [default: newest in weights/]")
@click.option("--run", help=f"{RUN_PATTERN}. A run that was stopped goes on under its name.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings. [default: the shipped one]")
@click.option("--size", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", help="Which shipped settings.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable.")
@click.option("--seed", type=int, help="Short for --set train.seed=N.")
@click.option("--steps", type=int, help="Short for --set train.steps=N.")
@click.option("--device", help="Short for --set runtime.device=NAME: auto, cpu, cuda, cuda:N, mps.")
@click.option("--replace", is_flag=True, help="Start over where the folder holds a run of other settings or data.")
def train(
    kind: str,
    data: Path | None,
    run: str | None,
    config: Path | None,
    size: str,
    overrides: tuple[str, ...],
    seed: int | None,
    steps: int | None,
    device: str | None,
    replace: bool,
) -> None:
    """Train a model. Results go to weights/KIND/RUN/: best.pt, metrics.jsonl, record.json.

    Stop it with Ctrl-C (or SIGTERM, SIGUSR1): it saves at the next step, and the same command with its --run goes
    on from there, to the same weights bit for bit.

    \b
      picogpt train char-bigram
      picogpt train char-transformer --run mine --set model.n_layer=6 --set train.epochs=4
    """
    from picogpt.config import load_experiment, model_config_file
    from picogpt.data.tokens import open_data

    short = {"train.seed": seed, "train.steps": steps, "runtime.device": device}
    overrides += tuple(f"{key}={value}" for key, value in short.items() if value is not None)
    experiment = load_experiment(config or model_config_file(kind, _size(size)), overrides)
    if experiment.model.kind != kind:
        raise UsageError(f"{config} describes a {experiment.model.kind}, not a {kind}")
    folder = WEIGHTS / kind.replace("-", "_") / (run or _now())
    token_data = open_data(data or _newest("char_tokenizer", "tokenizer.json", "picogpt tokenize char makes one"))

    from picogpt.train.loop import Trainer

    trainer = Trainer(experiment, token_data, folder)
    record = trainer.run(replace)
    if not trainer.progress.sessions:
        click.echo(f"{folder} was finished already; nothing was trained", err=True)
    results = record["results"]
    click.echo(
        f"{folder}/best.pt: validation loss {results['best_val_loss']:.6f} at epoch {results['best_epoch']:.2f}"
        f" (step {results['best_step']} of {results['steps']}), {results['train_seconds']:.0f} s of training"
    )


# Sampling


@cli.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--ckpt", type=click.Path(path_type=Path), help="A best.pt. [default: of the newest run in weights/]")
@click.option("--tokenizer-dir", type=click.Path(path_type=Path), help="[default: the one in weights/ that fits]")
@click.option("-n", "--num-tokens", type=int, default=500, help="Tokens to make.")
@click.option("--prompt", help="Text to continue. [default: a line break]")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File with the text to continue.")
@click.option("--temperature", type=float, default=1.0, help="Below 1 bolder, above 1 wilder; 0 is greedy.")
@click.option("--top-k", type=int, help="Choose among the k most likely tokens.")
@click.option("--top-p", type=float, help="Choose among the likeliest tokens that together reach this probability.")
@click.option("--seed", type=int, default=1337, help="The same seed gives the same text.")
@click.option("--num-samples", type=int, default=1, help="Texts to make, all at once.")
@click.option("--stream/--no-stream", default=None, help="Print as it is made. [default: for one text on a terminal]")
@click.option("--cache/--no-cache", default=True, help="Remember keys and values; without, the same text, slowly.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--untrained", is_flag=True, help="Sample from the weights that the training began with.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the terminal.")
def sample(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    num_tokens: int,
    prompt: str | None,
    prompt_file: Path | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_samples: int,
    stream: bool | None,
    cache: bool,
    device: str,
    untrained: bool,
    out: Path | None,
) -> None:
    """Sample text from a trained model.

    \b
      picogpt sample char-transformer -n 1000 --prompt "ROMEO:"
      picogpt sample char-transformer --ckpt weights/char_transformer/RUN/best.pt \\
          --tokenizer-dir weights/char_tokenizer/RUN/ -n 10000
    """
    if num_tokens < 1:
        raise UsageError(f"-n {num_tokens}: must be 1 or more")
    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples}: must be 1 or more")
    if prompt is not None and prompt_file is not None:
        raise UsageError("give --prompt or --prompt-file, not both")

    from picogpt import sample as sampling
    from picogpt.files import read_text, write_text
    from picogpt.train.checkpoint import load_weights

    decoding = sampling.Decoding(temperature, top_k, top_p)
    missing = f"picogpt train {kind} makes one"
    weights = load_weights(ckpt or _newest(kind.replace("-", "_"), "best.pt", missing) / "best.pt", kind)
    tokenizer = _fitting_tokenizer(tokenizer_dir, weights.corpus["tokenizer_sha256"], weights.path)
    text = prompt if prompt is not None else read_text(prompt_file) if prompt_file else None
    if text is None:
        text = "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]
    live = stream if stream is not None else out is None and num_samples == 1 and sys.stdout.isatty()
    if live and (num_samples > 1 or out):
        raise UsageError("--stream prints one text to the terminal: leave out --num-samples and --out")

    echo = None
    if live:
        click.echo(text if prompt or prompt_file else "", nl=False)

        def echo(token: int) -> None:
            click.echo(tokenizer.decode([token]), nl=False)

    texts, rate = sampling.sample_texts(
        weights.model(untrained), tokenizer, text, num_tokens, num_samples, decoding, seed, device, cache, echo
    )
    given = text if prompt or prompt_file else ""
    if out:
        write_text(out, _join([given + made for made in texts]))
    elif live:
        click.echo()
    else:
        click.echo(_join([given + made for made in texts]))
    click.echo(f"{num_tokens * num_samples:,} tokens, {rate:,.1f} tokens/s", err=True)


# Reporting


@cli.group()
def report() -> None:
    """Write figures, tables and the page from result records."""


@report.command("loss-curve")
@click.option("--run-folder", type=click.Path(path_type=Path), required=True, help="Has metrics.jsonl and record.json.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def loss_curve(run_folder: Path, out: Path) -> None:
    """Draw the loss curve of a run beside the published values."""
    from picogpt.report.figures import draw_loss_curve

    draw_loss_curve(run_folder, out)


@report.command()
@click.argument("record_files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def summary(record_files: tuple[Path, ...], out: Path) -> None:
    """Write the table of published and measured numbers."""
    from picogpt.report.tables import write_summary

    write_summary(record_files, out)


@report.command()
@click.option("--template", type=click.Path(path_type=Path), required=True)
@click.option("--summary", "summary_file", type=click.Path(path_type=Path), required=True)
@click.option("--record", "record_files", type=click.Path(path_type=Path), multiple=True)
@click.option("--sample", "samples", multiple=True, metavar="NAME=FILE", help="A text that the template shows.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def page(
    template: Path, summary_file: Path, record_files: tuple[Path, ...], samples: tuple[str, ...], out: Path
) -> None:
    """Fill in the template of the write-up."""
    from picogpt.report.page import write_page

    wrong = [pair for pair in samples if "=" not in pair]
    if wrong:
        raise UsageError(f"--sample {wrong[0]!r} is not of the form NAME=FILE")
    write_page(template, summary_file, record_files, dict(pair.split("=", 1) for pair in samples), out)


# About this machine and these settings


@cli.command()
@click.option("--size", "only_size", is_flag=True, help="Print just cpu or gpu: which settings fit this machine.")
def hardware(only_size: bool) -> None:
    """Show what is here: device, the dtype that is fast on it, cores, memory."""
    from picogpt import hardware as machine

    if only_size:
        click.echo(machine.size_of_machine())
        return
    device = machine.select()
    click.echo(f"device   {device.name} ({device.torch_name})")
    click.echo(f"dtype    {device.dtype} for matrix products")
    click.echo(f"cores    {machine.cpu_count()}")
    click.echo(f"memory   {machine.memory_bytes() / 2**30:.1f} GiB")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail where a file differs from the types.")
def schema(folder: Path, check: bool) -> None:
    """Write the JSON schemas of the settings into FOLDER."""
    from picogpt.config import SCHEMAS, json_schema
    from picogpt.files import read_text, write_text

    for name in SCHEMAS:
        path = folder / f"{name}.schema.json"
        if not check:
            write_text(path, json_schema(name))
        elif read_text(path) != json_schema(name):
            raise PicogptError(f"{path} is out of step with picogpt/config.py: picogpt schema {folder} writes it anew")


def _now() -> str:
    return datetime.now().strftime("%Y%m%d_%H%M%S")


def _size(size: str) -> str:
    from picogpt.hardware import size_of_machine

    return size_of_machine() if size == "auto" else size


def _newest(group: str, file: str, hint: str) -> Path:
    """The folder of the run in weights/GROUP/ whose `file` is newest."""
    files = sorted((WEIGHTS / group).glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UsageError(f"no {WEIGHTS / group}/*/{file} is here: {hint}")
    return files[-1].parent


def _fitting_tokenizer(folder: Path | None, sha256: str, checkpoint: Path) -> Any:
    """The tokenizer in `folder`, or the one in weights/ that the checkpoint was trained with."""
    from picogpt.data.tokenizers import CharTokenizer

    candidates = (
        [folder] if folder else [path.parent for path in sorted(WEIGHTS.glob("char_tokenizer/*/tokenizer.json"))]
    )
    for candidate in candidates:
        try:
            tokenizer = CharTokenizer.load(candidate)
        except PicogptError:
            if folder:
                raise
            continue  # one of several in weights/; another may fit
        if tokenizer.sha256 == sha256:
            return tokenizer
    if folder:
        raise PicogptError(f"the tokenizer in {folder} is not the one that {checkpoint} was trained with")
    raise PicogptError(
        f"no tokenizer in weights/char_tokenizer/ fits {checkpoint}: give its folder with --tokenizer-dir"
    )


def _join(texts: list[str]) -> str:
    return "\n---\n".join(texts)
