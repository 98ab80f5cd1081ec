"""Trains a small model as one rank of a job that torchrun started, or alone.

Arguments: run folder, tokens folder, settings as JSON (model, train), what else to do: none, die:STEP (rank 1 is
killed there, once), die0:STEP (rank 0), nan:STEP (the loss of rank 1 is not a number), linger (slow steps),
compile (with torch.compile), or count (how often the ranks exchange gradients, into the file `exchanges`).
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

from conftest import SMALL_RUNTIME
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from picogpt import cli
from picogpt.config import Experiment
from picogpt.data.corpus import open_data
from picogpt.train.distributed import init_distributed
from picogpt.train.loop import Trainer


def train(folder: str, tokens: str, settings: str, misfortune: str) -> None:
    kind, _, number = misfortune.partition(":")
    runtime = {**SMALL_RUNTIME, "compile": "auto" if kind == "compile" else "off"}
    experiment = Experiment.model_validate({**json.loads(settings), "runtime": runtime})
    with init_distributed("cpu") as world:
        trainer = Trainer(experiment, open_data(tokens), folder, world)
        exchanges: list[int] = []

        def exchange(state, bucket):
            exchanges.append(1)
            return allreduce_hook(None, bucket)

        def unlucky(trainer: Trainer) -> None:
            index, forward = trainer.progress.step, trainer.step.forward
            if kind == "count" and index == 0:
                forward.register_comm_hook(None, exchange)
            if kind == "linger":
                if index == 5:
                    Path(folder, f"ready{world.rank}").touch()
                time.sleep(0.3 if index >= 5 else 0)
            elif world.rank == (0 if kind == "die0" else 1) and index == int(number or -1):
                if kind.startswith("die") and not Path(folder, "died").exists():
                    Path(folder, "died").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                elif kind == "nan":
                    trainer.step.forward = lambda x, y: forward(x, y) * float("nan")

        trainer.callbacks.append(unlucky)
        trainer.run()
        if kind == "count" and world.is_main:
            Path(folder, "exchanges").write_text(str(len(exchanges)))
        # A wrapper that outlived the run would take the process group with it, and with that now and then this rank.
        assert not any(type(each) is DistributedDataParallel for each in gc.get_objects())


def main() -> None:
    cli.cli = lambda standalone_mode: train(*sys.argv[1:])  # errors as the command line tells them
    cli.main()


if __name__ == "__main__":
    main()
