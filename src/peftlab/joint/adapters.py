"""The adapters of several runs on one frozen base, each made as it is made alone: same settings, seed and tensors."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlab.attaching.attachment import TASK_TYPES, beside
from peftlab.attaching.lora_attachment import LoraAttachment
from peftlab.errors import MethodError, TargetError
from peftlab.family import FamilyMap
from peftlab.joint.layers import Room, part_layers, share_layers
from peftlab.method import Head

if TYPE_CHECKING:
    from peftlab.methods.lora import Settings

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RESERVED = ("default", "model", "base_model", "weight", "bias")


@dataclass(frozen=True, slots=True)
class AdapterOfRun:
    """What one run's adapter is made of.

    Attributes:
        settings: Of `lora`.
        seed: Seeds its first values.
    """

    settings: Settings
    seed: int


class LoraOfRun(LoraAttachment):
    """LoRA whose layers may have the adapters of other runs too."""

    def rests(self, name: str) -> bool:
        """Whether a tensor is this run's own and LoRA-FA rests it.

        Args:
            name: The tensor's name in `model`.
        """
        return self._is_frozen(name)

    def _is_frozen(self, name: str) -> bool:
        """Whether LoRA-FA rests a tensor of this run."""
        return super()._is_frozen(name) and self.name in name.split(".")

    def _check_beside_others(self, scope: str) -> None:
        """Nothing more: `check_shareable` has looked, and each run has an optimizer of its own."""

    def _check_targets(self) -> None:
        """Compare where peft put this run's adapter with what was selected.

        Raises:
            TargetError: They differ.
        """
        modules = self.model.base_model.model.named_modules()
        adapted = {path for path, module in modules if self.name in getattr(module, "lora_A", ())}
        wanted = {site.path for site in self.selection.adapted}
        if adapted != wanted:
            raise TargetError(
                f"peft adapted {sorted(adapted - wanted)} beside the targets and left out {sorted(wanted - adapted)}"
            )


class JoinedAdapters:
    """LoRA adapters of several runs on one base.

    Args:
        model: The base.
        family: Its map.
        adapters: The run's name to what its adapter is made of: a letter, then letters, digits, _ and -.
        head: What the model ends in; "causal" or "seq2seq".

    Attributes:
        attachments: The run's name to its adapter; satisfies `method.Attachment`.
        model: The model that peft made, with all of them.
        room: What the adapted layers look at.
        views: The run's name to its own layers.
        head: What the model ends in.

    Raises:
        MethodError: A setting cannot be had beside other runs; nothing has changed.
        TargetError: Targets match nothing in this model; nothing has changed.
    """

    def __init__(
        self, model: nn.Module, family: FamilyMap, adapters: Mapping[str, AdapterOfRun], *, head: Head
    ) -> None:
        _check_names(model, adapters)
        check_shareable(model, family, adapters, head=head)
        self.attachments: dict[str, LoraOfRun] = {}
        self.head, self.room = head, Room()
        try:
            for name, adapter in adapters.items():
                self.attachments[name] = self._attach(model, family, name, adapter)
            self.model: Any = next(iter(self.attachments.values())).model
            self._rest()
            self.views = share_layers(self.model, list(adapters), self.room)
        except Exception:
            if self.attachments:
                next(iter(self.attachments.values())).remove()
            raise

    def _attach(self, model: nn.Module, family: FamilyMap, name: str, adapter: AdapterOfRun) -> LoraOfRun:
        """Put one run's adapter beside those that are there.

        Raises:
            MethodError: It would train something that is not its own.
        """
        live = next(iter(self.attachments.values())).model if self.attachments else None
        with beside(live):
            made = LoraOfRun(
                model, replace(family, scope=name), adapter.settings, head=self.head, seed=adapter.seed
            )
        made.config.task_type = TASK_TYPES[self.head]  # as a run alone is saved
        return made

    def _rest(self) -> None:
        """Rest what LoRA-FA rests: peft lets an adapter train once more whenever another is put beside it."""
        for name, parameter in self.model.named_parameters():
            if any(made.rests(name) for made in self.attachments.values()):
                parameter.requires_grad_(False)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A context in which the model has one run's adapter: for validation, evaluation and use.

        Args:
            name: The run.
        """
        with self.room.alone(name):
            yield

    @contextmanager
    def only_trainable(self, name: str) -> Iterator[None]:
        """A context in which no other run's tensor requires a gradient.

        Args:
            name: The run.
        """
        others = [
            p for other, made in self.attachments.items() if other != name for p in made.parameters().values()
        ]
        required = [p.requires_grad for p in others]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, value in zip(others, required, strict=True):
                parameter.requires_grad_(value)

    def save(self, name: str, folder: Path) -> None:
        """Write one run's adapter as a run alone writes it.

        Args:
            name: The run.
            folder: Where; made if needed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            self.attachments[name].save(Path(aside))
            for path in (Path(aside) / name).iterdir():
                shutil.move(str(path), folder / path.name)

    def remove(self) -> nn.Module:
        """Take all adapters off.

        Returns:
            The base as it was given.
        """
        part_layers(self.model)
        first, *others = self.attachments.values()
        base = first.remove()
        for other in others:
            other.ended = "removed"
        return base


def _check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names that peft could not tell from those of modules.

    Raises:
        MethodError: There is one.
    """
    taken = {part for path, _ in model.named_modules() for part in path.split(".")}
    for name in names:
        if not _NAME.fullmatch(name) or name in _RESERVED or name in taken:
            raise MethodError(
                f"a run beside others cannot be called '{name}': a letter, then letters, digits, _ and -, and not the"
                f" name of a module ({', '.join(_RESERVED)})"
            )


def check_shareable(
    model: nn.Module, family: FamilyMap, adapters: Mapping[str, AdapterOfRun], *, head: Head
) -> None:
    """Refuse what cannot be had beside other runs.

    Args:
        model: The base; it may lie on the meta device.
        family: Its map.
        adapters: What a message calls the run, to what its adapter is made of.
        head: What the model ends in.

    Raises:
        MethodError: It is asked for.
        TargetError: Targets match nothing in this model.
    """
    if not adapters:
        raise MethodError("no runs were given")
    if head == "classification":
        raise MethodError(
            "runs of a classification model cannot share the base: each trains a new head whole, and peft 0.21 lets one copy"
            " of it be active at a time; train them one by one"
        )
    for stack in family.stacks:
        if family.layout(stack) != "bsh":
            raise MethodError(
                f"runs cannot share this {family.model_type} model: its {stack or 'blocks'} keep rows on another axis than"
                " the first; train them one by one"
            )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise MethodError(
            "runs cannot share a model with gradient checkpointing, which would draw their dropout twice: switch it off"
        )
    for name, adapter in adapters.items():
        settings = adapter.settings
        selection = family.select(settings.targets, experts=True)
        for what, asked in (
            (f"init={settings.init}", settings.init not in ("default", "gaussian", "orthogonal")),
            (f"bias={settings.bias}", settings.bias != "none"),
            ("modules_to_save", bool(settings.modules_to_save)),
            (f"targets={settings.targets} (embeddings and head trained whole)", bool(selection.saved)),
            ("experts held as 3-D parameters", bool(selection.experts)),
            ("a target that is the head", any(site.role == "head" for site in selection.adapted)),
        ):
            if asked:
                raise MethodError(
                    f"run '{name}' cannot share the base with others: {what} changes or trains what they have in common;"
                    " leave it out, or train this run alone"
                )
