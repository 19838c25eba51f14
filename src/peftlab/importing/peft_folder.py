"""A plain peft folder: `adapter_config.json` and `adapter_model.safetensors`, of this peft or an older one.

Names are read with and without `base_model.model.` in front, with and without the adapter's name `default` in them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.errors import CheckpointError, ConfigError, InputError
from peftlab.family import FamilyMap
from peftlab.importing.fields import Fields
from peftlab.importing.foreign import PREFIX, Foreign, Translation
from peftlab.importing.peft_settings import Asked, config_defaults, translate
from peftlab.importing.tensor_files import read_tensors
from peftlab.method import Head

CONFIG_FILE = "adapter_config.json"
"""peft's name for the file of an adapter's config."""
_SAFE, _TORCH = "adapter_model.safetensors", "adapter_model.bin"
_HEADS: Mapping[str, Head] = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "classification",
}
PROMPT = "prompt_embeddings"
"""peft's name for all that it saves of a prompt."""


def read_peft_folder(path: Path, *, torch_file: bool, ignored: Collection[str]) -> Foreign:
    """Read a plain peft folder.

    Args:
        path: The folder.
        torch_file: Whether `adapter_model.bin` may be read.
        ignored: Fields of its config that shall not be heeded.

    Returns:
        The adapter.

    Raises:
        InputError: A file is missing, or of a kind that was not asked for.
        ConfigError: The config cannot be read, or its task is none that models here are trained for.
        CheckpointError: The tensors are damaged.
        UnknownNameError: This peft has no such type.
    """
    config = _read_config(path / CONFIG_FILE)
    kind = str(config["peft_type"]).lower()
    fields = Fields(config, config_defaults(kind), str(path / CONFIG_FILE), ignored)
    task = fields.take("task_type", str)
    if task is not None and task not in _HEADS:
        raise ConfigError(
            f"{path / CONFIG_FILE}: task_type {task}; adapters for {', '.join(_HEADS)} are imported"
        )
    file = path / (_SAFE if (path / _SAFE).is_file() or not (path / _TORCH).is_file() else _TORCH)
    tensors = normalise_names(read_tensors(file, torch_file=torch_file), file)
    head = None if task is None else _HEADS[task]
    base = str(config.get("base_model_name_or_path") or "")
    return Foreign(
        "a peft folder", path, tensors, head, base, partial(_translate, kind, fields, tensors, head)
    )


def _translate(
    kind: str,
    fields: Fields,
    tensors: Mapping[str, torch.Tensor],
    head: Head | None,
    model: nn.Module,
    family: FamilyMap,
) -> Translation:
    """The translation for a live base."""
    return translate(kind, Asked(fields, tensors, model, family, head or "causal"))


def _read_config(path: Path) -> dict[str, Any]:
    """The config as a mapping that names a type."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ConfigError(f"{path} names no peft_type, so it is not an adapter's config")
    return config


def normalise_names(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Tensors by the names under which this peft saves them.

    Args:
        tensors: By the names of a file.
        file: The file, for the message.

    Returns:
        By peft's present names.

    Raises:
        CheckpointError: Two names stand for one tensor, with other values.
    """
    # a prompt's head stands one level higher, for peft wraps no tuner around the base
    is_prompt = PROMPT in tensors
    prefixed = any(name.startswith("base_model.") for name in tensors)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.replace(".modules_to_save.", ".").replace(".default.", ".").removesuffix(".default")
        if plain.endswith(".lora_magnitude_vector.weight"):  # what a live model calls DoRA's magnitude
            plain = plain.removesuffix(".weight")
        if not prefixed and plain != PROMPT:
            plain = f"{'base_model.' if is_prompt else PREFIX}{plain}"
        if plain in found and not torch.equal(found[plain], tensor):
            raise CheckpointError(f"{file} holds {plain} twice, with other values")
        found[plain] = tensor
    return found
