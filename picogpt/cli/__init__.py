"""The command line: parses, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

import click

from picogpt import __version__
from picogpt.cli import about, bench, data, report, runs, sample, train
from picogpt.errors import PicogptError, is_compile_error, is_out_of_memory
from picogpt.ranks import first_to_fail


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__, prog_name="picogpt")
def cli() -> None:
    """GPT from scratch as a reproducible experiment.

    Four commands train a first model and sample from it:

    \b
      picogpt fetch tinyshakespeare                       download the text and verify it
      picogpt tokenize char                               characters to integers, 90/10 split
      picogpt train char-transformer                      can be stopped and resumed at any step
      picogpt sample char-transformer -n 500              from the newest run

    GPT-2, with its own tokenizer:

    \b
      picogpt tokenize gpt2
      picogpt train gpt2                                  124M parameters from scratch, or --init pretrained
      torchrun --standalone --nproc_per_node=2 -m picogpt train gpt2
      picogpt sample gpt2 --prompt "ROMEO:"
      picogpt sample gpt2-pretrained --prompt "The meaning of life is"

    What has been trained, what this machine is, and how much each training optimization gains on it:

    \b
      picogpt runs
      picogpt hardware
      picogpt bench train --hardware cpu --rung flash

    `make report` runs everything and writes every figure and table.
    """


for command in (data.fetch, data.tokenize, train.train, sample.sample, sample.evaluate, sample.export):
    cli.add_command(command)
for command in (runs.runs, bench.bench, report.report, report.reference, about.hardware, about.plan):
    cli.add_command(command)


def main() -> None:
    """Entry point. A user's mistake ends in one message and exit status 2, a failure in one message and 1.

    Of several ranks, one prints it. An error that no message explains ends in a traceback. Characters that the output's
    encoding lacks are replaced, with a warning.
    """
    replaced: list[UnicodeError] = []

    def replace(error: UnicodeError) -> tuple[str | bytes, int]:
        replaced.append(error)
        return codecs.replace_errors(error)

    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: its descriptor must not go to the next file that is opened
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    codecs.register_error("picogpt", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="picogpt")
    try:
        _run()
    finally:
        if replaced:
            lacking = f"{sys.stdout.encoding} lacks some characters, which were replaced by ?"
            print(f"warning: {lacking}; PYTHONIOENCODING=utf-8 or --out keeps them", file=sys.stderr)


def _run() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        sys.exit("picogpt: the working folder was deleted: go to another one")
    try:
        cli(standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if first_to_fail():
            error.show()
        sys.exit(error.exit_code)
    except (PicogptError, OSError, RuntimeError, MemoryError) as error:
        message, explained = str(error), isinstance(error, PicogptError)
        if is_out_of_memory(error) and not explained:
            cause = message.strip().partition("\n")[0][:160] or type(error).__name__
            options = "train.micro_batch_size, --num-samples, --batch-size"
            message = f"out of memory ({cause}): process fewer sequences at once ({options}) or use a smaller model"
        elif isinstance(error, OSError):
            message = (f"{error.filename}: " if error.filename else "") + (error.strerror or message)
        elif is_compile_error(error):
            message = f"torch.compile does not work here, so go on without it: {message.strip().splitlines()[0]}"
        elif not explained:
            raise
        if first_to_fail():
            print(f"picogpt: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))
