"""Every command that a message or a help text names, run as it is written there, after the mistake that brings it about.

The commands are found in the source: one without a mistake in this file fails.
"""

import ast
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import forked
import hub
import pytest
import yaml
from conftest import ROOT
from pipeline import BOX, needs_snakemake
from test_readme import Command, check, commands, in_a_shell, run, tree  # noqa: F401

from picogpt.cli import cli

NAMED = re.compile(
    rf"\b(?:picogpt (?:{'|'.join(cli.commands)})\b|torchrun --|snakemake --|git checkout \S|hf auth|iconv -f|make (?:report|reference)\b)"
)
END = re.compile(r"[,;:)`\n]|\.\.\.|(?<!\{)\}| (?:or|makes|brings|prints|joins|where|does)\b|$")
"""What ends a command: the sentence goes on, or is over."""
VALUE = r"((?:'[^']*'|[^\s,;:)])+)"


class Suggestion(NamedTuple):
    """A command in a file of the package, with {} in the place of each value."""

    file: str
    command: str


class Mistake(NamedTuple):
    """What a user does, after what was done `before`, to be told the command."""

    file: str
    command: str
    line: str
    before: tuple[str, ...] = ()


TEXT = "picogpt fetch tinyshakespeare"
CHAR, GPT2 = (TEXT, "picogpt tokenize char"), (TEXT, "picogpt tokenize gpt2 --name g")
BIGRAM = (*CHAR, "picogpt train char-bigram --name 'a b'")
CHECKOUT = (
    "git init --quiet; echo __pycache__ > .git/info/exclude",
    "git add picogpt config profiles workflow Snakefile",
    "git -c user.name=a -c user.email=a@b commit --quiet --message all",
)
KEPT = (
    *BIGRAM,
    "mkdir -p 'results/a b'",
    "cd 'results/a b'; echo 1 > one.json; sha256sum one.json > SHA256SUMS",
    "git init --quiet",
    "git add results",
    "git -c user.name=a -c user.email=a@b commit --quiet --message all",
    "echo 2 > 'results/a b/one.json'",
)
EDITED = (
    "picogpt report summary 'weights/char_bigram/a b/record.json' --reference 'results/a b/one.json' --out summary.csv"
)
ON_RANKS = "picogpt bench train --rung baseline --hardware "
MISTAKES = [
    Mistake("checkpoint.py", "picogpt sample {} --ckpt {}", "picogpt sample char-transformer --ckpt 'weights/char_bigram/a b/best.pt'", BIGRAM),
    Mistake("cli/common.py", "picogpt tokenize {}", "picogpt train char-bigram", (TEXT,)),
    Mistake("cli/common.py", "picogpt tokenize {}", "picogpt train char-bigram --data weights/gpt2_tokenizer/g", GPT2),
    Mistake("cli/common.py", "picogpt train {}", "picogpt sample char-bigram", CHAR),
    Mistake("cli/data.py", "picogpt fetch {} --shard 0 --shard 1", "picogpt fetch fineweb-edu"),
    Mistake("cli/runs.py", "picogpt train {}", "picogpt runs --model char-transformer", CHAR),
    Mistake("data/bpe.py", "picogpt fetch {}", "python -c \"from picogpt.data.bpe import GPT2Tokenizer; GPT2Tokenizer('none')\" 2>&1 | tail -1"),
    Mistake("data/corpus.py", "picogpt fetch tinyshakespeare", "picogpt tokenize char"),
    Mistake("data/corpus.py", "picogpt tokenize fineweb-edu --join {} --folder {}", "picogpt train gpt2 --data 'a b'", ("picogpt fetch fineweb-edu --shard 0", "picogpt tokenize fineweb-edu --shard 0 --folder 'a b'")),
    Mistake("data/fetch.py", "hf auth login", "HF_ENDPOINT=$REFUSING picogpt fetch pretrained"),
    Mistake("data/fetch.py", "picogpt fetch {}", "HF_ENDPOINT=http://127.0.0.1:9 picogpt sample gpt2-pretrained"),
    Mistake("data/fetch.py", "picogpt fetch {}", "picogpt evaluate gpt2-pretrained --optional", GPT2),
    Mistake("data/fetch.py", "picogpt fetch {}", "picogpt evaluate gpt2 --task hellaswag --optional"),
    Mistake("data/fineweb.py", "picogpt fetch {} --shard {}", "picogpt tokenize fineweb-edu --shard 1"),
    Mistake("data/fineweb.py", "picogpt fetch {} --shard {}", "picogpt tokenize fineweb-edu --shard 1 --parquet Makefile"),
    Mistake("data/tokenizers.py", "picogpt tokenize char", "picogpt sample char-bigram --tokenizer-dir 'a b'", (*BIGRAM, "mkdir 'a b'", "echo '{}' > 'a b/tokenizer.json'")),
    Mistake("data/tokens.py", "picogpt tokenize char", "picogpt train char-bigram --data nowhere", (TEXT,)),
    Mistake("data/tokens.py", "picogpt tokenize gpt2", "picogpt train gpt2 --data 'a b'", (TEXT, "mkdir 'a b'", "echo ids > 'a b/train.bin'")),
    Mistake("files.py", "iconv -f {} -t UTF-8 {} > utf8.txt", "picogpt tokenize char --text 'a b'", ("mkdir 'a b'", "printf 'caf\\351' > 'a b/c d.txt'")),
    Mistake("machines.py", "picogpt hardware --draft", "picogpt train gpt2 --hardware h101"),
    Mistake("machines.py", "picogpt hardware --draft", f"{ON_RANKS} a30", (*GPT2, "rm config/hardware/cpu.yaml")),
    Mistake("machines.py", "torchrun --standalone --nproc_per_node={} -m picogpt", f"{ON_RANKS} 'two ranks.yaml'", GPT2),
    Mistake("machines.py", "torchrun --nnodes={} --nproc_per_node={} --node_rank=0 --master_addr=HOST --master_port=29500 -m picogpt", f"{ON_RANKS} nodes.yaml", GPT2),
    Mistake("plan.py", "snakemake --config corpus=my.txt", "snakemake -n --config corpus=tinyshakespeare.txt", ("cp my.txt tinyshakespeare.txt",)),
    Mistake("plan.py", "snakemake --workflow-profile slurm", "snakemake results/records/ladder/nodes/baseline.json --config 'ladder={hardware: [nodes.yaml]}'"),
    Mistake("publish.py", "hf auth login", "HF_TOKEN= HF_HOME=nowhere picogpt export gpt2 --out 'a b' --push me/mine"),
    Mistake("records.py", "make report", "picogpt report summary old.json --out summary.csv", ("echo '{\"schema_version\": 0}' > old.json",)),
    Mistake("reference.py", "make report", "picogpt reference", CHECKOUT),
    Mistake("reference.py", "make report", "picogpt reference", (*CHECKOUT, *CHAR, "picogpt train char-bigram --name pipeline")),
    Mistake("reference.py", "make report", EDITED, KEPT),
    Mistake("reference.py", "make reference", EDITED, KEPT),
    Mistake("reference.py", "git checkout {}", EDITED, KEPT),
    Mistake("report/compare.py", "picogpt evaluate {} --task hellaswag", "cat summary.csv", (*GPT2, "picogpt train gpt2 --name a", "picogpt report summary weights/gpt2/a/tinyshakespeare/record.json --out summary.csv")),
    Mistake("runs.py", "picogpt train {}", "picogpt runs diff a b", CHAR),
]  # fmt: skip
ELSEWHERE = {
    Suggestion("card.py", "picogpt sample gpt2 --ckpt best.pt --prompt The"): "a line of a model card: test_export.py runs it",
    Suggestion("card.py", "picogpt train gpt2 --config settings.yaml"): "and this one",
    Suggestion("plan.py", "torchrun --nproc_per_node={} --max-restarts=1 --shutdown-timeout=100"): "what a job runs, not a message",
    Suggestion("train/distributed.py", "torchrun --max-restarts=N"): "test_distributed.py loses ranks, and restarts them so",
}  # fmt: skip


def strings(source: str) -> Iterator[str]:
    """The strings of a module but for docstrings and descriptions of settings, with {} in the place of each value."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            pending += [part for part in node.values if not isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            pending += (child for child in ast.iter_child_nodes(node) if getattr(child, "arg", "") != "description")


def suggestions() -> Iterator[Suggestion]:
    """Each command in a string of the package."""
    for path in (ROOT / "picogpt").rglob("*.py"):
        for text in strings(path.read_text()):
            for start in NAMED.finditer(text):
                end = END.search(text, start.end())
                assert end
                yield Suggestion(str(path.relative_to(ROOT / "picogpt")), text[start.start() : end.start()].strip())


def said(line: str) -> str:
    """What a command line prints."""
    name, *words = shlex.split(line)
    done = forked.run(name, *words) if name in forked.PROGRAMS else in_a_shell(line)
    return done.stdout + done.stderr


@pytest.fixture
def world(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    """That tree, with a hub that wants a login, and with files of machines on two ranks."""
    (tree / "two ranks.yaml").write_text(yaml.safe_dump({**BOX, "ranks": 2, "micro_batch_size": 1}))
    (tree / "nodes.yaml").write_text(yaml.safe_dump({**BOX, "nodes": 2, "micro_batch_size": 1}))
    with hub.running() as refusing:
        refusing.status = 401
        monkeypatch.setenv("REFUSING", refusing.address)
        yield tree


def test_every_command_in_a_message_has_a_mistake():
    missing = (
        Counter(suggestions()) - Counter(Suggestion(*mistake[:2]) for mistake in MISTAKES) - Counter(list(ELSEWHERE))
    )
    assert not missing


@needs_snakemake
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.file}: {mistake.command}")
def test_the_command_that_a_mistake_brings_about_works(mistake: Mistake, world: Path):
    for line in mistake.before:
        check(in_a_shell(line) if line.split()[0] not in forked.PROGRAMS else forked.run(*shlex.split(line)))
    message = said(mistake.line)
    found = re.search(re.escape(mistake.command).replace(r"\{\}", VALUE), " ".join(message.split()))
    assert found, message
    command = found[0]
    if command.endswith(("-m picogpt", "slurm")):  # and goes on as the mistake does
        command += " " + mistake.line.partition(" ")[2]
    if command.startswith(("git", "hf", "iconv")):
        check(in_a_shell(command.replace("hf auth login", "hf auth login --help")))  # it would ask for a token
    else:
        run(Command(0, command))


def examples(command: click.Command) -> list[str]:
    """The blocks of commands in the help of a command and of those below it."""
    blocks = re.findall(r"\x08\n(.*?)(?:\n\n|$)", command.help or "", re.DOTALL)
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return [*blocks, *(block for each in below for block in examples(each))]


SMALL_HERE = {
    r"--hardware h100 --rung \w+": "--hardware cpu --rung baseline",
    r"--hardware h100x2 --rung \w+": "--hardware 'two ranks.yaml' --rung flash",
    r"--hardware cpu --rung flash": "--hardware cpu --rung fused_loss",
    r"weights/char_tokenizer/RUN/": "weights/char_tokenizer/c/",
    r"batch_size=64": "batch_size=2",
    r"-n 10000": "-n 20",
    r"train\.epochs=4": "train.steps=2",
}
"""What is here in the place of what the examples name, and of what takes minutes."""


@pytest.mark.slow
@needs_snakemake
def test_every_command_in_a_help_text_works(world: Path):
    """But for those on several ranks that the page README.md has too: its test runs that."""
    ranks = {command.text for command in commands((ROOT / "README.md").read_text()) if command.program == "torchrun"}
    found = [text for block in examples(cli) for _, text in commands(f"```\n{block}\n```") if text not in ranks]
    assert len(found) > 30
    named = [f"picogpt train char-transformer --name {name}" for name in ("pipeline", "wide")]
    for text in [TEXT, "picogpt tokenize char --name c", *named, "picogpt train char-transformer", *found]:
        for pattern, replacement in SMALL_HERE.items():
            text = re.sub(pattern, replacement, text)
        began = time.monotonic()
        try:
            run(Command(0, text))
        except AssertionError as error:
            pytest.fail(f"{text}\n{error}")
        print(f"{time.monotonic() - began:5.1f} s  {text}")
