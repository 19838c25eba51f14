"""What a method is: a way to make a base tunable.

A leaf in `methods/` is a module with:

- `Settings`: what can be set on it, importable without torch;
- `attach(model, family, settings, *, head, seed) -> Attachment`: adds the adapter to a live base.

It may have `IN_TOWERS`, whether it can adapt one part of a model beside others, and `RATE_TO_LORA`, where a search for its
learning rate begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from peftlab.family import FamilyMap, Selection
    from peftlab.schedule import Schedule

Head = Literal["causal", "seq2seq", "classification"]
"""What a model ends in, and so how it is trained: next token, target tokens, or class logits."""


class Attachment(Protocol):
    """An adapter on a live base: everything the rest of peftlab asks of it.

    Attributes:
        model: The model to train and to call; holds the base.
        family: The map of `model` as it stands, adapter included.
        selection: What the targets stood for.
        rewritten: Base tensors this method changes in place (none for LoRA).
    """

    model: nn.Module
    family: FamilyMap
    selection: Selection
    rewritten: tuple[str, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor the adapter can train, by its name in `model`."""
        ...

    def steps_to_train(self, name: str) -> int:
        """Optimizer steps of non-zero learning rate after which this tensor must have trained (law 1's K)."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which `model` answers as the base does."""
        ...

    def prepare(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Told once before the first step of a fresh training, never of a resumed one; most methods take nothing.

        `batches` makes collated batches of the run's own rows, in the order of training, only as far as it is asked for;
        on the CPU. The tensors of `parameters` keep identity and shape. What cannot be made of these rows is a MethodError.
        """
        ...

    def make_optimizer(
        self, kind: type[Optimizer], options: Mapping[str, Any], *, weight_decay: float
    ) -> Optimizer | None:
        """The method's own optimizer over all that `parameters` names; None leaves it to the trainer.

        `kind` and `options` ("lr", "betas", "eps" ...) are the trainer's. Its state is kept by parameter, as torch does.
        """
        ...

    def begin(self, schedule: Schedule) -> None:
        """Told once before training what will train when; a schedule the method cannot follow is a ScheduleError."""
        ...

    def after_step(self, step: int) -> None:
        """Told when the optimizer has moved and gradients are still there; `step` counts from 1."""
        ...

    def is_complete(self, step: int) -> bool:
        """Whether the adapter after this step is one to keep: not where ranks are still to be taken."""
        ...

    @property
    def answering(self) -> nn.Module:
        """The model without anything that the method adds to its loss: for validation."""
        ...

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to each training loss, which `model` does where it computes the loss itself; mostly None."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on training, by name: what a checkpoint keeps."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back; missing, extra or misshapen ones are a CheckpointError."""
        ...

    def save(self, folder: Path) -> None:
        """Write adapter and adapter config into a folder that Hugging Face tools can load."""
        ...

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote; what does not fit is a CheckpointError."""
        ...

    def remove(self) -> nn.Module:
        """Take the adapter off; the base that comes back is bit-equal to what was given (law 2)."""
        ...

    def merge(self) -> nn.Module:
        """Put the adapter's effect into the base's own weights and take it off, all or nothing.

        The base answers as the adapted model did and is a plain model again; what cannot be is a MethodError.
        """
        ...


class OrdinaryTraining:
    """Training as most methods have it: nothing to prepare, and the trainer's own optimizer."""

    def prepare(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Nothing to prepare: a method that starts from rows has more to do.

        Args:
            batches: Batches of the run's rows; none is taken.
        """

    def make_optimizer(
        self, kind: type[Optimizer], options: Mapping[str, Any], *, weight_decay: float
    ) -> Optimizer | None:
        """The trainer's own optimizer: a method with another has more to do.

        Args:
            kind: The trainer's optimizer class.
            options: Its settings.
            weight_decay: Weight decay.

        Returns:
            None.
        """
        return None

    def penalty(self) -> torch.Tensor | None:
        """Nothing is added to the loss.

        Returns:
            None.
        """
        return None


class Method(Protocol):
    """A leaf of `methods/` (a module satisfies this)."""

    Settings: Any

    def attach(
        self, model: nn.Module, family: FamilyMap, settings: Any, *, head: Head, seed: int
    ) -> Attachment:
        """Add the adapter to a live base.

        Args:
            model: The base; its own tensors are not changed.
            family: The map of the base.
            settings: The method's `Settings`.
            head: What the model ends in.
            seed: Seeds the adapter's initial values.

        Returns:
            The attachment.

        Raises:
            TargetError: The targets match nothing in this model.
        """
        ...
