"""`picogpt bench table`: one table of what a device reaches, a peer's model measured in turn with ours."""

import json
import sys
from pathlib import Path

import yaml
from conftest import ROOT
from pipeline import BOX

from picogpt import machines

NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        logits = self.table(idx) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
SMALL = [f"--set=model.{key}" for key in ("n_layer=1", "n_head=2", "n_embd=16", "block_size=16")]


def table(picogpt, gpt2_folder: Path, gpt2_resources: Path, *arguments: object):
    Path("resources").symlink_to(gpt2_resources)
    Path("model.py").write_text(NANOGPT)
    few = ["--batch-size=2", "--steps=1", "-n", 4, "--no-trainings", f"--data={gpt2_folder}"]
    return picogpt("bench", "table", *few, *SMALL, *arguments)


def test_every_part_is_measured_and_peers_stand_beside_ours(
    picogpt, gpt2_folder: Path, gpt2_resources: Path, monkeypatch
):
    monkeypatch.setattr("torch.compile", lambda model: model)  # of the peer, which would take a minute
    Path("box.yaml").write_text(yaml.safe_dump(BOX))
    monkeypatch.setattr(machines, "fitting", lambda: ["box.yaml"])
    run = table(picogpt, gpt2_folder, gpt2_resources, "--nanogpt=model.py", "--out=table.json")
    assert run.status == 0, run.err
    rows = json.loads(Path("table.json").read_text())["results"]["rows"]
    assert [row["what"].split(",")[0] for row in rows] == ["training GPT-2", "ladder of box.yaml", *["sampling"] * 3]
    assert all(row["ours"] > 0 and row["unit"] == "tokens/s" for row in rows)
    assert {row["peer"] for row in rows if row["theirs"]} == {"nanoGPT", "transformers"}
    assert all(row["what"] in run.out for row in rows)


def test_another_file_than_nanogpts_is_one_message(picogpt, gpt2_folder: Path, gpt2_resources: Path, tmp_path: Path):
    run = table(picogpt, gpt2_folder, gpt2_resources, f"--nanogpt={ROOT / 'picogpt/errors.py'}")
    assert (run.status, "errors.py is not nanoGPT's model.py" in run.err, run.out) == (1, True, "")
    sys.modules.pop("nanogpt_model", None)
