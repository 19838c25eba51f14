"""Measured peaks, by the device's own account of tensors.

On CUDA that is the allocator's peak of allocated bytes. On the CPU it is torch's profiler, which sees every allocation of
torch's CPU allocator, scratch memory of kernels included.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from peftlab.errors import ModelError

ACCOUNTS: Mapping[str, str] = {
    "cpu": "tensors of this process on the host, by torch's profiler",
    "cuda": "tensors of this process on the device, by torch's allocator",
}
"""What is measured and by what, for each device that tells."""

_CPU = torch.profiler.ProfilerActivity.CPU


@contextmanager
def measured_peak(device: torch.device) -> Iterator[list[int]]:
    """Measure how many bytes of tensors a block takes at its peak beside what there was at its start.

    Args:
        device: "cpu" or a CUDA device.

    Yields:
        A list that holds the bytes once the block has ended.

    Raises:
        ModelError: The device does not tell its memory.
    """
    found: list[int] = []
    if device.type not in ACCOUNTS:
        raise ModelError(f"memory of device {device.type} cannot be measured; use cpu or cuda")
    gc.collect()  # what is garbage already shall not be given back inside the block
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with _quiet_profiler(), torch.profiler.profile(activities=[_CPU], profile_memory=True) as profiler:
        yield found
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found.append(peak)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library from writing a line to the screen each time it starts and stops."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
