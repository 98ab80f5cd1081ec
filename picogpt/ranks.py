"""The ranks of a job: how a launcher numbers them, and which of them prints the error that ended it. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from picogpt.errors import UsageError


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
    given = {name: value for name, value in os.environ.items() if value}
    size = given.get("WORLD_SIZE", "1")
    if size == "1":
        return Ranks()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]:
        advice = "start the ranks by torchrun, or unset WORLD_SIZE for a single process"
        raise UsageError(f"WORLD_SIZE={size} is in the environment without {', '.join(missing)}: {advice}")
    local_rank = given.get("LOCAL_RANK") or given.get("SLURM_LOCALID", "0")
    local_size = given.get("LOCAL_WORLD_SIZE") or given.get("SLURM_NTASKS_PER_NODE", "1")
    try:
        ranks = Ranks(*map(int, (given["RANK"], size, local_rank, local_size)))
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
