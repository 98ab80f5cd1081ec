"""Sizes of weight files on disk. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picogpt import hardware, records
from picogpt.data import fetch
from picogpt.errors import PicogptError, Unreachable
from picogpt.registry import PRETRAINED


def measure(files: Mapping[str, str]) -> dict[str, Any]:
    """The record of the sizes of weight files by name, in bytes; gpt2-pretrained stands for OpenAI's file in the cache.

    Raises PicogptError when a file cannot be read. One of OpenAI's that is not in the cache is `missing` in the record.
    """
    paths, missing = {}, {}
    for name, file in files.items():
        try:
            openai = file in PRETRAINED
            paths[name] = fetch.fetch_pretrained(file.removeprefix("gpt2-"), cached_only=True) if openai else Path(file)
        except Unreachable:
            missing[f"{name} MB"] = records.HUB_UNREACHABLE
    try:
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    except OSError as error:
        raise PicogptError(f"cannot read {error.filename}: {error.strerror}") from error
    return {
        **records.provenance(hardware.select("cpu")),
        **records.Key("weights")._asdict(),
        "corpus": {},
        "config": {"files": {name: str(path) for name, path in paths.items()}},
        "missing": missing,
        "units": dict.fromkeys(sizes, "bytes"),
        "results": {**sizes, **{f"{name} MB": size / 1e6 for name, size in sizes.items()}},
    }
