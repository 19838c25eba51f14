"""The document's `LoRAExtension`: a LoRA adapter for each task on one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.device_manager import DeviceManager
from peftlab.extensions.life_cycle import Extension
from peftlab.folders import OnConflict


class LoRAExtension(Extension):
    """LoRA adapters, one for each task; see `Extension` for what all extensions share.

    Example:
        >>> extension = LoRAExtension(base_model, ExtensionConfig(lora_r=8, save_directory="adapters"))
        >>> model = extension.create_adapter("python")
        >>> extension.save_adapter(model, "python")
        >>> LoRAExtension(base_model, extension.config).load_adapter("python")
    """

    kind = "lora"
    idle_fields = ("layer_position", "layer_initialization_scale")
    idle_reason = "it adds no layer (TransformerLayerExtension and HybridExtension do)"

    def _settings(self) -> dict[str, Any]:
        return self.config.lora_settings()

    def create_adapter(self, task_name: str) -> Any:
        """A model with a new LoRA adapter; it answers as the base does until it is trained.

        Args:
            task_name: The task's name.

        Returns:
            A `PeftModel` on the base's own weights, only the adapter trainable (freeze_base=False: everything).

        Raises:
            InputError: The name cannot be a task's.
            TargetError: The targets match nothing in this model.
        """
        return self._create(task_name)

    def save_adapter(
        self,
        model: nn.Module,
        task_name: str,
        path: str | Path | None = None,
        *,
        on_conflict: OnConflict = "refuse",
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Save an adapter into the task's folder.

        Args:
            model: From `create_adapter` or `load_adapter`.
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

    def load_adapter(
        self, task_name: str, path: str | Path | None = None, *, version: int | None = None
    ) -> Any:
        """A saved adapter on the base's own weights, in any process; its settings are those it was saved with.

        Args:
            task_name: The task's name.
            path: The bundle's own folder instead of one below `save_directory`.
            version: Which version; None is the newest.

        Returns:
            The model in evaluation mode.

        Raises:
            InputError: Nothing is saved under that name.
            CheckpointError: A file is damaged, does not fit, or is of another base.
        """
        return self._load(task_name, version, path)

    def list_adapters(self) -> list[str]:
        """The tasks with a saved adapter, sorted."""
        return self._folders.tasks()

    def get_adapter_info(self, task_name: str | None = None) -> dict[str, Any]:
        """What is known of the saved adapters.

        Args:
            task_name: One task; None for all, with what is current and the config.

        Returns:
            JSON-ready values: folder, versions, date, settings, base and its hash, counts, scores.

        Raises:
            InputError: Nothing is saved under that name.
            CheckpointError: The one that was asked for is damaged; among all it is listed with its problem.
        """
        return self._info(task_name, "adapter")


def create_lora_adapter(
    base_model: nn.Module,
    task_name: str,
    config: ExtensionConfig | None = None,
    device_manager: DeviceManager | None = None,
) -> Any:
    """`LoRAExtension.create_adapter` in one call.

    Args:
        base_model: The base; not changed.
        task_name: The task's name.
        config: The settings.
        device_manager: Where the model shall be.

    Returns:
        The model.
    """
    return LoRAExtension(base_model, config, device_manager).create_adapter(task_name)
