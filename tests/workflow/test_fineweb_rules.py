"""The rules of FineWeb-Edu, from a hub of this test to tokens, a manifest and a training on two ranks."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import forked
import hub as hub_server
import pytest
import yaml
from conftest import copy_source
from hub import HELD_OUT, hub_path, parquet, registered, texts
from pipeline import SMALL, WORKFLOW, needs_snakemake
from pipeline import jobs as planned

from picogpt import records
from picogpt.data import fineweb, shards
from picogpt.data.corpus import open_data

PAIR = {
    "title": "pair", "device": ".*", "kind": "cpu", "ranks": 2, "batch_size": 4, "micro_batch_size": 1, "block_size": 16,
    "warmup_steps": 1, "steps": 3, "rungs": ["baseline"], "training": "gpt2_fineweb",
}  # fmt: skip
TINY = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "train.steps=4", "train.eval_interval=2",
    "train.warmup_steps=1", "runtime.log_interval=1", "runtime.compile=off",
]  # fmt: skip


def source_with(contents: list[bytes], tree: Path) -> Path:
    """A copy of the source tree whose registry names these shards."""
    copy_source(tree, *WORKFLOW, "picogpt")
    registry = {fineweb.NAME: registered(contents).model_dump(mode="json")}
    (tree / "config/fineweb.yaml").write_text(yaml.safe_dump(registry))
    return tree


@pytest.mark.slow
@needs_snakemake
def test_the_rules(tmp_path: Path, gpt2_resources: Path):
    """In a copy of the source tree whose registry names two small shards."""
    contents = [parquet(texts(number)) for number in range(2)]
    tree, folder = source_with(contents, tmp_path / "tree"), tmp_path / "run"
    (folder / "resources").mkdir(parents=True)
    shutil.copy(gpt2_resources / "gpt2.tiktoken", folder / "resources")
    settings = {
        **SMALL, "ladder": {"hardware": ["pair.yaml"]},
        "fineweb": {"shards": 2, "val_documents": HELD_OUT, "set": TINY},
    }  # fmt: skip
    (folder / "pair.yaml").write_text(yaml.safe_dump(PAIR))
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))

    def snakemake(*arguments: str, endpoint: str = "http://127.0.0.1:9") -> subprocess.CompletedProcess[str]:
        options = [
            "--snakefile", str(tree / "Snakefile"),
            "--directory", str(folder),
            "--configfile", str(folder / "small.yaml"),
        ]  # fmt: skip
        environment = {"PYTHONPATH": str(tree), "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(folder / "hub")}
        return forked.run("snakemake", *arguments, *options, env={**os.environ, **environment})

    def answers() -> dict[str, str]:
        files = json.loads((folder / "resources/hub.json").read_text())["files"]
        return {name: answer["state"] for name, answer in files.items()}

    assert snakemake("resources/hub.json").returncode == 0
    assert answers() == {"pretrained": "unreachable", "fineweb-edu/0": "unreachable"}
    assert "train_fineweb" not in planned(snakemake("-n").stdout)  # the report will say so
    with hub_server.running() as hub:
        hub.files.update({hub_path(number): content for number, content in enumerate(contents)})
        assert snakemake("resources/hub.json", endpoint=hub.address).returncode == 0
        assert answers() == {"pretrained": "refused", "fineweb-edu/0": "here"}
        assert {"fetch_fineweb", "train_fineweb"} <= planned(snakemake("-n", endpoint=hub.address).stdout)
        notes = [f"resources/fineweb-edu/{number:05}.txt" for number in range(2)]
        fetched = snakemake(*notes, endpoint=hub.address)
        assert fetched.returncode == 0, fetched.stderr
    manifest = "weights/gpt2_tokenizer/pipeline/fineweb-edu/manifest.json"
    done = snakemake(manifest)  # the hub is gone
    assert done.returncode == 0, done.stderr
    data = open_data((folder / manifest).parent)
    assert data.val.header.documents == HELD_OUT
    assert isinstance(data.train.ids, shards.ShardedTokens)
    again = snakemake("-n", manifest)
    assert "Nothing to be done" in again.stdout + again.stderr
    # The distributed run of the write-up, on a machine of two CPUs.
    trained = snakemake("media/gpt2_pair_loss.png")
    assert trained.returncode == 0, trained.stderr
    record = records.read(folder / "weights/gpt2/pipeline/fineweb-edu_pair/record.json")
    assert (record["machine"], record["ranks"], record["micro_batch_size"]) == ("pair", 2, 1)
    assert (record["corpus"]["name"], record["results"]["steps"]) == (fineweb.NAME, 4)
    assert (folder / "media/gpt2_pair_loss.png").stat().st_size > 10_000
