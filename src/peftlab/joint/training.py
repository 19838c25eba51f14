"""Runs that train together: each is carried out by its own `LabTrainer`, whose forward and backward pass is shared.

So order of rows, optimizer, clipping, schedule, phases, proof of training, validation, checkpoints and events are those of a
run alone. A run's own `TrainingArguments` say how long it trains; runs of different lengths leave one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TrainingArguments

from peftlab.attaching.attachment import ADAPTER
from peftlab.errors import ConfigError, MethodError, RunError
from peftlab.joint.adapters import JoinedAdapters
from peftlab.joint.meeting import Meeting
from peftlab.joint.trial import try_together
from peftlab.passes import RowPasses
from peftlab.phases import PhaseSwitch
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts


@dataclass(frozen=True, slots=True)
class JointRun:
    """One of the runs that train together.

    Attributes:
        parts: What its trainer is made of; the attachment is its own of `JoinedAdapters`.
        arguments: As for a run alone (`training.make_arguments`).
        callbacks: As for a run alone.
        resume_from: A checkpoint of the run to go on from; None begins.
        carry_out: Carries the trainer out in place of its `train`, and gives what it came to.
    """

    parts: TrainingParts
    arguments: TrainingArguments
    callbacks: tuple[Any, ...] = field(default=())
    resume_from: str | None = None
    carry_out: Callable[[LabTrainer], Any] | None = None


class JointTrainer(LabTrainer):
    """A run's trainer among those of other runs.

    Args:
        name: The run.
        run: What it is made of.
        meeting: Where passes are computed.
    """

    def __init__(self, name: str, run: JointRun, meeting: Meeting) -> None:
        self.run_name, self._meeting = name, meeting
        parts = replace(run.parts, trunk_bytes=0)  # the blocks below are shared, not kept
        super().__init__(parts, run.arguments, list(run.callbacks))
        self.passes = self._shared = SharedPasses(parts)
        family, views = parts.attachment.family, meeting.joined.views[name]
        self.switch = PhaseSwitch(parts.schedule, family, self.parameters, views)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As a run alone, but that rows are kept apart where the pass is computed."""
        with self._shared.elsewhere():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the whole step's mean; its gradients are there already, so nothing hangs on it."""
        shared = self.accelerator.gradient_state  # one for all trainers of a process
        is_last = shared.sync_gradients
        loss = self._meeting.compute(self.run_name, inputs, num_items_in_batch)
        shared._set_sync_gradients(is_last)
        return loss.requires_grad_()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The run's own optimizer, over its own tensors."""
        with self._meeting.joined.only_trainable(self.run_name):
            return super().create_optimizer(model)

    def _names(self) -> dict[torch.Tensor, str]:
        """As a run alone names them, which goes on with this checkpoint as this run does with its own."""
        return {
            parameter: ".".join(ADAPTER if part == self.run_name else part for part in name.split("."))
            for parameter, name in super()._names().items()
        }

    def evaluate(self, *args: Any, **others: Any) -> dict[str, float]:
        """The validation loss of this run's adapter alone."""
        with self._meeting.joined.alone(self.run_name):
            return super().evaluate(*args, **others)


class SharedPasses(RowPasses):
    """A run's batches; while it trains, its passes are computed elsewhere.

    Args:
        parts: What the run's trainer is made of.
    """

    def __init__(self, parts: TrainingParts) -> None:
        super().__init__(parts.attachment, parts.collator, parts.isolation)
        self._is_elsewhere = False

    def enter(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Keep no hidden states: the blocks below all that trains are computed once for all runs instead.

        Returns:
            This, for a log.
        """
        return {"trunk": "not kept: runs that train together share the blocks below instead"}

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """A context whose passes need nothing here."""
        self._is_elsewhere = True
        try:
            yield
        finally:
            self._is_elsewhere = False

    @contextmanager
    def around(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """A context for one pass.

        Args:
            batch: From `collate`, on the model's device.
        """
        if self._is_elsewhere:
            yield
            return
        with super().around(batch):
            yield


@dataclass(frozen=True, slots=True)
class Ended:
    """How runs that trained together ended.

    Attributes:
        trainers: The run's name to its trainer.
        results: What each run came to that reached its end.
        failed: What ended the others.
    """

    trainers: dict[str, JointTrainer]
    results: dict[str, Any]
    failed: dict[str, BaseException]


def train_together(joined: JoinedAdapters, runs: Mapping[str, JointRun]) -> dict[str, JointTrainer]:
    """Train several runs over one base.

    Args:
        joined: Their adapters on the base.
        runs: Name to run, the names of `joined`.

    Returns:
        Name to the run's trainer; the adapters are as their last steps left them.

    Raises:
        ConfigError: The runs cannot share passes.
        ModelError: This model does not compute the runs' losses apart.
        RunError: A run failed; the others have been carried out to their ends.
    """
    ended = carry_out_together(joined, runs)
    if ended.failed:
        raise tell_failed(ended.failed, [name for name in runs if name not in ended.failed])
    return ended.trainers


def tell_failed(failed: Mapping[str, BaseException], done: Sequence[str]) -> RunError:
    """What to say where runs failed beside others.

    Args:
        failed: What a message calls the run, to its error.
        done: The others.

    Returns:
        The error, its cause the first run's.
    """
    told = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
    others = f"; {', '.join(done)} trained to the end" if done else ""
    error = RunError(f"{len(failed)} of {len(failed) + len(done)} runs failed: {told}{others}")
    error.__cause__ = next(iter(failed.values()))
    return error


def carry_out_together(joined: JoinedAdapters, runs: Mapping[str, JointRun]) -> Ended:
    """Train several runs over one base, each to its own end.

    Args:
        joined: Their adapters on the base.
        runs: Name to run, the names of `joined`.

    Returns:
        How each ended.

    Raises:
        ConfigError: The runs cannot share passes.
        ModelError: This model does not compute the runs' losses apart.
    """
    _check(joined, runs)
    first = next(iter(runs.values())).parts
    meeting = Meeting(joined, pad_id=first.collator.pad_id, isolation=first.isolation)
    try_together(meeting, {name: run.parts for name, run in runs.items()})
    trainers = {name: JointTrainer(name, run, meeting) for name, run in runs.items()}

    results: dict[str, Any] = {}

    def act(name: str) -> Callable[[], None]:
        def carry_out() -> None:
            run, trainer = runs[name], trainers[name]
            results[name] = (
                trainer.train(resume_from_checkpoint=run.resume_from)
                if run.carry_out is None
                else run.carry_out(trainer)
            )

        return carry_out

    failed = meeting.hold(
        {n: (act(n), tuple(trainer.parameters.values())) for n, trainer in trainers.items()}
    )
    return Ended(trainers, results, failed)


def _check(joined: JoinedAdapters, runs: Mapping[str, JointRun]) -> None:
    """Refuse runs that cannot share passes.

    Raises:
        ConfigError: They have different layouts or pads, or several processes.
        MethodError: An adapter is not of these.
    """
    if list(runs) != list(joined.attachments):
        raise ConfigError(
            f"the runs are {', '.join(runs)}, the adapters {', '.join(joined.attachments)}: give each one run"
        )
    for name, run in runs.items():
        if run.parts.attachment is not joined.attachments[name]:
            raise MethodError(f"run '{name}' has an adapter that is not its own of these")
        if run.arguments.world_size > 1:
            raise ConfigError("runs train together in one process; start them without torchrun")
    if len({(run.parts.isolation is None, run.parts.collator.pad_id) for run in runs.values()}) > 1:
        raise ConfigError(
            "runs that train together have one layout of rows and one pad token: all padded, or all packed"
        )
