"""New blocks on a live base: what `new_layer` attaches, and what `combining.py` puts LoRA beside.

Source: block expansion, Wu et al. 2024, LLaMA Pro, arXiv 2401.02415; gates at zero, Bachlechner et al. 2020, ReZero,
arXiv 2003.04887; how a block is made and put in stands in `insertion/`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from peftlab.attaching.merging import check_not_over
from peftlab.attaching.occupancy import AllOrNothing, check_free, occupy
from peftlab.attaching.targeting import new_modules
from peftlab.attaching.tensors import check_fit, read_tensors, read_values
from peftlab.attaching.wide_copies import narrow, widen
from peftlab.errors import CheckpointError, ScheduleError
from peftlab.family import FamilyMap, Selection
from peftlab.files import write_json
from peftlab.insertion import NewLayers, configs_of
from peftlab.insertion.plain_model import check_can_stay
from peftlab.mapping import map_model
from peftlab.method import Head, OrdinaryTraining
from peftlab.placement import Placement
from peftlab.schedule import Schedule

LAYER_FILE = "new_layer.safetensors"
"""The new blocks' tensors, by their names in the base with the blocks in it."""
LAYER_CONFIG = "new_layer.json"
"""Where the new blocks stand and how they started."""
_VERSION = 1


class NewLayerAttachment(OrdinaryTraining, metaclass=AllOrNothing):
    """New blocks on a base; satisfies `method.Attachment`.

    Args:
        model: The base; the blocks are put into it, its own tensors are frozen and not changed.
        family: Its map.
        placement: Where the blocks stand and how they start.
        head: What the model ends in; a classification head is new: a copy of it is trained whole.
        seed: Seeds fresh weights.
        lent: New blocks of another model whose tensors are these blocks' tensors too.

    Attributes:
        model: The base, the same object.
        layers: The new blocks.

    Raises:
        MethodError: There is no such stack or place, the stack is not proved, or it takes no block more.
    """

    rewritten: tuple[str, ...] = ()
    ended = ""

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        placement: Placement,
        *,
        head: Head,
        seed: int,
        lent: NewLayers | None = None,
    ) -> None:
        check_free(model)
        self.model: Any = model
        self.layers = NewLayers(model, family, placement, seed=seed, lent=lent)
        self._required_grad = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._required_grad:
            parameter.requires_grad_(False)
        kept = {id(config): config for config in configs_of(model).values()}
        self._heads = {name: getattr(model, name) for name in new_modules(model, head)}
        self._trained_heads = {name: copy.deepcopy(head, dict(kept)) for name, head in self._heads.items()}
        for name, trained in self._trained_heads.items():
            trained.requires_grad_(True)
            widen(trained)
            setattr(model, name, trained)
        self.layers.put_in()
        try:
            self.family = map_model(model)
        except Exception:
            self.remove()
            raise
        self.selection = Selection((), (), tuple(self.layers.notes()))
        occupy(model, self)

    def _own(self) -> dict[str, torch.Tensor]:
        """All tensors that the attachment added, by name in the base."""
        heads = {
            f"{name}.{inner}": tensor
            for name, head in self._trained_heads.items()
            for inner, tensor in head.state_dict(keep_vars=True).items()
        }
        return {**self.layers.state(), **heads}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The new blocks' tensors, and those of a new head, by their names in `model`."""
        own = {id(tensor) for tensor in self._own().values()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def steps_to_train(self, name: str) -> int:
        """Law 1's K for one tensor.

        Args:
            name: The tensor's name in `model`.

        Returns:
            1 for gates, output projections and heads, 2 for what stands in front of those at zero.
        """
        before, _ = self.layers.factors(self.family, name)
        return 2 if before else 1

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the blocks are out of the model, which answers exactly as the base does."""
        check_not_over(self.ended, "switched off")
        current = {name: getattr(self.model, name) for name in self._heads}
        for name, head in self._heads.items():
            setattr(self.model, name, head)
        try:
            with self.layers.out():
                yield
        finally:
            for name, head in current.items():
                setattr(self.model, name, head)

    def begin(self, schedule: Schedule) -> None:
        """Refuse phases that could never train what they name.

        Args:
            schedule: What trains when.

        Raises:
            ScheduleError: A phase trains tensors in front of a zero that no phase has opened.
        """
        check_phases(schedule, self.family, self.parameters(), self.layers)

    def after_step(self, step: int) -> None:
        """Nothing to do after a step."""

    def is_complete(self, step: int) -> bool:
        """Whether the adapter after this step is one to keep.

        Args:
            step: An optimizer step, from 1.

        Returns:
            True.
        """
        return True

    @property
    def answering(self) -> nn.Module:
        """The model: nothing is added to its loss."""
        model: nn.Module = self.model
        return model

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, by name in the base, on the CPU."""
        check_not_over(self.ended, "saved")
        return on_cpu(self._own())

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        check_not_over(self.ended, "loaded")
        own = self._own()
        check_fit(own, tensors)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Write `new_layer.json` and `new_layer.safetensors`.

        Args:
            folder: Where; made if needed.
        """
        tensors = self.tensors()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / LAYER_FILE)
        write_json(folder / LAYER_CONFIG, self.describe())

    def describe(self) -> dict[str, Any]:
        """Where the blocks stand and how they started, as JSON-ready values."""
        return {
            "version": _VERSION,
            "method": "new_layer",
            "model_class": type(self.model).__name__,
            "settings": self.layers.placement.model_dump(include=set(Placement.model_fields)),
            "blocks": self.layers.describe(),
        }

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It is not a new layer's, or the blocks stand elsewhere.
        """
        self.load(self.read_saved(folder))

    def read_saved(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors in a folder, if they are of blocks that stand as these do.

        Args:
            folder: The folder.

        Returns:
            Tensors by name in the base.

        Raises:
            CheckpointError: It is not a new layer's, or the blocks stand elsewhere.
        """
        saved, own = read_layer_config(folder), self.describe()
        if saved["blocks"] != own["blocks"]:
            raise CheckpointError(
                f"the new blocks in {folder} stand elsewhere: saved {saved['blocks']}, here {own['blocks']}"
            )
        return read_tensors(folder / LAYER_FILE)

    def remove(self) -> nn.Module:
        """Take the blocks out.

        Returns:
            The base as it was given: same object, tensors, keys, config, indexes and `requires_grad`.

        Raises:
            MethodError: It has been merged.
        """
        check_not_over(self.ended, "removed")
        self.ended = "removed"
        self.layers.remove()
        for name, head in self._heads.items():
            setattr(self.model, name, head)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        base: nn.Module = self.model
        return base

    def merge(self) -> nn.Module:
        """Leave the blocks in the base for good, which is a plain, deeper model from then on; a trained head stays too.

        Returns:
            The base, the same object: its config counts the blocks, and transformers saves and loads it.

        Raises:
            MethodError: A gate is not one, a plain model could not be like this, or it is not on the base any more.
            NonFiniteError: A value of a block is not finite.
        """
        check_not_over(self.ended, "merged")
        check_can_stay(self.model, self.layers)
        self.stay()
        base: nn.Module = self.model
        return base

    def stay(self) -> None:
        """Make blocks and heads the base's own; what `merge` does once nothing speaks against it."""
        self.layers.stay()
        for head in self._trained_heads.values():
            narrow(head)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        self.ended = "merged"


def share_layers(
    model: nn.Module, family: FamilyMap, existing: NewLayerAttachment, *, head: Head, seed: int
) -> NewLayerAttachment:
    """Put an attachment's new blocks into another base of the same make: the same tensors, not copies.

    Args:
        model: The other base.
        family: Its map.
        existing: New blocks; what trains them on one base shows on the other at once.
        head: What the model ends in.
        seed: Seeds what is not shared.

    Returns:
        The attachment.

    Raises:
        MethodError: The blocks have no place in this base.
    """
    lent = existing.layers
    return NewLayerAttachment(model, family, lent.placement, head=head, seed=seed, lent=lent)


def read_layer_config(folder: Path) -> dict[str, Any]:
    """What `new_layer.json` in a folder says.

    Args:
        folder: A folder that a new layer was saved to, alone or in a hybrid.

    Returns:
        Its values: `settings` is what to attach with, `blocks` where the blocks stand.

    Raises:
        CheckpointError: A file is missing, or of another version.
    """
    missing = [name for name in (LAYER_CONFIG, LAYER_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}: it holds no new layer")
    content = read_values(folder / LAYER_CONFIG)
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{folder / LAYER_CONFIG}: version {content.get('version')}, this peftlab reads {_VERSION}"
        )
    return content


def check_phases(schedule: Schedule, family: FamilyMap, names: Iterable[str], layers: NewLayers) -> None:
    """Refuse phases that could never train what they name: what stands in front of a zero has no gradient.

    Args:
        schedule: What trains when.
        family: The map of the model that the blocks are in.
        names: The adapter's tensors, by name in that model.
        layers: The new blocks.

    Raises:
        ScheduleError: A phase trains tensors in front of a zero that neither it nor a phase before it opens.
    """
    factors = {name: layers.factors(family, name) for name in names}
    opened: set[Any] = set()
    for phase in schedule.phases:
        active = {}
        for name in factors:
            site = family.locate(name)
            deep = family.num_blocks(site.stack)
            if phase.trains(group=site.group, role=site.role, layer=site.layer, num_layers=deep):
                active[name] = factors[name]
                opened |= factors[name][1]
        stuck = {name: before for name, (before, _) in active.items() if before and not before & opened}
        if stuck:
            name, before = next(iter(stuck.items()))
            _, layer, factor = next(iter(before))
            raise ScheduleError(
                f"phase '{phase.name}' ({', '.join(phase.groups)}) trains {len(stuck)} tensors of the new block at layer"
                f" {layer} that have no gradient while {factor} is zero, such as {name}; add the group of {factor} to the"
                " phase, or train it in a phase before"
            )


def on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors on the CPU, as a file takes them.

    Args:
        tensors: Name to tensor.

    Returns:
        Name to copy.
    """
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
