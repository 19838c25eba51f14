"""Adapters in one file: safetensors whatever its name ends in, with a manifest in its header.

The manifest holds how strongly each update is scaled, which of AdaLoRA's ranks stand, a digest of the tensors and one of
the base they were trained on. Everything is checked before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from peftlab.attaching.attachment import ADAPTER
from peftlab.efficient.embeddings import PrefixTuning, PTuningEmbedding
from peftlab.efficient.layers import AdaLoRALayer, LoRALayer, own_parameters
from peftlab.errors import CheckpointError, OutputError
from peftlab.files import sync_path
from peftlab.inspection.model_fingerprint import hash_tensor
from peftlab.torch_files import read_torch_file as read_torch_file

_KEY = "peftlab"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file of adapters says beside its tensors.

    Attributes:
        base: Digest of the base's parameters.
        scaling: Path of a LoRA or AdaLoRA layer to the factor of its update.
        kept: Path of an AdaLoRA layer to which of its ranks stand.
        content: Digest of the tensors; made while writing.
        versions: Library to version; made while writing.
    """

    base: str
    scaling: dict[str, float]
    kept: dict[str, list[bool]]
    content: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that the document's layers train in a model.

    Args:
        model: The model.

    Returns:
        Name in the model, without peft's name of the adapter, to parameter; a shared one once, under its first name.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer | AdaLoRALayer):
            own = own_parameters(module)
        elif isinstance(module, PTuningEmbedding | PrefixTuning):
            own = dict(module.named_parameters())
        else:
            continue
        prefix = f"{path}." if path else ""
        found.update({f"{prefix}{name}": p for name, p in own.items() if id(p) not in seen})
        seen.update(id(parameter) for parameter in own.values())
    return found


def describe(model: nn.Module, kept: Mapping[str, list[bool]]) -> Manifest:
    """A manifest of what is on a model.

    Args:
        model: The model.
        kept: Which of AdaLoRA's ranks stand.

    Returns:
        The manifest, without what is made while writing.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LoRALayer | AdaLoRALayer)}
    own = {id(parameter) for parameter in adapter_tensors(model).values()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in own and ".ranknum." not in name:
            plain = name.replace(".base_layer.", ".")
            digest.update(f"{plain} {tuple(parameter.shape)} {hash_tensor(parameter)}\n".encode())
    scaling = {path: float(layer.scaling[ADAPTER]) for path, layer in layers.items()}
    return Manifest(digest.hexdigest(), scaling, dict(kept))


def write(path: Path, tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Write a file atomically.

    Args:
        path: Where.
        tensors: Name to tensor.
        manifest: What to say beside them.

    Raises:
        OutputError: It cannot be written.
    """
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    versions = {library: metadata.version(library) for library in ("peft", "torch")}
    told = asdict(manifest) | {"content": _digest(plain), "versions": versions}
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(plain, aside, metadata={_KEY: json.dumps(told)})
        sync_path(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error}") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Read what `write` wrote.

    Args:
        path: The file.

    Returns:
        Tensors and manifest.

    Raises:
        CheckpointError: It is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
        manifest = Manifest(**told)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        hint = ""
        if path.is_file() and path.read_bytes()[:2] == b"PK":
            hint = "; it is a file of torch's own format: read it with torch_file=True"
        raise CheckpointError(
            f"{path} is no file of efficient weights ({type(error).__name__}: {error}){hint}"
        ) from error
    if _digest(tensors) != manifest.content:
        raise CheckpointError(f"{path} is damaged: its tensors are not as written")
    return tensors, manifest


def check_fit(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], where: Path) -> None:
    """Refuse tensors of other names or shapes than a model's adapters have.

    Args:
        own: The model's.
        given: The file's.
        where: The file.

    Raises:
        CheckpointError: They differ; lists what is missing, unexpected and misshapen.
    """
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"{where} does not fit, nothing was loaded: missing {missing}, unexpected {unexpected}, of another shape"
            f" {misshapen}"
        )


def check_same(own: Manifest, given: Manifest, where: Path, *, any_base: bool) -> None:
    """Refuse a file of adapters that mean something else on this model.

    Args:
        own: The model's manifest.
        given: The file's.
        where: The file.
        any_base: Whether another base will do.

    Raises:
        CheckpointError: The scale of an update differs, or the base does.
    """
    wrong = [path for path in given.scaling if own.scaling.get(path) != given.scaling[path]]
    if wrong:
        told = ", ".join(f"{path} {given.scaling[path]} for {own.scaling.get(path)}" for path in wrong)
        raise CheckpointError(
            f"{where} was trained with other scales (alpha, or alpha / rank): {told}; nothing was loaded"
        )
    if own.base != given.base and not any_base:
        raise CheckpointError(
            f"{where} was trained on a base with other parameters; nothing was loaded; any_base=True takes it all the same"
        )


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
