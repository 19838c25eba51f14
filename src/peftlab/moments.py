"""The moments of a step at which a `LabTrainer` looks: when it begins, when the tensors have moved, when training ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from peftlab.trainer import LabTrainer


class Moments(TrainerCallback):  # type: ignore[misc]
    """Tells a `LabTrainer` when a step begins, has moved the tensors, and when training ends."""

    def __init__(self, trainer: LabTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Each epoch has its own order of rows."""
        self._trainer.order.set_epoch(state.global_step // self._trainer.order.steps_per_epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A phase is entered before its first step."""
        self._trainer.enter_phase()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The tensors have moved: what trained is proved."""
        self._trainer.prove_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What no phase trained is compared a last time; an adapter of another step may be loaded next."""
        self._trainer.watch.look()
        self._trainer.passes.close()
        self._trainer.proof.check_frozen()
        self._trainer.switch.end()
