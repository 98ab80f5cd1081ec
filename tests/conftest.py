"""Parts that several tests share: a small corpus, its tokens, the command line in this process, an HTTP server."""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

# Several tests at once, each with several threads: those that wait must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from picogpt import cli
from picogpt.config import Experiment, GPT2Config
from picogpt.data.bpe import GPT2Tokenizer, fetch_ranks
from picogpt.data.corpus import tokenize_chars, tokenize_gpt2
from picogpt.data.tokens import TokenData

ROOT = Path(__file__).resolve().parent.parent

LONGEST = ("test_workflow.py", "test_readme.py", "test_slurm.py", "test_fineweb_rules.py")

SMALL_MODEL = {"kind": "char-transformer", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1}
SMALL_TRAIN = {
    "dtype": "float32", "steps": 40, "batch_size": 4, "optimizer": "muon", "eval_interval": 10, "warmup_steps": 4,
    "weight_decay": 0.1,
}  # fmt: skip
SMALL_RUNTIME = {"device": "cpu", "compile": "off", "log_interval": 3, "checkpoint_interval": 7}


def copy_source(tree: Path, *parts: str) -> Path:
    """Copy these files and folders of the source tree into `tree`, for a test that changes them."""
    tree.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


def small_experiment(**train: object) -> Experiment:
    """A transformer that trains in a second, with everything on that has a random or a running state."""
    tree = {"model": SMALL_MODEL, "train": {**SMALL_TRAIN, **train}, "runtime": SMALL_RUNTIME}
    return Experiment.model_validate(tree)


def text_of_words(count: int) -> str:
    """`count` words in lines: the same text each time."""
    draw = random.Random(7)
    words = [
        "the",
        "king",
        "and",
        "queen",
        "of",
        "night",
        "shall",
        "not",
        "sleep",
        "O",
        "Juliet:",
        "my",
        "lord,",
        "fair!",
    ]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(count // 8)]
    return "\n".join(lines) + "\n"


def hellaswag_items(count: int) -> str:
    """`count` lines as in HellaSwag's file, of those words: the same each time."""
    draw, words = random.Random(3), text_of_words(400).split()

    def some(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    items = ({"ind": n, "ctx": some(25), "endings": [some(6) for _ in range(4)], "label": n % 4} for n in range(count))
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(text_of_words(1600), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tokenize_chars(corpus, folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tokens_folder: Path) -> TokenData:
    from picogpt.data.corpus import open_data

    return open_data(tokens_folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that no core waits for the last one."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def picogpt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Run a command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["picogpt", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)

    return run


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A real HTTP server on this machine; yields its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@dataclass
class Server:
    """A real HTTP server on this machine, and what it should do."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: list[int] = field(default_factory=list)
    """For each of the next answers: close the connection after so many bytes of the body."""
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header) of each request."""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server("")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append((self.path, wanted))
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            end = start + state.hang_up_after.pop(0) if state.hang_up_after else len(body)
            with suppress(ConnectionError):  # the client has heard enough
                self.wfile.write(body[start:end])

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(Handler) as state.address:
        yield state


@pytest.fixture(scope="session")
def gpt2_resources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's merge ranks, from the mirror or the package index that pip is set to."""
    folder = tmp_path_factory.mktemp("resources")
    fetch_ranks(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_resources: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.fetched(gpt2_resources)


def gpt2_config(**settings: object) -> GPT2Config:
    """The settings of a GPT-2 with one small block, or with these `settings`."""
    return GPT2Config(**{"kind": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, **settings})


def encode_documents(gpt2: GPT2Tokenizer, documents: list[str], threads: int = 0) -> np.ndarray:
    """Ids of documents with `<|endoftext|>` between them."""
    return np.concatenate([ids for _, ids in gpt2.encode_batches(documents, threads)])[:-1]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path, gpt2: GPT2Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("gpt2_tokens")
    tokenize_gpt2([corpus], folder, gpt2)
    return folder
