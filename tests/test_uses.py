"""The ways to use the workflow besides `snakemake` in its clone: as a module of another, from other folders, after a move."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_source
from test_workflow import NO_HUB, SMALL, SNAKEMAKE, WORKFLOW, configure, jobs

pytestmark = pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed: pip install '.[workflow]'")

CURVE = "media/char_bigram_loss.png"
MAKES_THE_CURVE = {"tokenize_char", "train", "loss_curve"}
MODULE = """
configfile: "mine.yaml"

module picogpt:
    snakefile: "{snakefile}"
    config: config["picogpt"]

use rule * from picogpt as picogpt_*

rule mine:
    default_target: True
    input: "media/char_bigram_loss.png"
    output: "mine.txt"
    shell: "echo drawn > {{output}}"
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Snakemake as a user starts it in `folder`; all that it prints is in `stderr`."""
    command = ["bash", "-c", 'cd "$1" && shift && exec "$@"', "bash", str(folder), str(SNAKEMAKE), *map(str, arguments)]
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **together, text=True, env={**os.environ, **NO_HUB}, check=False, timeout=600)
    return subprocess.CompletedProcess(command, done.returncode, "", done.stdout)


@pytest.fixture
def clone(tmp_path: Path, corpus: Path) -> Path:
    """A clone in whose config.yaml the small models and a text beside it are set."""
    clone = copy_source(tmp_path / "a clone", *WORKFLOW)
    shutil.copy(corpus, clone)
    settings = {**SMALL, "corpus": "words.txt", "size": "cpu", "ladder": {"hardware": []}}
    (clone / "config/config.yaml").write_text(yaml.safe_dump(settings))
    return clone


def test_as_a_module_of_another_workflow(tmp_path: Path, corpus: Path):
    clone, mine = copy_source(tmp_path / "clone", *WORKFLOW), tmp_path / "mine"
    mine.mkdir()
    (mine / "Snakefile").write_text(MODULE.format(snakefile=clone / "Snakefile"))
    settings = {**SMALL, "corpus": str(corpus), "size": "cpu", "ladder": {"hardware": []}}
    (mine / "mine.yaml").write_text(yaml.safe_dump({"picogpt": settings}))
    everything = run(mine, "-n", "--cores", 2, "picogpt_all")
    assert {"picogpt_page", "picogpt_evaluate", "picogpt_fetch_hub"} <= jobs(everything), everything.stderr
    done = run(mine, "--cores", 2)
    assert done.returncode == 0, done.stderr
    assert (mine / CURVE).stat().st_size > 10_000
    assert (mine / "mine.txt").exists()
    assert sorted(path.name for path in clone.iterdir()) == sorted(WORKFLOW)
    again = run(mine, "-n", "--cores", 2)
    assert "Nothing to be done" in again.stderr


def test_rules_of_the_module_can_be_imported_by_name(tmp_path: Path, corpus: Path):
    module = MODULE.format(snakefile=ROOT / "Snakefile")
    (tmp_path / "Snakefile").write_text(
        module.replace("use rule * from picogpt as picogpt_*", "use rule tokenize_char, train, loss_curve from picogpt")
    )
    settings = {**SMALL, "corpus": str(corpus), "size": "cpu", "ladder": {"hardware": []}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"picogpt": settings}))
    assert jobs(run(tmp_path, "-n", "--cores", 1)) == {*MAKES_THE_CURVE, "mine"}


@pytest.mark.parametrize("directory", [True, False], ids=["--directory", "the current folder"])
def test_the_snakefile_of_a_clone_in_another_folder(tmp_path: Path, corpus: Path, directory: bool):
    work, here = tmp_path / "work", tmp_path / "here"
    for folder in (work, here):
        folder.mkdir()
    configure(work, corpus=str(corpus), ladder={"hardware": []})
    there = ["--directory", work] if directory else []
    done = run(here, CURVE, "--snakefile", ROOT / "Snakefile", "--configfile", work / "small.yaml", *there)
    assert done.returncode == 0, done.stderr
    assert ((work if directory else here) / CURVE).stat().st_size > 10_000
    assert (list(here.iterdir()) == []) == directory
    # The default profile was in force (without its limit nothing starts), so nothing ran beside the training.
    assert re.search(r"rule train:(?:\n    .*)+resources: .*\bmachine=100\b", done.stderr), done.stderr
    assert re.search(r"rule tokenize_char:(?:\n    .*)+resources: .*\bmachine=1\b", done.stderr), done.stderr


def test_without_the_limits_of_a_profile_nothing_starts(clone: Path):
    refused = run(clone, "--workflow-profile", "none", "--cores", 1, CURVE)
    assert refused.returncode == 1
    assert "no profile limits the resource `machine`" in refused.stderr
    assert not (clone / "weights").exists()


def test_a_moved_clone_makes_nothing_again(clone: Path, tmp_path: Path):
    done = run(clone, CURVE)
    assert done.returncode == 0, done.stderr
    assert jobs(run(clone, "-n", "--forceall", CURVE)) == MAKES_THE_CURVE
    moved = clone.rename(tmp_path / "moved")
    again = run(moved, CURVE)
    assert (again.returncode, "Nothing to be done" in again.stderr) == (0, True), again.stderr


@pytest.mark.parametrize(
    ("arguments", "planned"),
    [
        ([], "page"),
        (["--cores", "all", "media/gpt2_a30_throughput.png"], "throughput"),
        (["--workflow-profile", "slurm", "media/gpt2_h100_throughput.png"], "bench_train"),
    ],
)
def test_the_three_commands_find_their_profile_in_a_clone(clone: Path, arguments: list[str], planned: str):
    profile = "slurm" if "slurm" in arguments else "default"
    plan = run(clone, "-n", *arguments)
    assert planned in jobs(plan), plan.stderr
    assert f"Using workflow specific profile profiles/{profile}" in plan.stderr


def test_lint_finds_nothing_but_that_rules_name_no_environment_of_their_own(clone: Path):
    """All jobs use the environment that Snakemake runs in, which constraints.txt and pixi.toml pin."""
    found = run(clone, "--lint")
    lints = set(re.findall(r"^ {4}\* (.*)$", found.stderr, re.MULTILINE))
    assert lints == {"Specify a conda environment or container for each rule.:"}


def test_the_picture_of_the_rules_is_that_of_the_rules():
    """docs/rulegraph.svg has the boxes and, but for arrows that longer ways replace, the arrows of today's rules."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import rulegraph
    finally:
        sys.path.remove(str(ROOT / "docs"))
    titles = re.findall(r"<title>(.*?)</title>", (ROOT / "docs/rulegraph.svg").read_text())
    drawn = {tuple(title.replace("&#45;", "-").replace("&gt;", ">").split("->")) for title in titles if "&gt;" in title}
    now = rulegraph.edges()
    assert {box for pair in now for box in pair} == {title for title in titles if title in rulegraph.BOXES}

    def reachable(edges: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
        while more := {(a, d) for a, b in edges for c, d in edges if b == c} - edges:
            edges = edges | more
        return edges

    assert drawn <= now
    assert reachable(drawn) == reachable(now), "make rulegraph draws it again"
