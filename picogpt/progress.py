"""Progress on stderr: a live bar with count, rate and time left on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


def _bar(name: str, total: int, unit: str, **options: Any) -> tqdm:
    columns, rows = shutil.get_terminal_size()  # 80 x 24 for a terminal of unknown size, where tqdm would show nothing
    options = {"disable": None, **options}  # None: no bar where stderr is no terminal
    return tqdm(desc=name, total=total, unit=unit, ncols=columns, nrows=rows, file=sys.stderr, **options)


@contextmanager
def transfer(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a transfer of `total` bytes; yields a function that takes the bytes received."""
    with _bar(name, total, "B", unit_scale=True, unit_divisor=1024) as bar:
        if bar.disable:
            print(f"fetching {name}: {total:,} bytes", file=sys.stderr)
        yield bar.update


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how many of `total` are done, on a terminal only; yields a function that takes how many more."""
    with _bar(name, total, " done", leave=False) as bar:
        yield bar.update


class _Noted(AbstractContextManager):
    """A bar with a note behind it; without a terminal, a line with the same content every few seconds."""

    unit: str

    def __init__(self, name: str, total: int, completed: int = 0, shown: bool = True):
        self.name, self.total, self.shown = name, total, shown
        self._bar = _bar(name, total, f" {self.unit}", initial=completed, disable=None if shown else True)
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._last_line = -LINE_INTERVAL_S

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._bar.close()

    def show(self, done: int, note: str) -> None:
        """Show that `done` of the total are done. The time left counts from the first call."""
        now = time.monotonic()
        first_done, first_time = self._first = self._first or (done, now)
        with suppress(OSError):  # whoever read our output has gone; what is shown goes on
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        if not (self._bar.disable and self.shown) or (now - self._last_line < LINE_INTERVAL_S and done < self.total):
            return
        self._last_line = now
        if done > first_done:
            note += f"  {tqdm.format_interval((self.total - done) * (now - first_time) / (done - first_done))} left"
        with suppress(OSError):
            print(f"{self.name}: {self.unit} {done:,}/{self.total:,}  {note}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            with suppress(OSError):
                tqdm.write(text, file=sys.stderr)


class Encoding(_Noted):
    """Documents that are tokenized, with tokens/s."""

    unit = "documents"
    documents = tokens = 0

    def advance(self, documents: int, tokens: int) -> None:
        """Show that so many more documents, and tokens, are done."""
        self.documents += documents
        self.tokens += tokens
        self.show(self.documents, f"{self.tokens / max(time.monotonic() - self._began, 1e-9):,.0f} tokens/s")


class Training(_Noted):
    """Steps of a training, with loss and tokens/s. With `shown` false it is silent, for all ranks but one."""

    unit = "step"

    def update(self, step: int, loss: float, tokens_per_second: float, val_loss: float | None) -> None:
        """Show that `step` steps are done. `loss` in nats per token, `val_loss` the latest one."""
        note = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self.show(step, note if val_loss is None else f"{note}  val {val_loss:.4f}")


class Scoring(Encoding):
    """Items of an evaluation that are scored, with tokens/s."""

    unit = "items"
