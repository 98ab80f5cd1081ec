"""The README's quick start, in one process and with small settings: the test to read first."""

from pathlib import Path

import pytest
import torch

from picogpt import models
from picogpt.sample import Decoding, generate


def test_from_a_text_to_a_trained_model_and_its_own_text(
    picogpt, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert picogpt("tokenize", "char", "--text", corpus).status == 0

    small = ["--set=model.n_layer=1", "--set=model.n_head=2", "--set=model.n_embd=32", "--set=model.block_size=32"]
    trained = picogpt("train", "char-transformer", "--name=mine", "--steps=60", "--set=train.eval_interval=20", *small)
    assert trained.status == 0, trained.err
    assert "weights/char_transformer/mine/best.pt: validation loss" in trained.out
    assert sorted(path.name for path in Path("weights/char_transformer/mine").glob("[a-z]*")) == [
        "best.pt", "metrics.jsonl", "record.json",
    ]  # fmt: skip

    sample = picogpt("sample", "char-transformer", "--prompt=the ", "-n", 20, "--seed=7")
    assert sample.out.startswith("the ")

    # The same in a notebook.
    model, tokenizer = models.load("weights/char_transformer/mine/best.pt")
    prompt = torch.from_numpy(tokenizer.encode("the ").astype("int64"))
    tokens = generate(model, [prompt], 20, Decoding(), seed=7)[0]
    assert sample.out.startswith("the " + tokenizer.decode(tokens.numpy()))
