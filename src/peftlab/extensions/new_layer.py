"""The document's `TransformerLayerExtension`: a new transformer layer for each task on one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.device_manager import DeviceManager
from peftlab.extensions.life_cycle import Extension
from peftlab.folders import OnConflict


class TransformerLayerExtension(Extension):
    """New transformer layers, one for each task; see `Extension` for what all extensions share.

    Example:
        >>> extension = TransformerLayerExtension(base_model, ExtensionConfig(layer_position="decoder"))
        >>> model = extension.add_layer("python")
    """

    kind = "new_layer"
    idle_fields = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    idle_reason = "it adds no LoRA (LoRAExtension and HybridExtension do)"

    def _settings(self) -> dict[str, Any]:
        return self.config.layer_settings()

    def add_layer(self, task_name: str) -> Any:
        """A model with a new layer at the end of the stack, a copy of the one before it that begins as the identity.

        Args:
            task_name: The task's name.

        Returns:
            A model of the base's class on the base's own weights, only the new layer (and a classifier's head) trainable.

        Raises:
            InputError: The name cannot be a task's.
            MethodError: There is no such stack, or it takes no layer more.
        """
        return self._create(task_name)

    def create_extended_model(self, task_name: str) -> Any:
        """`add_layer`, as the document's code calls it.

        Args:
            task_name: The task's name.

        Returns:
            The model.
        """
        return self.add_layer(task_name)

    def save_checkpoint(
        self,
        model: nn.Module,
        task_name: str,
        path: str | Path | None = None,
        *,
        on_conflict: OnConflict = "refuse",
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Save a new layer into the task's folder; the base is not in it.

        Args:
            model: From `add_layer` or `load_checkpoint`.
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

    def load_checkpoint(
        self, task_name: str, path: str | Path | None = None, *, version: int | None = None
    ) -> Any:
        """A saved layer on the base's own weights, in any process; its settings are those it was saved with.

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

    def list_checkpoints(self) -> list[str]:
        """The tasks with a saved layer, sorted."""
        return self._folders.tasks()

    def get_checkpoint_info(self, task_name: str | None = None) -> dict[str, Any]:
        """What is known of the saved layers.

        Args:
            task_name: One task; None for all, with what is current and the config.

        Returns:
            JSON-ready values: folder, versions, date, settings, base and its hash, counts, scores.

        Raises:
            InputError: Nothing is saved under that name.
            CheckpointError: The one that was asked for is damaged; among all it is listed with its problem.
        """
        return self._info(task_name, "checkpoint")


def create_extended_model(
    base_model: nn.Module,
    task_name: str,
    config: ExtensionConfig | None = None,
    device_manager: DeviceManager | None = None,
) -> Any:
    """`TransformerLayerExtension.add_layer` in one call.

    Args:
        base_model: The base; not changed.
        task_name: The task's name.
        config: The settings.
        device_manager: Where the model shall be.

    Returns:
        The model.
    """
    return TransformerLayerExtension(base_model, config, device_manager).add_layer(task_name)
