"""The machine: which device to use, which dtype it is good at, which process this is, what was used."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftlab.errors import ConfigError

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


def choose_device(name: str) -> torch.device:
    """The device to run on.

    Args:
        name: "auto" (CUDA, then MPS, then CPU) or a torch device.

    Returns:
        The device.

    Raises:
        ConfigError: The named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device '{name}' is not a device; use auto, cpu, cuda or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ConfigError(f"model.device '{name}' is not on this machine; use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights.

    Args:
        name: "auto" or one of `DTYPES`.
        device: Where the base will run.

    Returns:
        The dtype; auto is bfloat16 on a CUDA device that computes in it, else float32.
    """
    if name != "auto":
        return DTYPES[name]
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


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
