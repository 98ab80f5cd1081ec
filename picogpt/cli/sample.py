"""Commands that use a trained model: sample, evaluate, export."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from picogpt.cli import common
from picogpt.cli.common import PATH, PRETRAINED, load_model
from picogpt.errors import PicogptError, UsageError
from picogpt.registry import MODELS


@click.command()
@common.model_options
@click.option("-n", "--num-tokens", type=common.TOKENS, default=500, help="Tokens to sample.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; repeatable. [default: a line break; for OpenAI's models <|endoftext|>]",
)
@click.option("--prompt-file", type=PATH, help="UTF-8 file with the text to continue.")
@click.option("--truncate", is_flag=True, help="If a prompt is longer than the context, use only its end.")
@click.option("--temperature", type=float, default=1.0, help="Divides the logits: higher is more random, 0 is greedy.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens only.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens with this total probability (nucleus).")
@click.option("--seed", type=int, default=1337, help="The same seed gives the same text; sample i uses seed + i.")
@click.option("--num-samples", type=common.STREAMS, default=1, help="Samples for each prompt, in one batch.")
@click.option("--stop", "stops", multiple=True, help="Stop before this string; repeatable.")
@click.option("--ignore-end", is_flag=True, help="Continue after <|endoftext|>, which otherwise ends a sample.")
@click.option("--stream/--no-stream", default=None, help="Print tokens as they come. [default: on a terminal, for one]")
@click.option("--cache/--no-cache", "cached", default=True, help="Use a KV cache: faster; in float32 the same text.")
@common.compile_option
@click.option("--untrained", is_flag=True, help="Sample from the initial weights of the training.")
@click.option("--out", type=PATH, help="Write the text to this file instead of the terminal.")
@click.option(
    "--probabilities", "scores", type=PATH, help="Also write a JSON file with each token's text and its probability."
)
def sample(
    kind: str,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    stream: bool | None,
    out: Path | None,
    scores: Path | None,
    **options: Any,
) -> None:
    """Sample text from a trained model, or from OpenAI's GPT-2, which is downloaded at first use.

    \b
      picogpt sample char-transformer -n 1000 --prompt "ROMEO:"
      picogpt sample char-transformer --ckpt weights/char_transformer/RUN/best.pt \\
          --tokenizer-dir weights/char_tokenizer/RUN/ -n 10000
      picogpt sample gpt2-pretrained --prompt "Once upon a time" --top-k 40 --stop "The End"
      picogpt sample gpt2 --dtype bfloat16 --compile -n 50000          long samples on a GPU
    """
    if prompts and prompt_file:
        raise UsageError("give --prompt or --prompt-file, not both")
    from picogpt import sample as sampling
    from picogpt import stream as streaming
    from picogpt.files import read_text, write_text

    decoding = sampling.Decoding(options["temperature"], options["top_k"], options["top_p"])
    model, tokenizer, _ = load_model(kind, options["ckpt"], options["tokenizer_dir"], options["untrained"])
    given = [read_text(prompt_file)] if prompt_file else list(prompts)
    texts = given or [streaming.first_prompt(tokenizer, kind in PRETRAINED)]
    texts = [text for text in texts for _ in range(options["num_samples"])]
    ids = [streaming.read_prompt(tokenizer, text, model.config.block_size, options["truncate"]) for text in texts]
    if stream is None:
        stream = out is None and len(texts) == 1 and sys.stdout.isatty()
    elif stream and (len(texts) > 1 or out):
        raise UsageError("--stream prints one text: leave out --num-samples, a second --prompt and --out")
    echo = functools.partial(click.echo, nl=False)
    if stream and given:
        echo(texts[0])
    model = sampling.prepare(model, options["device"], options["dtype"], compiled=options["compiled"])
    sampled = {name: options[name] for name in ("seed", "stops", "cached", "compiled")}
    sampled |= {"at_end_of_text": not options["ignore_end"], "on_text": echo if stream else None}
    samples, seconds = streaming.sample_texts(model, tokenizer, ids, options["num_tokens"], decoding, **sampled)
    whole = "\n---\n".join((text if given else "") + made.text for text, made in zip(texts, samples, strict=True))
    if out:
        write_text(out, whole)
    else:
        click.echo("" if stream else whole)
    if scores:
        write_text(scores, json.dumps(streaming.scored(model, ids, samples)))
    count = sum(len(made.ids) for made in samples)
    click.echo(f"{count:,} tokens, {count / seconds:,.1f} tokens/s", err=True)


@click.command()
@common.model_options
@click.option(
    "--task", type=click.Choice(["loss", "hellaswag"]), default="loss", help="What to measure; hellaswag is for GPT-2."
)
@click.option("--limit", type=click.IntRange(1), help="Only the first N items of hellaswag. [default: all 10,042]")
@common.data_option
@click.option("--prompt", "prompts", multiple=True, help="Also continue this prompt; repeatable.")
@click.option("-n", "--num-tokens", type=common.TOKENS, default=100, help="Tokens of each continuation.")
@click.option("--seed", type=int, default=1337, help="Seed of the continuations.")
@common.record_option
@common.optional_option
def evaluate(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    task: str,
    limit: int | None,
    data: Path | None,
    out: Path | None,
    **measured: Any,
) -> None:
    """Measure the loss of a model on the whole validation text, with the weights in the dtype of sampling.

    With --task hellaswag: how often it finds the right one of four endings of a text, by the sum of the log-probabilities
    of their tokens (acc), and by the mean (acc_norm). The 10,042 items are downloaded at first use.

    \b
      picogpt evaluate gpt2
      picogpt evaluate gpt2 --dtype int8                   the cost of 8-bit weights
      picogpt evaluate gpt2-pretrained
      picogpt evaluate gpt2 --task hellaswag --limit 200   on a CPU all take half an hour
    """
    from picogpt import records
    from picogpt.data.corpus import open_data

    given = click.get_current_context().get_parameter_source
    others = (
        {"limit": "--limit"}
        if task == "loss"
        else {"data": "--data", "prompts": "--prompt", "num_tokens": "-n", "seed": "--seed"}
    )
    if unused := [option for name, option in others.items() if given(name) == ParameterSource.COMMANDLINE]:
        raise UsageError(f"--task {task} has no use for {' and '.join(unused)}: leave that out")
    if task == "hellaswag":
        return _hellaswag(kind, ckpt, tokenizer_dir, limit, out, measured)
    key = records.Key("evaluate", kind, dtype=measured["dtype"])
    token_data = open_data(data or common.token_folder("gpt2" if kind in PRETRAINED else kind))
    optional = measured.pop("optional")
    model, tokenizer, source = common.load_or_record(key, out, optional, ckpt, tokenizer_dir)
    from picogpt.bench import measure

    record = measure.quality(key, model, tokenizer, source, token_data, **measured)
    if out:
        records.write(out, record)
    results = record["results"]
    losses = f"{results['val_loss']:.6f} nats per token, {results['val_bits_per_byte']:.4f} bits per byte"
    click.echo(f"{source}, {key.dtype}: validation loss {losses}")
    for prompt, text in zip(record["config"]["prompts"], record["results"]["texts"], strict=True):
        click.echo(f"---\n{prompt}{text}")


def _hellaswag(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    limit: int | None,
    out: Path | None,
    options: dict[str, Any],
) -> None:
    from picogpt import records
    from picogpt.data import fetch

    if kind in MODELS and MODELS[kind].tokenizer == "char":
        raise UsageError(
            f"--task hellaswag is for GPT-2: {kind} reads only the characters of the text that it was trained on"
        )
    key = records.Key("hellaswag", kind, dtype=options["dtype"])
    with common.or_record(key, out, options["optional"], f"{fetch.find(key.task).file} could not be fetched"):
        path = fetch.fetch(key.task, common.RESOURCES, cached_only=options["optional"])
    model, tokenizer, source = common.load_or_record(key, out, options["optional"], ckpt, tokenizer_dir)
    from picogpt.bench import hellaswag
    from picogpt.report.compare import published_for

    measured = {name: options[name] for name in ("device", "dtype")}
    record = hellaswag.accuracy(key, model, tokenizer, source, path, limit=limit, **measured)
    results, published = record["results"], published_for(records.Key("hellaswag", "gpt2-pretrained", dtype="float32"))
    items = f"{'the first ' if limit else ''}{results['items']:,} items"
    click.echo(f"{source}, {key.dtype}: HellaSwag, {items}, chance 0.25, published for OpenAI's GPT-2 124M on 10,042:")
    for name, way in (("acc", "sum of log-probabilities"), ("acc_norm", "mean per token")):
        click.echo(f"{name:9}{results[name]:.4f}  {way}; published {published[name]['published']:.4f}")
    if out:  # last: where it cannot be written, an hour is not lost
        records.write(out, record)


@click.command()
@click.argument("kind", type=click.Choice(["gpt2"]))
@click.option("--ckpt", type=PATH, help="A best.pt. [default: of the newest run]")
@click.option("--out", type=PATH, required=True, help="Folder to write; one that has this model already is kept.")
@click.option("--push", "name", metavar="USER/NAME", help="Also publish it on the Hugging Face hub, in one commit.")
@click.option("--private", is_flag=True, help="With --push: for you alone.")
def export(kind: str, ckpt: Path | None, out: Path, name: str | None, private: bool) -> None:
    """Write a trained GPT-2 as a Hugging Face folder: safetensors, config, tokenizer, model card.

    \b
      picogpt export gpt2 --out my-gpt2
      python -c "from transformers import pipeline; print(pipeline('text-generation', 'my-gpt2')('ROMEO:'))"

    With --push USER/NAME it goes to the hub too, or to the one that HF_ENDPOINT names, with the login of `hf auth login` or
    HF_TOKEN. The card, README.md in the folder, can be edited before that: what you wrote is kept.
    """
    if private and name is None:
        raise UsageError("--private is for --push")
    from picogpt import publish

    if name is not None:
        publish.check(name)
    from picogpt.card import model_card
    from picogpt.data.bpe import GPT2Tokenizer
    from picogpt.export import export_folder
    from picogpt.models.gpt2 import GPT2

    weights = common.trained(kind, ckpt)
    model, tokenizer = weights.model(), weights.tokenizer(None)
    if not isinstance(model, GPT2) or not isinstance(tokenizer, GPT2Tokenizer):
        raise PicogptError(f"{weights.path} is not a GPT-2")
    card = functools.partial(model_card, weights, model.parameter_count())
    export_folder(model, tokenizer, out, card, name)
    click.echo(f"{out}: {weights.path} for transformers")
    if name is not None:
        click.echo(f"{publish.push(out, name, private)}: {out} on the hub")
