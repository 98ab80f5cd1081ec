"""Reference records: complete runs on one device, tracked in `results/reference/DEVICE/`, pictures in `media/reference/DEVICE/`.

`SHA256SUMS` beside them, a file for `sha256sum -c`, shows whether a file was edited.
"""

from __future__ import annotations

import re
import shlex
import shutil
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
WHOLE = ("train char-bigram", "train char-transformer", "train gpt2", "ladder", "evaluate gpt2", "sampling gpt2")
"""How the names of the records begin that a complete run has."""


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
        state = "has uncommitted changes" if commit else "is no git checkout"
        raise PicogptError(f"the source of picogpt {state}: a reference must say which code made it; commit first")
    paths = [path for pattern in RECORDS for path in sorted(root.glob(pattern.format(run=run)))]
    # Without records of what the hub did not provide; what this device cannot do, and why, is part of the run.
    found = {path: record for path in paths if "reason" not in (record := records.read(path))}
    if not found:
        raise PicogptError(f"{root.resolve()} has no records of the run {run!r}: make report makes them")
    for path, record in found.items():
        require_good(path, record)
    devices = {slug(record["device"]) for record in found.values() if record["task"] in ("train", "ladder")}
    if len(devices) != 1:
        told = ", ".join(sorted(devices)) or "none"
        raise PicogptError(f"records of one device make a reference, and these are of {told}")
    names = {path: str(records.key(record)) for path, record in found.items()}
    lacking = [part for part in WHOLE if not any(f"{name} ".startswith(f"{part} ") for name in names.values())]
    lacking += [page for page in PAGES if not (root / page).exists()]
    if lacking:
        raise PicogptError(f"a reference is a whole run, and {root.resolve()} lacks {', '.join(lacking)}: make report")
    (device,) = devices
    kept, pictures = root / "results/reference" / device, root / "media/reference" / device
    new_kept, new_pictures = kept.with_name(".new"), pictures.with_name(".new")
    for folder in (new_kept, new_pictures):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for path, name in names.items():
        shutil.copyfile(path, new_kept / f"{name.replace(' ', '_')}.json")
    for page in PAGES:
        text = read_text(root / page)
        for picture in set(re.findall(r"\]\(\.\./media/([^)]+)\)", text)):  # only pictures of this run
            shutil.copyfile(root / "media" / picture, new_pictures / picture)
        write_text(new_kept / Path(page).name, text.replace("](../media/", f"](../../../media/reference/{device}/"))
    for new, folder in ((new_kept, kept), (new_pictures, pictures)):
        write_sums(new)
        shutil.rmtree(folder, ignore_errors=True)  # the earlier copy, only now that the new one is complete
        new.rename(folder)
    return kept, pictures


def write_sums(folder: Path) -> None:
    """Write the hashes of all files in `folder`."""
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in _hashes(folder).items()))


def check(folder: Path) -> None:
    """Raises PicogptError naming a file in `folder` that was changed, added or deleted since it was kept."""
    lines = read_text(folder / SUMS).splitlines() if (folder / SUMS).exists() else []
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    actual = _hashes(folder)
    for name in sorted(expected.keys() | actual.keys()):
        ours, theirs = actual.get(name), expected.get(name)
        if ours != theirs:
            state = f"was edited: its sha256 is {ours}, and not {theirs}" if ours and theirs else "was added or deleted"
            advice = (
                f"restore it (git checkout {shlex.quote(str(folder))}), or measure again (make report, make reference)"
            )
            raise PicogptError(f"{folder / name} {state} as in {folder / SUMS}: {advice}")


def slug(device: dict[str, Any]) -> str:
    """The name of a device as a folder: nvidia_h100_80gb_hbm3; of a CPU with its cores, amd_epyc_2_cores."""
    name = device["name"] + (f" {device['cores']} cores" if device["kind"] == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def require_good(path: Path, record: dict[str, Any]) -> None:
    """Raises PicogptError when a record lacks its provenance, or when that would make it misleading."""
    corpus = record["corpus"]
    distributed = record["task"] == "train" and record["machine"] and corpus.get("name") == fineweb.NAME
    if not record["commit"] or record["dirty"]:
        state = "with uncommitted changes" if record["commit"] else "at no commit"
        raise PicogptError(f"{path} was measured {state}: measure it again from a clean checkout")
    if not record["device"]["name"] or not record["software"].get("torch"):
        raise PicogptError(f"{path} does not say on which device or with which torch it was measured")
    if corpus and not distributed and corpus.get("text_sha256") != fetch.find(CORPUS).sha256:
        raise PicogptError(f"{path} was measured on {corpus.get('name')}: reference records stand on {CORPUS}")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != SUMS}
