"""The machines of the write-up, and which of them this one is."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import ROOT

from picogpt import config, hardware, machines
from picogpt.config import MachineConfig, parse
from picogpt.errors import UsageError

A30, A100, H100 = "NVIDIA A30", "NVIDIA A100", "NVIDIA H100 PCIe"
TREE = {
    "title": "box", "device": "box .*", "kind": "cpu", "batch_size": 2, "micro_batch_size": 1, "warmup_steps": 1,
    "steps": 3, "rungs": ["baseline", "flash"],
}  # fmt: skip


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: names)
    monkeypatch.setattr(hardware, "usable_gpus", lambda: list(names))


def set_or_unset(monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ((), ["cpu"]),
        (("NVIDIA A30",), ["a30"]),
        (("NVIDIA GeForce RTX 3070 Laptop GPU",), ["rtx_3070"]),
        (("NVIDIA GeForce RTX 3070 Ti Laptop GPU",), []),
        (("NVIDIA H100 80GB HBM3 MIG 1g.10gb",), []),  # a part of a device
        (("NVIDIA GeForce RTX 3070",), []),  # the desktop card is another device
        (("NVIDIA H100 80GB HBM3",), ["h100"]),
        (("NVIDIA H100 80GB HBM3",) * 8, ["h100", "h100x2"]),
        (("NVIDIA H100 80GB HBM3", "NVIDIA A30"), ["h100"]),
        (("NVIDIA H200",), []),
    ],
)
def test_a_machine_fits_by_the_names_and_number_of_its_devices(monkeypatch, devices, expected):
    gpus(monkeypatch, *devices)
    assert machines.fitting() == expected


def test_every_shipped_file_is_right_and_is_what_the_write_up_says():
    shipped = {name: machines.load(name) for name in machines.names()}
    assert {name: (m.batch_size, m.micro_batch_size, m.world_size, m.block_size) for name, m in shipped.items()} == {
        "a30": (8, 8, 1, 1024),
        "cpu": (2, 2, 1, 1024),
        "h100": (64, 64, 1, 1024),
        "h100x16": (512, 32, 16, 1024),
        "h100x2": (512, 64, 2, 1024),
        "rtx_3070": (2, 2, 1, 1024),
    }


def test_a_name_that_is_none_says_which_there_are():
    with pytest.raises(UsageError, match=r"no hardware 'h10'.*did you mean h100\?.*a30, cpu, h100"):
        machines.load("h10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": ["flash"]}, "begin with baseline"),
        ({"rungs": ["baseline", "flash", "bf16"]}, "keep this order"),
        ({"rungs": ["baseline", "warp"]}, "rungs"),
        ({"batch_size": 3, "micro_batch_size": 2}, "batch_size=3 is not a multiple of micro_batch_size=2 on 1 ranks"),
        ({"device": "box ("}, "no regular expression"),
        ({"color": "red"}, "color: unknown key"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        parse(MachineConfig, {**TREE, **change}, "box.yaml")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("a30", A100, r"hardware a30 is A30 .*NVIDIA A30\), and this device is NVIDIA A100"),
        ("h100x2", H100, r"has 2 ranks and 1 started: run it by torchrun --standalone --nproc_per_node=2"),
        ("a30", A30, None),
    ],
)
def test_another_device_or_number_of_ranks_is_refused(name: str, device: str, message: str | None):
    chosen = hardware.Device(device, "cuda:0", "bfloat16")
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        machines.require(name, machines.load(name), chosen, world_size=1)


def test_gpus_that_torch_cannot_use_are_not_planned_for(monkeypatch):
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: ("NVIDIA A30",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a build of torch for CPUs
    assert machines.fitting() == ["cpu"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H100, A30)), ("", ()), ("-1", ()), ("1", (A30,)), ("1,0", (A30, H100)), ("0,7,1", (H100,)),
        ("GPU-bb", (A30,)), ("MIG-cc", ("a slice of an NVIDIA GPU",)),
    ],
)  # fmt: skip
def test_the_gpus_are_those_that_are_visible(monkeypatch, tmp_path, visible: str | None, expected: tuple):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'GPU-aa11, {H100}'\necho 'GPU-bb22, {A30}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    set_or_unset(monkeypatch, "CUDA_VISIBLE_DEVICES", visible)
    hardware.nvidia_gpus.cache_clear()
    assert hardware.nvidia_gpus() == expected
    hardware.nvidia_gpus.cache_clear()


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA A30", 165e12), ("NVIDIA A30 MIG 1g.6gb", None), ("NVIDIA H200 NVL", None)]
)
def test_a_device_whose_peak_is_not_known_has_none(name: str, peak: float | None):
    assert hardware.peak_flops(hardware.Device(name, "cuda:0", "bfloat16")) == peak


@pytest.mark.parametrize("devices", [(), ("NVIDIA L40S", "NVIDIA L40S")])
def test_the_draft_is_a_file_that_fits_this_machine(monkeypatch, picogpt, tmp_path, devices):
    gpus(monkeypatch, *devices)
    run = picogpt("hardware", "--draft")
    (tmp_path / "mine.yaml").write_text(run.out)
    machine = machines.load(str(tmp_path / "mine.yaml"))
    kind, names = machines.here()
    assert (machine.kind, machine.ranks) == (kind, len(names))
    machines.require("mine", machine, hardware.Device(names[0], kind, "float32"), machine.world_size)
    shown = picogpt("hardware").out  # with the draft, where no file fits
    assert ("fits     none of a30, cpu" in shown, run.out in shown) == (bool(devices), bool(devices))


def test_a_draft_may_go_where_the_files_are(monkeypatch, picogpt, tmp_path):
    """The shell has made the file before the command begins."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config/hardware/mine.yaml").touch()
    monkeypatch.setattr(config, "config_folder", lambda: tmp_path / "config")
    monkeypatch.setattr(machines, "config_folder", lambda: tmp_path / "config")
    run = picogpt("hardware", "--draft")
    assert (run.status, "title:" in run.out) == (0, True)


@pytest.mark.parametrize(("given", "cores"), [(None, 6), ("", 6), ("4", 4), ("8(x2),2", 2), ("72(x3)", 6), ("0", 1)])
def test_a_job_takes_the_cores_that_slurm_gave_it(monkeypatch, given: str | None, cores: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(hardware, "Path", lambda path: Path("/nothing"))  # no share of a container
    set_or_unset(monkeypatch, "SLURM_JOB_CPUS_PER_NODE", given)
    assert hardware.cpu_count() == cores
