import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from picogpt.data import bpe, fetch
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data, tokenize_gpt2
from picogpt.data.fetch import MIRROR_VARIABLE
from picogpt.errors import PicogptError, Unreachable, UsageError

STRANGE = "Don't  stop\n\n  believing   \t\n—naïve 東京 🙂🙃 1234567 <|endoftext|> x\u00a0y\r\n end   "


def test_a_wrong_file_of_ranks_is_refused(tmp_path: Path):
    (tmp_path / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(PicogptError, match=r"gpt2\.tiktoken has sha256 [0-9a-f]{64}"):
        GPT2Tokenizer(tmp_path / "gpt2.tiktoken")
    with pytest.raises(PicogptError, match="is not there"):
        GPT2Tokenizer(tmp_path / "none")


def test_where_nothing_answers_every_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "mirror"))
    monkeypatch.setattr(fetch, "_index_addresses", lambda archive: [])
    none = {name: asset.model_copy(update={"addresses": ()}) for name, asset in fetch.registry().items()}
    monkeypatch.setattr(fetch, "registry", lambda: none)
    with pytest.raises(Unreachable, match=r"(?s)vocab\.bpe.*openai_whisper"):
        GPT2Tokenizer.fetched(tmp_path)


def test_both_sources_give_the_same_bytes(gpt2: GPT2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The source distribution holds what is made from the merges: the registry's hash is the proof on either way."""
    made = bpe.ranks_of_merges(merges_text(gpt2))
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/gpt2.tiktoken").write_bytes(made)
    assert GPT2Tokenizer(tmp_path / "made/gpt2.tiktoken").ranks == gpt2.ranks


def merges_text(tokenizer: GPT2Tokenizer) -> str:
    from picogpt.export import merges

    return "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges(tokenizer))


def test_ids_are_those_of_the_reference(gpt2: GPT2Tokenizer):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello, world").tolist() == [15496, 11, 995]
    assert gpt2.encode("<|endoftext|>").tolist() == [50256]
    assert gpt2.decode(gpt2.encode(STRANGE)) == STRANGE
    assert gpt2.decode([50256]) == "<|endoftext|>"
    # What looks like the end in the middle of a document is text.
    assert 50256 not in gpt2.encode_documents([STRANGE])


def test_broken_unicode_is_a_usage_error(gpt2: GPT2Tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode at position 1"):
        gpt2.encode("a\udcff")


@pytest.mark.parametrize("piece", [1, 3, 10, 1 << 20])
def test_pieces_on_several_cores_give_the_ids_of_the_whole(gpt2: GPT2Tokenizer, monkeypatch, piece: int):
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", piece)
    text = ("a\nb\n\n c\t\n d \n" + STRANGE) * 3
    whole = gpt2.tiktoken.encode_ordinary(text)
    assert gpt2.encode_documents([text], threads=2).tolist() == whole
    first, second = gpt2.tiktoken.encode_ordinary("a\n b"), gpt2.tiktoken.encode_ordinary(text)
    assert gpt2.encode_documents(["a\n b", text]).tolist() == [*first, 50256, *second]


def test_token_files_of_documents(gpt2: GPT2Tokenizer, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten<|endoftext|>eleven", "utf-8")
    (tmp_path / "b.txt").write_text("twelve thirteen", "utf-8")
    data = tokenize_gpt2([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "t", gpt2, val_fraction=0.5)
    assert data.vocab_size == 50257
    assert data.train.header.dtype == "uint16"
    assert gpt2.decode(data.train.ids) == "one two three four five six seven<|endoftext|>twelve "
    assert gpt2.decode(data.val.ids) == " eight nine ten<|endoftext|>eleven<|endoftext|>thirteen"
    assert open_data(tmp_path / "t").corpus() == data.corpus()


def test_the_command_line(picogpt, tmp_path: Path, corpus: Path, gpt2_resources: Path):
    (tmp_path / "resources").symlink_to(gpt2_resources)
    run = picogpt("tokenize", "gpt2", "--text", corpus, "--run", "r")
    assert run.status == 0, run.err
    assert run.out.startswith("words: ")
    data = open_data(tmp_path / "weights/gpt2_tokenizer/r")
    text = corpus.read_text()
    cut = int(len(text) * 0.9)
    reference = tiktoken.Encoding(
        "again", pat_str=bpe.r50k_pat_str, mergeable_ranks=GPT2Tokenizer.fetched("resources").ranks, special_tokens={}
    )
    assert np.array_equal(data.train.ids, reference.encode_ordinary(text[:cut]))
    assert np.array_equal(data.val.ids, reference.encode_ordinary(text[cut:]))
    (tmp_path / "empty.txt").write_text("")
    assert picogpt("tokenize", "gpt2", "--text", "empty.txt").status == 1
    assert "empty.txt is empty" in picogpt("tokenize", "gpt2", "--text", "empty.txt").err
    assert picogpt("tokenize", "gpt2", "--text", "no.txt").status == 1
    # A file of characters is not for GPT-2, nor the other way round.
    assert picogpt("tokenize", "char", "--text", corpus, "--run", "c").status == 0
    wrong = picogpt("train", "gpt2", "--data", "weights/char_tokenizer/c")
    assert wrong.status == 2
    assert "tokens of another tokenizer" in wrong.err
    wrong = picogpt("train", "char-bigram", "--data", "weights/gpt2_tokenizer/r")
    assert wrong.status == 2
    assert "GPT-2's tokens" in wrong.err


def test_the_exported_vocabulary_is_openais(gpt2: GPT2Tokenizer, tmp_path: Path):
    from picogpt.config import GPT2Config
    from picogpt.export import _texts

    files = _texts(GPT2Config(kind="gpt2"), 50257, gpt2)
    (tmp_path / "vocab.bpe").write_text(files["merges.txt"], encoding="utf-8")
    merges = fetch.find(bpe.MERGES)
    assert fetch.is_whole(tmp_path / "vocab.bpe", merges)  # byte for byte what OpenAI published
    vocabulary = json.loads(files["vocab.json"])
    assert len(vocabulary) == 50257
    assert vocabulary["Ġworld"] == 995
