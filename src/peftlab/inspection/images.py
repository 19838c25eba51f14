"""Images for a model that sees: pixel values of a size that it takes, blank ones beside texts, what blocks make of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.activations import proof_of
from peftlab.inspection.attention_inputs import base_of
from peftlab.inspection.block_outputs import evaluation_mode
from peftlab.inspection.norm_statistics import watched_modules
from peftlab.inspection.shards import ROW, Activations
from peftlab.model_facts import main_config, main_stack, reader_of


def pixel_values(model: Any, family: FamilyMap, images: Any, *, location: str) -> torch.Tensor:
    """Images as a model reads them.

    Args:
        model: A transformers model that sees.
        family: Its map.
        images: PIL images or arrays (height, width, channels), or a floating-point tensor (batch, channels, height,
            width), taken as it is.
        location: Where the checkpoint's own image processor lies.

    Returns:
        Pixel values (batch, channels, height, width) on the model's device.

    Raises:
        ModelError: The checkpoint has no image processor.
        DataError: These are no images, or of a size that the model does not see.
    """
    if isinstance(images, torch.Tensor) and images.is_floating_point():
        channels = getattr(main_config(model.config), "num_channels", 3)
        if images.dim() != 4 or images.shape[1] != channels or not len(images):
            raise DataError(
                f"pixel values of {tuple(images.shape)}: expected (batch, {channels} channels, height, width)"
            )
    else:
        images = _processed(images, location)
    pixels: torch.Tensor = images.to(model.device, model.dtype)
    _check_size(model, family, pixels)
    return pixels


def blank_images(model: Any, num_images: int) -> dict[str, torch.Tensor]:
    """Blank images for a model with a tower for images beside the one for text (CLIP), no part of which sees them.

    Args:
        model: A transformers model, bare or wrapped by peft.
        num_images: How many.

    Returns:
        Pixel values (batch, channels, height, width) under their argument's name; nothing for other models.
    """
    core = base_of(model)
    if not hasattr(core, "get_text_features"):
        return {}
    first, size = next(core.parameters()), _image_size(core) or (1, 1)
    channels = getattr(main_config(core.config), "num_channels", 3)
    return {"pixel_values": first.new_zeros(num_images, channels, *size)}


def image_activations(
    model: Any,
    family: FamilyMap,
    pixels: torch.Tensor,
    layers: Iterable[int],
    *,
    pooling: str = "token",
    unproven: bool = False,
) -> Activations[torch.Tensor]:
    """What chosen blocks of the tower that sees put out for images.

    Args:
        model: A transformers model that sees.
        family: Its map.
        pixels: From `pixel_values`.
        layers: Layers of the tower, from 0.
        pooling: "token", a row for each position (a patch, or a token that the model adds), or "mean", one for each image.
        unproven: Take what the blocks put out also where it is not proved to be the model's hidden states.

    Returns:
        `layer_i` to values (rows, hidden), on the CPU; `rows_of(image)` tells which.

    Raises:
        ConfigError: There is no such layer or pooling.
        ModelError: A block puts out something else than one vector for each position, or what is not proved.
    """
    stack, wanted = main_stack(model, family), sorted(set(layers))
    blocks = family.blocks(stack)
    if not wanted or not set(wanted) <= set(range(len(blocks))) or pooling not in ("token", "mean"):
        raise ConfigError(
            f"layers {wanted}, pooling '{pooling}': of images this model has layers 0 to {len(blocks) - 1}; pooling is token"
            " or mean"
        )
    proof = proof_of(family, stack, unproven=unproven)
    paths = {f"layer_{layer}": blocks[layer].path for layer in wanted}
    reader = reader_of(model, family, stack, "pixel_values")
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode(), evaluation_mode(model), watched_modules(model, paths.values(), calls):
        model.get_submodule(reader or "")(pixel_values=pixels)
    values = {name: calls[path][1].cpu() for name, path in paths.items()}
    shapes = {tuple(tensor.shape[:2]) for tensor in values.values()}
    if len(shapes) > 1 or any(tensor.dim() != 3 for tensor in values.values()):
        raise ModelError(
            "the blocks asked for put out different numbers of positions, or not one vector for each: ask for one layer"
        )
    ((batch, positions),) = shapes
    if pooling == "mean":
        values, positions = {name: tensor.mean(dim=1, keepdim=True) for name, tensor in values.items()}, 1
    rows = np.zeros(batch * positions, ROW)
    rows["text"] = np.repeat(np.arange(batch), positions)
    rows["token_start"] = np.tile(np.arange(positions), batch)
    rows["token_end"] = rows["token_start"] + 1
    rows["word"] = -1
    flat = {name: tensor.flatten(0, 1) for name, tensor in values.items()}
    return Activations(flat, rows, batch, stack, pooling, proof)


def _processed(images: Any, location: str) -> torch.Tensor:
    """Images as the checkpoint's own image processor prepares them."""
    import transformers

    items = list(images) if isinstance(images, Iterable) else [images]
    wrong = [i for i, item in enumerate(items) if not (hasattr(item, "shape") or hasattr(item, "getbands"))]
    if wrong or not items:
        given = f"images[{wrong[0]}] is {str(items[wrong[0]])[:40]!r}" if wrong else "there are no images"
        raise DataError(
            f"{given}: expected texts alone, or images alone: PIL images, arrays (height, width, channels), or a tensor of"
            " floating-point pixel values"
        )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(location, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"there is no image processor in '{location}': give pixel values (batch, channels, height, width)"
        ) from error
    try:
        return processor(images=items, return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]
    except (ValueError, TypeError) as error:
        raise DataError(f"the image processor in '{location}' refuses these images: {error}") from error


def _image_size(model: Any) -> Sequence[int] | None:
    """Height and width of the images that a model sees; None where its config names none."""
    size = getattr(main_config(model.config), "image_size", None)
    return (size, size) if isinstance(size, int) else size


def _check_size(model: Any, family: FamilyMap, pixels: torch.Tensor) -> None:
    """Refuse images of another size than the config's, unless the model takes them (Swin pads, DINOv2 interpolates)."""
    given, expected = tuple(pixels.shape[-2:]), _image_size(model)
    if expected is None or given == tuple(expected):
        return
    path = reader_of(model, family, main_stack(model, family), "pixel_values")
    try:
        with torch.inference_mode(), evaluation_mode(model):
            model.get_submodule(path or "")(pixel_values=pixels[:1])
    except (ValueError, RuntimeError, IndexError) as error:
        raise DataError(
            f"images of {given[0]} x {given[1]} pixels: this {family.model_type} model sees {expected[0]} x {expected[1]};"
            f" resize them ({error})"
        ) from error
