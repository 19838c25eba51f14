"""LoRA from peft and new blocks on one base, trained together: what `hybrid` attaches.

Source: Hu et al. 2021, arXiv 2106.09685, peft `tuners/lora/`; the new blocks as in `extending.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from safetensors.torch import save_file
from torch import nn

from peftlab.attaching.attachment import ADAPTER_FILE, TASK_TYPES, PeftAttachment, adapter_parameters
from peftlab.attaching.extending import (
    LAYER_CONFIG,
    LAYER_FILE,
    NewLayerAttachment,
    check_phases,
    on_cpu,
)
from peftlab.attaching.merging import check_not_over
from peftlab.attaching.targeting import is_transposed, target_names, trained_whole
from peftlab.attaching.tensors import check_fit, read_tensors
from peftlab.errors import CheckpointError
from peftlab.family import FamilyMap, Selection
from peftlab.files import write_json
from peftlab.insertion.plain_model import check_can_stay
from peftlab.method import Head
from peftlab.schedule import Schedule

if TYPE_CHECKING:
    from peftlab.methods.hybrid import Settings


class HybridAttachment(PeftAttachment):
    """LoRA and new blocks trained together; satisfies `method.Attachment`.

    The LoRA stands on the new blocks' layers too, beside the weights that train there.

    Args:
        model: The base; where there is an existing layer, the model that this is on.
        family: The map of the base; not used where there is an existing layer.
        settings: Of the LoRA and of the blocks; an existing layer stands where it stands.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds LoRA's A and fresh weights.
        existing: New blocks that are on the model already and go on training.

    Raises:
        MethodError: There is no such stack or place, the stack is not proved, or it takes no block more.
        TargetError: The targets match nothing in this model.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        settings: Settings,
        *,
        head: Head,
        seed: int,
        existing: NewLayerAttachment | None = None,
    ) -> None:
        # "causal": a new head is copied and trained by peft here
        self.block = existing or NewLayerAttachment(model, family, settings, head="causal", seed=seed)
        self.layers, self.beneath = self.block.layers, self.block
        try:
            extended = self.block.family
            selection = extended.select(settings.targets)
            whole = trained_whole(model, extended, selection, head=head, peft_ties=True)
            config = peft.LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=target_names(extended, selection.adapted),
                modules_to_save=list(whole.modules) or None,
                ensure_weight_tying=whole.by_peft,
                task_type=TASK_TYPES[head],
                fan_in_fan_out=is_transposed(model, selection.adapted),
                bias="none",
            )
            super().__init__(model, config, selection, steps_to_train=self._steps, seed=seed, tied=whole.tied)
        except Exception:
            if existing is None:
                self.block.remove()
            raise
        notes = (*selection.notes, *self.layers.notes())
        self.selection = Selection(selection.adapted, selection.saved, notes)
        for parameter in self.layers.parameters.values():
            parameter.requires_grad_(True)

    def _steps(self, name: str) -> int:
        """Law 1's K: LoRA's A is behind B = 0, and both may stand in front of a zero in the block."""
        before, _ = self.layers.factors(self.family, name)
        return 1 + bool(before) + (".lora_A." in name or ".lora_embedding_A." in name)

    @property
    def counts(self) -> dict[str, int]:
        """Trainable parameters by kind: lora, new_layer, and whole (heads and embeddings trained whole)."""
        of_layers = {id(p) for p in self.layers.parameters.values()}
        found = {"lora": 0, "new_layer": 0, "whole": 0}
        for name, parameter in self.parameters().items():
            kind = "new_layer" if id(parameter) in of_layers else "lora" if ".lora_" in name else "whole"
            found[kind] += parameter.numel()
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's tensors, the new blocks' own, and what is trained whole, by their names in `model`."""
        own = {id(p) for p in adapter_parameters(self.model).values()}
        own |= {id(p) for p in self.layers.parameters.values()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which `model` answers as the base does."""
        with super().disabled(), self.block.disabled():
            yield

    def begin(self, schedule: Schedule) -> None:
        """Refuse phases that could never train what they name.

        Args:
            schedule: What trains when.

        Raises:
            ScheduleError: A phase trains tensors in front of a zero that no phase has opened.
        """
        check_phases(schedule, self.family, self.parameters(), self.layers)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on: peft's tensors by peft's names, the blocks' by their names in the base."""
        return super().tensors() | on_cpu(self.layers.state())

    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of peft's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in super().tensors().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        check_fit(self.tensors(), tensors)
        state = self.layers.state()
        super().load({name: tensor for name, tensor in tensors.items() if name not in state})
        self.layers.load({name: tensors[name] for name in state})

    def save(self, folder: Path) -> None:
        """Write peft's two files and the new blocks' two.

        Args:
            folder: Where; made if needed.
        """
        super().save(folder)
        save_file(on_cpu(self.layers.state()), folder / LAYER_FILE)
        write_json(folder / LAYER_CONFIG, self.block.describe() | {"method": "hybrid"})

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit, or lacks one of the two kinds.
        """
        layers = self.block.read_saved(folder)
        if not (folder / ADAPTER_FILE).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_FILE}: it holds new blocks without LoRA")
        self.load(read_tensors(folder / ADAPTER_FILE) | layers)

    def remove(self) -> nn.Module:
        """Take LoRA and the new blocks off.

        Returns:
            The base as it was given.
        """
        super().remove()
        return self.block.remove()

    def merge(self) -> nn.Module:
        """Fold LoRA into the base and the new blocks, and leave the blocks in the base for good.

        Returns:
            The base, the same object, a plain and deeper model.

        Raises:
            MethodError: The LoRA cannot be merged, the blocks cannot stay, or they are not on the base any more; nothing has
                changed.
            NonFiniteError: A merged weight would not be finite; nothing has changed.
        """
        check_not_over(self.ended, "merged")
        check_can_stay(self.model.base_model.model, self.layers)
        base = super().merge()
        self.block.stay()
        return base
