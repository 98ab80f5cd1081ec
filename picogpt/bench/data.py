"""The cost of data: tokenizing by number of cores, reading by number of shards."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picogpt import hardware, records
from picogpt.data import shards
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data
from picogpt.data.fineweb import DOCUMENTS_AT_ONCE
from picogpt.data.sampler import Sampler
from picogpt.data.tokens import VERSION, Header, write_tokens
from picogpt.errors import PicogptError
from picogpt.files import read_text, sha256_file
from picogpt.progress import counting

DOCUMENT_CHARACTERS = 5000
"""About what a document of FineWeb-Edu has."""
SHARD_TOKENS = 4096
BLOCK_SIZE = 1024
BATCHES = 10
"""Batches whose median is taken, after the first one, which opens files."""
CORPUS = "simulated"


def measure(
    text: Path,
    tokenizer: GPT2Tokenizer,
    threads: Sequence[int],
    counts: Sequence[int],
    windows: int,
    runs: int,
    characters: int,
) -> dict[str, Any]:
    """The record of `runs` runs of tokenizing on each number of `threads`, and of reading from `counts` shards.

    The text is repeated to about `characters`, cut into documents. Tokenizing takes turns with tiktoken's own batches of
    the same documents. The shards are small files, as many as a large corpus has; a batch is `windows` windows of
    BLOCK_SIZE tokens from anywhere.

    Raises PicogptError when the text is empty or a file cannot be written.
    """
    provenance = records.provenance(hardware.select("cpu"))
    documents = _documents(text, characters)
    results = _tokenizing(tokenizer, documents, threads, runs) | _reading(counts, windows, tokenizer.vocab_size)
    return {
        **provenance,
        **records.Key("data")._asdict(),
        "corpus": {},
        "config": {
            "text_sha256": sha256_file(text),
            "documents": len(documents),
            "characters": sum(map(len, documents)),
            "threads": list(threads),
            "shards": list(counts),
            "shard_tokens": SHARD_TOKENS,
            "windows": windows,
            "block_size": BLOCK_SIZE,
            "runs": runs,
        },
        "units": {
            "tokens_per_second": "of each run, a list for each number of threads",
            "tiktoken_tokens_per_second": "of tiktoken's own encode_ordinary_batch on as many threads, in turn with ours",
            "share_of_tiktoken": "median rate over tiktoken's, on one thread",
            "speedup": "median rate on the most threads over that on one",
            "open_seconds": "s, the manifest alone, for each number of shards",
            "first_batch_seconds": "s, which opens files",
            "batch_seconds": "s, median of the batches after every file has been opened, or as many as may be open",
        },
        "results": results,
    }


def _documents(path: Path, characters: int) -> list[str]:
    """The text, split at line breaks into documents and repeated to about this many characters."""
    text = read_text(path)
    if not text:
        raise PicogptError(f"{path} is empty")
    documents, start = [], 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT_CHARACTERS) + 1 or len(text)
        documents.append(text[start:end])
        start = end
    return documents * max(1, characters // len(text))


def _tokenizing(tokenizer: GPT2Tokenizer, documents: list[str], threads: Sequence[int], runs: int) -> dict[str, Any]:
    """Rates of our tokenizing and of tiktoken's, in turn."""
    count = len(tokenizer.encode_documents(documents))
    batches = [documents[first : first + DOCUMENTS_AT_ONCE] for first in range(0, len(documents), DOCUMENTS_AT_ONCE)]
    tiktoken = tokenizer.tiktoken
    ways: dict[str, Callable[[int], object]] = {
        # As the tokens of a shard are made.
        "tokens_per_second": lambda number: list(tokenizer.encode_batches(batches, number)),
        "tiktoken_tokens_per_second": lambda number: tiktoken.encode_ordinary_batch(documents, num_threads=number),
    }
    rates: dict[str, list[list[float]]] = {name: [[] for _ in threads] for name in ways}
    with counting("tokenizing", runs * len(threads) * len(ways)) as advance:
        for _ in range(runs):
            for place, number in enumerate(threads):
                for name, way in ways.items():
                    rates[name][place].append(count / _seconds(way, number))
                    advance(1)
    ours, theirs = ([statistics.median(some) for some in rates[name]] for name in ways)
    return {
        **rates,
        "one_thread": ours[0],
        "share_of_tiktoken": ours[0] / theirs[0],
        "speedup": ours[-1] / ours[0],
    }


def _reading(counts: Sequence[int], windows: int, vocab_size: int) -> dict[str, Any]:
    """Seconds for opening, for the first batch, and for a later one, by the number of shards."""
    seconds: dict[str, list[float]] = {"open_seconds": [], "first_batch_seconds": [], "batch_seconds": []}
    with counting("reading shards", len(counts)) as advance:
        for count in counts:
            with tempfile.TemporaryDirectory(prefix="picogpt-shards-") as name:
                _simulate(Path(name), count, vocab_size)
                seconds["open_seconds"].append(_seconds(open_data, name))
                sampler = Sampler(open_data(name).train.ids, BLOCK_SIZE, windows, seed=1337)
                seconds["first_batch_seconds"].append(_seconds(sampler.batch, 0))
                steps = sampler.steps(1)  # one epoch meets every file
                for step in range(1, steps):
                    sampler.batch(step)
                later = [_seconds(sampler.batch, step) for step in range(steps, steps + BATCHES)]
                seconds["batch_seconds"].append(statistics.median(later))
            advance(1)
    return {**seconds, "most_shards_batch_ms": 1000 * seconds["batch_seconds"][-1]}


def _simulate(folder: Path, count: int, vocab_size: int) -> None:
    """A corpus of `count` small shards, all with the same ids, and its manifest."""
    ids = np.random.default_rng(0).integers(vocab_size, size=SHARD_TOKENS, dtype=np.uint16)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    header = Header(
        version=VERSION, dtype="uint16", vocab_size=vocab_size, count=len(ids), split="train", corpus=CORPUS,
        text_sha256=digest, tokenizer_sha256=digest, data_sha256=digest, first_document=0, documents=0,
    )  # fmt: skip
    write_tokens(folder / shards.VAL, ids, header)
    for number in range(count):
        shutil.copyfile(folder / shards.VAL, folder / shards.shard_file(number))
    shards.join(folder, CORPUS, [("simulated.parquet", digest)] * count)


def _seconds(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began
