"""The memory there is for a training step, and what a peak of tensors needs of it.

The constants of the CPU are measured by `benchmarks/memory_prediction.py`; those of CUDA are quoted, not measured here.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from peftlab.devices import report_memory
from peftlab.errors import ConfigError

MARGIN = 0.05
"""A prediction may be too low by this share of itself and is still counted on."""
CUDA_MARGIN = 0.10
"""The same on CUDA, where torch's allocator rounds up and keeps pieces: 2 to 10 % are quoted."""
CUDA_CONTEXT_BYTES = 600 << 20
"""What a CUDA context takes beside tensors: 0.3 to 0.6 GB are quoted."""
GLIBC_HELD = 3.3
"""Bytes that a process on the CPU may hold for each byte of tensors at their peak: glibc keeps pieces below 32 MiB that are
given back, and cannot use them again for aligned requests of the same size. Measured: 1.2 to 1.5, and 1.7 to 3.2 with
gradient checkpointing."""
GLIBC_REMEDY = "MALLOC_MMAP_THRESHOLD_=131072"
"""In the environment of a process this has glibc return every larger piece at once. Measured: the process then holds 1.01 to
1.08 bytes for each byte of tensors, and its steps take 1.2 to 2.2 times as long."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that may be taken.

    Attributes:
        total_bytes: All of it.
        account: What it is of, in words.
        margin: Share of the peak that is added to it.
        beside_bytes: What is taken beside tensors.
        held: Bytes that the process may hold for each byte of tensors, where the C library keeps what it is given back.
    """

    total_bytes: int
    account: str
    margin: float = MARGIN
    beside_bytes: int = 0
    held: float = 1.0

    def needed(self, peak_bytes: int) -> int:
        """What a peak of tensors needs of it, the margin included.

        Args:
            peak_bytes: Predicted bytes of tensors.

        Returns:
            Bytes.
        """
        return round(peak_bytes * (1 + self.margin)) + self.beside_bytes

    def fits(self, peak_bytes: int) -> bool:
        """Whether a peak of tensors fits, with the margin.

        Args:
            peak_bytes: Predicted bytes of tensors.

        Returns:
            True where it does.
        """
        return self.needed(peak_bytes) <= self.total_bytes

    def largest_peak(self) -> int:
        """The largest peak of tensors that fits, in bytes."""
        return int((self.total_bytes - self.beside_bytes) / (1 + self.margin))

    def warning(self, peak_bytes: int) -> str:
        """What can go wrong though the tensors fit.

        Args:
            peak_bytes: Predicted bytes of tensors.

        Returns:
            A sentence; "" where nothing can.
        """
        held = round(peak_bytes * self.held)
        if held <= self.total_bytes or not self.fits(peak_bytes):
            return ""
        return (
            f"the tensors fit, but the process may hold up to {held:,} bytes, because glibc keeps pieces that tensors give"
            f" back; started with {GLIBC_REMEDY} it holds what they take, and is slower"
        )


def find_budget(device: torch.device, *, memory: int | None = None) -> Budget:
    """The memory of a device.

    Args:
        device: Where the run will be.
        memory: Bytes to take instead of what is there; the device's, or on the CPU the host's.

    Returns:
        On CUDA the whole device, elsewhere what of the host can still be taken.

    Raises:
        ConfigError: The device is not here, and no memory is given.
    """
    if device.type == "cuda":
        if memory is None and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here to see the memory of; give it: --memory 24GB")
        account = "as given"
        if memory is None:
            memory = torch.cuda.get_device_properties(device).total_memory
            account = f"the whole device: {torch.cuda.get_device_name(device)}"
        return Budget(memory, account, CUDA_MARGIN, CUDA_CONTEXT_BYTES)
    account = "the host: what can still be taken" if memory is None else "as given"
    available = report_memory().host_available_bytes if memory is None else memory
    keeps = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    remedied = GLIBC_REMEDY.partition("=")[0] in os.environ
    return Budget(available, account, held=GLIBC_HELD if keeps and not remedied else 1.0)
