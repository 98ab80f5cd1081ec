"""Trackers: TensorBoard, Weights & Biases or Trackio get every line of the metrics file. None of them is a dependency."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picogpt.errors import PicogptError, UsageError, innermost
from picogpt.files import read_text, write_text

Row = dict[str, float]


def require(kind: str) -> None:
    """Raises UsageError when the package of this tracker, or "none", cannot be imported."""
    try:
        if kind != "none":
            importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        raise _missing(kind, error) from error


def _missing(kind: str, error: ImportError) -> UsageError:
    needed = f"runtime.tracker={kind} needs a package that cannot be used ({error})"
    return UsageError(f"{needed}: pip install {kind}")


@contextmanager
def tracking(
    kind: str, folder: Path, settings: dict[str, Any], cut: list[Row] | None
) -> Iterator[Callable[[Row], None]]:
    """Give a tracker of this kind the `settings`; yield a function that gives it a line of the metrics.

    `cut` are the lines after the checkpoint from which a run goes on, which its tracker has had; None for a new run.
    Raises UsageError when the package is missing, PicogptError when it does not start; a later failure is one warning.
    """
    note, setting = folder / "checkpoints/tracker", f"runtime.tracker={kind}"
    noted = read_text(note).split() if cut is not None and note.exists() else []
    resumed = len(noted) == 2 and noted[0] == kind
    run_id, had = noted[1] if resumed else uuid.uuid4().hex, [(row["step"], *row) for row in cut or () if resumed]
    try:
        run: Any = _start(kind, folder, run_id, settings, resumed)
    except Exception as error:
        if cut is None:  # nothing has begun that could be continued
            shutil.rmtree(note.parent, ignore_errors=True)
        if isinstance(error, ImportError):
            raise _missing(kind, error) from error
        why = (" ".join(str(error).split()) or innermost(error)).rstrip(".")
        raise PicogptError(f"{setting} does not start: {why}; --set runtime.tracker=none trains without it") from error
    write_text(note, f"{kind} {run_id}\n")

    def attempt(action: str, *arguments: object) -> None:
        nonlocal run
        try:
            if run:
                getattr(run, action)(*arguments)
        except Exception as error:  # whatever it is, hours of training are worth more
            run = None
            warnings.warn(f"{setting} failed, going on without it: {str(error) or innermost(error)}", stacklevel=2)

    def track(row: Row) -> None:
        if (row["step"], *row) not in had:
            attempt("log", {name: value for name, value in row.items() if name != "step"}, row["step"])

    try:
        yield track
    finally:
        attempt("finish")


def _start(kind: str, folder: Path, run_id: str, settings: dict[str, Any], resumed: bool) -> Any:
    """The run of a tracker: an object with `log(values, step)` and `finish()`."""
    name = folder.as_posix().removeprefix("weights/")
    if kind == "tensorboard":
        return _TensorBoard(folder / "tensorboard", {"run": name, **settings}, resumed)
    if kind == "trackio":
        import trackio

        return trackio.init("picogpt", name, config=settings, resume="allow" if resumed else "never", embed=False)
    import wandb

    project, home = os.environ.get("WANDB_PROJECT", "picogpt"), os.environ.get("WANDB_DIR", str(folder))
    quiet = wandb.Settings(console="off")  # what is printed stays here
    return wandb.init(project=project, name=name, id=run_id, resume="allow", dir=home, config=settings, settings=quiet)


class _TensorBoard:
    def __init__(self, folder: Path, settings: dict[str, Any], resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        # A new run hides what one that was killed before its first checkpoint has left.
        self.writer = SummaryWriter(str(folder), purge_step=None if resumed else 0)
        if not resumed:
            self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", 0)

    def log(self, values: Row, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()
