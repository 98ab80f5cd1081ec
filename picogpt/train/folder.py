"""The folder of a run: its lock, its results, and the checkpoint to resume from.

.lock           held while it runs
checkpoints/    last.pt, last.previous.pt, best.pt, metrics.jsonl: written while it runs, removed at its end
tensorboard/    what runtime.tracker=tensorboard writes; removed by --replace
best.pt         the weights with the lowest validation loss
metrics.jsonl   losses by step
record.json     the numbers and their provenance; written last, so it marks the run as finished
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from picogpt import checkpoint, records
from picogpt.errors import PicogptError
from picogpt.files import exclusive_lock, place, write_text

RESULTS = ("best.pt", "metrics.jsonl")
WORK = {*RESULTS, "last.pt", "last.previous.pt", "last.damaged.pt", "tracker"}
"""What checkpoints/ holds, apart from hidden files."""


class RunFolder:
    """The folder of one run, whose settings and data have this `fingerprint`."""

    def __init__(self, path: str | Path, fingerprint: str):
        self.path, self.fingerprint = Path(path), fingerprint
        self.work = self.path / "checkpoints"
        self.last, self.best, self.metrics = (self.work / name for name in ("last.pt", "best.pt", "metrics.jsonl"))

    def held(self) -> AbstractContextManager:
        """Lock the folder. Raises PicogptError when another process is training here."""
        return exclusive_lock(self.path, "training")

    def require_free(self) -> None:
        """Raises PicogptError when another process is training here. Makes no lock."""
        if (self.path / ".lock").exists():
            with self.held():
                pass

    def finished(self, replace: bool) -> dict[str, Any] | None:
        """The record, if the run is finished; with `replace`, a run with other settings is deleted. Raises like `record`."""
        record = self.record(replace)
        if record:
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed just before its end
        elif record is not None:
            for name in ("record.json", *RESULTS):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        return record or None

    def record(self, replace: bool) -> dict[str, Any] | None:
        """The record, if the run is finished; an empty one where `replace` is to delete it. Changes nothing.

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
            return record
        if ours and not replace:
            raise PicogptError(
                f"{path.parent} is finished, but its best.pt is missing: restore it, or --replace the run"
            )
        self._refuse_unless(replace)
        return {}

    def load(self, replace: bool) -> dict[str, Any] | None:
        """The state to resume from, or None; with `replace`, that of a run with other settings is deleted.

        Raises like `state`, and PicogptError when checkpoints/, which is removed in the end, has files of others.
        """
        self.work.mkdir(exist_ok=True)
        if others := sorted(name for name in {*os.listdir(self.work)} - WORK if not name.startswith(".")):
            raise PicogptError(
                f"{self.work} would be removed, and picogpt did not write {others[0]}: choose another folder"
            )
        for incomplete in self.work.glob(".*.tmp"):  # of a process that was killed while it was writing
            incomplete.unlink()
        state, damaged = self.state(replace)
        if state and damaged and self.last.exists():  # otherwise the next save would keep it in place of the good one
            os.replace(self.last, self.last.with_name("last.damaged.pt"))
        elif state is not None and not state:
            shutil.rmtree(self.work)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            self.work.mkdir()
        return state or None

    def state(self, replace: bool) -> tuple[dict[str, Any] | None, bool]:
        """The state to resume from, or None, and whether last.pt is damaged; an empty one where `replace` is to delete it.

        Changes nothing. Raises PicogptError when there is one of other settings, or that cannot be read, and `replace` is
        not given.
        """
        # Listing the folder refreshes a network file system, which may cache that a file does not exist.
        names = set(os.listdir(self.work)) if self.work.exists() else set()
        if not {self.last.name, checkpoint.previous(self.last).name} & names:
            return None, False
        try:
            state, warning = checkpoint.load_state(self.last)
        except PicogptError as error:
            if not replace:
                raise PicogptError(f"{error}; --replace starts over") from error
            state, warning = {}, f"{error}; starting over"
        if warning:
            warnings.warn(warning, stacklevel=2)
        if state.get("fingerprint") == self.fingerprint:
            return state, warning is not None
        self._refuse_unless(replace)
        return {}, False

    def cut_metrics(self, step: int) -> list[dict[str, float]]:
        """Keep the lines up to `step`, return later ones: they are written again. The last one may be incomplete."""
        kept, cut = [], []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if step and self.metrics.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["step"] > step:
                cut.append(row)
            else:
                kept.append(f"{line}\n")
        write_text(self.metrics, "".join(kept))
        return cut

    def save(self, state: dict[str, Any]) -> None:
        """Write last.pt atomically. Raises PicogptError when it cannot be written."""
        with open(self.metrics, "rb") as metrics:
            os.fsync(metrics.fileno())  # after a power cut the metrics must be as complete as the checkpoint
        checkpoint.save_state(self.last, {"fingerprint": self.fingerprint, **state})

    def publish(self, record: dict[str, Any]) -> None:
        """Move the results to their final names, the record last, and remove the working files."""
        for name in RESULTS:
            place(self.work / name, self.path / name)  # hard links, until the record is written
        records.write(self.path / "record.json", record)
        shutil.rmtree(self.work)

    def _refuse_unless(self, replace: bool) -> None:
        if not replace:
            raise PicogptError(
                f"{self.path} holds a run of other settings or data: choose another --name, or --replace it"
            )
