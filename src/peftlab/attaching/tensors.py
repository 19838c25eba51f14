"""What attachments do with tensors: copies on the CPU, reading saved ones, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peftlab.errors import CheckpointError


def kept(parameter: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; of a tensor without data, another without.

    Args:
        parameter: The tensor.
    """
    data = parameter.detach()
    return data.clone() if data.is_meta else data.to("cpu", copy=True)


def cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that a model lies on.

    Args:
        model: The model.
    """
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def check_fit(own: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of other names or shapes than there are.

    Args:
        own: Name to tensor, or to shape.
        given: The tensors that were saved.

    Raises:
        CheckpointError: They differ.
    """
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    sizes = {name: tuple(getattr(value, "shape", value)) for name, value in own.items()}
    shapes = sorted(name for name in sizes.keys() & given.keys() if sizes[name] != tuple(given[name].shape))
    if missing or extra or shapes:
        raise CheckpointError(
            f"the saved adapter does not fit: missing {missing}, unexpected {extra}, of another shape {shapes}"
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: The file.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded, and nothing was: {error}") from error
    return found


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Args:
        path: The file.

    Returns:
        Its mapping.

    Raises:
        CheckpointError: It is missing or damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold keys and values")
    return content
