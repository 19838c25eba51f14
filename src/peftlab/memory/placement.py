"""Where the parts of a model go that is too large for one device: planned on its structure, refused where it cannot be.

accelerate divides the model along its blocks and moves data between the devices while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftlab.config import ModelSettings
from peftlab.devices import report_memory
from peftlab.errors import ModelError
from peftlab.loading import ModelSource, read_weights
from peftlab.memory.prediction import build_structure

Offload = Literal["none", "host", "disk"]
"""What may hold the parts that fit no accelerator: nothing, the host's memory, or that and the disk."""

_HOST, _DISK = "cpu", "disk"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each part of a model goes.

    Attributes:
        device_map: Module path to device: the number of a CUDA device, "cpu" or "disk".
        weights_bytes: Device to bytes of weights there.
        dtype: Of the weights, e.g. "bfloat16".
    """

    device_map: dict[str, int | str]
    weights_bytes: dict[int | str, int]
    dtype: str


def find_room(offload: Offload = "none", *, spared: float = 0.1) -> dict[int | str, int]:
    """Bytes of weights that each device can take.

    Args:
        offload: What may hold the parts that fit no accelerator.
        spared: Share of each accelerator that is left for what a forward pass needs.

    Returns:
        The number of each CUDA device and, where there is none or offloading is asked for, "cpu", to bytes.
    """
    room: dict[int | str, int] = {}
    for number in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(number)
        room[number] = int(free * (1 - spared))
    if not room or offload != "none":
        room[_HOST] = report_memory().host_available_bytes
    return room


def place_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    room: Mapping[int | str, int] | None = None,
    offload: Offload = "none",
) -> Placement:
    """Divide a model among the devices; no weight is read.

    Args:
        source: The base.
        dtype: Of its weights.
        room: Bytes of weights that each device can take, as `find_room` gives them; None asks it.
        offload: What may hold the parts that fit no accelerator; "disk" takes what nothing else can.

    Returns:
        The placement.

    Raises:
        ModelError: The weights fit nowhere; says how much there is and how much they take.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model = build_structure(source, dtype=dtype, checkpointing=False)
    room = dict(find_room(offload) if room is None else room)
    sizes = compute_module_sizes(model)
    device_map = infer_auto_device_map(
        model, max_memory=dict(room), no_split_module_classes=_unsplit(model), offload_buffers=True
    )
    weights: dict[int | str, int] = {}
    for path, device in device_map.items():
        weights[device] = weights.get(device, 0) + sizes[path]
    name = str(dtype).removeprefix("torch.")
    if _DISK in weights and offload != "disk":
        places = ", ".join(f"{_say(device)} {size:,}" for device, size in room.items()) or "none"
        raise ModelError(
            f"the weights of '{source.name}' take {sizes['']:,} bytes in {name} and there is no room for"
            f" {weights[_DISK]:,} of them (bytes of room: {places}; the largest part that cannot be divided takes"
            f" {_largest_part(model, sizes):,}); {_advice(offload, name)}"
        )
    return Placement(dict(device_map), weights, name)


def load_placed(
    source: ModelSource, settings: ModelSettings, placement: Placement, *, offload_folder: Path | None = None
) -> nn.Module:
    """Read the weights onto the devices of a placement.

    Args:
        source: The base.
        settings: Which model.
        placement: From `place_model`.
        offload_folder: Where parts on disk are written.

    Returns:
        The model in evaluation mode; accelerate moves data between its devices.

    Raises:
        ModelError: Weights are missing or damaged, or parts go to disk and no folder is given.
    """
    dtype: torch.dtype = getattr(torch, placement.dtype)
    if _DISK in placement.weights_bytes and offload_folder is None:
        raise ModelError(
            f"parts of '{source.name}' go to disk: give offload_folder, a folder with"
            f" {placement.weights_bytes[_DISK]:,} bytes of room"
        )
    structure = build_structure(source, dtype=dtype, checkpointing=False)
    options: dict[str, Any] = {"dtype": dtype, "device_map": placement.device_map}
    if offload_folder is not None:
        options["offload_folder"] = str(offload_folder)
    model, missing = read_weights(type(structure), source.config, settings, source.location, **options)
    if missing and source.head != "classification":
        raise ModelError(f"the weights of '{source.name}' lack {', '.join(missing[:5])}")
    placed: nn.Module = model.eval()
    return placed


def _unsplit(model: Any) -> list[str]:
    """Classes of modules that must stay whole: transformers' blocks."""
    return sorted(getattr(model, "_no_split_modules", None) or ())


def _largest_part(model: nn.Module, sizes: Mapping[str, int]) -> int:
    """Bytes of the largest module that is not divided."""
    whole = set(_unsplit(model))
    modules = model.named_modules()
    return max(
        sizes[path] for path, part in modules if type(part).__name__ in whole or not list(part.children())
    )


def _say(device: int | str) -> str:
    """A device in words."""
    return f"cuda:{device}" if isinstance(device, int) else {"cpu": "host"}.get(device, device)


def _advice(offload: Offload, dtype: str) -> str:
    """What could be done."""
    further = {"none": "offload='host' or 'disk'", "host": "offload='disk'", "disk": "more disk"}[offload]
    smaller = "" if dtype in ("bfloat16", "float16") else ", model.dtype=bfloat16"
    return f"give {further}{smaller}, or a smaller model"
