"""Where the parts of a model go that is too large for one device: planned on its structure, refused where it cannot be.

accelerate divides the model along its blocks and moves data between the devices while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftlab.devices import report_memory
from peftlab.errors import ModelError

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
    structure: nn.Module,
    *,
    name: str,
    dtype: torch.dtype,
    room: Mapping[int | str, int] | None = None,
    offload: Offload = "none",
) -> Placement:
    """Divide a model among the devices; no weight is read.

    Args:
        structure: The model without weights, on the meta device.
        name: What it is called, for messages.
        dtype: Of its weights.
        room: Bytes of weights that each device can take, as `find_room` gives them; None asks it.
        offload: What may hold the parts that fit no accelerator; "disk" takes what nothing else can.

    Returns:
        The placement; its `device_map` goes to `loading.read_weights`.

    Raises:
        ModelError: The weights fit nowhere; says how much there is and how much they take.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    room = dict(find_room(offload) if room is None else room)
    sizes = compute_module_sizes(structure, dtype=dtype)
    device_map = infer_auto_device_map(
        structure,
        max_memory=dict(room),
        no_split_module_classes=_unsplit(structure),
        dtype=dtype,
        offload_buffers=True,
    )
    weights: dict[int | str, int] = {}
    for path, device in device_map.items():
        weights[device] = weights.get(device, 0) + sizes[path]
    kind = str(dtype).removeprefix("torch.")
    if _DISK in weights and offload != "disk":
        places = ", ".join(f"{_say(device)} {size:,}" for device, size in room.items()) or "none"
        raise ModelError(
            f"the weights of '{name}' take {sizes['']:,} bytes in {kind} and there is no room for"
            f" {weights[_DISK]:,} of them (bytes of room: {places}; the largest part that cannot be divided takes"
            f" {_largest_part(structure, sizes):,}); {_advice(offload, kind)}"
        )
    return Placement(dict(device_map), weights, kind)


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
    smaller = "" if dtype in ("bfloat16", "float16") else "load them in bfloat16, "
    further = {
        "none": "place_model(offload='host' or 'disk'), ",
        "host": "place_model(offload='disk'), ",
        "disk": "",
    }
    return f"{smaller}{further[offload]}or take a smaller model"
