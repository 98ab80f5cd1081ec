"""What a person sees of a long command: a bar on a terminal, lines in a file."""

import os
import pty
import re
import subprocess
import sys

import pytest

SCRIPT = """
import time
from picogpt.progress import Encoding, Training, counting, transfer
with Training("gpt2", 40, 10) as bar:
    bar.say("before training: val loss 10.9")
    for step in (20, 30, 40):
        time.sleep(0.15)
        bar.update(step, 5.4321, 12345, 5.5 if step > 20 else None)
with Encoding("shard 0", 200) as bar:
    bar.advance(200, 10**6)
with transfer("text.txt", 2048) as advance:
    advance(2048)
with counting("sampling", 5) as advance:
    advance(5)
with Training("silent", 10, 0, shown=False) as bar:
    bar.update(10, 1.0, 1.0, None)
    bar.say("never")
"""


def run(terminal: bool) -> str:
    """What the script prints on stderr: a pseudo-terminal or a pipe."""
    if not terminal:
        return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stderr
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=slave, env={**os.environ, "COLUMNS": "140"}
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # Linux ends the terminal of a process that has ended in this way
                break
    os.close(master)
    assert process.returncode == 0
    return shown.decode()


def test_without_a_terminal_there_are_lines_with_everything():
    lines = run(terminal=False).splitlines()
    assert lines[:2] == ["before training: val loss 10.9", "gpt2: step 20/40  loss 5.4321  12,345 tokens/s"]
    assert re.fullmatch(r"gpt2: step 40/40  loss 5\.4321  12,345 tokens/s  val 5\.5000  00:00 left", lines[2])
    assert re.fullmatch(r"shard 0: documents 200/200  [\d,]+ tokens/s", lines[3])
    assert lines[4:] == ["fetching text.txt: 2,048 bytes"]


@pytest.mark.parametrize(
    "part",
    [
        "before training: val loss 10.9\r\n",
        r"gpt2: 100%\|[^|]+\| 40/40 \[[\d:]+<[\d:]+, +[\d.]+ step/s, loss 5\.4321  12,345 tokens/s  val 5\.5000\]",
        r"shard 0: 100%\|[^|]+\| 200/200 \[.* documents/s, [\d,]+ tokens/s\]",
        r"text\.txt: 100%\|[^|]+\| 2\.00k/2\.00k \[",
        r"sampling:",
    ],
)
def test_on_a_terminal_there_are_bars_with_count_rate_time_left_and_note(part: str):
    shown = run(terminal=True)
    assert re.search(part, shown), shown
    assert "silent" not in shown
    assert "never" not in shown
