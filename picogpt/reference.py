"""Reference records: complete runs on one device, tracked in `results/reference/DEVICE/`, pictures in `media/reference/DEVICE/`.

`SHA256SUMS` beside them tells an edited file; `sha256sum -c` reads it too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from picogpt import records
from picogpt.data import fetch, fineweb
from picogpt.errors import PicogptError
from picogpt.files import read_text, sha256_file, write_text

SUMS = "SHA256SUMS"
CORPUS = "tinyshakespeare"
RECORDS = ("results/records/**/*.json", "weights/*/{run}/record.json", "weights/gpt2/{run}/*/record.json")
PAGES = ("results/summary.csv", "results/report.md")
# Prefixes of the kinds of records that a complete run has.
WHOLE = ("train char-bigram", "train char-transformer", "train gpt2", "ladder ", "evaluate gpt2 ", "sampling gpt2 ")


def keep(root: Path, run: str) -> tuple[Path, Path]:
    """Copy what the pipeline measured in `root`, its records, pages and pictures, to the reference folders there.

    Only of the run folder called `run`, and without what could not be measured. A copy of the same device is replaced.
    Returns both folders.

    Raises PicogptError when there is nothing, when parts of a run are missing, when a record was measured with
    uncommitted changes, at no commit, or on another corpus than the published numbers, or when the records are of
    several devices.
    """
    commit, dirty = records.commit()
    if commit is None or dirty:
        state = "is no git checkout" if commit is None else "has uncommitted changes"
        raise PicogptError(
            f"the source of picogpt {state}: reference records must say which code made them; commit first"
        )
    paths = [path for pattern in RECORDS for path in sorted(root.glob(pattern.format(run=run)))]
    # Without records of what the hub did not provide; what this device cannot do, and why, is part of the run.
    found = {path: record for path in paths if "reason" not in (record := records.read(path))}
    if not found:
        raise PicogptError(f"{root.resolve()} has no records of the run {run!r}: make report makes them")
    for path, record in found.items():
        require_good(path, record)
    trained = [record["device"] for record in found.values() if record["kind"].startswith(("train ", "ladder "))]
    names = {slug(device) for device in trained}
    if len(names) != 1:
        raise PicogptError(
            f"records of one device make a reference, and these are of {', '.join(sorted(names)) or 'none'}"
        )
    (device,) = names
    folders = root / "results/reference" / device, root / "media/reference" / device
    kinds = [record["kind"] for record in found.values()]
    lacking = [part.strip() for part in WHOLE if not any(kind.startswith(part) for kind in kinds)]
    lacking += [page for page in PAGES if not (root / page).exists()]
    if lacking:
        raise PicogptError(f"a reference is a whole run, and {root.resolve()} lacks {', '.join(lacking)}: make report")
    # An earlier copy is deleted once the new one is complete.
    new = root / "results/.reference", root / "media/.reference"
    for folder in new:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for path, record in found.items():
        shutil.copyfile(path, new[0] / f"{record['kind'].replace(' ', '_')}.json")
    for page in PAGES:
        text = read_text(root / page)
        for name in sorted(set(re.findall(r"\]\(\.\./media/([^)]+)\)", text))):  # only pictures of this run
            shutil.copyfile(root / "media" / name, new[1] / name)
        write_text(new[0] / Path(page).name, text.replace("](../media/", f"](../../../media/reference/{device}/"))
    for source, folder in zip(new, folders, strict=True):
        _sum_up(source)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source.rename(folder)
    return folders


def check(folder: Path) -> None:
    """Raises PicogptError naming a file in `folder` that was changed, added or deleted since it was kept."""
    sums = folder / SUMS
    lines = read_text(sums).splitlines() if sums.exists() else []
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for path in sorted(path for path in folder.iterdir() if path.name != SUMS):
        if path.name not in expected:
            raise PicogptError(f"{path} is not in {sums}: make reference writes both")
        actual = sha256_file(path)
        if actual != expected[path.name]:
            raise PicogptError(
                f"{path} was edited: its sha256 is {actual}, {sums} has {expected[path.name]}. Restore it (git checkout),"
                " or measure again (make report, make reference)"
            )
    for name in expected:
        if not (folder / name).exists():
            raise PicogptError(f"{folder / name} is in {sums} and is not there: git checkout restores it")


def slug(device: dict[str, Any]) -> str:
    """The name of a device as a folder: nvidia_h100_80gb_hbm3; of a CPU with its cores, amd_epyc_2_cores."""
    name = device["name"] + (f" {device['cores']} cores" if device["kind"] == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def require_good(path: Path, record: dict[str, Any]) -> None:
    """Raises PicogptError when a record lacks its provenance, or when that would make it misleading."""
    if not record["commit"] or record["dirty"]:
        state = "with uncommitted changes" if record["commit"] else "at no commit"
        raise PicogptError(f"{path} was measured {state}: measure it again from a clean checkout")
    if not record["device"].get("name") or not record["software"].get("torch"):
        raise PicogptError(f"{path} does not say on which device or with which torch it was measured")
    corpus = record["corpus"]
    distributed = record["kind"].startswith("train gpt2 ") and corpus.get("name") == fineweb.NAME
    if corpus and not distributed and corpus["text_sha256"] != fetch.find(CORPUS).sha256:
        raise PicogptError(f"{path} was measured on {corpus['name']}: reference records stand on {CORPUS}")


def _sum_up(folder: Path) -> None:
    files: Iterable[Path] = sorted(folder.iterdir())
    write_text(folder / SUMS, "".join(f"{sha256_file(path)}  {path.name}\n" for path in files))
