"""A user's own text: files, folders, JSON lines, parquet tables, and what can be wrong with them."""

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import text_of_words
from hub import parquet

from picogpt import plan
from picogpt.data import bpe, corpus, documents
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import held_out, tokenize_chars, tokenize_gpt2
from picogpt.data.tokenizers import CharTokenizer
from picogpt.errors import PicogptError, UsageError

WORDS = text_of_words(400).split("\n")[:-1]
"""Fifty documents of eight words."""
LINES = "".join(json.dumps({"id": number, "text": line}) + "\n" for number, line in enumerate(WORDS)).encode()


def folder_of(path: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_folder(path: Path) -> Path:
    return folder_of(path / "my", {f"{number:02}/{number}.txt": line for number, line in enumerate(WORDS)})


def as_file(name: str, content: bytes) -> Callable[[Path], Path]:
    return lambda path: folder_of(path, {name: content}) / name


FORMS = {
    "folder": as_folder,
    "jsonl": as_file("my.jsonl", b"\xef\xbb\xbf" + LINES + b"\n"),
    "jsonl.gz": as_file("my.jsonl.gz", gzip.compress(LINES)),
    "parquet": as_file("MY.PARQUET", parquet(WORDS)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_the_same_documents_gives_the_same_split(form, tmp_path: Path, gpt2: GPT2Tokenizer, capsys):
    path = form(tmp_path)
    chosen = held_out([len(line) for line in WORDS], 0.1)
    val = [line for index, line in enumerate(WORDS) if index in chosen]
    train = [line for index, line in enumerate(WORDS) if index not in chosen]
    of_characters, of_gpt2 = tokenize_chars(path, tmp_path / "c"), tokenize_gpt2([path], tmp_path / "t", gpt2)
    tokenizer = CharTokenizer.load(tmp_path / "c")
    assert tokenizer.decode(of_characters.val.ids) == "".join(val)
    assert tokenizer.decode(of_characters.train.ids) == "".join(train)
    assert gpt2.decode(of_gpt2.val.ids) == "<|endoftext|>".join(val)
    assert gpt2.decode(of_gpt2.train.ids) == "<|endoftext|>".join(train)
    for split, parts in (("train", train), ("val", val)):
        sizes = {getattr(data, split).header.text_bytes for data in (of_characters, of_gpt2)}
        assert sizes == {len("".join(parts))}
    assert of_characters.corpus()["text_sha256"] == of_gpt2.corpus()["text_sha256"] == documents.sha256(path)
    share = len("".join(val)) / len("".join(WORDS))
    said = f"{path.stem}: {len(val)} of 50 documents are for validation, {share:.2%} of the text\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "fraction", "held"),
    [([7] * 1000, 0.1, 100), ([7] * 1000, 0.25, 250), ([5] * 5, 0.1, 1), ([5, 5], 0.1, 1), ([1, 9, 9, 9], 0.1, 2), ([1, 99], 0.1, 1), ([99, 1], 0.1, 1)],
)  # fmt: skip
def test_about_the_fraction_is_held_out(sizes: list[int], fraction: float, held: int):
    chosen = held_out(sizes, fraction)
    assert len(chosen) == held
    assert chosen == held_out(sizes, fraction)
    assert sum(sizes[index] for index in chosen) <= max(fraction, 0.5) * sum(sizes)


def test_documents_of_all_sizes_are_held_out():
    sizes = [10 + number % 100 for number in range(10_000)]
    share = [sizes[index] for index in held_out(sizes, 0.1)]
    assert abs(sum(share) / sum(sizes) - 0.1) < 0.001
    assert abs(np.mean(share) - np.mean(sizes)) < 3


def test_copies_of_a_document_are_all_for_training_or_all_for_validation(tmp_path: Path, gpt2: GPT2Tokenizer):
    lines = [*WORDS[:10], *WORDS, *WORDS[40:]]
    path = folder_of(tmp_path, {"my.jsonl": "\n".join(json.dumps({"text": line}) for line in lines)}) / "my.jsonl"
    data = tokenize_gpt2([path, path], tmp_path / "t", gpt2)
    train, val = (gpt2.decode(part.ids).split("<|endoftext|>") for part in (data.train, data.val))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(lines * 2)
    sizes = [part.header.text_bytes for part in (data.train, data.val)]
    assert sizes == [len("".join(part)) for part in (train, val)]
    with pytest.raises(PicogptError, match=r"one.txt, \S*one.txt has 2 documents that are all the same"):
        tokenize_gpt2([folder_of(tmp_path, {"one.txt": "text"}) / "one.txt"] * 2, tmp_path / "u", gpt2)


def test_one_document_that_is_nearly_all_of_the_text_is_a_warning(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "my", {"a.txt": "abcd", "b.txt": "abcd" * 1000})
    tokenize_chars(folder, tmp_path / "t")
    assert "0.10% of the text\nwarning: nearly all of my is one document: divide it" in capsys.readouterr().err
    folder_of(folder, {"c.txt": "abc" * 1000})
    tokenize_chars(folder, tmp_path / "t")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("change", ["my/a.jsonl", "my/c.txt", None])
@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_a_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, gpt2: GPT2Tokenizer, monkeypatch, kind: str, change: str | None
):
    folder, split = folder_of(tmp_path / "my", {"a.jsonl": LINES, "b.txt": "text"}), corpus.held_out

    def meanwhile(*arguments):
        if change:
            folder_of(tmp_path, {change: LINES.splitlines()[0]})
        else:
            (folder / "a.jsonl").unlink()
        return split(*arguments)

    monkeypatch.setattr(corpus, "held_out", meanwhile)
    reason = "my was changed while it was read: tokenize it when nothing writes to it"
    make = tokenize_chars if kind == "char" else lambda *paths: tokenize_gpt2([paths[0]], paths[1], gpt2)
    with pytest.raises(PicogptError, match=reason):
        make(folder, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_pipe_of_many_documents_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "my.jsonl")
    with pytest.raises(UsageError, match=r"my\.jsonl is read more than once, which a pipe or a device cannot be"):
        documents.read(tmp_path / "my.jsonl")


def test_what_is_no_text_in_a_folder_is_left_out_and_named(tmp_path: Path, capsys):
    text = text_of_words(80)
    folder = folder_of(
        tmp_path / "my",
        {
            "a.txt": text, "b/notes.md": text, ".hidden.txt": "no", ".git/config": "no", "empty.txt": "",
            "c.png": b"\x89PNG\r\n\0\0", "d.jsonl": '{"text": "one line"}\n{"text": ""}\n',
        },
    )  # fmt: skip
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    (folder / "linked.txt").symlink_to(folder / "a.txt")
    files, others = documents.text_files(folder)
    assert [path.name for path in files] == ["a.txt", "notes.md", "d.jsonl", "linked.txt"]
    assert [path.name for path in others] == ["c.png", "loop", "pipe"]
    read, digest = documents.read(folder)
    assert list(read()) == list(read()) == [text, text, "one line", text]
    assert f"left out of {folder}, as no text files: 3 ({folder}/c.png, {folder}/loop, " in capsys.readouterr().err
    command = f"cd {folder} && sha256sum a.txt b/notes.md d.jsonl linked.txt | sha256sum"
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[0] == digest


def test_the_end_of_a_single_document_is_for_validation(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "my", {"one.jsonl": json.dumps({"text": "abcdefghij" * 4})})
    data = tokenize_chars(folder, tmp_path / "t")
    assert (data.train.header.count, data.val.header.count, capsys.readouterr().err) == (36, 4, "")
    folder_of(tmp_path, {"one.txt": "abcdefghij" * 4})
    assert tokenize_chars(tmp_path / "one.txt", tmp_path / "u").corpus()["data_sha256"] == data.corpus()["data_sha256"]


LATIN1 = (
    r"is not UTF-8 text: byte 3 is 0xe9; if it is LATIN1, iconv -f LATIN1 -t UTF-8 \S*my/a.txt > utf8.txt makes it one"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my/.hidden", b"text", "my has no text: put files of UTF-8 text, .jsonl, .jsonl.gz or .parquet there"),
        ("my/a.txt", b"", "my has no text"),
        ("my/a.png", b"\x89PNG\0", "my has no text"),
        ("my/a.txt", b"caf\xe9", LATIN1),
        ("my/a.txt", "text".encode("utf-16"), "byte 0 is 0xff; if it is UTF-16, iconv -f UTF-16"),
        ("my.jsonl", b"", "my.jsonl is empty"),
        ("my.jsonl", b'{"text": ""}\n\n', "my.jsonl is empty"),
        ("my.jsonl", LINES + b'{"text": "a"\n', "my.jsonl, line 51: Invalid JSON: EOF while parsing an object"),
        ("my.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "my.jsonl, line 3: text: Field required"),
        ("my.jsonl", b'{"text": 5}\n', "my.jsonl, line 1: text=5: Input should be a valid string"),
        ("my.jsonl", b"[1]\n", r"my.jsonl, line 1: \[1\]: Input should be an object"),
        ("my.jsonl", b"[" * 100_000, "my.jsonl, line 1: .*recursion limit"),
        ("my.jsonl", b'{"text": "\\ud800"}', "my.jsonl, line 1: .*Invalid JSON"),
        ("my.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "my.jsonl is not UTF-8 text: byte 24 is 0xe9"),
        ("my.jsonl.gz", gzip.compress(LINES)[:-20], "cannot read .*my.jsonl.gz: "),
        ("my.jsonl.gz", LINES, "cannot read .*my.jsonl.gz: Not a gzipped file"),
        ("my.parquet", parquet(WORDS, column="body"), r"no column 'text' of strings, or several; it has id \(int64\), body \(string\)"),
        ("my.parquet", parquet(WORDS, other="text"), r"no column 'text' of strings, or several; it has text \(int64\), text \(string\)"),
        ("my.parquet", parquet(WORDS)[:-100], "my.parquet is not a parquet file"),
        ("my.parquet", parquet([*WORDS, None]), "a document in row group 2 has no text"),
        ("my/b.jsonl", b"{", "my/b.jsonl, line 1: "),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_one_message_and_nothing_is_written(
    picogpt, tmp_path: Path, gpt2_resources: Path, name: str, content: bytes, message: str
):
    folder_of(tmp_path, {name: content})
    (tmp_path / "resources").symlink_to(gpt2_resources)
    for kind in ("char", "gpt2"):
        refused = picogpt("tokenize", kind, "--text", name.partition("/")[0])
        assert (refused.status, refused.out) == (1, "")
        with pytest.raises(PicogptError, match=message):
            raise PicogptError(refused.err)
    assert not list(tmp_path.glob("weights/*/*"))


@pytest.mark.parametrize("target", ["loop.txt", "nowhere"])
def test_a_link_to_nothing_is_named(tmp_path: Path, target: str):
    folder = folder_of(tmp_path / "my", {"a.txt": "text"})
    (folder / "loop.txt").symlink_to(folder / target)
    with pytest.raises(PicogptError, match=r"cannot read .*my/loop\.txt: .*; mend or remove it"):
        documents.read(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["b", "b/c.txt"])
def test_what_may_not_be_read_is_named(tmp_path: Path, name: str):
    folder = folder_of(tmp_path / "my", {"a.txt": "text", "b/c.txt": "text"})
    (folder / name).chmod(0)
    with pytest.raises(PicogptError, match=f"cannot read .*my/{name}: Permission denied"):
        documents.read(folder)


def test_results_are_not_written_among_the_texts(tmp_path: Path, monkeypatch):
    folder = folder_of(tmp_path / "my", {"a.txt": "text", "b/c.txt": "text"})
    monkeypatch.chdir(folder / "b")
    for path in (Path(".."), folder, tmp_path, Path()):
        with pytest.raises(UsageError, match="holds the folder of this run, and so its results"):
            documents.read(path)


def test_unseen_characters_of_documents_are_named(tmp_path: Path):
    path = as_folder(tmp_path)
    for index in held_out([len(line) for line in WORDS], 0.1):
        (path / f"{index:02}/{index}.txt").write_text(WORDS[index][:-1] + "~")
    with pytest.raises(
        PicogptError, match=r"the validation text \(\d of 50 documents\) has characters .*: '~' \(\d times\)"
    ):
        tokenize_chars(path, tmp_path / "t")


def test_the_plan_notices_what_changes_in_a_folder_and_nothing_else(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = as_folder(tmp_path)

    def identity() -> str:
        made = plan.make({"corpus": "my/"}, "configuration")
        assert (made.text, made.corpus) == ("my", "my")
        return made.text_identity["text_sha256"]

    first = identity()
    folder_of(folder, {".DS_Store": "hidden", "empty.txt": "", "picture.png": b"\0"})
    os.utime(folder / "00/0.txt", (1, 1))
    assert identity() == first
    folder_of(folder, {"00/0.txt": "changed"})
    assert len({first, changed := identity()}) == 2
    folder_of(folder, {"00/1.txt": "added"})
    assert len({first, changed, identity()}) == 3
    (folder / "00/1.txt").unlink()
    assert identity() == changed
    (folder / "00/0.txt").rename(folder / "00/0.jsonl")  # read another way
    assert identity() != changed


def test_pieces_and_batches_do_not_show(tmp_path: Path, gpt2: GPT2Tokenizer, monkeypatch):
    path = as_folder(tmp_path)
    made = [tokenize_chars(path, tmp_path / "c"), tokenize_gpt2([path], tmp_path / "t", gpt2)]
    monkeypatch.setattr(bpe, "CHARACTERS_AT_ONCE", 60)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 7)
    again = [tokenize_chars(path, tmp_path / "d"), tokenize_gpt2([path], tmp_path / "u", gpt2)]
    assert [data.corpus() for data in again] == [data.corpus() for data in made]
    assert [len(batch) for batch in bpe.batches(["a" * 59, "b", "c", "d" * 70, "e"])] == [2, 2, 1]
