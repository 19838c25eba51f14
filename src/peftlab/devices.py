"""The machine: which device to use, which dtype it is fast at, which process this is, what memory there is and was used.

Every choice comes with its reason, so that a run can log why it ran where it did.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftlab.errors import ConfigError, did_you_mean

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes that a config can name."""

_REPORTED = (
    "peftlab",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "sacrebleu",
)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device and why it was chosen.

    Attributes:
        device: The device.
        reason: Why, for a log.
    """

    device: torch.device
    reason: str


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype and why it was chosen.

    Attributes:
        dtype: The dtype of the base's weights.
        reason: Why, for a log.
    """

    dtype: torch.dtype
    reason: str


def explain_device(name: str) -> DeviceChoice:
    """The device to run on, and why.

    Args:
        name: "auto" (CUDA, then MPS, then CPU) or a torch device.

    Returns:
        The choice.

    Raises:
        ConfigError: The named device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        if there["cuda"]:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            return DeviceChoice(device, f"CUDA is there: {torch.cuda.get_device_name(device)}")
        if there["mps"]:
            return DeviceChoice(torch.device("mps"), "no CUDA, but Apple's MPS is there")
        build = "" if torch.version.cuda else "; this torch is built without CUDA"
        return DeviceChoice(torch.device("cpu"), f"there is no CUDA and no MPS device{build}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device '{name}' is not a device; use auto, cpu, cuda or mps") from None
    if not there.get(device.type, False):
        raise ConfigError(f"model.device '{name}' is not on this machine; use auto or cpu")
    return DeviceChoice(device, f"model.device={name} was asked for")


def choose_device(name: str) -> torch.device:
    """The device to run on.

    Args:
        name: "auto" (CUDA, then MPS, then CPU) or a torch device.

    Returns:
        The device.

    Raises:
        ConfigError: The named device is not there.
    """
    return explain_device(name).device


def explain_dtype(name: str, device: torch.device) -> DtypeChoice:
    """The dtype of the base's weights, and why.

    Args:
        name: "auto" or one of `DTYPES`; a torch dtype counts as its name.
        device: Where the base will run.

    Returns:
        The choice; auto is bfloat16 on a CUDA device that computes in it, else float32, whatever the CPU could do: a
        run's numbers shall not depend on the CPU's age.

    Raises:
        ConfigError: There is no such dtype.
    """
    if name != "auto":
        name = str(name).removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(
                f"unknown dtype '{name}'{did_you_mean(name, DTYPES)}; use auto, {', '.join(DTYPES)}"
            )
        return DtypeChoice(DTYPES[name], f"model.dtype={name} was asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.bfloat16, "the device computes in bfloat16")
        return DtypeChoice(torch.float32, "the device only emulates bfloat16")
    if device.type == "mps":
        return DtypeChoice(torch.float32, "nothing is known of how fast MPS computes in bfloat16")
    found = bfloat16_instructions()
    could = f"; it has {' and '.join(found)}, so model.dtype=bfloat16 may be faster" if found else ""
    why = "float32 gives the same numbers on every CPU" if found else "the CPU has no bfloat16 instructions"
    return DtypeChoice(torch.float32, why + could)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights.

    Args:
        name: "auto" or one of `DTYPES`.
        device: Where the base will run.

    Returns:
        The dtype; auto is bfloat16 on a CUDA device that computes in it, else float32.
    """
    return explain_dtype(name, device).dtype


def bfloat16_instructions() -> tuple[str, ...]:
    """The names of the CPU's instructions for bfloat16; empty where it has none or torch cannot tell."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(name for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16") if known.get(name) is True)


def process_rank() -> int:
    """This process's rank among those that torchrun started; 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def peak_memory() -> dict[str, int | None]:
    """Peak memory of this process so far.

    Returns:
        "host": peak resident bytes, None where the system does not tell; "device": peak allocated bytes of the CUDA
        device, None without one.
    """
    host = None
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What memory is in use, each figure labelled with what it is of.

    Attributes:
        process_bytes: Resident bytes of this process, all its libraries included.
        host_total_bytes: Bytes of this machine, or of the container it is.
        host_available_bytes: Bytes of it that can still be taken without swapping.
        device_name: The CUDA device; None without one, and so the following.
        device_total_bytes: Its bytes.
        device_free_bytes: Bytes of it that no process holds.
        device_allocated_bytes: Bytes that this process's tensors take.
        device_reserved_bytes: Bytes that this process's allocator holds, the tensors included.
    """

    process_bytes: int
    host_total_bytes: int
    host_available_bytes: int
    device_name: str | None = None
    device_total_bytes: int | None = None
    device_free_bytes: int | None = None
    device_allocated_bytes: int | None = None
    device_reserved_bytes: int | None = None


def report_memory() -> MemoryReport:
    """What memory is in use now, of this process, the host and the CUDA device."""
    import psutil  # type: ignore[import-untyped]

    host = psutil.virtual_memory()
    total, available = host.total, host.available
    for limit, used in _container_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    process = psutil.Process().memory_info().rss
    if not torch.cuda.is_available():
        return MemoryReport(process, total, available)
    free, whole = torch.cuda.mem_get_info()
    return MemoryReport(
        process,
        total,
        available,
        torch.cuda.get_device_name(),
        whole,
        free,
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
    )


_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "inactive_file", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory"),
)
"""Version 2 and version 1: limit, use, what of the use can be dropped, and the folder."""


def _container_limits(root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Limit and use in bytes of the container this process is in; psutil sees the whole machine."""
    found = []
    for limit_file, used_file, droppable, folder in _CONTROL_GROUPS:
        limit, used = root / folder / limit_file, root / folder / used_file
        if not limit.is_file() or not used.is_file():
            continue
        text = limit.read_text(encoding="ascii").strip()
        if text.isdigit():  # "max" is no limit
            lines = (root / folder / "memory.stat").read_text(encoding="ascii").splitlines()
            cache = next((int(line.split()[1]) for line in lines if line.startswith(f"{droppable} ")), 0)
            found.append((int(text), int(used.read_text(encoding="ascii")) - cache))
    return found


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each storage counted once.

    Args:
        tensors: Tensors that may share storages, on any device but meta.

    Returns:
        Bytes.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def describe_environment(folder: Path) -> dict[str, Any]:
    """What a run ran on: versions, hardware, the state of the git checkout it was started in, the command.

    Args:
        folder: The folder whose git state is told.

    Returns:
        JSON-ready values; "git" is None outside a checkout.
    """
    versions = {"python": platform.python_version()}
    for package in _REPORTED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    cuda = torch.cuda.is_available()
    hardware = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "processes": num_processes(),
    }
    return {"versions": versions, "hardware": hardware, "git": _git(folder), "command": sys.argv}


def _processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of a checkout, None outside one or without git."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}
