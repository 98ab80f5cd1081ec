import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import encode_documents

from picogpt.config import GPT2Config
from picogpt.data import bpe, fetch
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data, tokenize_chars, tokenize_gpt2
from picogpt.data.fetch import MIRROR_VARIABLE
from picogpt.data.tokenizers import CharTokenizer
from picogpt.errors import PicogptError, Unreachable, UsageError
from picogpt.export import _texts

STRANGE = "Don't  stop\n\n  believing   \t\n—naïve 東京 🙂🙃 1234567 <|endoftext|> x\u00a0y\r\n end   "


def test_a_wrong_file_of_ranks_is_refused(tmp_path: Path):
    (tmp_path / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(PicogptError, match=r"gpt2\.tiktoken has sha256 [0-9a-f]{64}"):
        GPT2Tokenizer(tmp_path / "gpt2.tiktoken")
    with pytest.raises(PicogptError, match="is not there"):
        GPT2Tokenizer(tmp_path / "none")


def test_where_nothing_answers_every_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "mirror"))
    monkeypatch.setattr(fetch, "_pip_options", lambda: {"index-url": "http://127.0.0.1:9"})
    none = {name: asset.model_copy(update={"addresses": ()}) for name, asset in fetch.registry().items()}
    monkeypatch.setattr(fetch, "registry", lambda: none)
    with pytest.raises(Unreachable, match=r"(?s)vocab\.bpe.*openai_whisper"):
        GPT2Tokenizer.fetched(tmp_path)


def test_ids_are_those_of_the_reference(gpt2: GPT2Tokenizer):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello, world").tolist() == [15496, 11, 995]
    assert gpt2.encode("<|endoftext|>").tolist() == [50256]
    assert gpt2.decode(gpt2.encode(STRANGE)) == STRANGE
    assert gpt2.decode([50256]) == "<|endoftext|>"
    # What looks like the end in the middle of a document is text.
    assert 50256 not in encode_documents(gpt2, [STRANGE])


def test_broken_unicode_is_a_usage_error(gpt2: GPT2Tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode at position 1"):
        gpt2.encode("a\udcff")


@pytest.mark.parametrize("piece", [1, 3, 10, 1 << 20])
def test_pieces_on_several_cores_give_the_ids_of_the_whole(gpt2: GPT2Tokenizer, monkeypatch, piece: int):
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", piece)
    text = ("a\nb\n\n c\t\n d \n" + STRANGE) * 3
    whole = gpt2.tiktoken.encode_ordinary(text)
    assert encode_documents(gpt2, [text], threads=2).tolist() == whole
    first, second = gpt2.tiktoken.encode_ordinary("a\n b"), gpt2.tiktoken.encode_ordinary(text)
    assert encode_documents(gpt2, ["a\n b", text]).tolist() == [*first, 50256, *second]


def test_token_files_of_documents(gpt2: GPT2Tokenizer, tmp_path: Path):
    texts = ["one two three<|endoftext|>four", "five six", "seven eight nine ten eleven twelve thirteen fourteen"]
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, "utf-8")
    data = tokenize_gpt2(paths, tmp_path / "t", gpt2)
    assert data.vocab_size == 50257
    assert data.train.header.dtype == "uint16"
    assert np.array_equal(data.train.ids, encode_documents(gpt2, [texts[0], texts[2]]))
    assert np.count_nonzero(data.train.ids == 50256) == 1  # the one between them, and none that a text spells out
    assert gpt2.decode(data.val.ids) == texts[1]
    assert open_data(tmp_path / "t").corpus() == data.corpus()


def test_every_model_is_measured_on_the_same_bytes(gpt2: GPT2Tokenizer, tmp_path: Path):
    text = (STRANGE + "<|endoftext|>\n") * 20
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    of_characters = tokenize_chars(tmp_path / "a.txt", tmp_path / "c")
    of_gpt2 = tokenize_gpt2([tmp_path / "a.txt"], tmp_path / "t", gpt2)
    expected = text[int(0.9 * len(text)) :].encode()
    assert CharTokenizer.load(tmp_path / "c").decode_bytes(of_characters.val.ids) == expected
    assert gpt2.decode_bytes(of_gpt2.val.ids) == expected
    assert of_characters.corpus()["val_bytes"] == of_gpt2.corpus()["val_bytes"] == len(expected)
    assert gpt2.count_bytes(encode_documents(gpt2, [STRANGE])) == len(STRANGE.encode())
    assert gpt2.count_bytes(np.array([50256])) == 0


def test_the_command_line(picogpt, tmp_path: Path, corpus: Path, gpt2_resources: Path):
    (tmp_path / "resources").symlink_to(gpt2_resources)
    run = picogpt("tokenize", "gpt2", "--text", corpus, "--run", "r")
    assert run.status == 0, run.err
    assert run.out.startswith("words: ")
    data = open_data(tmp_path / "weights/gpt2_tokenizer/r")
    text = corpus.read_text()
    cut = int(len(text) * 0.9)
    ranks = GPT2Tokenizer.fetched("resources").ranks
    reference = tiktoken.Encoding("again", pat_str=bpe.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    assert np.array_equal(data.train.ids, reference.encode_ordinary(text[:cut]))
    assert np.array_equal(data.val.ids, reference.encode_ordinary(text[cut:]))
    assert picogpt("tokenize", "char", "--text", corpus, "--run", "c").status == 0
    (tmp_path / "empty.txt").touch()
    for command, status, message in (
        (["tokenize", "gpt2", "--text", "empty.txt"], 1, "empty.txt is empty"),
        (["tokenize", "gpt2", "--text", "no.txt"], 1, "no.txt"),
        (["train", "gpt2", "--data", "weights/char_tokenizer/c"], 2, "tokens of another tokenizer"),
        (["train", "char-bigram", "--data", "weights/gpt2_tokenizer/r"], 2, "GPT-2's tokens"),
    ):
        run = picogpt(*command)
        assert (run.status, message in run.err) == (status, True), run.err


def test_the_vocabulary_is_openais_from_either_source(gpt2: GPT2Tokenizer, tmp_path: Path):
    """What is exported is what OpenAI published, byte for byte, and the ranks that are made from that are registered."""
    files = _texts(GPT2Config(kind="gpt2"), 50257, gpt2)
    merges, ranks = tmp_path / "vocab.bpe", tmp_path / "gpt2.tiktoken"
    merges.write_text(files["merges.txt"], encoding="utf-8")
    ranks.write_bytes(bpe.ranks_of_merges(files["merges.txt"]))
    assert fetch.is_whole(merges, fetch.find(bpe.MERGES))
    assert fetch.is_whole(ranks, fetch.find(bpe.RANKS))
    vocabulary = json.loads(files["vocab.json"])
    assert (len(vocabulary), vocabulary["Ġworld"]) == (50257, 995)
