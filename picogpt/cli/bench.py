"""Commands that measure: each writes one record."""

from __future__ import annotations

from pathlib import Path

import click

from picogpt.cli.common import KINDS, PRETRAINED, load_model, model_options, or_noted
from picogpt.errors import UsageError


@click.group()
def bench() -> None:
    """Measure speed and size, and write records."""


@bench.command("sample")
@click.argument("kind", type=click.Choice([*KINDS, *PRETRAINED]))
@model_options
@click.option("-n", "--num-tokens", type=click.IntRange(1), default=500, help="Tokens of a run and stream.")
@click.option("--runs", type=click.IntRange(1), default=5, help="Runs, after a short one to warm up.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Streams at once.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the record.")
@click.option("--optional", is_flag=True, help="Where the hub cannot be reached, write a record that says so.")
def sample(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    device: str,
    dtype: str,
    num_tokens: int,
    runs: int,
    batch_size: int,
    out: Path | None,
    optional: bool,
) -> None:
    """Measure how many tokens a second a model samples; every run is listed.

    \b
      picogpt bench sample gpt2 --dtype int8
      picogpt bench sample gpt2 --batch-size 16 --runs 3
    """
    from picogpt import records
    from picogpt.bench import sampling
    from picogpt.sample import first_prompt

    with or_noted(f"sampling {kind} {dtype}", out if optional else None):
        model, tokenizer, source = load_model(kind, ckpt, tokenizer_dir, cached_only=optional)
    prompt = first_prompt(tokenizer, kind in PRETRAINED)
    record = sampling.measure(kind, model, tokenizer, source, device, dtype, num_tokens, runs, batch_size, prompt)
    if out:
        records.write(out, record)
    results = record["results"]
    listed = ", ".join(f"{rate:.2f}" for rate in results["tokens_per_second"])
    click.echo(f"{kind} {dtype}: {listed}; mean {results['mean']:.2f} tokens/s")


@bench.command()
@click.argument("files", nargs=-1, metavar="NAME=FILE...", required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the record.")
def weights(files: tuple[str, ...], out: Path | None) -> None:
    """Measure what weight files weigh; FILE `gpt2-pretrained` stands for OpenAI's, where they are here.

    \b
      picogpt bench weights gpt2=weights/gpt2/RUN/tinyshakespeare/best.pt gpt2-pretrained=gpt2-pretrained
    """
    from picogpt import hub, records
    from picogpt.bench import weights as bench_weights
    from picogpt.errors import Unreachable

    paths = {}
    for pair in files:
        name, equals, file = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not of the form NAME=FILE")
        if file in PRETRAINED:
            try:
                paths[name] = hub.fetch(file.removeprefix("gpt2-"), cached_only=True)
            except Unreachable:
                click.echo(f"{name}: not measured here: hub unreachable", err=True)
        else:
            paths[name] = Path(file)
    record = bench_weights.measure(paths)
    if out:
        records.write(out, record)
    for name, path in paths.items():
        click.echo(f"{name:24}{record['results'][name]:>16,} bytes  {path}")
