"""Adapters on a live base as a config asks for them: one for the whole model, or one for each of its towers.

Several adapters are one attachment: adapters of one peft model, each with its own settings, name and folder, which train,
are switched off, saved and taken off together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.attaching.attachment import PeftAttachment, beside
from peftlab.catalog import METHODS
from peftlab.config import AdapterSettings
from peftlab.errors import CheckpointError, MethodError
from peftlab.family import FamilyMap, Selection
from peftlab.method import Attachment, Head, OrdinaryTraining
from peftlab.schedule import Schedule

WHOLE = "model"
"""The scope of an adapter that has the model to itself."""


def attach_adapters(
    model: nn.Module,
    family: FamilyMap,
    adapters: Sequence[AdapterSettings],
    *,
    head: Head,
    seed: int,
) -> Attachment:
    """Add the adapters of a config to a live base.

    Args:
        model: The base.
        family: Its map.
        adapters: One with the scope "model", or one for each tower.
        head: What the model ends in; a classification head is new and is trained whole, beside the first adapter.
        seed: Seeds initial values; towers of one shape start alike.

    Returns:
        One attachment for all.

    Raises:
        MethodError: A method adapts no single tower, or two scopes share a part of the model.
        TargetError: A scope or target is not there.
    """
    if len(adapters) == 1:
        adapter = adapters[0]
        view = family
        if adapter.scope != WHOLE:
            _check_in_towers(adapter)
            view = replace(family.within(adapter.scope), scope="")  # alone, it is called as every adapter is
        return _attach(model, view, adapter, head=head, seed=seed)
    _check_apart(family, adapters)
    parts: dict[str, PeftAttachment] = {}
    try:
        for adapter in adapters:
            _check_in_towers(adapter)
            view = family.within(adapter.scope)
            own: Head = (
                "causal" if parts and head == "classification" else head
            )  # the new head is the first one's
            holding = next((name for name, part in parts.items() if part.selection.experts), None)
            if holding and view.select(adapter.settings["targets"], experts=True).experts:
                raise MethodError(
                    f"{adapter.method} on {holding} and {adapter.scope}: peft 0.21 puts one adapter of a model on experts"
                    " held as 3-D parameters, not two; choose targets without mlp for one of them"
                )
            with beside(next(iter(parts.values())).model if parts else None):
                part = _attach(model, view, adapter, head=own, seed=seed)
            if not isinstance(part, PeftAttachment):
                raise MethodError(f"method '{adapter.method}' gives no adapter that can stand beside others")
            parts[part.name] = part
        return TowersAttachment(parts)
    except Exception:
        if parts:
            next(iter(parts.values())).remove()
        raise


def _attach(
    model: nn.Module, family: FamilyMap, adapter: AdapterSettings, *, head: Head, seed: int
) -> Attachment:
    method = METHODS.load(adapter.method)
    attached: Attachment = method.attach(
        model, family, method.Settings(**adapter.settings), head=head, seed=seed
    )
    return attached


def _check_in_towers(adapter: AdapterSettings) -> None:
    """Refuse a method that does not adapt a single tower."""
    if not getattr(METHODS.load(adapter.method), "IN_TOWERS", False):
        able = [name for name in METHODS.names() if getattr(METHODS.load(name), "IN_TOWERS", False)]
        raise MethodError(
            f"method '{adapter.method}' has no scope '{adapter.scope}': it adapts the whole model; in a tower use"
            f" {', '.join(able)}"
        )


def _check_apart(family: FamilyMap, adapters: Sequence[AdapterSettings]) -> None:
    """Refuse scopes that share a part of the model."""
    for adapter in adapters:
        if adapter.scope == WHOLE:
            others = ", ".join(f"{a.method} on {a.scope}" for a in adapters if a is not adapter)
            raise MethodError(
                f"{adapter.method} on the whole model cannot be combined with {others}: give each a scope of its own"
                f" ({', '.join(family.stacks)}); for LoRA beside a new layer there is the method 'hybrid'"
            )
    for one, other in combinations(adapters, 2):
        first, second = family.tower(one.scope), family.tower(other.scope)
        if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
            raise MethodError(
                f"{one.method} on {one.scope} and {other.method} on {other.scope} cannot be combined: {first} and"
                f" {second} share layers"
            )
        if one.method != other.method:
            raise MethodError(
                f"{one.method} on {one.scope} and {other.method} on {other.scope} cannot be combined: one model has"
                " adapters of one method, each with its own settings"
            )


class TowersAttachment(OrdinaryTraining):
    """Adapters of one method on several towers of a base; satisfies `method.Attachment`.

    Args:
        parts: Name to adapter, all on one peft model.

    Attributes:
        parts: Name to adapter.
        model: The model that peft made.
        family: Its map, all towers.
        selection: What the targets stood for, all towers.
        rewritten: Base tensors that a method changes in place.
    """

    def __init__(self, parts: Mapping[str, PeftAttachment]) -> None:
        self.parts = dict(parts)
        last = list(self.parts.values())[-1]
        self.model: Any = last.model
        self.family = last.family
        selections = {name: part.selection for name, part in self.parts.items()}
        self.selection = Selection(
            tuple(site for s in selections.values() for site in s.adapted),
            tuple(site for s in selections.values() for site in s.saved),
            tuple(f"{name}: {note}" for name, s in selections.items() for note in s.notes),
            tuple(site for s in selections.values() for site in s.experts),
        )
        self.rewritten = tuple(name for part in self.parts.values() for name in part.rewritten)

    def _owner(self, name: str) -> PeftAttachment:
        """The adapter that a tensor of the model belongs to."""
        components = set(name.split("."))
        return next(part for part in self.parts.values() if part.name in components & self.parts.keys())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor that the adapters can train, by its name in `model`."""
        return {name: p for part in self.parts.values() for name, p in part.parameters().items()}

    def steps_to_train(self, name: str) -> int:
        """Law 1's K for one tensor.

        Args:
            name: The tensor's name in `model`.

        Returns:
            Optimizer steps of non-zero learning rate after which it must have trained.
        """
        return self._owner(name).steps_to_train(name)

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which `model` answers as the base does."""
        return self._first.disabled()

    @property
    def _first(self) -> PeftAttachment:
        """The adapter that came first: it knows the base as it was."""
        return next(iter(self.parts.values()))

    def begin(self, schedule: Schedule) -> None:
        """Tell every adapter what will train when.

        Args:
            schedule: The schedule.
        """
        for part in self.parts.values():
            part.begin(schedule)

    def after_step(self, step: int) -> None:
        """Tell every adapter that the optimizer has moved.

        Args:
            step: From 1.
        """
        for part in self.parts.values():
            part.after_step(step)

    def is_complete(self, step: int) -> bool:
        """Whether all adapters after this step are ones to keep.

        Args:
            step: From 1.
        """
        return all(part.is_complete(step) for part in self.parts.values())

    @property
    def answering(self) -> nn.Module:
        """The model without anything that the method adds to its loss."""
        return self._first.answering

    def penalty(self) -> torch.Tensor | None:
        """What the adapters add to each training loss."""
        added = [value for part in self.parts.values() if (value := part.penalty()) is not None]
        return torch.stack(added).sum() if added else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, by the adapter's name and the name in its file, on the CPU."""
        return {
            f"{name}/{key}": tensor
            for name, part in self.parts.items()
            for key, tensor in part.tensors().items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from these adapters'.
        """
        given: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.parts}
        for key, tensor in tensors.items():
            name, _, inner = key.partition("/")
            if name not in given:
                raise CheckpointError(
                    f"the saved adapters do not fit: '{key}' is of none of the towers {', '.join(self.parts)}"
                )
            given[name][inner] = tensor
        for name, part in self.parts.items():
            part.check_fit(given[name])  # all before the first one changes
        for name, part in self.parts.items():
            part.load(given[name])

    def save(self, folder: Path) -> None:
        """Write one folder for each adapter, each as peft writes it.

        Args:
            folder: Where.
        """
        for part in self.parts.values():
            part.save(folder)

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit.
        """
        for part in self.parts.values():
            part.load_saved(folder)

    def remove(self) -> nn.Module:
        """Take all adapters off.

        Returns:
            The base as it was given.
        """
        return self._first.remove()

    def merge(self) -> nn.Module:
        """Fold all adapters into the base's weights and take them off.

        Returns:
            The base, answering as the adapted model did in evaluation mode.

        Raises:
            MethodError: They cannot be merged; nothing has changed.
            NonFiniteError: A merged weight would not be finite; nothing has changed.
        """
        return self._first.merge()
