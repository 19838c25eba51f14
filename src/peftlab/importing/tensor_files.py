"""Named tensors from a foreign file, nothing in it executed: safetensors, and torch's own format where that is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from peftlab.errors import CheckpointError, InputError
from peftlab.torch_files import read_torch_file

_MANAGER = "peftlab"
"""What the efficient fine-tuning manager writes into a file's header."""
_SHOWN = 5


def read_tensors(path: Path, *, torch_file: bool) -> dict[str, torch.Tensor]:
    """Read a file of named tensors.

    Args:
        path: The file.
        torch_file: Whether a file of torch's own format was asked for; it is read with weights_only.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        InputError: It is missing, of torch's own format without that being asked for, or the manager's.
        CheckpointError: It is damaged, holds something else than named tensors, or numbers that are not finite.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix != ".safetensors":
        if not torch_file:
            raise InputError(
                f"{path} is of torch's own format, which can carry code; it is read, tensors only, where that is asked for:"
                " --torch_file, or torch_file=True"
            )
        tensors = read_torch_file(path)
    else:
        tensors = _read_safetensors(path)
    broken = [
        name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]
    if broken:
        raise CheckpointError(f"{path} holds numbers that are not finite: {', '.join(broken[:_SHOWN])}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file that the manager has not written."""
    try:
        with safe_open(path, framework="pt") as file:
            of_manager = _MANAGER in (file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if of_manager:
        raise InputError(
            f"{path} was written by EfficientFineTuningManager; its load_efficient_weights reads it, on any module"
        )
    return tensors
