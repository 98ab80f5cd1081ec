"""Every command in README.md, run as it is written there, in order, in one folder, with small settings.

The commands are read out of the page: fenced blocks line by line, and in the text what stands between backticks and
begins with the name of a program. One that can neither be run nor is known to SUBSTITUTIONS or INSTEAD fails.
"""

import hashlib
import os
import re
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import forked
import hub
import pytest
import yaml
from conftest import ROOT, copy_source, hellaswag_items, text_of_words
from hub import hub_path, parquet, registered
from pipeline import SMALL, WORKFLOW, needs_snakemake
from safetensors.torch import save
from test_pretrained import CONFIG, REVISION, openai_names, small

from picogpt.data import fineweb

BIN = Path(sys.executable).parent
PROGRAMS = ("make", "picogpt", "pip", "pixi", "python", "snakemake", "torchrun")
NO_COMMANDS = ("bash", "csv", "json", "python", "text", "yaml")
"""Languages of fenced blocks that hold something else, or (bash, the recipe of a model) have a test of their own."""
TIMEOUT_S = 600


class Command(NamedTuple):
    line: int
    text: str

    @property
    def program(self) -> str:
        """Its first word; of a virtual environment or of a variable before it the rest is left out."""
        words = [word for word in shlex.split(self.text) if not re.match(r"[A-Z_]+=", word)]
        return words[0].removeprefix(".venv/bin/")


def commands(page: str) -> list[Command]:
    """All commands of a page, in order, each once."""
    first: dict[str, Command] = {}
    for command in sorted([*_fenced(page), *_inline(page)]):
        first.setdefault(command.text, command)
    return list(first.values())


BLOCK = re.compile(r"^ *```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)


def _fenced(page: str) -> Iterator[Command]:
    for block in BLOCK.finditer(page):
        word = block[2].split(maxsplit=1)[0].removeprefix(".venv/bin/")
        # A block that begins with a file or folder of this repository that is no program shows files.
        if block[1] in NO_COMMANDS or (word not in PROGRAMS and (ROOT / word).exists()):
            continue
        line = page.count("\n", 0, block.start()) + 2
        for text in re.split(r"(?<!\\)\n", block[2].rstrip()):
            whole = re.sub(r"\s*\\\n\s*", " ", text).strip()
            # What stands two spaces behind a command, or after a number sign, explains it.
            command = re.split(r"\s{2,}|(?:^|\s)#\s", whole)[0].removeprefix("$ ")
            if command:
                yield Command(line, command)
            line += text.count("\n") + 1


def _inline(page: str) -> Iterator[Command]:
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), page)
    for span in re.finditer(r"`([^`]+)`", prose):
        command = Command(prose.count("\n", 0, span.start()) + 1, " ".join(span[1].split()))
        if " " in command.text and command.text.split()[0].removeprefix(".venv/bin/") in PROGRAMS:
            yield command


def newest_run(word: re.Match[str]) -> str:
    """The path with the newest run in the place of RUN or of a time stamp; where that stands alone, MODEL/RUN."""
    alone = "/" not in word[0]
    pattern = "weights/char_*/[0-9]*_[0-9]*" if alone else re.sub(RUN, "*", word[0])
    found = [path for path in Path().glob(pattern) if not (alone and path.parent.name.endswith("_tokenizer"))]
    assert found, f"nothing here stands for {word[0]}"
    newest = max(found, key=lambda path: path.stat().st_mtime)
    # Runs of two models that began in the same second have the same name.
    return f"{newest.parent.name}/{newest.name}" if alone else str(newest)


def free_port(match: re.Match[str]) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"{match[1]}{probe.getsockname()[1]}"


RUN = r"\b(?:RUN|\d{8}_\d{6})\b"
SUBSTITUTIONS: tuple[tuple[str, str | Callable[[re.Match[str]], str], str], ...] = (
    (rf"[\w/.-]*{RUN}[\w/.-]*", newest_run, "a run made by hand is called by the time at which it began"),
    (r"\bCOMMAND\b", "train", "stands for any of them"),
    (r"\bHOST\b", "127.0.0.1", "this machine is all nodes"),
    (r"(--master_port=)\d+", free_port, "another job may hold that port here"),
    (r"(--nnodes=2 --nproc_per_node=)\d+", r"\g<1>1", "eight ranks on two cores take a minute to start"),
    (r"(snakemake) (--config corpus=\S+)$", r"\1 media/char_bigram_loss.png \2", "all of it takes minutes; test_workflow.py makes it"),
    (r"(--workflow-profile slurm)", r"\1 --dry-run", "wants a cluster; test_slurm.py starts one"),
    (r"^(picogpt (?:bench )?sample (?!.* -n ).*)$", r"\1 -n 20", "500 tokens take a while, even of a small model"),
    (r" --compile(?: -n \d+)?", " -n 20", "wants a GPU, and is refused without one; test_sample.py compiles a step"),
    (r"(bench table)(?: --nanogpt \S+)?", r"\1 --steps 1 -n 4 --no-trainings", "measures for minutes; test_table.py has a peer"),
    (r" --set model\.size=\w+", "", "a model of that size takes minutes; test_config.py has its shape"),
    (r"(--steps |train\.steps=)\d+", r"\g<1>2", "so many steps take minutes, even of a small model"),
)  # fmt: skip


def plan_of_make(command: Command) -> None:
    check(in_a_shell(command.text.replace("make", "make -n", 1)))


def task_of_pixi(command: Command) -> None:
    known = re.fullmatch(r"pixi run (?:-e (?P<environment>\S+) )?(?P<task>\S+)", command.text)
    assert known, "only `pixi run` is known here"
    project = tomllib.loads((ROOT / "pixi.toml").read_text())
    assert known["task"] in project["tasks"]
    assert (known["environment"] or "default") in project["environments"]


def entry_point(command: Command) -> None:
    assert command.text == "pip install -e '.[workflow]'"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"picogpt": "picogpt.cli:main"}


def stage_of_docker(command: Command) -> None:
    known = re.fullmatch(
        r"docker build --target (\w+) -t picogpt:\1 \.|docker run .* picogpt:(\w+) (picogpt .*)", command.text
    )
    assert known, "only `docker build` and `docker run` are known here"
    assert f" AS {known[1] or known[2]}\n" in (ROOT / "Dockerfile").read_text()
    if known[3]:
        check(in_a_shell(known[3]))


INSTEAD: dict[str, tuple[Callable[[Command], None], str]] = {
    "make": (plan_of_make, "the recipes install packages, and run this test; what they run after that is run by other tests"),
    "pixi": (task_of_pixi, "it wants the package channels of conda"),
    "docker": (stage_of_docker, "it wants a daemon; a command in a container is run outside"),
    "pip": (entry_point, "it would change the environment in which the tests run"),
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, gpt2_resources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the source tree with small settings and a small text, a hub with small weights, and a user's text."""
    tree = copy_source(tmp_path / "picogpt", "picogpt", *WORKFLOW, "Makefile", "pyproject.toml", "constraints.txt")
    for path in (tree / "config/models").glob("*.yaml"):
        rewrite(path, smaller)
    shipped = {"gpus": "auto", "ladder": {**SMALL["ladder"], "hardware": "auto"}}
    rewrite(tree / "config/config.yaml", lambda settings: {**settings, **SMALL, **shipped})
    few = {"block_size": 16, "steps": 3, "rungs": ["baseline", "fused_loss"]}
    rewrite(tree / "config/hardware/cpu.yaml", lambda machine: {**machine, **few})

    text = string.ascii_letters + string.digits + string.punctuation + "\n" + text_of_words(3000)
    (tmp_path / "mirror").mkdir()
    for name, file, content in (
        ("tinyshakespeare", "tinyshakespeare.txt", text),
        ("hellaswag", "hellaswag_val.jsonl", hellaswag_items(4)),
    ):
        (tmp_path / "mirror" / file).write_text(content)
        asset = {"size": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
        rewrite(tree / "config/assets.yaml", lambda all: {**all, name: {**all[name], **asset}})  # noqa: B023
    (tree / "my.txt").write_text(text_of_words(1600))
    (tree / "books").mkdir()
    for number, line in enumerate(text_of_words(1600).splitlines()):
        (tree / f"books/{number}.txt").write_text(line)
    pages = (f'{{"text": "the king and queen of night {number}"}}\n' for number in range(600))
    (tree / "pages.jsonl").write_text("".join(pages))
    shutil.copytree(gpt2_resources, tree / "resources")

    (tree / ".venv").mkdir()
    (tree / ".venv/bin").symlink_to(BIN)
    with hub.running() as running:
        sizes, shape = tree / "picogpt/registry.py", f"({CONFIG.n_layer}, {CONFIG.n_head}, {CONFIG.n_embd})"
        sizes.write_text(re.sub(r"\(\d+, \d+, \d+\)", shape, sizes.read_text()))
        rewrite(tree / "config/pretrained.yaml", lambda registry: serve_small(registry, running))
        rewrite(tree / "config/fineweb.yaml", lambda registry: serve_shards(running))
        monkeypatch.chdir(tree)
        for name, value in {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(tree),
            "PICOGPT_MIRROR": str(tmp_path / "mirror"),
            "HF_ENDPOINT": running.address,
            "HF_HOME": str(tmp_path / "hub"),
            "CUDA_VISIBLE_DEVICES": "",  # two ranks run on any machine's CPU
        }.items():
            monkeypatch.setenv(name, value)
        yield tree


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text()))))


def smaller(settings: dict) -> dict:
    """The same model, very small, for a few steps."""
    model, train = settings["model"], settings["train"]
    if model["kind"] != "char-bigram":
        model |= {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "n_embd": CONFIG.n_embd}
    if model["kind"] != "gpt2":  # which has the context of OpenAI's weights
        model["block_size"] = 16
    train = {key: value for key, value in train.items() if key not in ("epochs", "micro_batch_size")}
    train |= {"steps": 2, "batch_size": 2, "warmup_steps": 1, "eval_interval": 100, "optimizer": "adamw"}
    return {"model": model, "train": train, "runtime": {"compile": "off", "threads": 1}}


def serve_small(registry: dict, running: hub.Hub) -> dict:
    """Put small weights on the hub for each of OpenAI's; returns the registry that fits them."""
    content = save(openai_names(small()))
    for entry in registry.values():
        entry |= {"revision": REVISION, "sha256": hashlib.sha256(content).hexdigest()}
        running.files[f"{entry['repository']}/{REVISION}/model.safetensors"] = content
    return registry


def serve_shards(running: hub.Hub) -> dict:
    """Put small shards on the hub for FineWeb-Edu's; returns the registry that fits them."""
    # Of the first one, a thousand documents are for validation.
    contents = [parquet([text_of_words(16)] * count) for count in (1200, 200, 100)]
    running.files.update({hub_path(number): content for number, content in enumerate(contents)})
    return {fineweb.NAME: registered(contents).model_dump(mode="json")}


def run(command: Command) -> None:
    """Run it, or what stands for it here; on all its nodes where it has several."""
    if command.program in INSTEAD:
        INSTEAD[command.program][0](command)
        return
    assert command.program in PROGRAMS, "nobody knows how to run this: see SUBSTITUTIONS and INSTEAD in this file"
    text = command.text
    for pattern, replacement, _ in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    name, *words = shlex.split(text)
    if name.removeprefix(".venv/bin/") in forked.PROGRAMS and not re.search(r"[$*?<>|&;~`]", text):  # needs no shell
        check(forked.run(command.program, *words, timeout=TIMEOUT_S))
        return
    nodes = int(re.search(r"--nnodes=(\d+)|$", text)[1] or 1)
    lines = [text.replace("--node_rank=0", f"--node_rank={node}") for node in range(nodes)]
    with ThreadPoolExecutor(nodes) as shells:
        for done in shells.map(in_a_shell, lines):
            check(done)


def in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    command = ["timeout", str(TIMEOUT_S), "bash", "-euo", "pipefail", "-c", line]  # torchrun ends its ranks at SIGTERM
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def check(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with what a command has printed, if it failed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    # torchrun logs one when the other node's agent was quicker to end. That is its manner, and no failure.
    ours = re.sub(r"^E\d{4} .* torch/distributed/elastic/.*$", "", done.stderr, flags=re.MULTILINE)
    assert "Traceback" not in ours, f"{done.args}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@needs_snakemake
def test_every_command_of_the_readme_works(tree: Path):
    for command in commands((ROOT / "README.md").read_text()):
        began = time.monotonic()
        try:
            run(command)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"README.md, line {command.line}: {command.text}\n{error}")
        print(f"{time.monotonic() - began:5.1f} s  line {command.line}: {command.text}")


PAGE = """
Of two `make report` and `picogpt`, one is a command, and so is `picogpt
runs`, but not `config/models/`.

```
make report      set up, then run
A=b picogpt sample gpt2 \\
    --prompt "ROMEO:"  # and so on
curl https://somewhere
```

```
config/            what to run
picogpt            is no command here
```

```yaml
picogpt: settings
```
"""


def test_commands_are_told_from_the_rest_of_a_page():
    found = [(command.line, command.program, command.text) for command in commands(PAGE)]
    assert found == [
        (2, "make", "make report"),
        (2, "picogpt", "picogpt runs"),
        (7, "picogpt", 'A=b picogpt sample gpt2 --prompt "ROMEO:"'),
        (9, "curl", "curl https://somewhere"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("curl https://somewhere", "nobody knows how to run this"),
        ("make frobnicate", "frobnicate"),
        ("pixi run frobnicate", "frobnicate"),
        ("pixi run -e tpu report", "tpu"),
        ("pip install picogpt", "picogpt"),
        ("docker build --target tpu -t picogpt:tpu .", "tpu"),
        ("picogpt frobnicate", "No such command"),
        ("picogpt sample gpt2 --ckpt weights/gpt2/RUN/best.pt", "nothing here stands for weights/gpt2/RUN/best.pt"),
    ],
)
def test_a_wrong_command_is_found_out(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(ROOT / "Makefile", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    with pytest.raises(AssertionError, match=message):
        run(Command(1, text))


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_file_that_a_page_shows_or_links_to_is_there(page: str):
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
