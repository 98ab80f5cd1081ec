"""A tokenized corpus: made from texts, and opened as two token files or as many shards."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from picogpt.data import fetch
from picogpt.data.bpe import END_OF_TEXT, GPT2Tokenizer
from picogpt.data.shards import MANIFEST, open_shards
from picogpt.data.tokenizers import CharTokenizer
from picogpt.data.tokens import Header, TokenData, TokenFile, hash_of_parts, hash_of_texts, open_tokens, write_tokens
from picogpt.errors import PicogptError, UsageError
from picogpt.files import exclusive_lock, read_hashed

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
    """Split a UTF-8 text, first part for training, and write tokenizer and token files into `folder`.

    The name of the corpus in all results is `corpus`, or its registered one, or the file's own. With `drop_unseen`,
    characters of the validation text that the training text lacks are left out; without it they are an error.

    Raises PicogptError when the text is empty, not UTF-8, of one character, or too short to split; UsageError when it has
    the name of a registered corpus and is another text.
    """
    (text,), text_sha256, name = _read([text_path], corpus)
    train, val = _split(text_path, text, val_fraction)
    tokenizer = CharTokenizer.from_text(train)
    known = set(tokenizer.characters)
    unseen = Counter(character for character in val if character not in known)
    if unseen and not drop_unseen:
        listed = ", ".join(f"{character!r} ({count} times)" for character, count in unseen.most_common(10))
        where = f"the validation text (the last {val_fraction:.0%}) has characters that the training text lacks"
        remedy = "leave them out with --drop-unseen (drop_unseen: true), or mend the text"
        raise PicogptError(f"{text_path}: {where}: {listed}. No model can predict them; {remedy}.")
    val = "".join(character for character in val if character not in unseen)
    if len(val) < 2:
        raise PicogptError(f"{text_path}: the training text lacks nearly all characters of the validation text")
    parts = [(tokenizer.encode(part), len(part.encode())) for part in (train, val)]
    return _write(folder, parts, tokenizer, name, text_sha256)


def tokenize_gpt2(
    text_paths: Sequence[Path],
    folder: Path,
    tokenizer: GPT2Tokenizer,
    corpus: str | None = None,
    val_fraction: float = 0.1,
    threads: int = 0,
) -> TokenData:
    """Split UTF-8 texts, the first part of each for training, and write token files of GPT-2's tokens into `folder`.

    Each text is a document, or several with `<|endoftext|>` between them; in the files too that token is between them.
    On `threads` cores, 0 for all. The name of the corpus is as of `tokenize_chars`.

    Raises PicogptError when a text is empty, not UTF-8, or too short to split; UsageError as `tokenize_chars`.
    """
    texts, text_sha256, name = _read(text_paths, corpus)
    splits = zip(*(_split(path, text, val_fraction) for path, text in zip(text_paths, texts, strict=True)), strict=True)
    parts = []
    for some in splits:
        documents = [document for text in some for document in text.split(END_OF_TEXT)]
        parts.append((tokenizer.encode_documents(documents, threads), sum(len(text.encode()) for text in some)))
    return _write(folder, parts, tokenizer, name, text_sha256)


def _read(paths: Sequence[Path], corpus: str | None) -> tuple[list[str], str, str]:
    """The texts, the hash of their bytes, and the name of the corpus."""
    texts, hashes = map(list, zip(*map(read_hashed, paths), strict=True))
    registered = fetch.identify(hashes[0]) if len(paths) == 1 else None
    name = (corpus or registered or paths[0].stem).encode("utf-8", "replace").decode()  # names of files may be no UTF-8
    if name != registered and name in fetch.registry():
        raise UsageError(f"{paths[0]} is not the registered {name}, whose name it bears: name yours with --corpus")
    return texts, hash_of_texts(hashes), name


def _split(path: Path, text: str, val_fraction: float) -> tuple[str, str]:
    """The text of `path` split in two, with the last `val_fraction` of its characters for validation."""
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be between 0 and 1")
    if not text:
        raise PicogptError(f"{path} is empty")
    cut = int(len(text) * (1 - val_fraction))
    if cut < 2 or len(text) - cut < 2:
        raise PicogptError(f"{path} has {len(text)} characters: too few for a training and a validation text")
    return text[:cut], text[cut:]


def _write(
    folder: Path,
    parts: list[tuple[np.ndarray, int]],
    tokenizer: CharTokenizer | GPT2Tokenizer,
    corpus: str,
    text_sha256: str,
) -> TokenData:
    """Write the token files of both splits, ids and the bytes of their text, and the tokenizer of characters into `folder`."""
    for split, (ids, _) in zip(("training", "validation"), parts, strict=True):
        if len(ids) < MIN_TOKENS:
            raise PicogptError(f"the {split} text of {corpus} has {len(ids)} tokens: {MIN_TOKENS} are the least")
    same: dict[str, Any] = {"corpus": corpus, "text_sha256": text_sha256, "tokenizer_sha256": tokenizer.sha256}
    same["data_sha256"] = hash_of_parts(hashlib.sha256(ids.tobytes()).hexdigest() for ids, _ in parts)
    with exclusive_lock(folder, "tokenizing"):
        for split, (ids, size) in zip(("train", "val"), parts, strict=True):
            header = Header(split=split, dtype=ids.dtype.name, vocab_size=tokenizer.vocab_size, text_bytes=size, **same)
            write_tokens(folder / f"{split}.bin", header, [(1, ids)])
        if isinstance(tokenizer, CharTokenizer):
            tokenizer.save(folder)
    return open_data(folder)
