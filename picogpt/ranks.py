"""The ranks of a job: how a launcher numbers them, and which of them prints the error that ended it. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from picogpt.errors import UsageError

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks(NamedTuple):
    """The index of this process among all ranks of a job, and among those on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def from_environment() -> Ranks:
    """The ranks as torchrun, or srun and a script that sets what torch asks for, number them; without a launcher, one.

    Raises UsageError when the variables are incomplete, or hold no numbers.
    """
    given = {name: os.environ[name] for name in REQUIRED if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    if missing := [name for name in REQUIRED if name not in given]:
        raise UsageError(
            f"WORLD_SIZE={given['WORLD_SIZE']} is in the environment without {', '.join(missing)}: start the ranks by"
            " torchrun, or unset WORLD_SIZE for a single process"
        )
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    try:
        ranks = Ranks(*map(int, (given["RANK"], given["WORLD_SIZE"], local_rank, local_size)))
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be integers: {error}") from error
    if not 0 <= ranks.rank < ranks.size:
        raise UsageError(f"RANK={ranks.rank} is not below WORLD_SIZE={ranks.size}")
    return ranks


def first_to_fail() -> bool:
    """True on the rank of a torchrun job that failed first, which prints the error; the others fail because of it."""
    own_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder that the ranks of one attempt on this node share
    if not own_file:
        return True
    try:
        (Path(own_file).parents[1] / "picogpt-failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no mark can be written: printing twice is better than not at all
        pass
    return True


def launcher() -> str:
    """Identifies the parent process by its number and start time, as numbers are reused."""
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not Linux
        start = "0"
    return f"{parent}-{start}"
