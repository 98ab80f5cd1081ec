"""The ways to use the workflow besides `snakemake` in its clone: as a module of another, from other folders, after a move."""

import os
import re
import shutil
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT, copy_source
from pipeline import NO_HUB, SMALL, WORKFLOW, job_counts, jobs, needs_snakemake

pytestmark = needs_snakemake
CURVE = "media/char_bigram_loss.png"
MAKES_THE_CURVE = {"tokenize_char", "train", "loss_curve"}
EVERYTHING = {
    "fetch_corpus", "fetch_gpt2_ranks", "fetch_hub", "tokenize_char", "tokenize_gpt2", "train", "train_gpt2",
    "sample", "sample_untrained", "sample_gpt2", "evaluate", "bench_sampling", "bench_sampling_streams",
    "bench_weights", "bench_train", "loss_curve", "throughput", "summary", "page",
}  # fmt: skip
MODULE = """
configfile: "mine.yaml"

module picogpt:
    snakefile: "{snakefile}"
    config: config["picogpt"]

use rule {rules}

rule mine:
    default_target: True
    input: "media/char_bigram_loss.png"
    output: "mine.txt"
    shell: "echo drawn > {{output}}"
"""


def run(folder: Path, *arguments: object, status: int = 0) -> str:
    """Snakemake as a user starts it in `folder`, which ends with this status; returns all that it prints."""
    done = forked.run("snakemake", *arguments, cwd=folder, env={**os.environ, **NO_HUB, "PWD": str(folder)})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def settings(corpus: Path | str) -> dict:
    return {**SMALL, "corpus": str(corpus), "ladder": {"hardware": []}}


def workflow_of_mine(folder: Path, corpus: Path, source: Path, rules: str) -> Path:
    """Another workflow, with the one of `source` as a module."""
    folder.mkdir()
    (folder / "Snakefile").write_text(MODULE.format(snakefile=source / "Snakefile", rules=rules))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"picogpt": settings(corpus)}))
    return folder


@pytest.fixture
def clone(tmp_path: Path, corpus: Path) -> Path:
    """A clone in whose config.yaml the small models and a text beside it are set."""
    clone = copy_source(tmp_path / "a clone", *WORKFLOW)
    shutil.copy(corpus, clone)
    (clone / "config/config.yaml").write_text(yaml.safe_dump(settings("words.txt")))
    return clone


def test_as_a_module_of_another_workflow(tmp_path: Path, corpus: Path):
    clone = copy_source(tmp_path / "clone", *WORKFLOW)
    mine = workflow_of_mine(tmp_path / "mine", corpus, clone, "* from picogpt as picogpt_*")
    everything = jobs(run(mine, "-n", "--cores", 2, "picogpt_all"))
    assert {"picogpt_page", "picogpt_evaluate", "picogpt_fetch_hub"} <= everything
    run(mine, "--cores", 2)
    assert (mine / CURVE).stat().st_size > 10_000
    assert (mine / "mine.txt").exists()
    assert sorted(path.name for path in clone.iterdir()) == sorted(WORKFLOW)
    assert "Nothing to be done" in run(mine, "-n", "--cores", 2)


def test_rules_of_the_module_can_be_imported_by_name(tmp_path: Path, corpus: Path):
    mine = workflow_of_mine(tmp_path / "mine", corpus, ROOT, "tokenize_char, train, loss_curve from picogpt")
    assert jobs(run(mine, "-n", "--cores", 1)) == {*MAKES_THE_CURVE, "mine"}


def test_a_clone_from_another_folder_and_after_a_move(clone: Path, corpus: Path, tmp_path: Path):
    (tmp_path / "here").mkdir()
    there = [CURVE, "--snakefile", clone / "Snakefile"]
    out = run(tmp_path / "here", *there, "--directory", clone)
    assert (clone / CURVE).stat().st_size > 10_000
    assert list((tmp_path / "here").iterdir()) == []
    # The default profile was in force (without its limit nothing starts), so nothing ran beside the training.
    for rule, share in (("train", 100), ("tokenize_char", 1)):
        assert re.search(rf"rule {rule}:(?:\n    .*)+resources: .*\bmachine={share}\b", out), out
    # Where no folder is named, the current one has the results.
    assert jobs(run(tmp_path / "here", "-n", *there, "--config", f"corpus={corpus}")) == MAKES_THE_CURVE
    assert jobs(run(clone, "-n", "--forceall", CURVE)) == MAKES_THE_CURVE
    assert "Nothing to be done" in run(clone.rename(tmp_path / "moved"), CURVE)


def test_without_the_limits_of_a_profile_nothing_starts(clone: Path):
    refused = run(clone, "--workflow-profile", "none", "--cores", 1, CURVE, status=1)
    assert "no profile limits the resource `machine`" in refused
    assert not (clone / "weights").exists()


@pytest.mark.parametrize(
    ("arguments", "planned"),
    [([], EVERYTHING), (["--cores", "all", "media/gpt2_a30_throughput.png"], {"throughput"})],
)
def test_in_a_fresh_clone_the_default_profile_is_found(tmp_path: Path, arguments: list[str], planned: set[str]):
    plan = run(copy_source(tmp_path / "clone", *WORKFLOW), "-n", *arguments)
    assert jobs(plan) == planned
    assert "Using workflow specific profile profiles/default" in plan


def test_on_a_cluster_the_profile_says_what_is_measured(tmp_path: Path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    clone = copy_source(tmp_path / "clone", *WORKFLOW)
    plan = run(clone, "-n", "--workflow-profile", "slurm", "media/gpt2_h100_throughput.png")
    rungs = yaml.safe_load((ROOT / "config/hardware/h100.yaml").read_text())["rungs"]
    assert job_counts(plan)["bench_train"] == len(rungs)
    used = "Using workflow specific profile profiles/slurm"
    for text in (used, "gpu=1, gpu_model=h100", "slurm_extra=--signal=TERM@120 --exclusive", "runtime=60"):
        assert text in " ".join(plan.split())


def test_lint_finds_nothing_but_that_rules_name_no_environment_of_their_own(clone: Path):
    """All jobs use the environment that Snakemake runs in, which constraints.txt and pixi.toml pin."""
    lints = set(re.findall(r"^ {4}\* (.*)$", run(clone, "--lint", status=1), re.MULTILINE))
    assert lints == {"Specify a conda environment or container for each rule.:"}


def test_the_picture_of_the_rules_is_that_of_the_rules(monkeypatch: pytest.MonkeyPatch):
    """docs/rulegraph.svg has the boxes and, but for arrows that longer ways replace, the arrows of today's rules."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import rulegraph

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
