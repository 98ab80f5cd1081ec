"""Sizes of weight files on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picogpt import hardware, records
from picogpt.errors import PicogptError


def measure(files: Mapping[str, Path], missing: Mapping[str, str]) -> dict[str, Any]:
    """The record of the sizes of weight files, in bytes by name, and of the reasons why others are `missing`.

    Raises PicogptError when a file cannot be read.
    """
    sizes = {}
    for name, path in files.items():
        try:
            sizes[name] = path.stat().st_size
        except OSError as error:
            raise PicogptError(f"cannot read {path}: {error.strerror}") from error
    return {
        **records.provenance(hardware.select("cpu")),
        **records.Key("weights")._asdict(),
        "corpus": {},
        "config": {"files": {name: str(path) for name, path in files.items()}},
        "missing": {f"{name} MB": reason for name, reason in missing.items()},
        "units": dict.fromkeys(sizes, "bytes"),
        "results": {**sizes, **{f"{name} MB": size / 1e6 for name, size in sizes.items()}},
    }
