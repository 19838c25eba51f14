"""Files of torch's own format, tensors only: nothing in them is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peftlab.attaching.attachment import ADAPTER
from peftlab.errors import CheckpointError


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of torch's own format, tensors only: nothing in it is executed.

    Args:
        path: The file.

    Returns:
        Name to tensor.

    Raises:
        CheckpointError: It is missing, damaged, or holds something else than named tensors.
    """
    try:
        found: Any = torch.serialization.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its reader raises, whatever that is
        raise CheckpointError(f"{path} cannot be read as named tensors: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds something else than named tensors")
    return {
        str(name).replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}"): t for name, t in found.items()
    }
