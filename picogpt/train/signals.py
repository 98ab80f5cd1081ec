"""Signals that stop a training: what SLURM, a terminal or a user sends to make it save and end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def collect_stop_signals(received: list[int]) -> Iterator[None]:
    """Collect the stop signals that arrive. A second Ctrl-C (or SIGTERM, ...) ends the process at once, without saving.

    Under torchrun signals are only collected, and to the end of the process. Ranks often get one twice, from SLURM or a
    terminal and again from torchrun: dying at the second would lose the save. And torchrun sends SIGTERM to all ranks when
    one has failed, while they still have to say why they end.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def remember(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:  # the terminal was closed: writing to it would fail before the checkpoint is saved
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if not launched:
            signal.signal(number, previous[number])

    previous = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}
    if previous[signal.SIGHUP] == signal.SIG_IGN:  # under nohup; other signals that a shell ignores are meant for us
        del previous[signal.SIGHUP]
    for number in previous:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if not launched:
                signal.signal(number, handler)
