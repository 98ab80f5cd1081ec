"""The training ladder of a machine: its records, each rung relative to the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from picogpt import machines
from picogpt.config import MachineConfig
from picogpt.errors import PicogptError
from picogpt.records import Records, at

LOSS_TOLERANCE = 0.05
"""Nats by which the last loss of a rung may differ from the baseline's, because of rounding."""
SAME = (
    "device.name", "device.cores", "corpus.text_sha256", "config.model", "config.hardware.batch_size", "config.hardware.block_size",
)  # fmt: skip
"""Values that all rungs of a ladder must share."""


@dataclass(frozen=True)
class Ladder:
    """The records of one machine by rung: `here`, of this run, or else of a reference, or none."""

    name: str
    machine: MachineConfig
    rungs: dict[str, dict[str, Any]]
    here: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences per step, tokens per sequence) as measured, or else from the machine's file."""
        for record in self.rungs.values():
            return at(record, "config.hardware.batch_size"), at(record, "config.hardware.block_size")
        return self.machine.batch_size, self.machine.block_size

    @property
    def largest_difference(self) -> float | None:
        """The largest difference of a rung's last loss from the baseline's, in nats; None without a comparison."""
        compared = (record["results"].get("loss_difference") for record in self.rungs.values())
        return max((abs(difference) for difference in compared if difference is not None), default=None)


def find(hardware: str, measured: Records, references: Records) -> Ladder:
    """The ladder of a machine, named as `machines.load` takes it, from the records of a run, or else the references."""
    name = machines.name_of(hardware)
    here, there = (
        {key.rung or "": record for key, record in group.items() if (key.task, key.machine) == ("ladder", name)}
        for group in (measured, references)
    )
    return Ladder(name, machines.load(hardware), here or there, bool(here))


def compare_with_baselines(measured: Records) -> None:
    """Add to the results of each rung, in place, its comparison with the baseline of its machine.

    speedup: tokens/s over the baseline's. loss_difference: last loss less the baseline's, nats. Both None without one.

    Raises PicogptError when a rung was measured on another device, text, model or batch than its baseline.
    """
    for key, record in measured.items():
        results, baseline = record["results"], measured.get(key._replace(rung="baseline"))
        if key.task != "ladder" or not results:
            continue
        results.update(speedup=None, loss_difference=None)
        if not baseline or not baseline["results"]:
            continue
        for path in SAME:
            if (ours := at(record, path)) != (first := at(baseline, path)):
                advice = "measure the ladder again as a whole (delete its folder in results/records/ladder/)"
                raise PicogptError(f"{key} was measured with {path} {ours}, and its baseline with {first}: {advice}")
        results["speedup"] = results["tokens_per_second"] / baseline["results"]["tokens_per_second"]
        results["loss_difference"] = results["final_loss"] - baseline["results"]["final_loss"]
