"""The document's `DeviceManager`: which device, which dtype, seeds and memory; what it decides is `devices.py`'s."""

from __future__ import annotations

import gc
import logging
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from peftlab.devices import DeviceChoice, explain_device, explain_dtype, report_memory
from peftlab.errors import ConfigError

_log = logging.getLogger(__name__)


class DeviceManager:
    """The device to work on: CUDA, else MPS, else the CPU.

    The dtype is `devices.py`'s. It differs from the document's in one place: CUDA devices compute in bfloat16, those that
    only emulate it in float32, because plain float16 overflows without loss scaling (T5's even without training).

    Args:
        preferred_device: A torch device to be taken if it is there; None or "auto" takes the best. One that is not there is
            replaced by the best with a warning.

    Attributes:
        device: The device.
        reason: Why this one.

    Raises:
        ConfigError: There is no device of that name on any machine.
    """

    def __init__(self, preferred_device: str | torch.device | None = None) -> None:
        self.preferred_device = None if preferred_device is None else str(preferred_device)
        choice = _choose(self.preferred_device or "auto")
        self.device, self.reason = choice.device, choice.reason
        _log.info("device %s: %s; %s: %s", self.device, self.reason, self.torch_dtype, self.dtype_reason)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a base's weights on this device: bfloat16 on CUDA where it computes in it, else float32."""
        return explain_dtype("auto", self.device).dtype

    @property
    def dtype_reason(self) -> str:
        """Why this dtype."""
        return explain_dtype("auto", self.device).reason

    def optimize_for_device(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, its floating-point weights in `torch_dtype`; where it has no room, to the CPU.

        Args:
            model: The model; changed in place, as `nn.Module.to` does.

        Returns:
            The same model.
        """
        try:
            model.to(device=self.device, dtype=self.torch_dtype)
        except torch.OutOfMemoryError as error:
            warnings.warn(
                f"the model has no room on {self.device}, so it is on the CPU: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            self.reason = f"the model had no room on {self.device}"
            self.device = torch.device("cpu")
            model.to(device=self.device, dtype=self.torch_dtype)
            self.clear_cache()
        parameters = sum(p.numel() for p in model.parameters())
        _log.info("%s parameters on %s in %s", f"{parameters:,}", self.device, self.torch_dtype)
        return model

    def fits(self, model: nn.Module) -> bool:
        """Whether a model is as `optimize_for_device` would leave it.

        Args:
            model: The model.
        """
        tensors = [*model.parameters(), *model.buffers()]
        there = {_placed(tensor.device) for tensor in tensors} <= {_placed(self.device)}
        return there and {t.dtype for t in tensors if t.is_floating_point()} <= {self.torch_dtype}

    def get_device_info(self) -> dict[str, Any]:
        """Device, dtype, why, and the memory in use, as JSON-ready values."""
        return {
            "device": str(self.device),
            "preferred_device": self.preferred_device,
            "reason": self.reason,
            "torch_dtype": str(self.torch_dtype),
            "dtype_reason": self.dtype_reason,
            "memory": self.memory_report(),
        }

    def memory_report(self) -> dict[str, int | str | None]:
        """What memory is in use now, in bytes; see `devices.MemoryReport`."""
        return asdict(report_memory())

    def set_seed(self, seed: int) -> None:
        """Seed python's, numpy's and torch's random numbers; new adapters draw their start from torch's.

        Args:
            seed: The seed, 0 to 2**32 - 1.

        Raises:
            ConfigError: It is out of that range.
        """
        from transformers import set_seed

        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1 (given: {seed!r})")
        set_seed(seed)

    def clear_cache(self) -> None:
        """Give memory back that no tensor uses any more."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()


def _placed(device: torch.device) -> tuple[str, int]:
    """A device with its number: "cuda" is the current one."""
    number = device.index
    if number is None:
        number = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return device.type, number


def _choose(name: str) -> DeviceChoice:
    """The wanted device, or the best with a warning."""
    if name == "auto":
        return explain_device("auto")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"preferred_device '{name}' is not a device; use auto, cpu, cuda or mps")
    missing = ""
    if (
        wanted.type == "cuda"
        and torch.cuda.is_available()
        and (wanted.index or 0) >= torch.cuda.device_count()
    ):
        missing = f"there are {torch.cuda.device_count()} CUDA devices"
    try:
        choice = explain_device(name)
    except ConfigError:
        missing = f"this machine has no {wanted.type} device"
    if not missing:
        return DeviceChoice(choice.device, f"preferred_device={name} was asked for")
    best = explain_device("auto")
    warnings.warn(
        f"preferred_device '{name}' is not there ({missing}): {best.device} is used instead", stacklevel=3
    )
    return DeviceChoice(best.device, f"preferred_device '{name}' is not there; {best.reason}")
