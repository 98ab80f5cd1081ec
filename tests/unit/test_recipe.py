"""The README's recipe for a new model, followed word by word: one file and one line."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, copy_source


def test_a_new_model_is_one_file_and_one_line(tmp_path: Path, corpus: Path):
    recipe = (ROOT / "README.md").read_text().split("### A model of your own")[1].split("\n## ")[0]
    (model, line), (commands,) = (
        re.findall(r"```python\n(.*?)```", recipe, re.S),
        re.findall(r"```bash\n(.*?)```", recipe, re.S),
    )
    tree = copy_source(tmp_path / "source", "picogpt", "config")
    (tree / "picogpt/models/char_gru.py").write_text(model)
    registry = tree / "picogpt/registry.py"
    before, mark, after = registry.read_text().partition("\nMODELS = {\n")
    registry.write_text(before + mark + line + after)

    def picogpt(*arguments: str) -> str:
        program = [sys.executable, "-m", "picogpt", *arguments]
        done = subprocess.run(program, cwd=tree, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    picogpt("tokenize", "char", f"--text={corpus}")
    train, sample = (command.split()[1:] for command in commands.splitlines())
    picogpt(*train, "--device=cpu", "--steps=20")
    assert len(picogpt(*sample, "--device=cpu", "-n", "20")) == 21
