"""A tokenized corpus: made from documents, and opened as two token files or as many shards."""

from __future__ import annotations

import hashlib
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.data import documents, fetch
from picogpt.data.bpe import PIECE_CHARACTERS, GPT2Tokenizer, batches
from picogpt.data.shards import MANIFEST, open_shards
from picogpt.data.tokenizers import CharTokenizer
from picogpt.data.tokens import Header, TokenData, TokenFile, hash_of_parts, hash_of_texts, open_tokens, write_tokens
from picogpt.errors import PicogptError, UsageError
from picogpt.files import exclusive_lock

MIN_TOKENS = 2
"""One to predict another from."""


def open_data(folder: str | Path) -> TokenData:
    """Open `train.bin` and `val.bin` in `folder`, or the shards that its manifest lists.

    Raises PicogptError when they do not belong together.
    """
    if (Path(folder) / MANIFEST).exists():
        return open_shards(folder)
    shards = list(Path(folder).glob("train-*.bin"))
    if shards and not (Path(folder) / "train.bin").exists():
        join = f"picogpt tokenize fineweb-edu --join {len(shards)} --folder {shlex.quote(str(folder))}"
        raise PicogptError(f"{folder} has shards that were not joined: {join} joins them")
    train = open_tokens(Path(folder) / "train.bin")
    same = train.header.model_dump(include={"vocab_size", "text_sha256", "tokenizer_sha256", "data_sha256"})
    belongs = f"of the text, split and tokenizer of {train.path}"
    val = open_tokens(Path(folder) / "val.bin", belongs=belongs, **same)
    if val.header.count < MIN_TOKENS:
        raise PicogptError(f"{val.path} has {val.header.count} tokens: {MIN_TOKENS} are the least; use a longer text")
    return TokenData(train, val if val.header.text_bytes else _measured(val))


def _measured(val: TokenFile) -> TokenFile:
    """An older file with the number of bytes of its text, if the tokenizer of characters that made it lies beside it."""
    with suppress(PicogptError):
        tokenizer = CharTokenizer.load(val.path.parent)
        if tokenizer.sha256 == val.header.tokenizer_sha256:
            return replace(val, header=val.header.model_copy(update={"text_bytes": tokenizer.count_bytes(val.ids[:])}))
    return val


def first_corpus(folder: Path) -> Path:
    """The first registered corpus that is in `folder`. Raises UsageError when none is."""
    for asset in fetch.registry().values():
        if asset.kind == "corpus" and (folder / asset.file).exists():
            return folder / asset.file
    raise UsageError(f"no corpus is in {folder}/: run picogpt fetch tinyshakespeare, or pass --text FILE")


def tokenize_chars(
    text_path: Path, folder: Path, corpus: str | None = None, val_fraction: float = 0.1, drop_unseen: bool = False
) -> TokenData:
    """Write a tokenizer of characters, and token files with nothing between documents (`documents.py`), into `folder`.

    Several documents are split whole (`held_out`); of a single one the end is for validation, `val_fraction` of it. The name
    of the corpus in all results is `corpus`, or its registered one, or the file's own. With `drop_unseen`, characters of
    the validation text that the training text lacks are left out; without it they are an error.

    Raises PicogptError when the text cannot be read, is empty, of one character, or too short to split; UsageError when it
    has the name of a registered corpus and is another text.
    """
    with _read([text_path], corpus, val_fraction) as text:
        known: set[str] = set()
        for document in text.train():
            known.update(document)
        tokenizer = CharTokenizer.from_text("".join(known))
        unseen = Counter(character for document in text.val for character in document if character not in known)
        if unseen and not drop_unseen:
            listed = ", ".join(f"{character!r} ({count} times)" for character, count in unseen.most_common(10))
            where = f"the validation text ({text.val_part}) has characters that the training text lacks"
            remedy = "leave them out with --drop-unseen (drop_unseen: true), or mend the text"
            raise PicogptError(f"{text_path}: {where}: {listed}. No model can predict them; {remedy}.")
        val = ["".join(character for character in document if character not in unseen) for document in text.val]
        if sum(map(len, val)) < MIN_TOKENS:
            raise PicogptError(f"{text_path}: the training text lacks nearly all characters of the validation text")
        parts = [(_encode(tokenizer, text.train()), text.train_bytes), (_encode(tokenizer, val), _bytes(val))]
    return _write(folder, parts, tokenizer, text)


def _encode(tokenizer: CharTokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids of all characters in pieces: while they are made, each takes twenty bytes."""
    joined = map("".join, batches(texts))
    cut = (text[start : start + PIECE_CHARACTERS] for text in joined for start in range(0, len(text), PIECE_CHARACTERS))
    return [tokenizer.encode(piece) for piece in cut]


def tokenize_gpt2(
    text_paths: Sequence[Path],
    folder: Path,
    tokenizer: GPT2Tokenizer,
    corpus: str | None = None,
    val_fraction: float = 0.1,
    threads: int = 0,
) -> TokenData:
    """Write token files of GPT-2's tokens, with `<|endoftext|>` between documents, into `folder`; split as by `tokenize_chars`.

    On `threads` cores, 0 for all. The name of the corpus is as of `tokenize_chars`; raises as that.
    """
    parts = []
    with _read(text_paths, corpus, val_fraction) as text:
        for some, size in ((text.train(), text.train_bytes), (text.val, _bytes(text.val))):
            ids = [ids for _, ids in tokenizer.encode_batches(some, threads)]
            parts.append(([*ids[:-1], ids[-1][:-1]], size))
    return _write(folder, parts, tokenizer, text)


@dataclass(frozen=True)
class _Text:
    """The documents of a text: those for training, read anew each time, and those for validation."""

    name: str
    sha256: str
    train: documents.Documents
    train_bytes: int
    val: list[str]
    val_part: str
    """Which part of the text is for validation, for messages."""


@contextmanager
def _read(paths: Sequence[Path], corpus: str | None, val_fraction: float) -> Iterator[_Text]:
    """The documents of `paths`, split for training and validation: the same way for all tokenizers.

    Its name is `corpus`, or the registered one of the text, or that of the first path.

    Raises PicogptError at the end, also in place of another error, when a text was changed since.
    """
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be between 0 and 1")
    texts, hashes = zip(*map(documents.read, paths), strict=True)
    text_sha256 = hash_of_texts(hashes)
    registered = fetch.identify(text_sha256)
    own = corpus or registered or paths[0].absolute().stem
    name = own.encode("utf-8", "replace").decode()  # names of files may be no UTF-8
    if name != registered and name in fetch.registry():
        raise UsageError(f"{paths[0]} is not the registered {name}, whose name it bears: name yours with --corpus")

    def every() -> Iterator[str]:
        return (document for text in texts for document in text())

    try:
        yield _split(every, ", ".join(map(str, paths)), name, text_sha256, val_fraction)
    finally:
        for path, digest in zip(paths, hashes, strict=True):
            documents.require_unchanged(path, digest)


def _split(every: documents.Documents, listed: str, name: str, sha256: str, val_fraction: float) -> _Text:
    """The documents split. Copies of one stay together: a text for validation must not be trained on."""
    sizes: Counter[int] = Counter()
    count = 0
    for document in every():
        count += 1
        sizes[hash(document)] += len(document.encode())
    if not count:
        raise PicogptError(f"{listed} is empty")
    if count == 1:
        document = "".join(every())
        cut = int(len(document) * (1 - val_fraction))
        start, end = document[:cut], document[cut:]
        if min(len(start), len(end)) < MIN_TOKENS:
            found = f"{len(document)} characters: too few for a training and a validation text"
            raise PicogptError(f"{listed} has {found}")
        return _Text(name, sha256, lambda: iter([start]), _bytes([start]), [end], f"the last {val_fraction:.0%}")
    if len(sizes) == 1:
        raise PicogptError(f"{listed} has {count:,} documents that are all the same: none is left for validation")
    keys = list(sizes)
    chosen = {keys[index] for index in held_out(list(sizes.values()), val_fraction)}

    def some(for_validation: bool) -> Iterator[str]:
        return (document for document in every() if (hash(document) in chosen) == for_validation)

    val, whole, held = list(some(True)), sizes.total(), sum(sizes[key] for key in chosen)
    part = f"{len(val):,} of {count:,} documents"
    print(f"{name}: {part} are for validation, {held / whole:.2%} of the text", file=sys.stderr)
    if held < val_fraction / 2 * whole:
        print(f"warning: nearly all of {name} is one document: divide it, or join all in one file", file=sys.stderr)
    return _Text(name, sha256, lambda: some(False), whole - held, val, part)


def held_out(sizes: Sequence[int], fraction: float) -> set[int]:
    """Indices of the documents for validation, by the sizes of all: in a fixed random order, those that fit into the fraction.

    If they make less than half of it, because documents are large, the smallest other one is added, where several are left.
    """
    budget = room = fraction * sum(sizes)
    draw, chosen = random.Random(0), set()
    for index in sorted(range(len(sizes)), key=lambda _: draw.random()):
        if sizes[index] <= room:
            chosen.add(index)
            room -= sizes[index]
    others = [index for index in range(len(sizes)) if index not in chosen]
    if room > budget / 2 and len(others) > 1:
        chosen.add(min(others, key=sizes.__getitem__))
    return chosen


def _bytes(texts: Iterable[str]) -> int:
    """Length in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def _write(
    folder: Path, parts: list[tuple[list[np.ndarray], int]], tokenizer: CharTokenizer | GPT2Tokenizer, text: _Text
) -> TokenData:
    """Write the token files of both splits, ids in pieces and the bytes of their text, and the tokenizer of characters."""
    for split, (pieces, _) in zip(("training", "validation"), parts, strict=True):
        if (count := sum(map(len, pieces))) < MIN_TOKENS:
            raise PicogptError(f"the {split} text of {text.name} has {count} tokens: {MIN_TOKENS} are the least")
    same: dict[str, Any] = {"corpus": text.name, "text_sha256": text.sha256, "tokenizer_sha256": tokenizer.sha256}
    same["data_sha256"] = hash_of_parts(_hash(pieces) for pieces, _ in parts)
    with exclusive_lock(folder, "tokenizing"):
        for split, (pieces, size) in zip(("train", "val"), parts, strict=True):
            dtype = pieces[0].dtype.name
            header = Header(split=split, dtype=dtype, vocab_size=tokenizer.vocab_size, text_bytes=size, **same)
            write_tokens(folder / f"{split}.bin", header, ((1, ids) for ids in pieces))
        if isinstance(tokenizer, CharTokenizer):
            tokenizer.save(folder)
    return open_data(folder)


def _hash(pieces: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for ids in pieces:
        digest.update(ids.tobytes())
    return digest.hexdigest()
