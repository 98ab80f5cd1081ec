"""The command line: parses, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys

import click

from picogpt import __version__
from picogpt.cli import about, bench, data, report, runs, sample, train
from picogpt.errors import PicogptError, first_to_fail, is_out_of_memory

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


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

    and GPT-2, with OpenAI's tokens, the same:

    \b
      picogpt tokenize gpt2
      picogpt train gpt2                                  124M weights from scratch; --init pretrained: from OpenAI's
      torchrun --standalone --nproc_per_node=2 -m picogpt train gpt2
      picogpt sample gpt2 --prompt "ROMEO:"
      picogpt sample gpt2-pretrained --prompt "The meaning of life is"

    What was trained, what is here, and what each optimization buys on it:

    \b
      picogpt runs
      picogpt hardware
      picogpt bench train --hardware cpu --rung flash

    `make report` runs all of it, and writes every figure and table.
    """


for command in (
    data.fetch,
    data.tokenize,
    train.train,
    sample.sample,
    sample.evaluate,
    sample.export,
    runs.runs,
    bench.bench,
    report.report,
    report.reference,
    about.hardware,
    about.plan,
):
    cli.add_command(command)


def main() -> None:
    """Entry point. A user's mistake ends in one message and exit status 2, a failure in one message and 1."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.ClickException as error:
        if first_to_fail():
            error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except PicogptError as error:
        if first_to_fail():
            print(f"picogpt: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if first_to_fail():
            print(
                f"picogpt: out of memory ({str(error).strip().partition(chr(10))[0][:160]}):"
                " fewer sequences at once (train.micro_batch_size, --num-samples, --batch-size) or a smaller model need less",
                file=sys.stderr,
            )
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has left, as in `picogpt sample … | head`.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if first_to_fail():
            print(f"picogpt: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
