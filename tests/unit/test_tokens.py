import json
from pathlib import Path

import numpy as np
import pytest

from picogpt.data.corpus import open_data, tokenize_chars
from picogpt.data.tokenizers import CharTokenizer
from picogpt.data.tokens import Header, open_tokens, write_tokens
from picogpt.errors import PicogptError, UsageError


def test_the_files_hold_the_text(corpus: Path, tokens_folder: Path):
    data, tokenizer = open_data(tokens_folder), CharTokenizer.load(tokens_folder)
    text = corpus.read_text()
    assert tokenizer.decode(data.train.ids) + tokenizer.decode(data.val.ids) == text
    assert data.train.header.count == int(len(text) * 0.9)
    assert data.corpus()["name"] == "words"


def test_ids_follow_the_code_points_whatever_the_alphabet():
    tokenizer = CharTokenizer.from_text("zaé\n🎭a")
    assert tokenizer.characters == "\nazé🎭"
    assert tokenizer.encode("🎭a\n").tolist() == [4, 1, 0]
    assert tokenizer.decode(tokenizer.encode("aé🎭z")) == "aé🎭z"
    assert tokenizer.encode("").tolist() == []


def test_unknown_characters_are_named_with_their_place():
    with pytest.raises(UsageError, match=r"lacks '!' '€' \(first at position 1\)"):
        CharTokenizer.from_text("abc").encode("a!b€")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "only the character 'a'"),
        (b"abab", "too few"),
        (b"ab\xe9ab" * 50, "not UTF-8 text: byte 2 is 0xe9"),
        (b"ab" * 95 + b"zabababa", r"'z' \(1 times\).*--drop-unseen"),
    ],
    ids=["empty", "one character", "short", "latin-1", "unseen"],
)
def test_a_corpus_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(PicogptError, match=message) as error:
        tokenize_chars(path, tmp_path / "out")
    assert str(path) in str(error.value) or "only the character" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unseen_characters_can_be_left_out_if_something_remains(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 95 + "zabababa")
    data = tokenize_chars(path, tmp_path / "out", drop_unseen=True)
    assert (data.vocab_size, data.val.header.count) == (2, 19)
    path.write_text("ab" * 45 + "z" * 10)
    with pytest.raises(PicogptError, match="lacks nearly all"):
        tokenize_chars(path, tmp_path / "out", drop_unseen=True)


def rewrite_header(path: Path, **change: object) -> None:
    """Change values of a token file's header, in place and at the same length."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:12], "little")
    header = json.dumps({**json.loads(raw[12 : 12 + length]), **change}).encode().ljust(length)
    path.write_bytes(raw[:12] + header[:length] + raw[12 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:9]), "damaged header"),
        (lambda path: path.write_bytes(b"PK" + path.read_bytes()), "not a token file"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff\xff\xff\x7f"), "not a token file"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged header"),
        (lambda path: rewrite_header(path, version=2), r"damaged header \(version=2: Input should be 1\)"),
        (lambda path: rewrite_header(path, count=5), "cut short or changed"),
        (lambda path: rewrite_header(path, dtype="objec"), "damaged header"),
        (lambda path: rewrite_header(path, vocab_size=3), "holds the id"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["cut", "stump", "foreign", "huge header", "half a header", "version", "count", "dtype", "ids", "missing"],
)
def test_a_damaged_file_is_refused_by_name(corpus: Path, tmp_path: Path, damage, message: str):
    tokenize_chars(corpus, tmp_path)
    path = tmp_path / "train.bin"
    damage(path)
    with pytest.raises(PicogptError, match=message) as error:
        open_tokens(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("field", "val_fraction", "more"), [("text_sha256", 0.1, "more\n"), ("data_sha256", 0.3, "")])
def test_halves_of_different_texts_or_splits_are_refused(corpus: Path, tmp_path: Path, field, val_fraction, more):
    tokenize_chars(corpus, tmp_path / "a")
    (tmp_path / "other.txt").write_text(corpus.read_text() + more)
    tokenize_chars(tmp_path / "other.txt", tmp_path / "b", val_fraction=val_fraction)
    (tmp_path / "b/val.bin").replace(tmp_path / "a/val.bin")
    with pytest.raises(PicogptError, match=rf"is not of the text, split and tokenizer of .*train\.bin: its {field} is"):
        open_data(tmp_path / "a")


def test_an_older_file_is_read_and_its_bytes_are_counted(tmp_path: Path):
    (tmp_path / "text.txt").write_text("aé東\n" * 20, encoding="utf-8")
    assert (
        tokenize_chars(tmp_path / "text.txt", tmp_path).corpus()["val_bytes"] == 14
    )  # 8 characters of 7 bytes by fours
    rewrite_header(tmp_path / "val.bin", text_bytes=None)
    assert open_data(tmp_path).corpus()["val_bytes"] == 14
    (tmp_path / "tokenizer.json").unlink()
    assert open_data(tmp_path).corpus()["val_bytes"] is None


def test_a_large_vocabulary_takes_two_bytes(tmp_path: Path):
    header = Header(vocab_size=50_000, split="train", corpus="x", text_sha256="0", tokenizer_sha256="0")
    write_tokens(tmp_path / "a.bin", header, [(1, np.array([0, 300, 49_999]))])
    assert open_tokens(tmp_path / "a.bin").ids.tolist() == [0, 300, 49_999]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "x", "version": 1}', '{"format": "picogpt-char-tokenizer"}']
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PicogptError, match=r"tokenizer\.json"):
        CharTokenizer.load(tmp_path)
