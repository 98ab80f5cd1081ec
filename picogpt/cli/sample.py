"""Commands that use a trained model: sample, evaluate, export."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from picogpt.cli.common import (
    KINDS,
    PRETRAINED,
    load_model,
    model_options,
    optional_option,
    record_if_unavailable,
    token_folder,
)
from picogpt.errors import PicogptError, UsageError


@click.command()
@click.argument("kind", type=click.Choice([*KINDS, *PRETRAINED]))
@model_options
@click.option("-n", "--num-tokens", type=int, default=500, help="Tokens to sample.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; repeatable. [default: a line break; for OpenAI's models <|endoftext|>]",
)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="UTF-8 file with the text to continue.")
@click.option("--truncate", is_flag=True, help="If a prompt is longer than the context, use only its end.")
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    help="Divides the logits: lower is more deterministic, higher more random, 0 is greedy.",
)
@click.option("--top-k", type=int, help="Sample from the k most likely tokens only.")
@click.option(
    "--top-p",
    type=float,
    help="Sample from the most likely tokens whose probabilities add up to this (nucleus sampling).",
)
@click.option("--seed", type=int, default=1337, help="The same seed gives the same text; sample i uses seed + i.")
@click.option("--num-samples", type=int, default=1, help="Samples for each prompt, generated as one batch.")
@click.option("--stop", "stops", multiple=True, help="Stop before this string; repeatable.")
@click.option("--ignore-end", is_flag=True, help="Continue after <|endoftext|>, which otherwise ends a sample.")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Print tokens as they are sampled. [default: on a terminal, for one sample]",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    help="Use a KV cache. Without it sampling is slow; in float32 the text is the same.",
)
@click.option("--untrained", is_flag=True, help="Sample from the initial weights of the training.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the text to this file instead of the terminal.")
def sample(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    device: str,
    dtype: str,
    num_tokens: int,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    truncate: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_samples: int,
    stops: tuple[str, ...],
    ignore_end: bool,
    stream: bool | None,
    cache: bool,
    untrained: bool,
    out: Path | None,
) -> None:
    """Sample text from a trained model, or from OpenAI's GPT-2, which is downloaded at first use.

    \b
      picogpt sample char-transformer -n 1000 --prompt "ROMEO:"
      picogpt sample char-transformer --ckpt weights/char_transformer/RUN/best.pt \\
          --tokenizer-dir weights/char_tokenizer/RUN/ -n 10000
      picogpt sample gpt2-pretrained --prompt "Once upon a time" --top-k 40 --stop "The End"
    """
    if num_tokens < 1:
        raise UsageError(f"-n {num_tokens}: must be 1 or more")
    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples}: must be 1 or more")
    if prompts and prompt_file is not None:
        raise UsageError("give --prompt or --prompt-file, not both")

    from picogpt import sample as sampling
    from picogpt import stream as streaming
    from picogpt.files import read_text, write_text

    decoding = sampling.Decoding(temperature, top_k, top_p)
    model, tokenizer, _ = load_model(kind, ckpt, tokenizer_dir, untrained)
    given = prompts or ((read_text(prompt_file),) if prompt_file else ())
    texts = list(given) or [streaming.first_prompt(tokenizer, kind in PRETRAINED)]
    texts = [text for text in texts for _ in range(num_samples)]
    ids = [streaming.read_prompt(tokenizer, text, model.config.block_size, truncate) for text in texts]
    live = stream if stream is not None else out is None and len(texts) == 1 and sys.stdout.isatty()
    if live and (len(texts) > 1 or out):
        raise UsageError(
            "--stream prints one text to the terminal: leave out --num-samples, a second --prompt and --out"
        )

    def echo(text: str) -> None:
        click.echo(text, nl=False)

    if live and given:
        echo(texts[0])
    model = sampling.prepare(model, device, dtype)
    samples, seconds = streaming.sample_texts(
        model,
        tokenizer,
        ids,
        num_tokens,
        decoding,
        seed,
        stops,
        not ignore_end,
        cache,
        echo if live else None,
    )
    whole = "\n---\n".join((text if given else "") + made.text for text, made in zip(texts, samples, strict=True))
    if out:
        write_text(out, whole)
    else:
        click.echo("" if live else whole)
    made = sum(made.tokens for made in samples)
    click.echo(f"{made:,} tokens, {made / seconds:,.1f} tokens/s", err=True)


@click.command()
@click.argument("kind", type=click.Choice([*KINDS, *PRETRAINED]))
@model_options
@click.option("--data", type=click.Path(path_type=Path), help="Folder of token files. [default: newest in weights/]")
@click.option("--prompt", "prompts", multiple=True, help="Also continue this prompt; repeatable.")
@click.option("-n", "--num-tokens", type=click.IntRange(1), default=100, help="Tokens of each continuation.")
@click.option("--seed", type=int, default=1337, help="Seed of the continuations.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a record of the result.")
@optional_option
def evaluate(
    kind: str,
    ckpt: Path | None,
    tokenizer_dir: Path | None,
    device: str,
    dtype: str,
    data: Path | None,
    prompts: tuple[str, ...],
    num_tokens: int,
    seed: int,
    out: Path | None,
    optional: bool,
) -> None:
    """Measure the loss of a model on the whole validation text, with the weights in the dtype of sampling.

    \b
      picogpt evaluate gpt2
      picogpt evaluate gpt2 --dtype int8                   the cost of 8-bit weights
      picogpt evaluate gpt2-pretrained
    """
    from picogpt import records
    from picogpt.data.corpus import open_data

    token_data = open_data(data or token_folder("gpt2" if kind in PRETRAINED else kind))
    with record_if_unavailable(records.Key("evaluate", kind, dtype=dtype), out if optional else None):
        model, tokenizer, source = load_model(kind, ckpt, tokenizer_dir, cached_only=optional)
    from picogpt.bench import quality

    record = quality.measure(kind, model, tokenizer, source, token_data, device, dtype, prompts, num_tokens, seed)
    if out:
        records.write(out, record)
    click.echo(f"{source}, {dtype}: validation loss {record['results']['val_loss']:.6f} nats per token")
    for prompt, text in zip(prompts, record["results"]["texts"], strict=True):
        click.echo(f"---\n{prompt}{text}")


@click.command()
@click.argument("kind", type=click.Choice(["gpt2"]))
@click.option("--ckpt", type=click.Path(path_type=Path), help="A best.pt. [default: of the newest run]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist yet.")
def export(kind: str, ckpt: Path | None, out: Path) -> None:
    """Write a trained GPT-2 as a Hugging Face folder: safetensors, config, tokenizer.

    \b
      picogpt export gpt2 --out my-gpt2
      python -c "from transformers import pipeline; print(pipeline('text-generation', 'my-gpt2')('ROMEO:'))"
    """
    from picogpt.data.bpe import GPT2Tokenizer
    from picogpt.export import export_folder
    from picogpt.models.gpt2 import GPT2

    model, tokenizer, source = load_model(kind, ckpt, None)
    if not isinstance(model, GPT2) or not isinstance(tokenizer, GPT2Tokenizer):
        raise PicogptError(f"{source} is no GPT-2")
    export_folder(model, tokenizer, out)
    click.echo(f"{out}: {source} for transformers")
