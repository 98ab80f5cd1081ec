"""Commands that measure: each writes one record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from picogpt.cli import common
from picogpt.cli.common import PRETRAINED, record_option
from picogpt.errors import Unsuited, UsageError, is_out_of_memory


@click.group()
def bench() -> None:
    """Measure speed and size, and write records."""


@bench.command("sample")
@common.model_options
@click.option("-n", "--num-tokens", type=common.TOKENS, default=500, help="Tokens per run and stream.")
@click.option("--runs", type=click.IntRange(1), default=5, help="Timed runs, after a short warm-up run.")
@click.option("--batch-size", type=common.STREAMS, default=1, help="Streams sampled together.")
@common.compile_option
@record_option
@common.optional_option
def sample(
    kind: str, ckpt: Path | None, tokenizer_dir: Path | None, out: Path | None, optional: bool, **measured: Any
) -> None:
    """Measure the sampling throughput of a model in tokens/s; every run is listed.

    \b
      picogpt bench sample gpt2 --dtype int8
      picogpt bench sample gpt2 --batch-size 16 --runs 3
      picogpt bench sample gpt2 --dtype bfloat16 --compile             on a GPU
    """
    from picogpt import hardware, records

    dtype, streams = measured["dtype"], measured["batch_size"]
    alone = records.Key("sampling", kind, dtype=dtype)
    key = records.Key("streams", kind, streams=str(streams)) if streams > 1 else alone
    model, tokenizer, source = common.load_or_record(key, out, optional, ckpt, tokenizer_dir)
    from picogpt.bench import measure
    from picogpt.stream import first_prompt

    prompt = first_prompt(tokenizer, kind in PRETRAINED)
    try:
        record = measure.speed(key, model, tokenizer, source, prompt=prompt, **measured)
    except Exception as error:
        too_large = is_out_of_memory(error)
        if not (out and optional and (too_large or isinstance(error, Unsuited))):
            raise
        why = f"{streams} streams do not fit into the memory of this device" if too_large else str(error)
        record = records.not_measured(key, why, hardware.select(measured["device"]))
    if out:
        records.write(out, record)
    if not (results := record["results"]):
        return click.echo(f"{key}: not measured here: {record['not_measured']}")
    listed = ", ".join(f"{rate:.2f}" for rate in results["tokens_per_second"])
    click.echo(f"{kind} {dtype}: {listed}; mean {results['mean']:.2f} tokens/s")


@bench.command("train")
@click.option("--hardware", "name", required=True, help="Machine of config/hardware/, or a YAML file of your own.")
@click.option("--rung", required=True, help="Last optimization to include: baseline, tf32, bf16, compile, flash, ...")
@common.data_option
@click.option("--config", help="YAML file with the model, or a name in config/models/. [default: GPT-2 124M]")
@common.set_option
@record_option
def train(
    name: str, rung: str, data: Path | None, config: str | None, overrides: tuple[str, ...], out: Path | None
) -> None:
    """Measure one rung of the training ladder: a training step of GPT-2 with all optimizations up to RUNG.

    The device must be the one that the hardware file names, so that no number is listed under a wrong name.
    `picogpt hardware` says which file fits this machine.

    \b
      picogpt bench train --hardware cpu --rung baseline
      picogpt bench train --hardware h100 --rung max_autotune --out record.json
      torchrun --standalone --nproc_per_node=2 -m picogpt bench train --hardware h100x2 --rung fused_loss
    """
    from picogpt import machines, records

    machine = machines.load(name)
    if rung not in machine.rungs:
        raise UsageError(f"hardware {name} has no rung {rung!r}; it has {', '.join(machine.rungs)}")
    from picogpt.config import GPT2Config, load_experiment, model_file

    experiment = load_experiment(model_file(config or "gpt2"), overrides)
    if not isinstance(experiment.model, GPT2Config):
        raise UsageError(f"{config} describes a {experiment.model.kind}, and the ladder is one of gpt2")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would write lines of its own among ours
    from picogpt.bench import ladder
    from picogpt.data.corpus import open_data
    from picogpt.train.distributed import init_distributed

    tokens = open_data(data or common.token_folder("gpt2"))
    common.require_fitting("gpt2", tokens)
    with init_distributed(machine.kind) as world:
        record = ladder.measure(machines.name_of(name), machine, rung, experiment.model, tokens, world)
    if not world.is_main:
        return
    if out:
        records.write(out, record)
    results = record["results"]
    if not results:
        return click.echo(f"{name} {rung}: not measured here: {record['not_measured']}")
    smaller = f"; micro-batches of {results['micro_batch_size']}, because larger ones ran out of memory"
    click.echo(
        f"{name} {rung}: {results['tokens_per_second']:,.0f} tokens/s, median step {results['median']:.4g} s"
        f" ({results['fastest']:.4g} to {results['slowest']:.4g} of {len(results['step_seconds'])}),"
        f" {results['peak_memory_bytes'] / 2**30:.2f} GiB, loss {results['final_loss']:.4f}"
        f"{smaller if results['out_of_memory'] else ''}"
    )


@bench.command()
@click.option("--nanogpt", type=common.PATH, help="nanoGPT's model.py, to be measured beside ours.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences of a training step. [default: 64; on a CPU 4]")
@click.option("--steps", type=click.IntRange(1), default=10, help="Training steps of each of three rounds.")
@click.option("-n", "--num-tokens", type=click.IntRange(1), default=500, help="Tokens of each run of sampling.")
@click.option("--trainings/--no-trainings", default=True, help="Also the two short trainings, from start to end.")
@common.data_option
@common.set_option
@record_option
def table(
    nanogpt: Path | None,
    batch_size: int | None,
    steps: int,
    num_tokens: int,
    trainings: bool,
    data: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure training and sampling of GPT-2 on this device, and both short trainings: one table.

    nanoGPT and transformers, where they are at hand, are measured in turn with ours in the same run.

    \b
      picogpt bench table
      picogpt bench table --nanogpt ../nanoGPT/model.py --out table.json
    """
    from picogpt.config import load_experiment, model_file

    experiment = load_experiment(model_file("gpt2"), overrides)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would write lines of its own among ours
    from itertools import chain

    from picogpt import hardware, records
    from picogpt.bench import table as tables
    from picogpt.data.bpe import GPT2Tokenizer
    from picogpt.data.corpus import open_data

    device, tokens = hardware.select(), open_data(data or common.token_folder("gpt2"))
    batch = batch_size or (64 if device.type == "cuda" else 4)
    rows, texts = [], [("what", "picogpt", "unit", "peer", "its", "ratio")]
    for row in chain(
        [tables.training(experiment, nanogpt, batch, steps)],
        tables.ladder_top(experiment, tokens),
        tables.sampling(experiment, GPT2Tokenizer.fetched("resources"), num_tokens),
        tables.whole_trainings(overrides) if trainings else (),
    ):
        rows.append(row._asdict())
        theirs = (row.peer, f"{row.theirs:,.4g}", f"{row.ours / row.theirs:.2f}") if row.theirs else ("", "", "")
        texts.append((row.what, f"{row.ours:,.5g}", row.unit, *theirs))
        click.echo(f"{row.what}: {row.ours:,.5g} {row.unit}", err=True)
    click.echo(f"{device.name}, {device.dtype}\n{common.aligned(texts, range(1, 2))}")
    if out:
        records.write(
            out, {**records.provenance(device), "task": "table", "corpus": {}, "config": {}, "results": {"rows": rows}}
        )


@bench.command()
@click.argument("files", nargs=-1, metavar="NAME=FILE...", required=True)
@record_option
def weights(files: tuple[str, ...], out: Path | None) -> None:
    """Measure the sizes of weight files. FILE gpt2-pretrained means OpenAI's, if they are in the cache.

    \b
      picogpt bench weights gpt2=weights/gpt2/RUN/tinyshakespeare/best.pt gpt2-pretrained=gpt2-pretrained
    """
    from picogpt import records
    from picogpt.bench import weights as bench_weights

    if wrong := [pair for pair in files if "=" not in pair]:
        raise UsageError(f"{wrong[0]!r} is not of the form NAME=FILE")
    record = bench_weights.measure(dict(pair.split("=", 1) for pair in files))
    if out:
        records.write(out, record)
    for name, reason in record["missing"].items():
        click.echo(f"{name.removesuffix(' MB')}: not measured here: {reason}", err=True)
    for name, path in record["config"]["files"].items():
        click.echo(f"{name:24}{record['results'][name]:>16,} bytes  {path}")
