from pathlib import Path

import pytest
import torch
from conftest import small_experiment

from picogpt import models
from picogpt.errors import UsageError
from picogpt.sample import Decoding, choose, context_start, generate

V = 11


@pytest.fixture(params=["char-transformer", "char-bigram"])
def model(request: pytest.FixtureRequest) -> models.LanguageModel:
    config = small_experiment().model
    if request.param == "char-bigram":
        from picogpt.config import CharBigramConfig

        config = CharBigramConfig(kind="char-bigram", block_size=16)
    built = models.build(config, V, seed=1).eval()
    torch.manual_seed(0)
    for parameter in built.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return built


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_and_without_a_cache_the_text_is_the_same_also_past_the_context(model, length: int, temperature: float):
    prompt = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(length))
    decoding = Decoding(temperature)
    cached = generate(model, prompt, 50, decoding, seed=3)
    assert cached.shape == (2, 50)
    assert torch.equal(cached, generate(model, prompt, 50, decoding, seed=3, cached=False))


def test_the_seed_decides_the_text(model):
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    first, again, other = (generate(model, prompt, 30, Decoding(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_handed_over_as_they_are_made(model):
    made = []
    tokens = generate(
        model, torch.zeros(2, 1, dtype=torch.int64), 9, Decoding(), 1, lambda column: made.append(column.clone())
    )
    assert torch.equal(torch.stack(made, 1), tokens)


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 100])
def test_the_context_is_never_longer_than_a_block_nor_shorter_than_half(prompt_length: int):
    for position in range(prompt_length, prompt_length + 200):
        seen = position - context_start(position, prompt_length, 16)
        assert seen <= 16
        assert seen > 8 or seen == position


def test_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, Decoding(0), torch.Generator()).tolist() == [1, 0]


def drawn(decoding: Decoding, probabilities: list[float], draws: int = 4000) -> list[float]:
    """Frequencies of what is chosen."""
    logits = torch.tensor([probabilities]).log().repeat(draws, 1)
    ids = choose(logits, decoding, torch.Generator().manual_seed(0))
    return [(ids == index).float().mean().item() for index in range(len(probabilities))]


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(), [0.1, 0.5, 0.1, 0.3]),
        (Decoding(top_k=1), [0, 1, 0, 0]),
        (Decoding(top_k=2), [0, 0.625, 0, 0.375]),
        (Decoding(top_k=99), [0.1, 0.5, 0.1, 0.3]),
        (Decoding(top_p=0.4), [0, 1, 0, 0]),
        (Decoding(top_p=0.6), [0, 0.625, 0, 0.375]),
        (Decoding(top_p=1.0), [0.1, 0.5, 0.1, 0.3]),
        (Decoding(0.5), [0.01 / 0.36, 0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36]),
        (Decoding(top_k=2, top_p=0.55), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_filtered_probabilities(decoding: Decoding, expected: list[float]):
    assert drawn(decoding, [0.1, 0.5, 0.1, 0.3]) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_decoding_is_a_usage_error(wrong: dict):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Decoding(**wrong)


@pytest.fixture
def trained(picogpt, corpus: Path) -> None:
    """A tokenizer and a short run of each model in the current folder."""
    assert picogpt("tokenize", "char", "--text", corpus, "--run", "t").status == 0
    small = [f"--set=model.{key}" for key in ("n_layer=1", "n_embd=16", "n_head=2", "block_size=16")]
    run = ["--run", "r", "--steps", 3, "--set=train.eval_train=none"]
    assert picogpt("train", "char-transformer", *run, *small, "--size", "cpu").status == 0
    assert picogpt("train", "char-bigram", *run, "--set=model.block_size=16").status == 0


def test_the_command_line(trained, picogpt, tmp_path: Path):
    run = picogpt("sample", "char-transformer", "-n", 100)
    assert (run.status, len(run.out)) == (0, 101)
    assert "100 tokens, " in run.err
    named = ["--ckpt", "weights/char_transformer/r/best.pt", "--tokenizer-dir", "weights/char_tokenizer/t/"]
    assert picogpt("sample", "char-transformer", *named, "-n", 100).out == run.out
    assert picogpt("sample", "char-transformer", "-n", 100, "--no-cache").out == run.out
    assert picogpt("sample", "char-transformer", "-n", 100, "--stream").out == run.out
    assert picogpt("sample", "char-transformer", "-n", 100, "--seed", 2).out != run.out
    assert picogpt("sample", "char-bigram", "-n", 20, "--untrained").status == 0

    continued = picogpt("sample", "char-bigram", "-n", 5, "--prompt", "the king").out
    assert continued.startswith("the king")
    assert len(continued) == len("the king") + 5 + 1
    (tmp_path / "prompt.txt").write_text("the king")
    assert picogpt("sample", "char-bigram", "-n", 5, "--prompt-file", "prompt.txt").out == continued
    assert picogpt("sample", "char-bigram", "-n", 5, "--num-samples", 3).out.count("\n---\n") == 2
    assert picogpt("sample", "char-bigram", "-n", 5, "--prompt", "the king", "--out", "o.txt").out == ""
    assert (tmp_path / "o.txt").read_text() == continued[:-1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", "0"], 2, "-n 0"),
        (["-n", "-5"], 2, "-n -5"),
        (["-n", "x"], 2, "'x' is not a valid integer"),
        (["--temperature", "-1"], 2, "--temperature -1"),
        (["--top-k", "0"], 2, "--top-k 0"),
        (["--top-p", "2"], 2, "--top-p 2"),
        (["--num-samples", "0"], 2, "--num-samples 0"),
        (["--prompt", "ÆØ"], 2, "lacks 'Æ' 'Ø'"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "not both"),
        (["--prompt-file", "missing.txt"], 1, "missing.txt"),
        (["--ckpt", "missing.pt"], 1, "missing.pt"),
        (["--ckpt", "weights/char_bigram/r/best.pt"], 1, "holds a char-bigram, not a char-transformer"),
        (["--tokenizer-dir", "other"], 1, "other is not the one that"),
        (["--tokenizer-dir", "nowhere"], 1, "nowhere/tokenizer.json"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--device", "gpu"], 2, "no device 'gpu'"),
        (["--temperature", "nan"], 2, "--temperature nan"),
        (["--prompt", "\udcff"], 2, "lacks"),
        (["--out", "weights/char_bigram/r/best.pt/x"], 1, "best.pt/x"),
    ],
)
def test_bad_input_is_one_message_and_a_status(trained, picogpt, tmp_path, arguments: list, status: int, message: str):
    (tmp_path / "other.txt").write_text("xyz\n" * 50)
    picogpt("tokenize", "char", "--text", "other.txt", "--run", "other")
    (tmp_path / "weights/char_tokenizer/other").rename(tmp_path / "other")
    run = picogpt("sample", "char-transformer", *arguments)
    assert (run.status, run.out) == (status, "")
    assert message in run.err
