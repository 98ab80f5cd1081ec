"""The published numbers, `config/published.yaml`, and how a measured one compares."""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import Field

from picogpt import machines
from picogpt.config import Settings, config_folder, parse, read_yaml
from picogpt.data.assets import find

CORPUS = "tinyshakespeare"
"""What every published loss was measured on."""
TRAIN_VAL_TOKENS = {(1_003_854, 111_540), (301_966, 36_059)}
"""Its two parts, in characters and in GPT-2's tokens."""


class Number(Settings):
    """One row of the comparison."""

    section: str
    metric: str
    record: str = Field(description="kind of the record that measures it")
    key: str = Field(description="its place in the record's results; of a list, with a point and the place, from 0")
    unit: str
    published: float | None = Field(None, description="null: the write-up gives none")
    tolerance: float = Field(0.0, ge=0, description="up to this difference it counts as reproduced")
    better: Literal["lower", "higher"] | None = Field(None, description="null: neither direction is better")
    device: str | None = Field(None, description="where the published number was measured, if that matters")
    on_corpus: bool = Field(True, description="whether the number depends on the text")
    comparable: bool = Field(
        True, description="false: shown beside ours, but measured in another way; the note says how"
    )
    note: str = Field("", description="why ours differs")


def value_of(results: dict[str, Any], key: str) -> Any:
    """The number at a key as `Number.key` names it; None where there is none."""
    name, _, place = key.rpartition(".")
    if not place.isdigit():
        return results.get(key)
    listed = results.get(name) or []
    return listed[int(place)] if int(place) < len(listed) else None


@functools.cache
def numbers() -> tuple[Number, ...]:
    """All rows, in order."""
    path = config_folder() / "published.yaml"
    return tuple(parse(Number, row, f"{path}, row {index}") for index, row in enumerate(read_yaml(path)["numbers"], 1))


def on_published_corpus(record: dict[str, Any]) -> bool:
    """Whether a record stands on the published text and split: told by hash and counts, as a name proves nothing."""
    corpus = record["corpus"]
    counts = (corpus["train_tokens"], corpus["val_tokens"])
    return corpus["text_sha256"] == find(CORPUS).sha256 and counts in TRAIN_VAL_TOKENS


def published(record: str) -> dict[str, float]:
    """The published values that stand beside the results of a kind of record, by key."""
    return {number.key: number.published for number in numbers() if number.record == record and number.published}


def compare(number: Number, record: dict[str, Any] | None, reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """One row of `results/summary.csv`. `record` is None where nothing measured the number here.

    Then the number of a reference record, measured elsewhere, stands in its place, and the row says so; only of what
    depends on a certain machine, as any machine can measure the rest.
    """
    measured = value_of(record["results"], number.key) if record else None
    row = {
        "section": number.section,
        "metric": number.metric,
        "published": number.published,
        "measured": measured,
        "unit": number.unit,
        "device": record["device"]["name"] if record and measured is not None else None,
    }
    if record is None or measured is None:
        known_reason = (record or {}).get("not_measured") or (record or {}).get("missing", {}).get(number.key)
        reason = known_reason or _needs(number) or f"no record of {number.record} has it"
        return _not_here(row, number, reason, reference)
    if number.on_corpus and not on_published_corpus(record):
        corpus = record["corpus"]["name"]
        return {**row, "status": "not comparable", "note": f"measured on {corpus}, published for {CORPUS}, split 90/10"}
    if number.device is not None and number.device != record["device"]["name"]:
        # A number of another device never stands beside the published one.
        reason = f"published for {number.device}; this machine is {record['device']['name']}"
        return _not_here(row, number, reason, reference)
    if number.published is None or not number.comparable:
        return {**row, "status": "not comparable", "note": number.note or "nothing is published"}
    difference = measured - number.published
    if abs(difference) <= number.tolerance:
        return {**row, "status": "reproduced", "note": f"within {number.tolerance:g}"}
    if number.better and (difference < 0) == (number.better == "lower"):
        return {**row, "status": "better", "note": number.note}
    return {**row, "status": "differs", "note": number.note}


def _not_here(row: dict[str, Any], number: Number, reason: str, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The row of what this machine has not measured, with the number of a reference record where there is one for it."""
    row = {**row, "measured": None, "device": None, "status": "not measured here", "note": reason}
    known = value_of(reference["results"], number.key) if reference else None
    if reference and known is not None and (_needs(number) or number.device == reference["device"]["name"]):
        name, day = reference["device"]["name"], reference["created"][:10]
        row |= {"measured": known, "device": name, "note": f"{reason}; the number is a reference record of {day}"}
    return row


def _needs(number: Number) -> str | None:
    """Why a number of one machine is missing on others; None for numbers that every machine has."""
    name = next((name for name in machines.names() if name in number.record.split(" ")), None)
    return f"needs {machines.load(name).title}" if name else None
