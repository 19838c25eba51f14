"""The document's continual learners: a LoRA adapter, a new layer, or both for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peftlab.continual.learner import ContinualLearner
from peftlab.extensions.hybrid import HybridExtension
from peftlab.extensions.lora import LoRAExtension
from peftlab.extensions.new_layer import TransformerLayerExtension


class LoRAContinualLearner(ContinualLearner):
    """A LoRA adapter for each task; see `ContinualLearner`.

    Example:
        >>> learner = LoRAContinualLearner("peftlab/tiny-base", config=ExtensionConfig(lora_r=8))
        >>> learner.prepare_model()
        >>> minutes = learner.train_task(rows, "python", epochs=2, batch_size=8)
        >>> learner.evaluate_task(test_rows, "python", num_samples=50)["bleu"].value
    """

    kind = "lora"

    @property
    def lora_extension(self) -> LoRAExtension:
        """What makes, saves and loads the models, under the document's name."""
        self._require_prepared()
        found: LoRAExtension = self._extension
        return found

    def _make_extension(self) -> LoRAExtension:
        return LoRAExtension(self.base_model, self.config)

    def _create(self, task_name: str) -> Any:
        return self._extension.create_adapter(task_name)

    def _save(self, task_name: str) -> None:
        self._extension.save_adapter(self._models[task_name], task_name, on_conflict="overwrite")

    def _load(self, task_name: str) -> Any:
        return self._extension.load_adapter(task_name)

    def list_tasks(self) -> list[str]:
        """The tasks with a saved adapter, sorted."""
        self._require_prepared()
        return list(self._extension.list_adapters())


class FullLayerContinualLearner(ContinualLearner):
    """A new transformer layer for each task; see `ContinualLearner`."""

    kind = "new_layer"

    @property
    def layer_extension(self) -> TransformerLayerExtension:
        """What makes, saves and loads the models, under the document's name."""
        self._require_prepared()
        found: TransformerLayerExtension = self._extension
        return found

    def _make_extension(self) -> TransformerLayerExtension:
        return TransformerLayerExtension(self.base_model, self.config)

    def _create(self, task_name: str) -> Any:
        return self._extension.add_layer(task_name)

    def _save(self, task_name: str) -> None:
        self._extension.save_checkpoint(self._models[task_name], task_name, on_conflict="overwrite")

    def _load(self, task_name: str) -> Any:
        return self._extension.load_checkpoint(task_name)

    def list_tasks(self) -> list[str]:
        """The tasks with a saved layer, sorted."""
        self._require_prepared()
        return list(self._extension.list_checkpoints())


class HybridLoRAFullLayerLearner(ContinualLearner):
    """LoRA and a new layer for each task; see `ContinualLearner`.

    Args:
        model_name: As for `ContinualLearner`; so are the others.
        tokenizer: The tokenizer.
        device: Where the models shall be.
        use_shared_layer: Whether all tasks have one layer, whose tensors go on learning with every task: then each task has
            a LoRA of its own alone, and what a later task does to the layer shows in the earlier ones at once. Their bundles
            are written anew with the layer as it is.
        options: As for `ContinualLearner`.
    """

    kind = "hybrid"

    def __init__(
        self,
        model_name: str | Path | nn.Module,
        tokenizer: Any = None,
        device: str = "auto",
        *,
        use_shared_layer: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model_name, tokenizer, device, **options)
        self.use_shared_layer = use_shared_layer

    @property
    def hybrid_extension(self) -> HybridExtension:
        """What makes, saves and loads the models, under the document's name."""
        self._require_prepared()
        found: HybridExtension = self._extension
        return found

    def _make_extension(self) -> HybridExtension:
        return HybridExtension(self.base_model, self.config)

    def _create(self, task_name: str) -> Any:
        lender = self._lender(task_name) if self.use_shared_layer else None
        if lender is None:
            return self._extension.create_hybrid(task_name)
        return self._extension.create_hybrid_from_existing(lender, task_name)

    def _lender(self, task_name: str) -> Any:
        """A model with the shared layer; those that were saved by another process are joined to one layer first."""
        for name in self.list_tasks():
            if name not in self._models and name != task_name:
                self._models[name] = self._load(name)
        return next((model for name, model in self._models.items() if name != task_name), None)

    def _save(self, task_name: str) -> None:
        self._extension.save_hybrid_model(self._models[task_name], task_name, on_conflict="overwrite")
        others = [name for name in self._models if name != task_name] if self.use_shared_layer else []
        for name in others:
            self._extension.save_hybrid_model(self._models[name], name, on_conflict="overwrite")

    def _load(self, task_name: str) -> Any:
        lender = next(iter(self._models.values()), None) if self.use_shared_layer else None
        return self._extension.load_hybrid_model(task_name, lender)

    def list_tasks(self) -> list[str]:
        """The tasks with a saved hybrid, sorted."""
        self._require_prepared()
        return list(self._extension.list_hybrid_models())
