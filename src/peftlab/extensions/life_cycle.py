"""What all extensions share: a model for each task on one base, to disk and back."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from peftlab.errors import InputError, MethodError, RunError
from peftlab.extensions import bundles
from peftlab.extensions.bundles import Record, record_of
from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.device_manager import DeviceManager
from peftlab.extensions.structure import copy_structure, hash_model
from peftlab.extensions.task_folders import TaskFolders
from peftlab.folders import OnConflict, check_name, choose_folder
from peftlab.insertion import chosen_stacks
from peftlab.mapping import map_model
from peftlab.method import Attachment, Head
from peftlab.store import read_manifest

_log = logging.getLogger(__name__)


class Extension(ABC):
    """A way to extend one base for any number of tasks; the base is never changed.

    Every model stands on the base's own weights and has its own adapter: N tasks take the memory of one base and N adapters.
    Where a device manager is given and the base is not as it wants it, the extension keeps one copy of the base on the
    device, and the models share that.

    Args:
        base_model: A transformers model that generates text or classifies, without adapters.
        config: The settings; None takes the defaults.
        device_manager: Where the models shall be and in which dtype; None leaves them where and as the base is.

    Attributes:
        base_model: The base, as it was given.
        config: The settings.
        device_manager: The device manager.

    Raises:
        MethodError: The base is not such a model.
        ConfigError: A field was set by hand that has no effect here.
    """

    kind: ClassVar[str]
    idle_fields: ClassVar[tuple[str, ...]] = ()
    idle_reason: ClassVar[str] = ""

    def __init__(
        self,
        base_model: nn.Module,
        config: ExtensionConfig | None = None,
        device_manager: DeviceManager | None = None,
    ) -> None:
        self.base_model = base_model
        self.config = ExtensionConfig() if config is None else config
        self.device_manager = device_manager
        self._head = head_of(base_model)
        self._current: str | None = None
        self._require_effect()
        self._on_device: nn.Module | None = None

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The method's settings, from the config."""

    def _require_effect(self) -> None:
        self.config.require_effect(self.idle_fields, where=type(self).__name__, why=self.idle_reason)

    @property
    def _stand(self) -> nn.Module:
        """The base on whose weights the models stand."""
        manager = self.device_manager
        if manager is None or manager.fits(self.base_model):
            return self.base_model
        if self._on_device is None or not manager.fits(self._on_device):
            self._on_device = manager.optimize_for_device(copy_structure(self.base_model))
        return self._on_device

    def _create(self, task_name: str) -> Any:
        """A new model for a task."""
        check_name(task_name)
        self._require_effect()
        settings, base = self._settings(), self._stand
        model = copy_structure(base, own=not self.config.freeze_base)
        own = {} if self.config.freeze_base else dict(model.named_parameters())
        self._check_position(model, settings)
        seed = int(torch.randint(2**31, ()).item())  # of the caller's stream, as any layer's start is
        attachment = bundles.attach(self.kind, model, settings, head=self._head, seed=seed)
        return self._keep(task_name, settings, base, attachment, own, seed=seed)

    def _check_position(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Say in the config's words that a stack is not there."""
        if settings.get("stack") is not None:
            try:
                chosen_stacks(map_model(model), settings["stack"])
            except MethodError as error:
                raise MethodError(f"layer_position: {error}") from None

    def _keep(
        self,
        task_name: str,
        settings: Mapping[str, Any],
        base: nn.Module,
        attachment: Attachment,
        own: Mapping[str, nn.Parameter],
        *,
        seed: int,
        done: str = "created",
    ) -> Any:
        """Make a model this extension's own, and say what trains in it."""
        unfrozen = bundles.unfreeze(attachment, own) if own else {}
        record = Record(self.kind, task_name, dict(settings), self._head, seed, base, attachment, unfrozen)
        model = bundles.keep(record)
        self._current = task_name
        self._tell(record, done)
        return model

    def _tell(self, record: Record, done: str) -> None:
        """The log's lines about a model that was made."""
        counts = bundles.count(record)
        trainable, base = sum(counts.values()), sum(p.numel() for p in self.base_model.parameters())
        what = {"lora": "LoRA adapter", "new_layer": "Extended model", "hybrid": "Hybrid model"}[self.kind]
        _log.info("%s %s: %s trainable parameters", what, done, f"{trainable:,}")
        parts = ", ".join(f"{kind} {number:,}" for kind, number in counts.items() if number)
        _log.info(
            "task %s: %s; %.2f%% of the base's %s", record.task, parts, 100 * trainable / base, f"{base:,}"
        )
        for note in record.attachment.selection.notes:
            _log.info("task %s: %s", record.task, note)

    def _save(
        self,
        model: nn.Module,
        task_name: str,
        path: str | Path | None,
        on_conflict: OnConflict,
        scores: Mapping[str, float] | None,
    ) -> Path:
        """Write a model's bundle."""
        record = record_of(model)
        if record is None or record.kind != self.kind:
            found = "no extension made it" if record is None else f"it is a {record.kind} model"
            raise InputError(f"{type(self).__name__} saves the {self.kind} models that it made: {found}")
        if path is None:
            folder = self._folders.place(task_name, on_conflict)
        else:
            check_name(task_name)
            folder = _explicit_place(Path(path).expanduser(), on_conflict)
        renamed = record if record.task == task_name else _renamed(record, task_name)
        bundles.save(renamed, folder, base_hash=hash_model(self.base_model), scores=scores or {})
        _log.info("task %s saved to %s", task_name, folder)
        return folder

    def _load(self, task_name: str, version: int | None, path: str | Path | None) -> Any:
        """A model from its bundle, on the base's weights; nothing of it is there if anything is wrong."""
        manifest, folder = self._read(task_name, version, path)
        model = copy_structure(self._stand, own=not manifest["freeze_base"])
        own = {} if manifest["freeze_base"] else dict(model.named_parameters())
        attachment = bundles.attach_as_saved(manifest, model, folder)
        return self._fill(task_name, manifest, folder, attachment, own)

    def _read(
        self, task_name: str, version: int | None, path: str | Path | None
    ) -> tuple[dict[str, Any], Path]:
        """A bundle's manifest and folder."""
        if path is not None and version is not None:
            raise InputError("version has no effect with path: a path names one folder")
        folder = Path(path).expanduser() if path is not None else self._folders.find(task_name, version)
        return bundles.read(folder, kind=self.kind, base_hash=hash_model(self.base_model)), folder

    def _fill(
        self,
        task_name: str,
        manifest: Mapping[str, Any],
        folder: Path,
        attachment: Attachment,
        own: Mapping[str, nn.Parameter],
    ) -> Any:
        """Put a bundle's tensors into a model and make it this extension's own."""
        unfrozen = bundles.unfreeze(attachment, own) if own else {}
        bundles.load(attachment, unfrozen, folder)
        made = self._keep(
            task_name,
            manifest["settings"],
            self._stand,
            attachment,
            own,
            seed=manifest["seed"],
            done="loaded",
        )
        made.eval()
        return made

    @property
    def _folders(self) -> TaskFolders:
        return TaskFolders(self.config.directory, self.kind)

    def _info(self, task_name: str | None, called: str) -> dict[str, Any]:
        """What is known of the saved models, or of one."""
        if task_name is not None:
            return self._facts(task_name)
        facts: dict[str, Any] = {}
        for name in self._folders.tasks():
            try:
                facts[name] = self._facts(name)
            except RunError as error:  # the list goes on: it says which one is damaged
                facts[name] = {"task": name, "problem": str(error)}
        return {
            f"available_{called}s": list(facts),
            f"current_{called}": self._current,
            "config": self.config.complete(),
            "tasks": facts,
        }

    def _facts(self, task_name: str) -> dict[str, Any]:
        """What the newest manifest of a task says."""
        folder = self._folders.find(task_name)
        manifest = read_manifest(folder)
        kept = ("created", "method", "settings", "freeze_base", "base", "counts", "scores", "versions")
        return {
            "task": task_name,
            "folder": str(folder),
            "saved_versions": self._folders.versions(task_name),
            **{name: manifest[name] for name in kept if name in manifest},
        }


def _renamed(record: Record, task_name: str) -> Record:
    """A record under the name that it is saved as."""
    return replace(record, task=task_name)


def _explicit_place(folder: Path, on_conflict: OnConflict) -> Path:
    """A folder that a person named; nothing but a bundle is ever replaced."""
    chosen = choose_folder(folder.parent, folder.name, on_conflict)
    if chosen.exists():
        read_manifest(chosen)
    return chosen


def head_of(model: Any) -> Head:
    """What a live model ends in.

    Args:
        model: A transformers model.

    Returns:
        classification, seq2seq or causal.

    Raises:
        MethodError: It is none of these.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise MethodError(
            f"an extension stands on a transformers model, not on {name}; for any other module there is"
            " EfficientFineTuningManager"
        )
    classes = (
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
    )
    if any(name == known or name in known for known in classes):
        return "classification"
    if not model.can_generate():
        raise MethodError(
            f"{name} neither generates text nor classifies: give a model with such a head, ...ForCausalLM,"
            " ...ForConditionalGeneration or ...ForSequenceClassification"
        )
    return "seq2seq" if model.config.is_encoder_decoder else "causal"
