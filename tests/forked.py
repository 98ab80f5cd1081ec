"""Programs in processes forked from one that has loaded them: that takes longer than most of what they do in tests."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

PROGRAMS = {"picogpt": "picogpt.cli", "snakemake": "snakemake.cli", "rank": "rank"}
"""Modules with a `main` that reads sys.argv, as their scripts call it."""
LOADED = ("snakemake.cli", "picogpt.cli", "picogpt.train.loop", "torch._dynamo")
"""What takes long to load; the server does not see this folder."""


def run(
    program: str,
    *arguments: object,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run of the program, with its output captured. Raises subprocess.TimeoutExpired."""
    context = _server()
    words = [program, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("1", "2"):
            Path(folder, name).touch()
        process = context.Process(target=_start, args=(words, str(cwd or os.getcwd()), dict(env or os.environ), folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = (Path(folder, name).read_text() for name in ("1", "2"))
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    return context


def _start(words: list[str], working_folder: str, environment: dict[str, str], folder: str) -> None:
    os.chdir(working_folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(os.open(os.path.join(folder, str(descriptor)), os.O_WRONLY), descriptor)
    if environment.get("PYTHONPATH"):  # another copy of this project, which would not have been loaded yet
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        for name in [name for name in sys.modules if name.partition(".")[0] == "picogpt"]:
            del sys.modules[name]
    sys.argv = words
    importlib.import_module(PROGRAMS[words[0]]).main()


def loaded() -> list[str]:
    """Of LOADED what the server has loaded, asked in a process of its own."""
    context = _server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender,))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def _tell(sender) -> None:
    sender.send([name for name in LOADED if name in sys.modules])
