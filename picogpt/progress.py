"""Progress that a person can follow: a live bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

LINE_INTERVAL_S = 10.0


@contextmanager
def transfer(name: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show bytes, rate and time left of a transfer; yields a function that takes the bytes just received."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if not sys.stderr.isatty():
        print(f"fetching {name}: {total:,} bytes" + (f", {start:,} already here" if start else ""), file=sys.stderr)
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_console()) as progress:
        task = progress.add_task(name, total=total, completed=start)
        yield lambda count: progress.advance(task, count)


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done and the time left, on a terminal; yields a function that takes how many more."""
    from rich.progress import MofNCompleteColumn, Progress

    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


class _Noted:
    """A live bar with a count, the time left and a note, on a terminal; elsewhere nothing but what a subclass prints."""

    def __init__(self, name: str, total: int, completed: int = 0, shown: bool = True):
        self.name, self.total, self.shown = name, total, shown
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=_console())
            self._task = self._bar.add_task(name, total=total, completed=completed, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()


class Encoding(_Noted):
    """A bar of documents with tokens/s and time left; on a file or a pipe a line every few seconds."""

    def __init__(self, name: str, total: int):
        super().__init__(name, total)
        self.documents = self.tokens = 0
        self._began = self._last_line = time.monotonic()

    def advance(self, documents: int, tokens: int) -> None:
        """Show that so many more documents, and tokens, are done."""
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        note = f"{self.tokens / seconds:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=self.documents, note=note)
        elif now - self._last_line >= LINE_INTERVAL_S or self.documents == self.total:
            self._last_line = now
            left = _clock((self.total - self.documents) * seconds / self.documents)
            counted = f"{self.documents:,}/{self.total:,} documents"
            print(f"{self.name}: {counted}  {note}  {left} left", file=sys.stderr, flush=True)


class Training(_Noted):
    """A bar of steps with loss, tokens/s and time left; on a file or a pipe a line every few seconds.

    With `shown` false it is silent: one rank of several speaks.
    """

    def __init__(self, name: str, total_steps: int, start_step: int, shown: bool = True):
        super().__init__(name, total_steps, start_step, shown)
        self._first: tuple[int, float] | None = None  # step and time of the first update: rates count from there
        self._last_line = -LINE_INTERVAL_S

    def update(self, step: int, loss: float, tokens_per_second: float, val_loss: float | None) -> None:
        """Show that `step` steps are done. `loss` in nats a token, `val_loss` the latest one."""
        if not self.shown:
            return
        note = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if val_loss is not None:
            note += f"  val {val_loss:.4f}"
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        first_step, first_time = self._first = self._first or (step, now)
        if now - self._last_line < LINE_INTERVAL_S and step < self.total:
            return
        self._last_line = now
        if step > first_step:
            note += f"  {_clock((self.total - step) * (now - first_time) / (step - first_step))} left"
        print(f"{self.name}: step {step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
