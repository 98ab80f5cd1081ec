"""What a person sees of a long command: a bar on a terminal, lines in a file."""

import os
import pty
import re
import subprocess
import sys

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
COMMAND = [sys.executable, "-c", SCRIPT]


def test_without_a_terminal_there_are_lines_with_everything():
    lines = subprocess.run(COMMAND, capture_output=True, text=True, check=True).stderr.splitlines()
    assert lines[:2] == ["before training: val loss 10.9", "gpt2: step 20/40  loss 5.4321  12,345 tokens/s"]
    assert re.fullmatch(r"gpt2: step 40/40  loss 5\.4321  12,345 tokens/s  val 5\.5000  00:00 left", lines[2])
    assert re.fullmatch(r"shard 0: documents 200/200  [\d,]+ tokens/s", lines[3])
    assert lines[4:] == ["fetching text.txt: 2,048 bytes"]


def test_on_a_terminal_there_are_bars_with_count_rate_time_left_and_note():
    master, slave = pty.openpty()
    with subprocess.Popen(COMMAND, stderr=slave, env={**os.environ, "COLUMNS": "140"}) as process:
        os.close(slave)
        output = b""
        try:
            while part := os.read(master, 65536):
                output += part
        except OSError:  # Linux ends the terminal of a process that has ended in this way
            pass
    os.close(master)
    shown = output.decode()
    assert process.returncode == 0
    for pattern in (
        "before training: val loss 10.9\r\n",
        r"gpt2: 100%\|[^|]+\| 40/40 \[[\d:]+<[\d:]+, +[\d.]+ step/s, loss 5\.4321  12,345 tokens/s  val 5\.5000\]",
        r"shard 0: 100%\|[^|]+\| 200/200 \[.* documents/s, [\d,]+ tokens/s\]",
        r"text\.txt: 100%\|[^|]+\| 2\.00k/2\.00k \[",
        r"sampling:",
    ):
        assert re.search(pattern, shown), (pattern, shown)
    assert "silent" not in shown
    assert "never" not in shown
