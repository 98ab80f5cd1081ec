"""The machines of the write-up, one file of `config/hardware/` each: which there are, and which of them is this one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from picogpt import hardware
from picogpt.config import MachineConfig, config_folder, did_you_mean, parse, read_yaml
from picogpt.errors import UsageError
from picogpt.registry import RUNGS

SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """Names of the shipped files, in order."""
    return sorted(path.stem for path in (config_folder() / "hardware").glob("*.yaml"))


def load(name: str) -> MachineConfig:
    """A machine by the name of its file, or by the path of one of your own, which may also be relative to `config/`.

    Raises UsageError when there is none of this name, or when the file is wrong.
    """
    path = Path(name)
    if path.suffix not in SUFFIXES:
        path = config_folder() / "hardware" / f"{name}.yaml"
        if name not in names():
            there = f"{', '.join(names())} are in config/hardware/; picogpt hardware --draft prints a draft for this machine"
            raise UsageError(f"there is no hardware {name!r}{did_you_mean(name, names())}: {there}")
    elif not path.exists() and (config_folder() / path).exists():
        path = config_folder() / path
    return parse(MachineConfig, read_yaml(path), str(path))


def name_of(name: str) -> str:
    """The name of a machine for records and files: of `load`'s argument, without folder and suffix."""
    return Path(name).stem if Path(name).suffix in SUFFIXES else name


def here() -> tuple[str, list[str]]:
    """(device type, names) of the devices for training: the GPUs that torch can use, or else the CPU."""
    gpus = hardware.usable_gpus()
    return ("cuda", gpus) if gpus else ("cpu", [hardware.cpu_name()])


def fitting() -> list[str]:
    """Names of the shipped machines that this one can measure: same device, and enough of them in one machine."""
    device_type, devices = here()

    def fits(machine: MachineConfig) -> bool:
        used = [name for name in devices[: machine.ranks] if re.fullmatch(machine.device, name)]
        return (machine.kind, machine.nodes, machine.ranks) == (device_type, 1, len(used))

    return [name for name in names() if fits(load(name))]


def require(name: str, machine: MachineConfig, device: hardware.Device, world_size: int) -> None:
    """Raises UsageError, naming both devices, when a benchmark for `machine` is run on a different one."""
    if device.type != machine.kind or not re.fullmatch(machine.device, device.name):
        on_slurm = "; on a cluster, gpu_model in the profile asks for the right GPUs"
        raise UsageError(
            f"hardware {name} is {machine.title} ({machine.kind}, {machine.device}), and this device is {device.name}"
            f" ({device.type}): its numbers would be listed under a wrong name. Hardware that fits here:"
            f" {', '.join(fitting()) or 'none; picogpt hardware --draft prints a draft'}"
            f"{on_slurm if 'SLURM_JOB_ID' in os.environ else ''}"
        )
    if world_size != machine.world_size:
        start = f"run it by torchrun --standalone --nproc_per_node={machine.ranks} -m picogpt ..."
        if machine.nodes > 1:
            start = (
                f"run it on {machine.nodes} nodes, on each with its own --node_rank, by torchrun --nnodes={machine.nodes}"
                f" --nproc_per_node={machine.ranks} --node_rank=0 --master_addr=HOST --master_port=29500 -m picogpt ..."
            )
        elif machine.ranks == 1:
            start = "run it without torchrun"
        raise UsageError(f"hardware {name} has {machine.world_size} ranks and {world_size} started: {start}")


def draft() -> str:
    """A draft of a file for this machine, as YAML."""
    device_type, devices = here()
    on_cpu, count = device_type == "cpu", len(devices)
    left_out = ("TF32", "GPU") if on_cpu else ("CPU",)
    tree = {
        "title": re.sub(r"^NVIDIA (GeForce )?", "", devices[0]),
        "device": re.escape(devices[0]).replace(r"\ ", " ").replace(r"\-", "-"),
        "kind": device_type,
        "ranks": count,
        "batch_size": 2 if on_cpu else 8 * count,
        "micro_batch_size": 2 if on_cpu else 8,
        "warmup_steps": 1 if on_cpu else 5,
        "steps": 5 if on_cpu else 20,
        "rungs": [name for name, rung in RUNGS.items() if rung.needs not in left_out],
    }
    comment = f"# A draft for {count} x {devices[0]}: save it as config/hardware/NAME.yaml, and raise micro_batch_size"
    return f"{comment} as far as the memory allows.\n{yaml.safe_dump(tree, sort_keys=False, width=120)}"
