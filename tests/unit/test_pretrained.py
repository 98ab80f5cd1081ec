"""OpenAI's weights through the real client of the hub, from a hub of this test; and the way back."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import hub as hub_server
import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save

from picogpt import models
from picogpt.checkpoint import save_weights
from picogpt.config import Experiment, GPT2Config
from picogpt.data import fetch
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.errors import PicogptError, Refused, Unreachable, UsageError
from picogpt.export import export_folder
from picogpt.models import pretrained
from picogpt.models.gpt2 import GPT2
from picogpt.models.pretrained import TRANSPOSED, load_safetensors
from picogpt.registry import GPT2_SIZES
from picogpt.sample import Decoding, generate

CONFIG = GPT2Config(kind="gpt2", n_layer=2, n_head=2, n_embd=8)
SHAPE = [f"--set=model.{key}" for key in ("n_layer=2", "n_head=2", "n_embd=8")]
REVISION = "0123456789" * 4


def small() -> GPT2:
    model = models.build(CONFIG, pretrained.VOCAB_SIZE, seed=3)
    assert isinstance(model, GPT2)
    return model.eval()


def openai_names(model: GPT2) -> dict[str, torch.Tensor]:
    """The tensors as OpenAI's files have them, constants of old ones included."""
    state = {n: (t.T if n.endswith(TRANSPOSED) else t).contiguous() for n, t in model.state_dict().items()}
    for layer in range(CONFIG.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
    return state


@pytest.fixture(scope="module")
def content() -> bytes:
    return save(openai_names(small()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> Iterator[Hub]:
    """A hub with a small model, the only one it has, registered as `pretrained`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        running.files[f"openai-community/gpt2/{REVISION}/model.safetensors"] = content
        register(monkeypatch, hashlib.sha256(content).hexdigest())
        yield running


def register(monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> None:
    asset = fetch.Pretrained(repository="openai-community/gpt2", revision=REVISION, sha256=sha256, parameters="124M")
    monkeypatch.setitem(GPT2_SIZES, "124M", (CONFIG.n_layer, CONFIG.n_head, CONFIG.n_embd))
    monkeypatch.setattr(fetch, "pretrained", lambda: {"pretrained": asset})


def test_the_hub_is_asked_once_and_its_cache_serves_from_then_on(hub: Hub):
    model = pretrained.load("pretrained")
    expected = small()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert [path for method, path, _ in hub.requests if method == "GET"] == [
        f"/store/openai-community/gpt2/{REVISION}/model.safetensors"
    ]
    asked = len(hub.requests)
    hub.status = 500
    pretrained.load("pretrained")
    assert len(hub.requests) == asked


def test_a_hang_up_is_resumed_where_it_stopped(hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 14)  # 10 MB: this file in one piece
    hub.hang_up_after = [len(content) // 2]
    try:
        path = fetch.fetch_pretrained("pretrained")
    except Unreachable:  # the client may leave it to the next run
        path = fetch.fetch_pretrained("pretrained")
    assert path.read_bytes() == content
    ranges = [wanted for method, _, wanted in hub.requests if method == "GET"]
    assert any(wanted and int(wanted.removeprefix("bytes=").split("-")[0]) > 0 for wanted in ranges), ranges


def test_a_connection_that_breaks_each_time_is_a_message(hub: Hub, content: bytes, monkeypatch: pytest.MonkeyPatch):
    """The client gives up, with an error of its transport that is no OSError."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.hang_up_after = [0] * 20
    with pytest.raises(Unreachable, match=r"cannot get openai-community/gpt2/model\.safetensors.*tries again"):
        fetch.fetch_pretrained("pretrained")
    hub.hang_up_after = []
    assert fetch.fetch_pretrained("pretrained").read_bytes() == content


def test_a_file_that_lies_in_the_store_of_xet_is_known_by_the_hash_of_the_hub(hub: Hub, content: bytes, monkeypatch):
    """There the file of the cache is a link to what several repositories share, under a hash of another kind."""
    path = fetch.fetch_pretrained("pretrained")
    blob = path.resolve()
    shared = blob.parent.parent.parent / "shared" / ("c" * 64)
    shared.parent.mkdir()
    blob.rename(shared)
    blob.symlink_to(shared)
    register(monkeypatch, None)
    assert fetch.fetch_pretrained("pretrained").read_bytes() == content
    register(monkeypatch, "a" * 64)
    with pytest.raises(PicogptError, match="expected aaaa"):
        fetch.fetch_pretrained("pretrained")
    assert (shared.exists(), path.is_symlink(), blob.is_symlink()) == (True, False, False)


@pytest.mark.parametrize("registered", [True, False])
def test_another_file_is_refused_and_not_kept(hub: Hub, monkeypatch, tmp_path: Path, registered: bool):
    if registered:
        register(monkeypatch, "a" * 64)
    else:  # no hash is registered: the hub's own must fit
        register(monkeypatch, None)
        hub.claimed_hash = "a" * 64
    with pytest.raises(PicogptError, match=f"sha256 [0-9a-f]{{64}}, expected {'a' * 64}"):
        fetch.fetch_pretrained("pretrained")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "401 .*hf auth login, or HF_TOKEN"),
        (403, "403 .*may not read"),
        (404, "404 .*is HF_ENDPOINT right"),
        (429, "429|cannot"),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, monkeypatch, status: int, message: str):
    """And is no more than that: a pipeline goes on without it."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it asks again
    hub.status = status
    with pytest.raises(Unreachable, match=message) as refused:
        fetch.fetch_pretrained("pretrained")
    assert isinstance(refused.value, Refused) == (status != 429)


def test_the_names_on_the_command_line_are_those_of_the_registry():
    from picogpt.cli.common import PRETRAINED

    assert tuple(f"gpt2-{name}" for name in fetch.pretrained()) == PRETRAINED


def test_where_no_hub_answers_the_message_names_it(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9.*picogpt fetch pretrained"):
        fetch.fetch_pretrained("pretrained")


@pytest.fixture
def working(tmp_path: Path, gpt2_resources: Path, corpus: Path, picogpt, hub: Hub) -> Path:
    """A working folder with GPT-2's tokenizer and the tokens of a text."""
    (tmp_path / "resources").symlink_to(gpt2_resources)
    (tmp_path / "long.txt").write_text(corpus.read_text() * 20)
    assert picogpt("tokenize", "gpt2", "--text", "long.txt", "--run", "long").status == 0
    return tmp_path


def test_the_commands(working: Path, picogpt):
    run = picogpt("sample", "gpt2-pretrained", "-n", 5, "--prompt", "Hello")
    assert (run.status, run.out.startswith("Hello")) == (0, True), run.err
    assert picogpt("fetch", "pretrained").out.startswith("pretrained: ")
    evaluate = ["evaluate", "gpt2-pretrained", "--out", "record.json", "--prompt", "the king", "-n", 3]
    assert picogpt(*evaluate).status == 0
    record = json.loads((working / "record.json").read_text())
    assert record["results"]["val_loss"] == pytest.approx(10.8, abs=0.2)  # ln 50257: it knows nothing
    assert len(record["results"]["texts"]) == 1
    for model, option in (("gpt2-pretrained", "--ckpt"), ("gpt2", "--tokenizer-dir")):
        wrong = picogpt("sample", model, option, "x")
        assert (wrong.status, f"leave out {option}" in wrong.err) == (2, True), wrong.err


def test_fine_tuning_keeps_the_better_weights_and_asks_for_them_once(hub, working: Path, picogpt, monkeypatch):
    tune = ["train", "gpt2", "--init=pretrained", "--steps=2", "--set=train.learning_rate=0.01", *SHAPE]

    def results(run: str) -> dict:
        return json.loads((working / f"weights/gpt2/{run}/long/record.json").read_text())["results"]

    run = picogpt(*tune, "--run", "tuned")
    assert (run.status, "before training: val loss 10.8" in run.err) == (0, True), run.err
    assert results("tuned")["val_loss_after"] < results("tuned")["val_loss_before"]
    losses = count(1.0)  # each evaluation is worse than the one before
    with monkeypatch.context() as patch:
        patch.setattr("picogpt.train.loop.evaluate", lambda *rest, **named: next(losses))
        assert picogpt(*tune, "--run", "worse").status == 0
    assert results("worse")["val_loss_before"] == results("worse")["best_val_loss"] == 1
    assert (results("worse")["best_step"], results("worse")["val_loss_after"]) == (0, 2)
    # What is finished, or can be gone on from, asks nobody for OpenAI's weights again.
    shutil.rmtree(working / "cache")
    hub.status = 404
    for arguments, status, message in (
        (["--run", "tuned"], 0, "is finished already"),
        (["--run", "other"], 1, "answers 404"),
        (["--run", "deeper", "--set=model.n_layer=3"], 2, "no pretrained weights fit n_layer=3"),
    ):
        run = picogpt(*tune, *arguments)
        assert (run.status, message in run.err) == (status, True), run.err


def test_fine_tuning_begins_with_the_weights(hub: Hub):
    config = CONFIG.model_copy(update={"dropout": 0.1})
    model = pretrained.load_for(config, 50257)
    assert model.training
    assert model.config.dropout == 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.wte.weight, small().wte.weight)
    with pytest.raises(UsageError, match="no pretrained weights fit n_layer=3"):
        pretrained.name_for(CONFIG.model_copy(update={"n_layer": 3}), 50257)


def test_what_could_not_be_measured_is_recorded_as_such(working: Path, picogpt, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert picogpt("evaluate", "gpt2-pretrained").status == 1
    for command in (["evaluate"], ["bench", "sample"]):
        run = picogpt(*command, "gpt2-pretrained", "--optional", "--out", "record.json")
        assert (run.status, "not measured here: hub unreachable" in run.err) == (0, True), run.err
        assert json.loads((working / "record.json").read_text())["not_measured"] == "hub unreachable"


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes | dict], GPT2]:
    """Read a file with these tensors, or with this content."""

    def read(content: bytes | dict[str, torch.Tensor]) -> GPT2:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content if isinstance(content, bytes) else save(content))
        return load_safetensors(path, CONFIG, 50257)

    return read


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("h.1.ln_2.bias", None, r"h\.1\.ln_2\.bias is missing"),
        ("h.2.ln_2.bias", torch.zeros(8), r"h\.2\.ln_2\.bias is unknown"),
        ("wpe.weight", torch.zeros(7, 8), r"wpe\.weight has shape \(7, 8\), not \(1024, 8\)"),
        ("h.0.attn.c_attn.weight", torch.zeros(24, 8), r"c_attn\.weight has shape \(8, 24\)"),
        ("wte.weight", torch.zeros(50257), r"wte\.weight has shape"),
        ("lm_head.weight", torch.zeros(50257, 8), "head is tied"),
        ("ln_f.bias", torch.zeros(8, dtype=torch.int64), r"ln_f\.bias holds torch\.int64"),
    ],
)
def test_other_tensors_are_named(read, name: str, tensor: torch.Tensor | None, message: str):
    state = {**openai_names(small()), name: tensor}
    with pytest.raises(PicogptError, match=f"model.safetensors does not fit the model: .*{message}"):
        read({name: tensor for name, tensor in state.items() if tensor is not None})


@pytest.mark.parametrize("damage", ["length", "long", "cut", "empty", "offsets", "text"])
def test_a_header_that_lies_is_found_out(read, content: bytes, damage: str):
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["wte.weight"]["data_offsets"][1] += 4
    lying = json.dumps(header).encode()
    damaged = {
        "length": (size + 1000).to_bytes(8, "little") + content[8:],
        "long": (1 << 62).to_bytes(8, "little") + content[8:],
        "cut": content[:-100],
        "empty": b"",
        "offsets": len(lying).to_bytes(8, "little") + lying + content[8 + size :],
        "text": b"not at all a safetensors file",
    }[damage]
    with pytest.raises(PicogptError, match=r"model\.safetensors is not a complete safetensors file"):
        read(damaged)


def test_files_with_transformers_own_prefix_are_read(read):
    state = {f"transformer.{n}": t for n, t in openai_names(small()).items()}
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    assert torch.equal(read(state).wpe.weight, small().wpe.weight)


def test_an_export_is_loaded_by_transformers_and_gives_the_same(gpt2: GPT2Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = small()
    export_folder(model, gpt2, tmp_path / "out", str)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Don't stop — naïve 東京 1234\n\n  x"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == gpt2.encode(text).tolist()
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    greedy = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy[0, ids.size(1) :].tolist() == generate(model, [ids[0]], 20, Decoding(0), seed=0)[0].tolist()
    # And back: our own reader takes it.
    assert torch.equal(load_safetensors(tmp_path / "out/model.safetensors", CONFIG, 50257).wte.weight, model.wte.weight)
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    export_folder(model, gpt2, tmp_path / "out", str)
    with torch.no_grad():
        model.wte.weight[0, 0] += 1
    with pytest.raises(PicogptError, match=r"out exists already and has another model\.safetensors: remove it"):
        export_folder(model, gpt2, tmp_path / "out", str)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from picogpt.cli import main
sys.argv = ["picogpt", "export", "gpt2", "--ckpt", sys.argv[1], "--out", "out"]
main()
"""


def test_without_space_an_export_leaves_nothing(gpt2: GPT2Tokenizer, gpt2_resources: Path, tmp_path: Path):
    experiment = Experiment(model=CONFIG, train={"steps": 1})
    save_weights(
        tmp_path / "best.pt", small().state_dict(), experiment, 50257, {"tokenizer_sha256": gpt2.sha256}, 1, 1.0
    )
    (tmp_path / "resources").symlink_to(gpt2_resources)
    line = [sys.executable, "-c", FULL_DISK, "best.pt"]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, "\npicogpt: cannot export to out: " in run.stderr) == (1, True), run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "resources"]
