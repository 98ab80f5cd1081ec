"""The folder of a run: who may use it, what in it is finished, what can be gone on from.

checkpoints/    last.pt, last.previous.pt, best.pt, metrics.jsonl: written while it runs, removed at its end
best.pt         the weights with the lowest validation loss
metrics.jsonl   losses by step
record.json     the numbers, and where they come from; written last, so it says that the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.errors import PicogptError
from picogpt.files import locked, place, write_text
from picogpt.train import checkpoint

RESULTS = ("best.pt", "metrics.jsonl")


class RunFolder:
    """One folder, for one run: the settings and data of `fingerprint`."""

    def __init__(self, path: str | Path, fingerprint: str):
        self.path, self.fingerprint = Path(path), fingerprint
        self.work = self.path / "checkpoints"
        self.last, self.best, self.metrics = (self.work / name for name in ("last.pt", "best.pt", "metrics.jsonl"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out. Raises PicogptError when one is training here."""
        with locked(self.path, "training"):
            yield

    def finished(self, replace: bool) -> dict[str, Any] | None:
        """The record of a run that is finished already; with `replace`, one of other settings is deleted.

        Raises PicogptError when there is one of other settings and `replace` is not given.
        """
        path = self.path / "record.json"
        if not path.exists():
            return None
        record: dict[str, Any] = {}
        try:
            record = records.read(path)
        except PicogptError as error:
            if not replace:
                raise
            warnings.warn(f"{error}; it is replaced", stacklevel=2)
        ours = record.get("fingerprint") == self.fingerprint
        if ours and (self.path / "best.pt").exists():
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed just before its end
            return record
        if ours and not replace:
            raise PicogptError(
                f"{self.path} is finished, and its best.pt is gone: bring it back, or --replace trains again"
            )
        self._refuse_unless(replace)
        for name in ("record.json", *RESULTS):
            (self.path / name).unlink(missing_ok=True)
        return None

    def load(self, replace: bool) -> dict[str, Any] | None:
        """The state to go on from, or None where there is none; with `replace`, one of other settings is deleted.

        Raises PicogptError when there is one of other settings, or that cannot be read, and `replace` is not given.
        """
        self.work.mkdir(exist_ok=True)
        # Listed, because a network file system may go on saying of a name that nothing is there when a node asked too early.
        if not {self.last.name, checkpoint.previous(self.last).name} & set(os.listdir(self.work)):
            return None
        state = self._read(replace)
        if state and state["fingerprint"] == self.fingerprint:
            return state
        self._refuse_unless(replace)
        shutil.rmtree(self.work)
        self.work.mkdir()
        return None

    def cut_metrics(self, step: int) -> None:
        """Keep the lines up to `step`: those after the checkpoint will be written again; the last one may be torn."""
        write_text(self.metrics, "".join(line + "\n" for line in _lines_until(self.metrics, step)) if step else "")

    def save(self, state: dict[str, Any]) -> None:
        """Write last.pt in one piece. Raises PicogptError when it cannot be written."""
        with open(self.metrics, "rb") as metrics:
            os.fsync(metrics.fileno())  # the lines up to this step must outlive a power cut if the checkpoint does
        checkpoint.save_state(self.last, {"fingerprint": self.fingerprint, **state})

    def publish(self, record: dict[str, Any]) -> None:
        """Give the results their final names, the record last, and remove the working files."""
        for name in RESULTS:
            place(self.work / name, self.path / name)  # both names, until the record is written
        records.write(self.path / "record.json", record)
        shutil.rmtree(self.work)

    def _read(self, replace: bool) -> dict[str, Any] | None:
        """The last good state; with `replace`, None where none can be read."""
        try:
            state, warning = checkpoint.load_state(self.last)
        except PicogptError as error:
            if not replace:
                raise PicogptError(f"{error}; --replace starts over") from error
            state, warning = None, f"{error}; starting over"
        if warning:
            warnings.warn(warning, stacklevel=3)
        return state

    def _refuse_unless(self, replace: bool) -> None:
        if not replace:
            raise PicogptError(
                f"{self.path} holds a run of other settings or data: choose another --run, or --replace it"
            )


def _lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    return kept
