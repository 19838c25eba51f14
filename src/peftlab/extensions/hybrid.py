"""The document's `HybridExtension`: LoRA and a new layer trained together, the layer a task's own or shared by several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.attaching.combining import HybridAttachment
from peftlab.attaching.extending import NewLayerAttachment, share_layers
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError, InputError, MethodError
from peftlab.extensions.bundles import Record, record_of
from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.device_manager import DeviceManager
from peftlab.extensions.life_cycle import Extension
from peftlab.extensions.structure import copy_structure, hash_model
from peftlab.folders import OnConflict, check_name
from peftlab.insertion import chosen_stacks
from peftlab.mapping import map_model
from peftlab.settings import validate


class HybridExtension(Extension):
    """LoRA and a new layer for each task; see `Extension` for what all extensions share.

    Example:
        >>> extension = HybridExtension(base_model, ExtensionConfig(lora_r=8))
        >>> own = extension.create_hybrid("python")
        >>> shared = extension.create_hybrid_from_existing(own, "javascript")  # one layer in two models
    """

    kind = "hybrid"

    def _settings(self) -> dict[str, Any]:
        return self.config.layer_settings() | self.config.lora_settings()

    def create_hybrid(self, task_name: str) -> Any:
        """A model with LoRA and a new layer of its own, both trainable; it answers as the base does until trained.

        Args:
            task_name: The task's name.

        Returns:
            A `PeftModel` on the base's own weights.

        Raises:
            InputError: The name cannot be a task's.
            MethodError: There is no such stack, or it takes no layer more.
            TargetError: The targets match nothing in this model.
        """
        return self._create(task_name)

    def create_hybrid_from_existing(self, base_model: nn.Module, task_name: str) -> Any:
        """A model with new LoRA on the layer of another model: the layer goes on training, and is one for both.

        The layer's tensors are the other model's very tensors: what trains the one shows in the other at once. The other
        model is not changed by this call.

        Args:
            base_model: A model with a new layer, from `TransformerLayerExtension.add_layer` or of this extension.
            task_name: The task's name.

        Returns:
            A `PeftModel` on the base's own weights; it answers as the other model does without its LoRA.

        Raises:
            InputError: The name cannot be a task's.
            MethodError: That model has no new layer, stands on another base or trains its base, or its layer stands where
                the config does not want one.
            TargetError: The targets match nothing in this model.
        """
        check_name(task_name)
        record = self._lender(base_model)
        settings = self._settings() | _layer_of(record)
        model = copy_structure(self._stand, own=not self.config.freeze_base)
        own = {} if self.config.freeze_base else dict(model.named_parameters())
        seed = int(torch.randint(2**31, ()).item())
        attachment = self._join(model, record, settings, seed=seed)
        return self._keep(task_name, settings, self._stand, attachment, own, seed=seed)

    def create_hybrid_model(
        self, task_name: str, use_shared_layer: bool = False, shared_layer_model: nn.Module | None = None
    ) -> Any:
        """`create_hybrid`, or `create_hybrid_from_existing` where a layer is shared.

        Args:
            task_name: The task's name.
            use_shared_layer: Whether the layer is another model's.
            shared_layer_model: That model.

        Returns:
            The model.

        Raises:
            InputError: One of the two is given without the other, or the name cannot be a task's.
            MethodError: As the two have it.
            TargetError: The targets match nothing in this model.
        """
        if use_shared_layer != (shared_layer_model is not None):
            raise InputError(
                "use_shared_layer=True needs shared_layer_model, the model whose layer is shared"
                if use_shared_layer
                else "shared_layer_model has no effect without use_shared_layer=True"
            )
        if shared_layer_model is None:
            return self.create_hybrid(task_name)
        return self.create_hybrid_from_existing(shared_layer_model, task_name)

    def save_hybrid_model(
        self,
        model: nn.Module,
        task_name: str,
        path: str | Path | None = None,
        *,
        on_conflict: OnConflict = "refuse",
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Save LoRA and layer into the task's folder; a shared layer as it is now.

        Args:
            model: From this extension.
            task_name: The task's name.
            path: The bundle's own folder instead of one below `save_directory`.
            on_conflict: Where the task has one: "refuse", "version" (keep both) or "overwrite" (replace the newest).
            scores: What the manifest shall say of its quality: metric to value.

        Returns:
            The folder.

        Raises:
            InputError: The name cannot be a folder's, or the model is not this extension's.
            OutputError: The task has one and nothing was said of that, or it cannot be written.
        """
        return self._save(model, task_name, path, on_conflict, scores)

    def load_hybrid_model(
        self,
        task_name: str,
        base_with_layer: nn.Module | None = None,
        path: str | Path | None = None,
        *,
        version: int | None = None,
    ) -> Any:
        """A saved hybrid on the base's own weights, in any process; its settings are those it was saved with.

        Args:
            task_name: The task's name.
            base_with_layer: A model whose layer is to be shared instead of a layer of its own; it must hold the saved
                values, which this call therefore does not change.
            path: The bundle's own folder instead of one below `save_directory`.
            version: Which version; None is the newest.

        Returns:
            The model in evaluation mode.

        Raises:
            InputError: Nothing is saved under that name.
            MethodError: `base_with_layer` has no layer to share with this base.
            CheckpointError: A file is damaged, does not fit, or is of another base, or `base_with_layer` has another layer.
        """
        if base_with_layer is None:
            return self._load(task_name, version, path)
        manifest, folder = self._read(task_name, version, path)
        record = self._lender(base_with_layer, check_position=False)
        block = _block(record)
        saved = block.read_saved(folder)
        state = block.layers.state()
        other = [
            n for n, t in state.items() if n not in saved or not torch.equal(t.cpu(), saved[n].to(t.dtype))
        ]
        if other:
            raise CheckpointError(
                f"the layer of base_with_layer is not the one in {folder}: {len(other)} of {len(state)} tensors differ, such"
                f" as {other[0]}; it was trained on, or is another. Without base_with_layer the saved one is loaded"
            )
        model = copy_structure(self._stand, own=not manifest["freeze_base"])
        own = {} if manifest["freeze_base"] else dict(model.named_parameters())
        attachment = self._join(model, record, manifest["settings"], seed=manifest["seed"])
        return self._fill(task_name, manifest, folder, attachment, own)

    def list_hybrid_models(self) -> list[str]:
        """The tasks with a saved hybrid, sorted."""
        return self._folders.tasks()

    def get_hybrid_info(self, task_name: str | None = None) -> dict[str, Any]:
        """What is known of the saved hybrids.

        Args:
            task_name: One task; None for all, with what is current and the config.

        Returns:
            JSON-ready values: folder, versions, date, settings, base and its hash, counts, scores.

        Raises:
            InputError: Nothing is saved under that name.
            CheckpointError: The one that was asked for is damaged; among all it is listed with its problem.
        """
        return self._info(task_name, "hybrid_model")

    def _lender(self, model: nn.Module, *, check_position: bool = True) -> Record:
        """The record of a model whose layer can be shared."""
        record = record_of(model)
        if record is None or not hasattr(record.attachment, "layers"):
            raise MethodError(
                "this model has no new layer of an extension; make one with TransformerLayerExtension.add_layer, or use"
                " create_hybrid, which adds one"
            )
        if record.unfrozen:
            raise MethodError(
                "this model was made with freeze_base=False: its layer was trained on a base that is not the one here"
            )
        if record.base is not self._stand and hash_model(record.base) != hash_model(self._stand):
            raise MethodError(
                "this model stands on another base than this extension: its layer has no place here"
            )
        if check_position and "layer_position" in self.config.set_by_hand:
            family = map_model(record.base)
            wanted = chosen_stacks(family, self.config.layer_position)
            stands = [grown.stack for grown in _block(record).layers.grown]
            if wanted != stands:
                raise MethodError(
                    f"layer_position={self.config.layer_position!r}, but the existing layer stands in {', '.join(stands)};"
                    " leave layer_position out, or make the layer there"
                )
        return record

    def _join(
        self, model: nn.Module, record: Record, settings: Mapping[str, Any], *, seed: int
    ) -> HybridAttachment:
        """Put another model's layer and new LoRA on a copy of the base."""
        lent = _block(record)
        flags = [(p, p.requires_grad) for p in lent.layers.parameters.values()]
        try:
            shared = share_layers(
                model, map_model(model), lent, head="causal", seed=seed
            )  # a new head is peft's to train
            made = HybridAttachment(
                model,
                shared.family,
                validate(METHODS.load(self.kind).Settings, settings),
                head=self._head,
                seed=seed,
                existing=shared,
            )
        except Exception:
            for parameter, required in flags:
                parameter.requires_grad_(required)
            raise
        _take_heads(record, made)
        return made


def _block(record: Record) -> NewLayerAttachment:
    """The new blocks of a model, alone or in a hybrid."""
    attachment: Any = record.attachment
    found: NewLayerAttachment = getattr(attachment, "block", attachment)
    return found


def _layer_of(record: Record) -> dict[str, Any]:
    """The settings of an existing layer."""
    found: dict[str, Any] = _block(record).layers.placement.model_dump(
        include={"stack", "position", "count", "initialization", "scale"}
    )
    return found


def _take_heads(record: Record, made: HybridAttachment) -> None:
    """Let the copies of a classifier's trained head begin where the other model's stand."""
    theirs: Any = record.attachment.model
    for name, module in made.model.base_model.model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            trained: Any = theirs.base_model.model if record.kind == "hybrid" else theirs
            head: Any = trained.get_submodule(name)
            head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
            copies["default"].load_state_dict(head.state_dict())


def create_hybrid_model(
    base_model: nn.Module,
    task_name: str,
    config: ExtensionConfig | None = None,
    device_manager: DeviceManager | None = None,
    use_shared_layer: bool = False,
    shared_layer_model: nn.Module | None = None,
) -> Any:
    """`HybridExtension.create_hybrid_model` in one call.

    Args:
        base_model: The base; not changed.
        task_name: The task's name.
        config: The settings.
        device_manager: Where the model shall be.
        use_shared_layer: Whether the layer is another model's.
        shared_layer_model: That model.

    Returns:
        The model.
    """
    extension = HybridExtension(base_model, config, device_manager)
    return extension.create_hybrid_model(task_name, use_shared_layer, shared_layer_model)
