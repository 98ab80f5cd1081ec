"""Combines the records of a training ladder: each rung relative to the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picogpt.config import MachineConfig
from picogpt.errors import PicogptError

LOSS_TOLERANCE = 0.05
"""Nats by which the last loss of a rung may differ from the baseline's, because of rounding."""
SAME = (
    ("device", "name"), ("device", "cores"), ("corpus", "text_sha256"),
    ("config", "model"), ("config", "hardware", "batch_size"), ("config", "hardware", "block_size"),
)  # fmt: skip
"""Keys of the record that all rungs of a ladder must share."""


def kind(hardware: str, rung: str) -> str:
    """The kind of the record of a rung."""
    return f"ladder {hardware} {rung}"


def machine_of(kind: str) -> str | None:
    """The machine in the kind of a record of a rung; None for other records."""
    words = kind.split(" ")
    return words[1] if words[0] == "ladder" else None


def of(hardware: str, by_kind: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of one machine by rung."""
    prefix = kind(hardware, "")
    return {name.removeprefix(prefix): record for name, record in by_kind.items() if name.startswith(prefix)}


def compare_with_baselines(by_kind: Mapping[str, dict[str, Any]]) -> None:
    """Add to the results of each rung, in place, its comparison with the baseline of its machine.

    speedup: tokens/s over the baseline's. loss_difference: last loss less the baseline's, nats. Both None without one.

    Raises PicogptError when a rung was measured on another device, text, model or batch than its baseline.
    """
    for name, record in by_kind.items():
        machine = machine_of(name)
        if machine is None:
            continue
        results, first = record["results"], by_kind.get(kind(machine, "baseline"))
        if not results:
            continue
        results.update(speedup=None, loss_difference=None)
        if first and first["results"]:
            _require_same(record, first)
            baseline = first["results"]
            results["speedup"] = results["tokens_per_second"] / baseline["tokens_per_second"]
            results["loss_difference"] = results["final_loss"] - baseline["final_loss"]


def shape(machine: MachineConfig, rungs: Mapping[str, dict[str, Any]]) -> tuple[int, int]:
    """(sequences per step, tokens per sequence) as measured, or else from the machine's file."""
    measured = next((record["config"]["hardware"] for record in rungs.values()), None)
    if measured is None:
        return machine.batch_size, machine.block_size
    return measured["batch_size"], measured["block_size"]


def largest_difference(rungs: Mapping[str, dict[str, Any]]) -> float | None:
    """The largest difference of a rung's last loss from the baseline's, in nats; None without a comparison."""
    compared = (record["results"].get("loss_difference") for record in rungs.values())
    return max((abs(difference) for difference in compared if difference is not None), default=None)


def _require_same(record: dict[str, Any], baseline: dict[str, Any]) -> None:
    for place in SAME:
        ours, theirs = _at(record, place), _at(baseline, place)
        if ours != theirs:
            raise PicogptError(
                f"{record['kind']} was measured with {' '.join(place)} {ours}, and {baseline['kind']} with {theirs}:"
                " a ladder is one machine's; measure it again as a whole (delete its folder in results/records/ladder/)"
            )


def _at(tree: Any, place: tuple[str, ...]) -> Any:
    """The value at nested keys of a record; None if there is none."""
    for key in place:
        tree = (tree or {}).get(key)
    return tree
