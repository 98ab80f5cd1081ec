"""Trains the small transformer in a process of its own, and kills itself where it is told to.

Arguments: run folder, tokens folder, where to die (step:N, save:N, or never).
"""

import os
import signal
import sys

from conftest import small_experiment

from picogpt.data.corpus import open_data
from picogpt.train.loop import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, tokens, death = sys.argv[1:]
    trainer = Trainer(small_experiment(), open_data(tokens), folder)
    place, _, number = death.partition(":")
    if place == "step":
        trainer.callbacks.append(lambda trainer: die() if trainer.progress.step == int(number) else None)
    elif place == "save":
        replace, calls = os.replace, [0]

        def deadly_replace(source: str, target: str) -> None:
            # Between the write of a file and its rename.
            if str(target).endswith("last.pt"):
                calls[0] += 1
                if calls[0] == int(number):
                    die()
            replace(source, target)

        os.replace = deadly_replace
    elif place == "linger":

        def linger(trainer: Trainer) -> None:
            if trainer.progress.step == int(number):
                print("ready", flush=True)
            if trainer.progress.step >= int(number):
                signal.sigtimedwait([], 0.05)

        trainer.callbacks.append(linger)
    trainer.run()


if __name__ == "__main__":
    main()
