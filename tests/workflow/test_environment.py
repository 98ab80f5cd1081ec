"""Both ways to install name the same packages: pip with constraints, and pixi."""

import os
import re
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
