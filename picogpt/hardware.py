"""This machine: its device and the dtype that is fast on it, cores, memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from picogpt.errors import UsageError


@dataclass(frozen=True)
class Device:
    """The manufacturer's name of a device, torch's (cpu, cuda:0, mps), and the dtype of matrix products, as torch has it."""

    name: str
    torch_name: str
    dtype: str

    @property
    def type(self) -> str:
        """cpu, cuda or mps."""
        return self.torch_name.partition(":")[0]


def usable_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that torch can use; without an NVIDIA driver it does not load torch."""
    if not nvidia_gpus():
        return []
    import torch  # may be a build for CPUs, or too new for the driver; takes seconds to load

    return list(nvidia_gpus()) if torch.cuda.is_available() else []


@cache
def nvidia_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that the driver lists and CUDA_VISIBLE_DEVICES shows; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [line.strip().split(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(name for _, name in gpus)
    shown: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        by_uuid = [name for uuid, name in gpus if entry.startswith("GPU-") and uuid.startswith(entry)]
        by_index = [name for index, (_, name) in enumerate(gpus) if str(index) == entry]
        slices = ["a slice of an NVIDIA GPU"] if entry.startswith("MIG-") else []
        if not (found := by_uuid + by_index + slices):  # like CUDA, ignore everything after the first invalid entry
            break
        shown.append(found[0])
    return tuple(shown)


def select(device: str = "auto", dtype: str = "auto") -> Device:
    """The device, and the dtype of its matrix products. Raises UsageError for a device that is not here."""
    if device != "cpu":  # a CPU is known without torch, which takes seconds to load
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"there is no device {device!r}: auto, cpu, cuda, cuda:N and mps are understood")
    device_type, _, index = device.partition(":")
    if device_type == "cpu":
        name, fast = cpu_name(), multiplies_bfloat16("cpu")
    elif device_type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("device 'mps' was asked for and is not here; --device cpu works")
        name, fast = f"Apple {platform.machine()}", False
    else:
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise UsageError(f"device {device!r} was asked for and {count} CUDA devices are here; --device cpu works")
        device = f"cuda:{index or 0}"
        name, fast = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
    return Device(name, device, ("bfloat16" if fast else "float32") if dtype == "auto" else dtype)


# Dense bfloat16 FLOP/s with float32 accumulation, from NVIDIA's data sheets. Exact device names, so that MIG slices do not
# match; a device that is not listed has no MFU.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
}


def peak_flops(device: Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device from its data sheet; None if unknown, or if it computes in float32."""
    return PEAK_FLOPS.get(device.name) if device.dtype == "bfloat16" else None


def mfu(device: Device, tokens_per_second: float, flops_per_token: int | None) -> float | None:
    """Model FLOP utilization: the share of a device's peak that its tokens/s need; None where one of the two is unknown."""
    peak = peak_flops(device)
    return tokens_per_second * flops_per_token / peak if peak and flops_per_token else None


def synchronize(device: Device) -> None:
    """Wait for all work on a GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_memory_bytes(device: Device) -> int:
    """Peak memory of this process: resident on a CPU, allocated by torch on a GPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device.torch_name)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def gpu_memory_bytes(device: Device) -> int | None:
    """Total memory of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_properties(device.torch_name).total_memory


def prepare(device: Device, threads: int) -> None:
    """Configure torch in this process: its threads, and the current GPU."""
    import torch

    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.torch_name)  # streams and graphs are made on the current device


def keep_memory(device: Device) -> None:
    """Make glibc's malloc keep freed memory, so that a training step on a CPU reuses it.

    Otherwise every large buffer is new memory, whose pages Linux clears at the first access: a tenth of the time of a
    training step of GPT-2. Does nothing on other devices and without glibc.
    """
    import ctypes

    if device.type == "cpu":
        with suppress(OSError, AttributeError, TypeError):  # without glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: never allocate a buffer by mmap,
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never return freed memory to the system


def attention(device: Device) -> AbstractContextManager:
    """A context in which scaled_dot_product_attention uses the fastest backend for `device`.

    On Hopper cuDNN's kernel trains about twice as fast as the flash kernel; elsewhere torch's own choice is right.
    """
    import torch

    if device.type != "cuda" or torch.cuda.get_device_capability(device.torch_name) != (9, 0):
        return nullcontext()
    return attention_backends(device.type, cudnn=True)


def attention_backends(device_type: str, cudnn: bool) -> AbstractContextManager:
    """A context in which scaled_dot_product_attention on a GPU uses cuDNN's kernel first, or not at all."""
    if device_type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *order] if cudnn else order, set_priority=True)


def cpu_count() -> int:
    """Cores that this process may use; in a container or a batch job fewer than the machine has."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    # Cores of the SLURM job per node, as "8" or "8(x2),4": without cgroups nothing else limits the job.
    limits += map(int, re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")))
    # A container's share of the CPU, as "200000 100000" microseconds.
    if share := re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max")):
        limits.append(int(share[1]) // int(share[2]))
    return max(1, min(limits))


def _read(path: str) -> str:
    """The content of a file of the operating system; empty where it has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@cache
def _cpu_info() -> dict[str, str]:
    """What Linux says about the first core; empty elsewhere."""
    return dict(re.findall(r"(.+?)\s*: ?(.*)", _read("/proc/cpuinfo").split("\n\n")[0]))


def cpu_instructions() -> list[str]:
    """The instruction sets that decide how fast a CPU multiplies matrices, of those that it has; [] without Linux."""
    flags = _cpu_info().get("flags", _cpu_info().get("Features", "")).split()
    return sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16"} & set(flags))


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether products of bfloat16 are fast on a device of this type; not on CPUs without instructions for them."""
    return device_type != "cpu" or bool({"amx_bf16", "avx512_bf16"} & set(cpu_instructions()))


def cpu_name() -> str:
    """Model name of the CPU, with family and model number if a virtual machine hides the model."""
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= info.keys():
        return name
    return f"{name} (family {info['cpu family']}, model {info['model']})"


def memory_bytes() -> int:
    """Physical memory of the machine; 0 where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None without one."""
    return _read("/sys/module/nvidia/version").strip() or None


def cudnn_version() -> int | None:
    """Version of cuDNN that torch uses, or None without it."""
    import torch

    return torch.backends.cudnn.version()
