"""Both ways to install name the same packages: pip with constraints, and pixi."""

import os
import re
import tomllib

import cluster
import pytest
from conftest import ROOT

CONDA = {"matplotlib": "matplotlib-base", "torch": "pytorch"}
"""Where conda's name is another than the index's."""


def project_dependencies() -> list[str]:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [re.split(r"[<>=]", requirement)[0].replace("-", "_") for requirement in tree["project"]["dependencies"]]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        name.lower().replace("-", "_"): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }


def conda_name(name: str) -> str:
    return CONDA.get(name, name.replace("_", "-") if name == "pypi_simple" else name)


def test_every_dependency_is_pinned_alike_for_pip_and_for_pixi():
    pixi = tomllib.loads((ROOT / "pixi.toml").read_text())
    listed = {**pixi["dependencies"], "pytorch": pixi["feature"]["cpu"]["dependencies"]["pytorch-cpu"]}
    for name in project_dependencies():
        version = pinned()[name]
        assert version.startswith(listed[conda_name(name)].removesuffix("*").removesuffix(".")), name


def test_the_profile_of_pixi_and_of_make_run_the_same_commands():
    makefile = (ROOT / "Makefile").read_text()
    tasks = tomllib.loads((ROOT / "pixi.toml").read_text())["tasks"]
    for task in ("report", "test", "reference"):
        recipe = re.search(rf"^{task}:.*\n\t\$\(BIN\)/(.+)$", makefile, re.MULTILINE)
        assert recipe, task
        assert recipe[1] == tasks[task]["cmd"]


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
