"""Trains as one rank of a job that torchrun started, or alone, and has a misfortune.

Arguments: run folder, tokens folder, experiment as JSON, misfortune: none, die:RANK:STEP (killed before that step, once),
save:N (killed between write and rename of its N-th last.pt), nan:RANK:STEP (a loss that is not a number), linger (slow
steps), count (the all-reduces of gradients, into the file `exchanges`), compile (it pays for a short training too).
"""

import gc
import os
import signal
import sys
import time
from pathlib import Path

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from picogpt import cli
from picogpt.config import Experiment
from picogpt.data.corpus import open_data
from picogpt.train import loop
from picogpt.train.distributed import init_distributed
from picogpt.train.loop import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(number: int) -> None:
    replace, saves = os.replace, []

    def deadly_replace(source: str, target: str) -> None:
        saves.extend([target] if str(target).endswith("last.pt") else [])
        if len(saves) == number:
            die()
        replace(source, target)

    os.replace = deadly_replace


def train(folder: str, tokens: str, experiment: str, misfortune: str) -> None:
    name, *numbers = misfortune.split(":")
    if name == "compile":
        loop.TOKENS_TO_COMPILE = 0
    exchanges: list[int] = []

    def exchange(state, bucket):
        exchanges.append(1)
        return allreduce_hook(None, bucket)

    def unlucky(trainer: Trainer) -> None:
        here, step, forward = [str(world.rank), str(trainer.progress.step)], trainer.progress.step, trainer.step.forward
        died = Path(folder, misfortune)
        if name == "die" and here == numbers and not died.exists():
            died.touch()
            die()
        elif name == "nan" and here == numbers:
            trainer.step.forward = lambda x, y: forward(x, y) * float("nan")
        elif name == "count" and step == 0:
            forward.register_comm_hook(None, exchange)
        elif name == "linger" and step >= 5:
            Path(folder, f"ready{world.rank}").touch()
            time.sleep(0.3)

    if name == "save":
        die_in_save(int(numbers[0]))
    with init_distributed("cpu") as world:
        trainer = Trainer(Experiment.model_validate_json(experiment), open_data(tokens), folder, world)
        trainer.callbacks.append(unlucky)
        trainer.run()
        if name == "count" and world.is_main:
            Path(folder, "exchanges").write_text(str(len(exchanges)))
        # A wrapper that outlived the run would take the process group with it, and with that now and then this rank.
        assert not any(type(each) is DistributedDataParallel for each in gc.get_objects())


def main() -> None:
    cli.cli = lambda standalone_mode: train(*sys.argv[1:])  # errors as the command line tells them
    cli.main()


if __name__ == "__main__":
    main()
