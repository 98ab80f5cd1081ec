import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_experiment

from picogpt import models
from picogpt.config import CharBigramConfig, GPT2Config
from picogpt.errors import UsageError
from picogpt.models.language_model import LanguageModel
from picogpt.sample import Decoding, choose, context_start, generate, prepare
from picogpt.stream import TextStream

V = 11


@pytest.fixture(params=["char-transformer", "char-bigram", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    config = {
        "char-transformer": small_experiment().model,
        "char-bigram": CharBigramConfig(kind="char-bigram", block_size=16),
        "gpt2": GPT2Config(kind="gpt2", n_layer=2, n_head=2, n_embd=16, block_size=16),
    }[request.param]
    built = models.build(config, V, seed=1).eval()
    torch.manual_seed(0)
    for parameter in built.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return built


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(V, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]


@pytest.mark.parametrize("lengths", [(1, 1), (5,), (15,), (16,), (17, 17), (40,), (1, 5, 40), (16, 2, 17, 9)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_and_without_a_cache_the_text_is_the_same_also_past_the_context(model, lengths, temperature: float):
    prompts, decoding = prompts_of(*lengths), Decoding(temperature)
    cached = generate(model, prompts, 50, decoding, seed=3)
    assert cached.shape == (len(lengths), 50)
    assert torch.equal(cached, generate(model, prompts, 50, decoding, seed=3, cached=False))


def test_a_prompt_gives_the_same_text_beside_others_as_alone(model):
    prompts = prompts_of(3, 20, 7)
    together = generate(model, prompts, 30, Decoding(), seed=5)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], generate(model, [prompt], 30, Decoding(), seed=5 + row))


@pytest.mark.parametrize("lengths", [(4,), (4, 9)])
def test_a_step_of_fixed_shape_gives_the_same(model, lengths, monkeypatch: pytest.MonkeyPatch):
    """What a CUDA graph replays on a GPU: masks over the whole cache, and a place known to the device alone."""
    prompts = prompts_of(*lengths)
    expected = generate(model, prompts, 40, Decoding(), seed=3)
    new_cache = type(model).new_cache
    monkeypatch.setattr(
        type(model), "new_cache", lambda self, batch, padding=None, fixed=False: new_cache(self, batch, padding, True)
    )
    assert torch.equal(generate(model, prompts, 40, Decoding(), seed=3), expected)


def test_the_seed_decides_the_text(model):
    first, again, other = (generate(model, prompts_of(1), 30, Decoding(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_handed_over_as_they_are_made_and_may_be_enough(model):
    made = []
    tokens = generate(model, prompts_of(1, 1), 9, Decoding(), 1, lambda column: made.append(column.clone()))
    assert torch.equal(torch.stack(made, 1), tokens)
    made = []

    def take(column: torch.Tensor) -> bool:
        made.append(column)
        return len(made) == 4

    assert torch.equal(generate(model, prompts_of(1, 1), 9, Decoding(), 1, take), tokens[:, :4])


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 100])
def test_the_context_is_never_longer_than_a_block_nor_shorter_than_half(prompt_length: int):
    for position in range(prompt_length, prompt_length + 200):
        seen = position - context_start(position, prompt_length, 16)
        assert seen <= 16
        assert seen > 8 or seen == position


def test_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, Decoding(0), torch.zeros(2)).tolist() == [1, 0]


def drawn(decoding: Decoding, probabilities: list[float], draws: int = 4000) -> list[float]:
    """Frequencies of what is chosen."""
    logits = torch.tensor([probabilities]).log().repeat(draws, 1)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = choose(logits, decoding, uniform)
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


def test_the_ends_of_the_range_never_give_what_is_impossible():
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]).log().repeat(2, 1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Decoding(), uniform).tolist() == [1, 3]


class Bytes:
    """A tokenizer of bytes: the id is the byte, 256 the end."""

    end_of_text = 256

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


def streamed(text: str | bytes, stops: tuple[str, ...] = (), **options) -> list[str]:
    stream = TextStream(Bytes(), stops, **options)  # type: ignore[arg-type]
    ids = list(text.encode() if isinstance(text, str) else text)
    return [*(stream.push(token) for token in ids), stream.close()]


def test_a_character_is_never_broken():
    parts = streamed("aé東🙂")
    assert parts == ["a", "", "é", "", "", "東", "", "", "", "🙂", ""]
    assert "".join(streamed("🙂".encode()[:3] + b"x")) == "\ufffdx"
    assert streamed("🙂".encode()[:2])[-1] == "\ufffd"


def test_text_ends_before_a_stop_and_nothing_of_it_is_shown():
    assert "".join(streamed("one END two", ("END",))) == "one "
    assert "".join(streamed("one EN", ("END",))) == "one EN"  # it was none after all
    assert "".join(streamed("EENDx", ("END",))) == "E"
    assert "".join(streamed("a\n\nb", ("\n\n", "b"))) == "a"
    assert streamed("abEN", ("END",))[:4] == ["a", "b", "", ""]


def test_the_end_of_a_document_ends_the_text():
    stream = TextStream(Bytes())  # type: ignore[arg-type]
    assert stream.push(97) + stream.push(256) + stream.push(98) == "a"
    assert (stream.ended, stream.tokens) == (True, 2)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_stay_close_with_instructions_for_them_and_without(monkeypatch, dtype: str, instructions: bool):
    monkeypatch.setattr("picogpt.hardware.multiplies_bfloat16", lambda device_type: instructions)
    config = GPT2Config(kind="gpt2", n_layer=2, n_head=2, n_embd=64, block_size=32)
    expected = models.build(config, 300, seed=1).eval()
    model = prepare(models.build(config, 300, seed=1), "cpu", dtype)
    idx = torch.randint(300, (1, 32))
    with torch.no_grad():
        logits, reference = model(idx), expected(idx)
        assert model(idx, idx).item() == pytest.approx(expected(idx, idx).item(), abs=0.01)
        few = model(idx[:, :3])  # few rows take another way
    assert logits.dtype == torch.bfloat16
    spread = reference.std()
    assert (logits.float() - reference).abs().max() < 0.1 * spread
    assert (few.float() - reference[:, :3]).abs().max() < 0.1 * spread
    assert generate(model, prompts_of(5), 40, Decoding(), 1).shape == (1, 40)


def test_int8_is_for_gpt2():
    with pytest.raises(UsageError, match="int8 is for gpt2"):
        prepare(models.build(small_experiment().model, V, 0), "cpu", "int8")


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
    two = picogpt("sample", "char-transformer", "-n", 30, "--prompt", "the king", "--prompt", "O").out
    assert two.split("\n---\n")[0] + "\n" == picogpt("sample", "char-transformer", "-n", 30, "--prompt", "the king").out
    stopped = picogpt("sample", "char-bigram", "-n", 500, "--prompt", "the king", "--stop", "e", "--stream").out
    assert stopped.startswith("the king")
    assert "e" not in stopped.removeprefix("the king")
    long = "the king and queen of night"
    cut = picogpt("sample", "char-transformer", "-n", 9, "--prompt", long, "--truncate").out
    end = picogpt("sample", "char-transformer", "-n", 9, "--prompt", long[-16:]).out
    assert cut.removeprefix(long) == end.removeprefix(long[-16:])
    assert picogpt("sample", "char-bigram", "-n", 5, "--prompt", "the king", "--out", "o.txt").out == ""
    assert (tmp_path / "o.txt").read_text() == continued[:-1]


def test_torchs_compiler_is_not_loaded(trained):
    """It would be a third of the time to the first token."""
    script = (
        "import sys; from picogpt import cli; cli.cli(sys.argv[1:], standalone_mode=False);"
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "sample", "char-transformer", "-n", "5"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "True False"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", "0"], 2, "0 is not in the range x>=1"),
        (["-n", "-5"], 2, "-5 is not in the range x>=1"),
        (["-n", "x"], 2, "'x' is not a valid integer"),
        (["--temperature", "-1"], 2, "--temperature -1"),
        (["--top-k", "0"], 2, "--top-k 0"),
        (["--top-p", "2"], 2, "--top-p 2"),
        (["--num-samples", "0"], 2, "'--num-samples': 0 is not"),
        (["--prompt", "ÆØ"], 2, "lacks 'Æ' 'Ø'"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--prompt", "the king and queen of night"], 2, "has 27 tokens and the context of this model holds 16"),
        (["--dtype", "int8"], 2, "int8 is for gpt2"),
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
