import gc
import itertools
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUNTIME, gpt2_config, small_experiment

from picogpt import hardware, models, records
from picogpt import sample as sampling
from picogpt.config import CharBigramConfig, Experiment
from picogpt.data.corpus import tokenize_chars
from picogpt.errors import PicogptError, UsageError
from picogpt.models import kernels
from picogpt.models.cache import attention_of_one
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel
from picogpt.records import Key
from picogpt.sample import Decoding, choose, context_start, generate, prepare, probabilities
from picogpt.stream import TextStream
from picogpt.train.loop import Trainer

V = 11
BIGRAM = CharBigramConfig(kind="char-bigram", block_size=16)


@pytest.fixture(params=[small_experiment().model, BIGRAM, gpt2_config(n_layer=2)], ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    built = models.build(request.param, V, seed=1).eval()
    torch.manual_seed(0)
    for parameter in built.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return built


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(V, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]


@pytest.mark.parametrize("lengths", [(1, 1), (15,), (16,), (17, 17), (40,), (1, 5, 40), (16, 2, 17, 9)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_and_without_a_cache_the_text_is_the_same_also_past_the_context(model, lengths, temperature: float):
    prompts, decoding = prompts_of(*lengths), Decoding(temperature)
    cached = generate(model, prompts, 40, decoding, seed=3)
    assert cached.shape == (len(lengths), 40)
    assert torch.equal(cached, generate(model, prompts, 40, decoding, seed=3, cached=False))


def test_a_prompt_gives_the_same_text_beside_others_as_alone(model):
    prompts = prompts_of(3, 20, 7)
    together = generate(model, prompts, 30, Decoding(), seed=5)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], generate(model, [prompt], 30, Decoding(), seed=5 + row))


@pytest.mark.parametrize("length", [1, 16, 40])
def test_probabilities_are_those_by_which_each_token_was_drawn(model, length: int):
    (prompt,) = prompts_of(length)
    (tokens,) = generate(model, [prompt], 40, Decoding(), seed=3)
    ids, expected = torch.cat([prompt, tokens]), []
    for end in range(length, length + 40):
        start = context_start(end, length, model.config.block_size)
        expected.append(model(ids[None, start:end])[0, -1].softmax(-1)[ids[end]].item())
    found = probabilities(model, prompt, tokens)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert 0.01 < found.mean() < 0.99


def taking(made: list[torch.Tensor], enough: int):
    """A callback that keeps each column in `made`, and stops when there are `enough`."""
    return lambda column: made.append(column) or len(made) == enough


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, model: LanguageModel, written_out: bool) -> None:
    """Take the way of a GPU, but for its graph: a cache of fixed shape, and a host that looks one token later."""
    new_cache = model.new_cache

    def fixed_cache(batch: int, padding: torch.Tensor | None = None, fixed: bool = False):
        if cache := new_cache(batch, padding, True):
            cache.written_out = written_out
        return cache

    monkeypatch.setattr(model, "new_cache", fixed_cache)
    monkeypatch.setitem(sampling.BEHIND, "cpu", 1)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (4,), (4, 9), (1, 1)])
def test_a_step_of_fixed_shape_gives_the_same(model, lengths, written_out: bool, monkeypatch: pytest.MonkeyPatch):
    """What a CUDA graph replays on a GPU: masks over the whole cache, and a place known to the device alone."""
    prompts, decoding = prompts_of(*lengths), Decoding()
    expected = generate(model, prompts, 40, decoding, seed=3, cached=False)
    as_on_a_gpu(monkeypatch, model, written_out)
    made = []
    assert torch.equal(generate(model, prompts, 40, decoding, 3, made.append), expected)
    assert torch.equal(torch.stack(made, 1), expected)  # each of them, and in order
    for enough in (1, 23, 40):
        made.clear()
        stopped = generate(model, prompts, 40, decoding, 3, taking(made, enough))
        assert torch.equal(stopped, expected[:, :enough])
        assert len(made) == enough


def test_the_mask_of_a_fixed_step_is_made_of_numbers_in_the_dtype_of_the_cache():
    model = models.build(gpt2_config(block_size=8), V, seed=1).bfloat16()
    cache = model.new_cache(2, torch.tensor([0, 2]), fixed=True)
    model(torch.zeros(2, 4, dtype=torch.int64), cache=cache)
    assert cache.mask.dtype == torch.bool
    assert cache.start(1).tolist() == [[4], [2]]
    assert cache.mask.dtype == torch.bfloat16
    none = -torch.inf
    rows = [[0, 0, 0, 0, 0, none, none, none], [none, none, 0, 0, 0, none, none, none]]
    assert cache.mask[:, 0, 0].tolist() == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_that_of_torch(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 8, generator=generator).to(dtype) for length in (1, 20, 20))
    mask = torch.zeros(3, 1, 1, 20, dtype=dtype).masked_fill(torch.arange(20) > 12, -torch.inf)
    written = attention_of_one(q, k, v, mask)
    assert written.dtype == dtype
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.float())
    torch.testing.assert_close(written.float(), expected, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-5)
    torch.testing.assert_close(written, attention_of_one(q, k[:, :, :13], v[:, :, :13], mask[..., :13]))


def test_what_is_kept_for_the_next_call_changes_nothing(model, monkeypatch: pytest.MonkeyPatch):
    """Buffers of an earlier call with other prompts, seeds and lengths, and none where the weights moved."""
    calls = [
        ((5,), 30, 1, 0.8),
        ((9,), 12, 2, 0.8),
        ((9,), 50, 2, 0.8),
        ((2, 7), 20, 3, 0.8),
        ((7, 2), 20, 4, 0.8),
        ((7, 2), 9, 4, 0),
    ]
    fresh = [generate(model, prompts_of(*lengths), n, Decoding(t), seed, cached=False) for lengths, n, seed, t in calls]
    as_on_a_gpu(monkeypatch, model, written_out=True)
    decoders = []
    for (lengths, n, seed, t), expected in zip(calls, fresh, strict=True):
        assert torch.equal(generate(model, prompts_of(*lengths), n, Decoding(t), seed), expected)
        decoders.append(sampling._KEPT.get(model))
    if decoders[0] is None:
        return  # a bigram has nothing to keep
    same = [one is other for one, other in itertools.pairwise(decoders)]
    assert same == [True, False, False, True, False]  # 50 tokens are more than a block
    kept = decoders[-1]
    model.bfloat16().float()  # other memory
    again = generate(model, prompts_of(7, 2), 9, Decoding(0), 4)
    assert again.shape == (2, 9)
    assert sampling._KEPT[model] is not kept
    with pytest.raises(ZeroDivisionError):
        generate(model, prompts_of(7, 2), 9, Decoding(0), 4, lambda column: 1 / 0)
    assert model not in sampling._KEPT


def test_a_model_that_is_gone_keeps_nothing():
    model = models.build(gpt2_config(), V, seed=1).eval()
    generate(model, prompts_of(3), 5, Decoding(), 1)
    kept = weakref.ref(sampling._KEPT[model])
    del model
    gc.collect()
    assert kept() is None


def test_a_compiled_step_gives_the_same(model):
    prompts = prompts_of(4, 9)
    if model.new_cache(1) is None:
        with pytest.raises(UsageError, match="--compile is for the step of a KV cache"):
            generate(model, prompts, 40, Decoding(), 3, compiled=True)
        return
    expected = [generate(model, prompts, 40, Decoding(), seed, cached=False) for seed in (3, 4)]
    if isinstance(model, GPT2):
        kernels.specialize(model, kernels.SplitLinear)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # one step, compiled once, for every position
        for seed, tokens in zip((3, 4), expected, strict=True):
            assert torch.equal(generate(model, prompts, 40, Decoding(), seed, compiled=True), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_added_after_the_product_changes_nothing(dtype: torch.dtype):
    linear, x = torch.nn.Linear(32, 48).to(dtype), torch.randn(1, 1, 32, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(kernels.SplitLinear(linear.weight, linear.bias)(x), linear(x), atol=tolerance, rtol=1e-2)


def test_what_a_device_has_no_use_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = models.build(gpt2_config(), V, seed=1)
    with pytest.raises(UsageError, match="--compile is for a GPU"):
        prepare(model, "cpu", compiled=True)
    monkeypatch.setattr(hardware, "select", lambda *_: hardware.Device("a GPU", "cuda:0", "bfloat16"))
    with pytest.raises(UsageError, match=r"--dtype int8 .* use --dtype bfloat16"):
        prepare(model, "auto", "int8")


def test_cudnn_is_for_steps_and_not_for_prompts():
    priority = torch._C._get_sdp_priority_order
    with hardware.attention_backends("cuda", cudnn=True):
        assert priority()[0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with hardware.attention_backends("cuda", cudnn=False):
        assert priority()[0] == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (5, 20, 9)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_a_graph_gives_the_tokens_of_the_cpu(model, lengths, temperature: float, compiled: bool):
    """Greedy and drawn, past the context, stopped in between, and from the same graph for other prompts and seeds."""
    cases = [(prompts_of(*lengths), 3), (prompts_of(*(length + 1 for length in lengths)), 4)]
    decoding = Decoding(temperature)
    expected = [generate(model, prompts, 40, decoding, seed) for prompts, seed in cases]
    if model.new_cache(1) is None:
        return
    model, graphs = prepare(model, "cuda", compiled=compiled), set()
    for (prompts, seed), tokens in zip([*cases, *cases], [*expected, *expected], strict=True):
        there, made = [prompt.cuda() for prompt in prompts], []
        new = generate(model, there, 40, decoding, seed, made.append, compiled=compiled)
        assert torch.equal(new.cpu(), tokens)
        assert torch.equal(torch.stack(made, 1), tokens)
        made.clear()
        stopped = generate(model, there, 40, decoding, seed, taking(made, 23), compiled=compiled)
        assert torch.equal(stopped.cpu(), tokens[:, :23])
        assert len(made) == 23
        graphs.add(sampling._KEPT[model].graph)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu_bfloat16_steps_agree_with_the_prompt_read_anew():
    """cuDNN's attention with a mask of numbers, compiled and not, against torch's over the whole context."""
    config = gpt2_config(n_layer=2, n_head=4, n_embd=256, block_size=128)
    model = models.build(config, V, seed=0).cuda().bfloat16().eval()
    with torch.no_grad():
        idx = torch.randint(V, (3, 60), device="cuda")
        cache = model.new_cache(3, fixed=True)
        model(idx[:, :50], cache=cache)
        with hardware.attention_backends("cuda", cudnn=True):
            steps = [model(idx[:, position : position + 1], cache=cache) for position in range(50, 60)]
        expected = model(idx)[:, 50:]
    assert (torch.cat(steps, 1) - expected).abs().max() < 0.1 * expected.std()


def test_the_seed_decides_the_text(model):
    first, again, other = (generate(model, prompts_of(1), 30, Decoding(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_handed_over_as_they_are_made_and_may_be_enough(model):
    made = []
    tokens = generate(model, prompts_of(1, 1), 9, Decoding(), 1, lambda column: made.append(column.clone()))
    assert torch.equal(torch.stack(made, 1), tokens)
    made.clear()
    enough = generate(model, prompts_of(1, 1), 9, Decoding(), 1, taking(made, 4))
    assert torch.equal(enough, tokens[:, :4])


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 100])
def test_the_context_is_never_longer_than_a_block_nor_shorter_than_half(prompt_length: int):
    for position in range(prompt_length, prompt_length + 200):
        seen = position - context_start(position, prompt_length, 16)
        assert seen <= 16
        assert seen > 8 or seen == position


def test_temperature_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, Decoding(0), torch.zeros(2)).tolist() == [1, 0]


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
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().repeat(4000, 1)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = choose(logits, decoding, uniform).bincount(minlength=4) / 4000
    assert frequencies.tolist() == pytest.approx(expected, abs=0.03)


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
    assert stream.ended


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_stay_close_with_instructions_for_them_and_without(monkeypatch, dtype: str, instructions: bool):
    monkeypatch.setattr("picogpt.hardware.multiplies_bfloat16", lambda device_type: instructions)
    config = gpt2_config(n_layer=2, n_embd=64, block_size=32)
    expected = models.build(config, 300, seed=1).eval()
    model = prepare(models.build(config, 300, seed=1), "cpu", dtype)
    idx = torch.randint(300, (1, 32))
    with torch.no_grad():
        logits, reference = model(idx), expected(idx)
        assert model(idx, idx).item() == pytest.approx(expected(idx, idx).item(), abs=0.01)
        few = model(idx[:, :3])  # few rows take another way
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference).abs().max() < 0.1 * reference.std()
    assert (few.float() - reference[:, :3]).abs().max() < 0.1 * reference.std()
    assert generate(model, prompts_of(5), 40, Decoding(), 1).shape == (1, 40)


@pytest.mark.parametrize("width", [8, 24, 64])
def test_int8_reads_nothing_behind_a_row(width: int):
    """As torch's kernel does for widths that do not fill its registers: numbers from there, or a segmentation fault."""
    memory = torch.full((10_000,), float("nan"), dtype=torch.bfloat16)
    rows = memory[: 3 * width].view(3, width).normal_()
    layer = kernels.Int8Linear(torch.randn(32, width), None)
    expected = rows.float() @ (layer.weight.float() * layer.scale.float()[:, None]).T
    torch.testing.assert_close(layer.product(rows).float(), expected, atol=0.02 * width**0.5, rtol=0.02)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder weights/ with two tokenizers and a short run of each model."""
    folder = tmp_path_factory.mktemp("sampled") / "weights"
    other = folder.parent / "other.txt"
    other.write_text("xyz\n" * 50)
    tokenize_chars(other, folder / "other")
    data = tokenize_chars(corpus, folder / "char_tokenizer/t")
    for config in (small_experiment().model, BIGRAM):
        experiment = Experiment(model=config, train={"steps": 3}, runtime=SMALL_RUNTIME)
        Trainer(experiment, data, folder / config.kind.replace("-", "_") / "r").run()
    return folder


@pytest.fixture
def trained(picogpt, weights: Path, tmp_path: Path) -> None:
    """`weights` in the current folder."""
    shutil.copytree(weights, tmp_path / "weights")


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


def test_without_a_working_compiler_there_is_one_message(trained, picogpt, monkeypatch):
    monkeypatch.setattr(sampling, "prepare", lambda model, *_, **__: model)  # which refuses to compile on a CPU
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True}):
        run = picogpt("sample", "char-transformer", "-n", 5, "--compile")
    assert run.status == 1
    assert "picogpt: torch.compile does not work here, so go on without it: " in run.err
    assert "Traceback" not in run.err


def test_what_a_device_cannot_measure_is_recorded_where_that_is_asked_for(trained, picogpt, monkeypatch):
    command = ["bench", "sample", "char-transformer", "-n", 3, "--runs", 2, "--batch-size"]
    assert picogpt(*command, 2, "--out", "2.json").status == 0
    record = records.read("2.json")
    assert records.key(record) == Key("streams", "char-transformer", streams="2")
    assert str(records.key(record)) == "sampling char-transformer 2 streams"
    assert (record["config"]["batch_size"], record["config"]["compiled"]) == (2, False)

    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("picogpt.bench.measure.generate", full)
    assert picogpt(*command, 2, "--out", "2.json").status == 1
    run = picogpt(*command, 2, "--optional", "--out", "2.json")
    assert (run.status, records.read("2.json")["results"]) == (0, {})
    assert "not measured here: 2 streams do not fit into the memory" in run.out

    monkeypatch.setattr(hardware, "select", lambda *_: hardware.Device("a GPU", "cuda:0", "bfloat16"))
    run = picogpt(*command, 1, "--dtype", "int8", "--out", "int8.json")
    assert (run.status, Path("int8.json").exists()) == (2, False)
    assert "use --dtype bfloat16" in run.err
    assert picogpt(*command, 1, "--dtype", "int8", "--optional", "--out", "int8.json").status == 0
    record = records.read("int8.json")
    assert records.key(record) == Key("sampling", "char-transformer", dtype="int8")
    assert record["device"]["name"] == "a GPU"
    assert "use --dtype bfloat16" in record["not_measured"]
    assert "reason" not in record  # which belongs to what the hub did not give


def test_a_character_model_is_loaded_with_its_tokenizer_wherever_that_lies(weights: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = weights / "char_transformer/r/best.pt"
    alone = shutil.copy(best, tmp_path / "best.pt")
    with pytest.raises(PicogptError, match=r"no tokenizer in weights/char_tokenizer/ fits .*--tokenizer-dir"):
        models.load(alone)
    with pytest.raises(PicogptError, match=r"tokenizer in .*other is not the one that .*best\.pt was trained with"):
        models.load(alone, weights / "other")
    found = [models.load(best), models.load(alone, weights / "char_tokenizer/t")]
    monkeypatch.chdir(weights.parent)
    found.append(models.load(str(alone)))
    for model, tokenizer in found:
        ids = torch.from_numpy(tokenizer.encode("the king").astype("int64"))
        assert (tokenizer.decode(ids.numpy()), model.training) == ("the king", False)
        assert torch.equal(model(ids[None]), found[0][0](ids[None]))


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
        (["-n", "0"], 2, "0 is not in the range 1<=x"),
        (["-n", "-5"], 2, "-5 is not in the range 1<=x"),
        (["-n", "x"], 2, "'x' is not a valid integer"),
        (["--temperature", "-1"], 2, "--temperature -1"),
        (["--top-k", "0"], 2, "--top-k 0"),
        (["--top-p", "2"], 2, "--top-p 2"),
        (["--top-p", "0"], 2, "--top-p 0"),
        (["--num-samples", "0"], 2, "'--num-samples': 0 is not"),
        (["--prompt", "ÆØ"], 2, "lacks 'Æ' 'Ø'"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--prompt", "the king and queen of night"], 2, "has 27 tokens and the context of this model holds 16"),
        (["--dtype", "int8"], 2, "int8 is for gpt2"),
        (["--compile", "--device", "cpu"], 2, "--compile is for a GPU"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "not both"),
        (["--prompt-file", "missing.txt"], 1, "missing.txt"),
        (["--ckpt", "missing.pt"], 1, "missing.pt"),
        (["--ckpt", "weights/char_bigram/r/best.pt"], 1, "holds a char-bigram, not a char-transformer"),
        (["--tokenizer-dir", "weights/other"], 1, "other is not the one that"),
        (["--tokenizer-dir", "nowhere"], 1, "nowhere/tokenizer.json"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--device", "gpu"], 2, "no device 'gpu'"),
        (["--temperature", "nan"], 2, "--temperature nan"),
        (["--prompt", "\udcff"], 2, "lacks"),
        (["--out", "weights/char_bigram/r/best.pt/x"], 1, "best.pt/x"),
    ],
)
def test_bad_input_is_one_message_and_a_status(trained, picogpt, arguments: list, status: int, message: str):
    run = picogpt("sample", "char-transformer", *arguments)
    assert (run.status, run.out) == (status, "")
    assert message in run.err
