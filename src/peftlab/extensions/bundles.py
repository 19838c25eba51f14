"""What an extension keeps of a model that it made, and how that goes to disk and comes back.

The folder is a bundle as in `store.py`, with the same manifest and checksums, but for the tokenizer and the prompt template,
which these models are made without.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab.attaching.extending import on_cpu
from peftlab.attaching.tensors import check_fit
from peftlab.catalog import METHODS
from peftlab.devices import describe_environment
from peftlab.errors import CheckpointError, ConfigError, MethodError
from peftlab.files import CHECKSUMS, new_folder, write_json
from peftlab.mapping import map_model
from peftlab.method import Attachment, Head
from peftlab.restoring import load_whole
from peftlab.settings import validate
from peftlab.store import MANIFEST, MANIFEST_VERSION, read_manifest

BASE_FILE = "trained_base.safetensors"
"""The base's own tensors, where they were trained too."""
_RECORD = "_extension"


@dataclass(frozen=True, slots=True)
class Record:
    """What an extension keeps of a model that it made.

    Attributes:
        kind: lora, new_layer or hybrid.
        task: The task's name.
        settings: The method's settings, as plain values.
        head: What the model ends in.
        seed: What the adapter's start was drawn from.
        base: The base on whose weights it stands.
        attachment: What was added to a copy of the base's modules.
        unfrozen: The model's own copies of the base's tensors, by name in the base; empty where the base is frozen.
    """

    kind: str
    task: str
    settings: Mapping[str, Any]
    head: Head
    seed: int
    base: nn.Module = field(repr=False)
    attachment: Attachment = field(repr=False)
    unfrozen: Mapping[str, nn.Parameter] = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """The record of a copy of the model: its base is the same one."""
        attachment, unfrozen = copy.deepcopy((self.attachment, dict(self.unfrozen)), memo)
        return replace(self, attachment=attachment, unfrozen=unfrozen)


def record_of(model: Any) -> Record | None:
    """The record of a model, None where no extension made it.

    Args:
        model: Any object.
    """
    found = getattr(model, "__dict__", {}).get(_RECORD)
    return found if isinstance(found, Record) else None


def attach(
    kind: str, model: nn.Module, settings: Mapping[str, Any], *, head: Head, seed: int, where: str = ""
) -> Attachment:
    """Add what a method adds to a model.

    Args:
        kind: The method.
        model: The model; changed.
        settings: The method's settings, as plain values.
        head: What the model ends in.
        seed: Seeds the start.
        where: What the settings are of, for messages.

    Returns:
        The attachment.

    Raises:
        ConfigError: The settings are not the method's.
        MethodError: The method has no place in this model.
        TargetError: The targets match nothing in it.
    """
    method = METHODS.load(kind)
    made: Attachment = method.attach(
        model, map_model(model), validate(method.Settings, settings, where=where), head=head, seed=seed
    )
    return made


def keep(record: Record) -> Any:
    """Note a record on its model.

    Args:
        record: The record.

    Returns:
        The model.
    """
    model = record.attachment.model
    vars(model)[_RECORD] = record
    return model


def unfreeze(attachment: Attachment, own: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Let a model's own copies of the base's tensors train, those that its forward pass can reach.

    Args:
        attachment: What was added.
        own: The copies, by name in the base.

    Returns:
        Those that train now.
    """
    named = attachment.model.named_parameters()
    reached = {id(p) for name, p in named if ".original_module." not in name}  # peft trains a copy of that
    found = {name: p for name, p in own.items() if id(p) in reached}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def count(record: Record) -> dict[str, int]:
    """Trainable parameters by kind.

    Args:
        record: A model's record.

    Returns:
        lora, new_layer, whole (heads and embeddings trained whole) and base (where it is not frozen).
    """
    layers = getattr(record.attachment, "layers", None)
    of_layers = {id(p) for p in layers.parameters.values()} if layers is not None else set()
    found = {"lora": 0, "new_layer": 0, "whole": 0, "base": sum(p.numel() for p in record.unfrozen.values())}
    for name, parameter in record.attachment.parameters().items():
        kind = "new_layer" if id(parameter) in of_layers else "lora" if ".lora_" in name else "whole"
        found[kind] += parameter.numel()
    return found


def save(record: Record, path: Path, *, base_hash: str, scores: Mapping[str, float]) -> Path:
    """Write a model's bundle.

    Args:
        record: The model's record.
        path: The folder; one that is there is replaced in one move.
        base_hash: From `structure.hash_model` of the base as the caller gave it.
        scores: What the manifest says of its quality.

    Returns:
        The path.

    Raises:
        OutputError: It cannot be written.
    """
    counts = count(record)
    tensors = [*record.attachment.parameters().values(), *record.unfrozen.values()]
    with new_folder(path) as folder:
        record.attachment.save(folder)
        if record.unfrozen:
            save_file(on_cpu(record.unfrozen), folder / BASE_FILE)
        manifest = {
            "version": MANIFEST_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": record.kind,
            "scope": "model",
            "settings": dict(record.settings),
            "beside": [],
            "head": record.head,
            "labels": [],
            "seed": record.seed,
            "base": {
                "name": _name(record.base),
                "class": type(record.base).__name__,
                "tensors_sha256": None,
                "live_sha256": base_hash,
            },
            "freeze_base": not record.unfrozen,
            "tokenizer_sha256": None,
            "template": None,
            "task": record.task,
            "versions": describe_environment(Path.cwd())["versions"],
            "counts": {"tensors": len(tensors), "parameters": sum(counts.values()), "by_kind": counts},
            "scores": dict(scores),
            "origin": "",
            "checksums": CHECKSUMS,
        }
        write_json(folder / MANIFEST, json.loads(json.dumps(manifest)))
    return path


def _name(base: Any) -> str:
    """What a base is called: as it was loaded, or its class."""
    return getattr(base.config, "name_or_path", "") or type(base).__name__


def read(path: Path, *, kind: str, base_hash: str) -> dict[str, Any]:
    """A bundle's manifest, if it is of this kind and this base.

    Args:
        path: The folder.
        kind: lora, new_layer or hybrid.
        base_hash: Of the base that it is to be put on.

    Returns:
        The manifest.

    Raises:
        InputError: The folder is no bundle.
        CheckpointError: A file is damaged, or it is of another kind or another base.
    """
    manifest = read_manifest(path)
    if manifest["method"] != kind:
        raise CheckpointError(f"{path} holds a {manifest['method']} model, not a {kind} one")
    expected = manifest["base"].get("live_sha256")
    if expected is None:
        raise CheckpointError(f"{path} was not saved by an extension; open it with peftlab.load")
    if expected != base_hash:
        raise CheckpointError(
            f"{path} was made on another base: {manifest['base']['class']} '{manifest['base']['name']}' with sha256"
            f" {expected[:12]}..., this one has {base_hash[:12]}..."
        )
    return manifest


def load(attachment: Attachment, unfrozen: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put a bundle's tensors into a model that was made as it was.

    Args:
        attachment: What was added.
        unfrozen: The base's tensors that trained, by name in the base.
        path: The bundle's folder, its checksums checked.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape, or no tensors; names them.
    """
    try:
        saved = load_file(path / BASE_FILE) if unfrozen else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / BASE_FILE} cannot be read: {error}") from error
    check_fit(unfrozen, saved)
    load_whole(attachment, path)
    with torch.no_grad():
        for name, tensor in saved.items():
            unfrozen[name].copy_(tensor)


def attach_as_saved(manifest: Mapping[str, Any], model: nn.Module, path: Path) -> Attachment:
    """Add to a model what a manifest says, with values of no meaning yet.

    Args:
        manifest: The bundle's manifest.
        model: The model; changed.
        path: The bundle's folder, for messages.

    Returns:
        The attachment.

    Raises:
        CheckpointError: The manifest's settings cannot be followed.
    """
    try:
        return attach(
            manifest["method"], model, manifest["settings"], head=manifest["head"], seed=manifest["seed"]
        )
    except (ConfigError, MethodError) as error:
        raise CheckpointError(f"{path}: its settings cannot be followed: {error}") from error
