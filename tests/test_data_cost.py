"""The benchmark of data: what it measures and what it writes."""

from pathlib import Path

import pytest

from picogpt import hardware, records


@pytest.fixture
def record(picogpt, corpus: Path, gpt2_resources: Path, tmp_path: Path) -> Path:
    (tmp_path / "resources").symlink_to(gpt2_resources)
    run = picogpt(
        "bench", "data", "--text", corpus, "--characters", "30000", "--shards", "3", "--shards", "20", "--windows", "4",
        "--runs", "3", "--out", tmp_path / "data.json",
    )  # fmt: skip
    assert run.status == 0, run.err
    lines = run.out.splitlines()
    assert lines[0].startswith("tokenizing: ")
    assert [line.split(" shards: ")[0].strip() for line in lines[1:]] == ["3", "20"]
    return tmp_path / "data.json"


def test_every_run_is_in_the_record(record: Path):
    tree = records.read(record)
    config, results = tree["config"], tree["results"]
    assert config["threads"][0] == 1
    assert config["threads"][-1] == hardware.cpu_count()
    assert config["characters"] == pytest.approx(30_000, rel=0.5)
    for name in ("tokens_per_second", "tiktoken_tokens_per_second"):
        assert [len(rates) for rates in results[name]] == [3] * len(config["threads"])
        assert all(rate > 0 for rates in results[name] for rate in rates)
    assert config["shards"] == [3, 20]
    for name in ("open_seconds", "first_batch_seconds", "batch_seconds"):
        assert len(results[name]) == 2
        assert all(seconds > 0 for seconds in results[name])
    assert results["most_shards_batch_ms"] == 1000 * results["batch_seconds"][1]


def test_an_empty_text_is_named(picogpt, gpt2_resources: Path, tmp_path: Path):
    (tmp_path / "resources").symlink_to(gpt2_resources)
    (tmp_path / "empty.txt").touch()
    run = picogpt("bench", "data", "--text", tmp_path / "empty.txt")
    assert (run.status, "empty.txt is empty" in run.err) == (1, True)
