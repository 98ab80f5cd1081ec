"""What the ranks of a torchrun job agree on without torch: which of them prints the error that ended the job."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def first_to_fail() -> bool:
    """True on the rank of a job that failed first, which prints the error; the others fail because of it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        failure_mark().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no mark can be written: printing twice is better than not at all
        pass
    return True


def failure_mark() -> Path:
    """The file that marks that a rank has failed; one for each start of the ranks by their parent, torchrun."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Path(tempfile.gettempdir()) / f"picogpt-failed-{launcher()}-{start}"


def launcher() -> str:
    """Identifies the parent process by its number and start time, as numbers are reused."""
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # not Linux
        start = "0"
    return f"{parent}-{start}"
