"""The quick run of the whole pipeline (config/quick.yaml) as `make quick` starts it, and as another workflow imports it."""

import csv
import os
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT
from pipeline import NO_HUB, needs_snakemake
from test_uses import MODULE, jobs

pytestmark = needs_snakemake
QUICK = ROOT / "config/quick.yaml"
BANNER = yaml.safe_load(QUICK.read_text())["banner"]


def snakemake(folder: Path, *arguments: object) -> str:
    environment = {**os.environ, **NO_HUB, "PWD": str(folder)}
    run = forked.run("snakemake", *map(str, arguments), cwd=folder, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
def test_every_artifact_is_made_and_says_that_its_models_are_small(tmp_path: Path, corpus: Path):
    small = ["--configfile", QUICK, "--config", f"corpus={corpus}"]
    out = snakemake(tmp_path, "--snakefile", ROOT / "Snakefile", "--directory", tmp_path / "quick", *small)
    made = tmp_path / "quick"
    assert BANNER in (made / "results/report.md").read_text()
    with open(made / "results/summary.csv", newline="") as file:
        measured = [row for row in csv.DictReader(file) if row["measured"]]
    here = [row for row in measured if "reference record" not in row["note"]]
    assert {(row["status"], row["note"]) for row in here} == {("not comparable", BANNER)}
    assert {row["section"] for row in here} >= {
        "char bigram",
        "char transformer",
        "gpt2",
        "sampling throughput",
        "weights",
    }
    # Cheap and interesting first, and each says so.
    shown = [line.split(": ")[-1] for line in out.splitlines() if line.startswith("picogpt: to look at")]
    order = [f"media/{name}" for name in ("char_bigram_sample.txt", "char_transformer_sample.txt")]
    places = [shown.index(name) for name in (*order, "results/report.md")]
    assert places == sorted(places)
    written = [*made.glob("media/*"), *made.glob("results/samples/*.txt"), *made.glob("results/report.*")]
    written.append(made / "results/summary.csv")
    assert sorted(shown) == sorted(str(path.relative_to(made)) for path in written)


def test_another_workflow_imports_it(tmp_path: Path, corpus: Path):
    (tmp_path / "Snakefile").write_text(
        MODULE.format(snakefile=ROOT / "Snakefile", rules="* from picogpt as picogpt_*")
    )
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for key, value in yaml.safe_load(QUICK.read_text()).items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"picogpt": {**settings, "corpus": str(corpus)}}))
    planned = jobs(snakemake(tmp_path, "-n", "--cores", 2, "picogpt_all"))
    assert {"picogpt_bench_train", "picogpt_page", "picogpt_train_gpt2"} <= planned
