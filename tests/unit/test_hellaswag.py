"""HellaSwag: the choices and log-likelihoods of transformers, and what is said where it cannot be measured."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import gpt2_config, hellaswag_items
from test_fetch import closed_address
from test_gpt2 import V, pair, transformers

from picogpt.bench import hellaswag
from picogpt.bench.hellaswag import Item
from picogpt.data import fetch

DRAW = random.Random(3)
LINES = hellaswag_items(24).splitlines(keepends=True)
SHAPE = [f"--set=model.{key}" for key in ("n_layer=2", "n_head=2", "n_embd=16", "block_size=32")]


def alone(model: torch.nn.Module, context: list[int], ending: list[int]) -> float:
    """Log-likelihood of one ending, by transformers, of one sequence without padding."""
    ids = torch.tensor([context + ending])
    with torch.no_grad():
        found = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return found[-len(ending) :].sum().item()


@pytest.mark.parametrize("tokens_per_pass", [1, 200, 10000])
def test_log_likelihoods_equal_those_of_transformers_item_by_item(tokens_per_pass: int, monkeypatch):
    monkeypatch.setitem(hellaswag.TOKENS_PER_PASS, "cpu", tokens_per_pass)
    monkeypatch.setattr(hellaswag, "LOGITS_AT_ONCE", 7)

    def ids(most: int) -> list[int]:
        return DRAW.choices(range(V), k=DRAW.randint(1, most))

    items = [Item(ids(30), [ids(8) for _ in range(4)], 0) for _ in range(20)]
    ours, theirs = pair(gpt2_config(n_layer=3, n_head=4, n_embd=64, block_size=40))
    done: list[tuple[int, int]] = []
    found = hellaswag.log_likelihoods(ours.eval(), items, lambda *counts: done.append(counts))
    expected = torch.tensor([[alone(theirs.eval(), item.context, end) for end in item.endings] for item in items])
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert sum(count for count, _ in done) == len(items)
    assert sum(count for _, count in done) == sum(len(item.context) + sum(map(len, item.endings)) for item in items)


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a file in the mirror and register its hash, or that of another content."""

    def register(content: str, registered: str | None = None) -> None:
        (tmp_path / "mirror").mkdir(exist_ok=True)
        (tmp_path / "mirror/hellaswag_val.jsonl").write_text(content)
        given = (registered or content).encode()
        change = {"size": len(given), "sha256": hashlib.sha256(given).hexdigest(), "addresses": (closed_address(),)}
        assets = {**fetch.registry(), "hellaswag": fetch.find("hellaswag").model_copy(update=change)}
        monkeypatch.setattr(fetch, "registry", lambda: assets)

    monkeypatch.setenv(fetch.MIRROR_VARIABLE, str(tmp_path / "mirror"))
    return register


@pytest.fixture
def trained(tmp_path: Path, picogpt, gpt2_resources: Path, gpt2_folder: Path) -> Path:
    """A working folder with a small GPT-2, without the tokens that it was trained on."""
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources/gpt2.tiktoken").symlink_to(gpt2_resources / "gpt2.tiktoken")
    run = picogpt("train", "gpt2", "--name=a", f"--data={gpt2_folder}", "--steps=3", "--device=cpu", *SHAPE)
    assert run.status == 0, run.err
    return tmp_path


def test_the_record_has_the_choices_of_the_exported_model(trained: Path, picogpt, register):
    register("".join(LINES))
    run = picogpt("evaluate", "gpt2", "--task=hellaswag", "--device=cpu", "--out=all.json")
    assert run.status == 0, run.err
    assert "HellaSwag: items 24/24" in run.err
    record = json.loads((trained / "all.json").read_text())
    assert [record[part] for part in ("task", "model", "dtype")] == ["hellaswag", "gpt2", "float32"]
    assert record["config"]["sha256"] == fetch.find("hellaswag").sha256

    assert picogpt("export", "gpt2", "--out=exported").status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "exported")
    correct = correct_norm = shortened = 0
    for item in map(json.loads, LINES):
        ends = [tokenizer(f" {end}").input_ids for end in item["endings"]]
        context = tokenizer(item["ctx"]).input_ids
        kept = context[-(32 - max(map(len, ends))) :]
        shortened += kept != context
        sums = [alone(model, kept, end) for end in ends]
        means = [total / len(end) for total, end in zip(sums, ends, strict=True)]
        correct += sums.index(max(sums)) == item["label"]
        correct_norm += means.index(max(means)) == item["label"]
    results = record["results"]
    assert (results["correct"], results["correct_norm"], results["items"]) == (correct, correct_norm, 24)
    assert (results["acc"], results["acc_norm"]) == (correct / 24, correct_norm / 24)
    assert results["shortened_contexts"] == shortened > 0
    assert f"acc_norm {correct_norm / 24:.4f}  mean per token; published 0.2945" in run.out
    assert f"acc      {correct / 24:.4f}  sum of log-probabilities; published 0.2859" in run.out

    # Without the network from now on, in other dtypes, and for the first items alone.
    (trained / "mirror/hellaswag_val.jsonl").unlink()
    for dtype in ("bfloat16", "int8", "float32"):
        run = picogpt("evaluate", "gpt2", "--task=hellaswag", "--limit=5", f"--dtype={dtype}", "--out=five.json")
        assert (run.status, "the first 5 items" in run.out) == (0, True), run.err
        five = json.loads((trained / "five.json").read_text())
        assert (five["config"]["limit"], five["results"]["items"], five["dtype"]) == (5, 5, dtype)
    for file, note in (("five.json", "the first 5 items alone"), ("all.json", "published for OpenAI's weights")):
        assert picogpt("report", "summary", file, "--out=summary.csv").status == 0
        assert 'acc_norm, ours, float32",0.2945,' in (trained / "summary.csv").read_text()
        assert note in (trained / "summary.csv").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES[0] + LINES[1][:40], "hellaswag_val.jsonl, line 2: "),
        (LINES[0] + "\n" + LINES[1], "hellaswag_val.jsonl, line 2: "),
        (LINES[0].replace('"label": 0', '"label": 4'), "hellaswag_val.jsonl, line 1:"),
        (json.dumps({"ctx": "a", "endings": ["b", "c", "d"], "label": 0}), "endings"),
        (json.dumps({"ctx": "", "endings": ["b", "c", "d", "e"], "label": 0}), "ctx"),
        (json.dumps({"ctx": "a", "endings": ["b", "c", "d", "O " * 70], "label": 0}), "too short for an ending of"),
        ("", "hellaswag_val.jsonl"),
    ],
    ids=["truncated", "blank", "label", "three endings", "no context", "long ending", "empty"],
)
def test_a_file_that_is_no_list_of_items_is_an_error_with_the_line(
    trained: Path, picogpt, register, content: str, message: str
):
    register(content)
    run = picogpt("evaluate", "gpt2", "--task=hellaswag")
    assert (run.status in (1, 2), run.out, message in run.err) == (True, "", True), run.err


def test_where_the_record_cannot_be_written_the_numbers_are_shown(trained: Path, picogpt, register):
    register("".join(LINES))
    run = picogpt(
        "evaluate", "gpt2", "--task=hellaswag", "--device=cpu", "--limit=2", "--out=resources/gpt2.tiktoken/a"
    )
    assert (run.status, run.out.count("; published 0.2")) == (1, 2)
    assert "cannot write resources/gpt2.tiktoken/a" in run.err


def test_other_bytes_are_refused_and_not_kept(trained: Path, picogpt, register):
    register(LINES[0], registered=LINES[1])
    run = picogpt("evaluate", "gpt2", "--task=hellaswag")
    hashes = [hashlib.sha256(line.encode()).hexdigest() for line in LINES[:2]]
    assert (run.status, "serves another file" in run.err) == (1, True)
    assert [digest for digest in hashes if digest not in run.err] == []
    assert not (trained / "resources/hellaswag_val.jsonl").exists()


def test_without_the_data_the_message_says_where_it_was_looked_for_and_a_record_that_it_is_not_here(
    trained: Path, picogpt, register
):
    register("".join(LINES))
    (trained / "mirror/hellaswag_val.jsonl").unlink()
    run = picogpt("evaluate", "gpt2", "--task=hellaswag")
    assert run.status == 1
    for part in (str(trained / "mirror"), "Connection refused", fetch.MIRROR_VARIABLE):
        assert part in run.err
    run = picogpt("evaluate", "gpt2", "--task=hellaswag", "--optional", "--out=record.json")
    why = "hellaswag_val.jsonl could not be fetched"
    assert (run.status, f"hellaswag gpt2 float32: not measured here: {why}" in run.err) == (0, True), run.err
    record = json.loads((trained / "record.json").read_text())
    assert (record["not_measured"], "picogpt fetch hellaswag" in record["reason"]) == (why, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["char-transformer", "--task=hellaswag"], "char-transformer reads only the characters of the text"),
        (["char-bigram", "--task=hellaswag"], "char-bigram reads only the characters of the text"),
        (["gpt2", "--limit=3"], "--task loss has no use for --limit"),
        (["gpt2", "--task=hellaswag", "--prompt=O", "-n", "3"], "--task hellaswag has no use for --prompt and -n"),
        (["gpt2", "--task=hellaswag", "--limit=0"], "--limit"),
        (["gpt2", "--task=arc"], "hellaswag"),
    ],
)
def test_what_does_not_fit_the_task_is_a_usage_error(picogpt, arguments: list[str], message: str):
    run = picogpt("evaluate", *arguments)
    assert (run.status, run.out, message in run.err) == (2, "", True), run.err
