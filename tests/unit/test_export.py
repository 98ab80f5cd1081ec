"""The exported folder: its card, its defaults, and the way to a hub of this test, through the client that users have."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub as hub_server
import pytest
import torch
from conftest import ROOT, SMALL_RUNTIME, Outcome, gpt2_config, text_of_words
from hub import Hub, Repository, header_of

from picogpt import models
from picogpt.card import UNKNOWN, model_card
from picogpt.checkpoint import load_weights, save_weights
from picogpt.cli import cli
from picogpt.config import Experiment
from picogpt.data import fetch, fineweb
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import tokenize_gpt2
from picogpt.data.tokens import hash_of_texts
from picogpt.train.loop import Trainer

HOSTILE = "a | `b`\n---\n# <b>x</b> [y](z): {'*_&~$\\\ud800\0\x1b\u202e"
INSTALL = "not a dependency: pip install {} to run this test"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, gpt2: GPT2Tokenizer, gpt2_resources: Path) -> Path:
    """A working folder with a finished run of a GPT-2 of one block on a text with a hostile name."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "resources").symlink_to(gpt2_resources)
    (folder / "words.txt").write_text(text_of_words(400))
    data = tokenize_gpt2([folder / "words.txt"], folder / "weights/gpt2_tokenizer/g", gpt2, HOSTILE)
    tree = {
        "model": gpt2_config(),
        "train": {"steps": 2, "batch_size": 2, "dtype": "float32"},
        "runtime": SMALL_RUNTIME,
    }
    Trainer(Experiment.model_validate(tree), data, folder / "weights/gpt2/run/words").run()
    return folder


@pytest.fixture
def working(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, in which a command runs."""
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path


def card(folder: Path, name: str = "me/mine") -> str:
    return model_card(load_weights(folder / "weights/gpt2/run/words/best.pt"), 1_000_000, name)


def table(text: str) -> dict[str, str]:
    """The rows of the first table of a Markdown page."""
    lines = text.partition("| --- | --- |\n")[2].partition("\n\n")[0].splitlines()
    return dict(line.strip("| ").split(" | ", 1) for line in lines)


def test_the_card_says_what_the_record_says(working: Path, picogpt):
    record = json.loads((working / "weights/gpt2/run/words/record.json").read_text())
    assert picogpt("export", "gpt2", "--out", "out").status == 0
    text = (working / "out/README.md").read_text()
    assert header_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "picogpt"],
    }
    rows, results = table(text), record["results"]
    assert f"# GPT-2 with {results['parameters']:,} parameters, trained from scratch on a " in text
    bits = f"{results['best_val_loss']:.4f} nats per token, {results['val_bits_per_byte']:.4f} bits per byte"
    assert rows["validation loss"] == f"{bits}, on the whole validation text"
    assert rows["training"].startswith(f"{results['steps']} steps, {results['tokens']} tokens, ")
    assert record["device"]["name"] in rows["device"]
    assert str(record["commit"] or "not known") in rows["software"]
    assert rows["its SHA-256"] == record["corpus"]["text_sha256"]
    assert rows["size"] == "1 layers, 2 heads, width 16, a context of 16 tokens"
    assert "its licence is not known" in rows["text"]


def test_the_settings_of_the_card_train_the_same_again(working: Path, picogpt):
    settings = card(working).partition("```yaml\n")[2].partition("```")[0]
    (working / "settings.yaml").write_text(settings)
    trained = picogpt("train", "gpt2", "--config", "settings.yaml", "--device", "cpu", "--name", "again")
    assert trained.status == 0, trained.err
    (again,) = working.glob("weights/gpt2/again/*/record.json")
    first, second = (json.loads(path.read_text()) for path in (working / "weights/gpt2/run/words/record.json", again))
    assert second["fingerprint"] == first["fingerprint"]
    assert second["results"]["best_val_loss"] == pytest.approx(first["results"]["best_val_loss"])


def test_a_name_changes_neither_header_nor_markdown(trained: Path):
    text = card(trained, HOSTILE)
    assert set(header_of(text)) == {"library_name", "pipeline_tag", "tags"}
    escaped = r"a \| \`b\` --- \# \<b\>x\</b\> \[y\](z): \{'\*\_\&\~\$\\?���"
    assert table(text)["text"].startswith(escaped)
    assert text.replace("\n", "").isprintable()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0].endswith(f"trained from scratch on {escaped}")
    assert [line.lstrip("# ") for line in headings[1:]] == ["How to use it", "Settings"]
    (line,) = [line for line in text.splitlines() if line.startswith("generate = ")]
    assert eval(line.partition(", ")[2].removesuffix(")")) == HOSTILE


@pytest.mark.parametrize("record", ["none", "damaged", "of another training", "of other weights"])
def test_without_its_record_the_card_invents_nothing(working: Path, record: str):
    path = working / "weights/gpt2/run/words/record.json"
    tree = json.loads(path.read_text())
    match record:
        case "none":
            path.unlink()
        case "damaged":
            path.write_text("{")
        case "of another training":
            path.write_text(json.dumps(tree | {"fingerprint": "0" * 64}))
        case "of other weights":
            path.write_text(json.dumps(tree | {"results": tree["results"] | {"best_val_loss": 1.0}}))
    rows = table(card(working))
    assert [rows[key] for key in ("training", "device", "software")] == [UNKNOWN] * 3
    assert "bits per byte" in rows["validation loss"]


def of_corpus(path: Path, corpus: dict, step: int = 3, **train: object) -> str:
    """The card of a checkpoint of this training alone."""
    experiment = Experiment.model_validate({"model": {"kind": "gpt2"}, "train": {"steps": 3, **train}})
    save_weights(path, {}, experiment, 50257, corpus, step, 2.0)
    return model_card(load_weights(path), 124_439_808, "me/mine")


def test_a_registered_text_is_known_by_its_hash(tmp_path: Path):
    shakespeare = of_corpus(tmp_path / "best.pt", {"name": "x", "text_sha256": fetch.find("tinyshakespeare").sha256})
    assert header_of(shakespeare)["language"] == "en"
    assert "40,000 lines of Shakespeare's plays (public domain)" in table(shakespeare)["text"]
    assert table(shakespeare)["validation loss"] == "2.0000 nats per token, on the whole validation text"
    two_shards = hash_of_texts([shard.sha256 for shard in fineweb.dataset().shards[:2]])
    web = of_corpus(tmp_path / "best.pt", {"name": "fineweb-edu", "text_sha256": two_shards})
    assert (header_of(web)["datasets"], header_of(web)["language"]) == (["HuggingFaceFW/fineweb-edu"], "en")
    other = of_corpus(tmp_path / "best.pt", {"name": "fineweb-edu", "text_sha256": "0" * 64})
    assert not {"datasets", "language"} & set(header_of(other))


def test_the_card_of_a_fine_tuned_model_names_what_it_began_with(tmp_path: Path):
    tuned = of_corpus(tmp_path / "best.pt", {"name": "x"}, init="pretrained")
    assert header_of(tuned)["base_model"] == "openai-community/gpt2"
    assert "trained further from openai-community/gpt2 on x" in tuned
    assert table(tuned)["initial weights"].startswith("openai-community/gpt2 at ")
    unchanged = of_corpus(tmp_path / "best.pt", {"name": "x"}, step=0, init="pretrained")
    assert table(unchanged)["these weights"] == "the initial ones: no step was better"


def test_values_of_a_wrong_type_in_a_checkpoint_are_unknown(tmp_path: Path):
    text = of_corpus(tmp_path / "best.pt", {"name": ["\n---"], "val_tokens": "|", "val_bytes": 0, "text_sha256": {}})
    assert table(text)["its tokens"] == "an unknown number for training, an unknown number for validation"


def test_the_lines_of_the_card_run(working: Path, picogpt):
    pytest.importorskip("transformers")
    assert picogpt("export", "gpt2", "--out", "out").status == 0
    code = (working / "out/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    run = subprocess.run([sys.executable, "-c", code], cwd=working, capture_output=True, text=True)
    assert (run.returncode, run.stdout.startswith("The")) == (0, True), run.stderr
    shutil.copy(working / "weights/gpt2/run/words/best.pt", working)
    assert picogpt("sample", "gpt2", "--ckpt", "best.pt", "--prompt", "The", "-n", 3).out.startswith("The")


@pytest.mark.parametrize("out", [".", "words.txt", "resources"])
def test_what_is_there_already_is_not_touched(working: Path, picogpt, out: str):
    before = sorted(working.iterdir())
    run = picogpt("export", "gpt2", "--out", out)
    assert (run.status, f"{out} exists already and has no model.safetensors: remove it" in run.err) == (1, True), (
        run.err
    )
    assert sorted(working.iterdir()) == before


def test_transformers_samples_as_picogpt_does_by_default(working: Path, picogpt):
    transformers = pytest.importorskip("transformers")
    assert picogpt("export", "gpt2", "--out", "out").status == 0
    ours = cli.commands["sample"].make_context("sample", ["gpt2"]).params
    theirs = transformers.GenerationConfig.from_pretrained(working / "out")
    assert theirs.temperature == ours["temperature"] == 1
    assert (theirs.do_sample, theirs.top_k, theirs.top_p) == (True, ours["top_k"] or 0, ours["top_p"] or 1)
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert theirs.max_new_tokens == 8
    model = transformers.AutoModelForCausalLM.from_pretrained(working / "out").eval()
    drawn = model.generate(torch.zeros(400, 1, dtype=torch.long), max_new_tokens=1)[:, 1]
    assert len(drawn.unique()) > 300  # nearly uniform over 50,257: among 50 candidates there would be no more


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub at which this user is logged in, with the protocol of large files that needs no store of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield running


EXPORT = ("export", "gpt2", "--out", "out", "--push")


def published(hub: Hub, name: str = "me/mine") -> dict[str, bytes]:
    prefix = f"{name}/main/"
    return {path.removeprefix(prefix): content for path, content in hub.files.items() if path.startswith(prefix)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_pushed_is_the_folder_in_one_commit(hub: Hub, working: Path, picogpt):
    run = picogpt(*EXPORT, "me/mine")
    assert (run.status, run.out.splitlines()[-1]) == (0, f"{hub.address}/me/mine: out on the hub"), run.err
    assert published(hub) == files_of(working / "out")
    assert hub.repositories == {"me/mine": Repository(False, ["0" * 40, f"{1:040}"])}
    assert 'pipeline("text-generation", "me/mine")' in (working / "out/README.md").read_text()
    assert picogpt(*EXPORT, "me/mine").status == 0  # nothing has changed
    assert len(hub.repositories["me/mine"].commits) == 2


def test_a_connection_that_breaks_publishes_nothing_and_the_same_command_completes_it(hub: Hub, working: Path, picogpt):
    hub.hang_up_after = [1000] * 100
    run = picogpt(*EXPORT, "me/mine", "--private")
    message = r"cannot push out to me/mine on the hub"
    assert (run.status, message in run.err) == (1, True), run.err
    assert "me/mine is there, without these files. The same command tries again." in run.err
    assert (published(hub), hub.repositories["me/mine"].private) == ({}, True)
    hub.hang_up_after, hub.fails = [], {"/commit/": 0}
    run = picogpt(*EXPORT, "me/mine", "--private")
    assert (run.status, "without these files" in run.err, published(hub)) == (1, True, {}), run.err
    sent, hub.fails = len(hub.stored), {}
    hub.requests.clear()
    run = picogpt(*EXPORT, "me/mine", "--private")
    assert (run.status, sent, published(hub)) == (0, 3, files_of(working / "out")), run.err
    assert not [path for method, path, _ in hub.requests if method == "PUT"]


def test_a_commit_whose_answer_was_lost_is_told_and_not_made_again(hub: Hub, working: Path, picogpt):
    hub.loses_answers = True
    run = picogpt(*EXPORT, "me/mine")
    assert (run.status, "me/mine is there, with a new commit." in run.err) == (1, True), run.err
    assert picogpt(*EXPORT, "me/mine").status == 0
    assert len(hub.repositories["me/mine"].commits) == 2


@pytest.mark.parametrize(
    ("name", "fails", "message"),
    [
        ("me/mine", {"/api/repos": 401}, "does not know this login: hf auth login, or HF_TOKEN"),
        ("other/theirs", {}, "this login may not write there"),
        ("other/new", {}, "this login may not write there"),
        ("me/mine", {"/api/repos": 404}, "is HF_ENDPOINT right?"),
        ("me/mine", {"/api/repos": 0}, "Nothing was published. The same command tries again."),
        ("me/mine", {"/preupload": 500}, "500"),
        ("me/mine", {"/api/models": 500}, "Nothing was published."),
        ("me/mine", {"/validate-yaml": 400}, "Invalid metadata in README.md"),
    ],
)
def test_a_refusal_is_one_message(hub: Hub, working: Path, picogpt, name: str, fails: dict[str, int], message: str):
    hub.repositories["other/theirs"], hub.fails = Repository(), fails
    run = picogpt(*EXPORT, name)
    assert (run.status, message in run.err) == (1, True), run.err
    assert not hub.files
    assert len(run.err.partition("picogpt: ")[2].splitlines()) == 1


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/../mine", "me/ä", "", "me/"])
def test_what_is_no_name_of_a_repository_is_refused_before_anything(hub: Hub, working: Path, picogpt, name: str):
    run = picogpt(*EXPORT, name)
    assert (run.status, f"--push {name!r} is not a repository as USER/NAME" in run.err) == (2, True), run.err
    assert (hub.requests, (working / "out").exists()) == ([], False)


def test_without_a_login_nothing_begins(hub: Hub, working: Path, picogpt, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    run = picogpt(*EXPORT, "me/mine")
    assert (run.status, "nobody is logged in: hf auth login, or HF_TOKEN" in run.err) == (1, True), run.err
    assert (hub.requests, (working / "out").exists()) == ([], False)


def test_what_is_to_be_private_is_not_published_in_a_public_repository(hub: Hub, working: Path, picogpt):
    hub.repositories["me/mine"] = Repository(private=False)
    run = picogpt(*EXPORT, "me/mine", "--private")
    assert (run.status, "it is there already, and public: leave out --private" in run.err) == (1, True), run.err
    assert not hub.files
    assert picogpt("export", "gpt2", "--out", "out", "--private").status == 2


def test_a_card_that_was_edited_is_kept_and_another_is_written_for_the_hub(hub: Hub, working: Path, picogpt):
    assert picogpt(*EXPORT[:-1]).status == 0
    readme = working / "out/README.md"
    assert '"text-generation", "out"' in readme.read_text()
    assert picogpt(*EXPORT, "me/mine").status == 0
    assert '"text-generation", "me/mine"' in readme.read_text()
    readme.write_text(readme.read_text() + "Mine.\n")
    assert picogpt(*EXPORT, "me/other").status == 0
    assert published(hub, "me/other")["README.md"].endswith(b"Mine.\n")


def of_the_page(start: str) -> str:
    """The block of docs/export.md that begins with this."""
    found = re.search(rf"```\w*\n({re.escape(start)}.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def gguf(folder: Path, picogpt: Callable[..., Outcome]) -> Path:
    """The export, converted by the line of docs/export.md."""
    if not (llama := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP=FOLDER, with llama.cpp's convert_hf_to_gguf.py in it, to run this test")
    assert picogpt("export", "gpt2", "--out", "my-gpt2").status == 0
    (folder / "llama.cpp").symlink_to(llama)
    name, *words = of_the_page("python llama.cpp/").split()
    run = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert (name, run.returncode) == ("python", 0), run.stderr
    return folder / "my-gpt2.gguf"


def test_llama_cpps_converter_takes_the_folder(working: Path, picogpt):
    path = gguf(working, picogpt)
    read = "import sys; sys.path.insert(0, 'llama.cpp/gguf-py'); import gguf; r = gguf.GGUFReader(sys.argv[1]); "
    read += (
        "print(len(r.fields['tokenizer.ggml.tokens'].data), r.fields['tokenizer.ggml.pre'].contents(), len(r.tensors))"
    )
    run = subprocess.run([sys.executable, "-c", read, path], cwd=working, capture_output=True, text=True)
    assert run.stdout == "50257 gpt-2 16\n", run.stderr


def test_llama_cpp_continues_a_text_as_picogpt_does(working: Path, picogpt):
    path = gguf(working, picogpt)
    pytest.importorskip("cyllama", reason=INSTALL.format("cyllama"))
    prompt, code = "the king and queen", "import sys, cyllama; print(cyllama.complete(*sys.argv[1:3], temperature=0.0, "
    code += "max_tokens=8, repeat_penalty=1.0, n_gpu_layers=0))"
    run = subprocess.run([sys.executable, "-c", code, prompt, path], capture_output=True, text=True)
    ours = picogpt("sample", "gpt2", "--prompt", prompt, "--temperature", 0, "-n", 8).out
    assert (run.returncode, prompt + run.stdout) == (0, ours), run.stderr


def test_lm_evaluation_harness_measures_what_picogpt_does(working: Path, gpt2: GPT2Tokenizer, picogpt):
    pytest.importorskip("lm_eval", reason=INSTALL.format("lm-eval[hf]"))
    assert picogpt("export", "gpt2", "--out", "my-gpt2").status == 0
    text = "the king and queen of night shall"
    (working / "my.txt").write_text(text)
    (working / "tasks").mkdir()
    (working / "tasks/my_text.yaml").write_text(of_the_page("task: my_text"))
    command = [sys.executable, "-m", *of_the_page("lm_eval run").split(), "--output_path", "results.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(working / "cache")}
    run = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (result,) = working.glob("results*.json")
    theirs = json.loads(result.read_text())["results"]["my_text"]["bits_per_byte,none"]
    model, _ = models.load(working / "weights/gpt2/run/words/best.pt")
    ids = torch.tensor([[50256, *gpt2.encode(text).tolist()]])
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).item() * (ids.size(1) - 1)
    assert theirs == pytest.approx(loss / len(text) / math.log(2), rel=1e-4)
