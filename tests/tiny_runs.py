"""Tiny training runs through the lab's own trainer."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import tiny_models
from peftlab.batches import IGNORED, Collator, Row
from peftlab.catalog import METHODS
from peftlab.config import build_config
from peftlab.gradients import GradientGroups
from peftlab.grouping import Grouping
from peftlab.isolation import Isolation
from peftlab.mapping import map_model
from peftlab.objective import ModelLoss
from peftlab.probe import ProbeContext
from peftlab.probes import gradient_norms
from peftlab.progress import RunCallback
from peftlab.schedule import PhaseSettings, Schedule, place_phases, strategy_phases
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, make_arguments

STEPS = 12
RATE = 1e-2
SEED = 42
BOTH_MLP_ATTENTION = "both->mlp->attn"
ONE_PHASE = ()


def make_rows(head: str, count: int = 21, seed: int = 0) -> list[Row]:
    """Random rows of different lengths.

    Args:
        head: What the model ends in.
        count: How many.
        seed: Seeds the tokens.

    Returns:
        The rows.
    """
    source = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [source.randrange(3, tiny_models.VOCABULARY - 2) for _ in range(source.randrange(low, high))]

    rows = []
    for number in range(count):
        ids = tokens(4, 10)
        labels = [IGNORED, IGNORED, *ids[2:]]
        if head == "seq2seq":
            labels = tokens(2, 6)
        elif head == "classification":
            labels = [number % tiny_models.LABELS]
        rows.append(Row(f"row-{number}", ids, labels))
    return rows


class Watcher(TrainerCallback):
    """Keeps what a test wants to look at: tensors and learning rate at every step; stops where asked."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.attachment: Any = None
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}
        self.learning_rates: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (rate,) = {group["lr"] for group in kwargs["optimizer"].param_groups}
        self.learning_rates[state.global_step] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(state.global_step)
        if state.global_step == self.stop_after:
            control.should_save = control.should_training_stop = True

    def _keep(self, step: int) -> None:
        self.tensors[step] = {n: p.detach().clone() for n, p in self.attachment.parameters().items()}


class Progress(RunCallback):
    """The run's own callback, without its ear for signals: a test session that is told to end shall end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


@dataclass
class Finished:
    """A run that has been carried out."""

    trainer: LabTrainer
    attachment: Any
    watcher: Watcher
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.attachment.tensors()

    @property
    def log(self) -> Any:
        return self.trainer.parts.probes["gradient_norms"].log

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == kind]


def prepare(
    folder: Path,
    name: str = "llama",
    *,
    method: str = "lora",
    settings: dict[str, Any] | None = None,
    phases: str | Sequence[PhaseSettings] = BOTH_MLP_ATTENTION,
    targets: str = "both",
    num_layers: int = 2,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    probe: bool = True,
    stop_after: int | None = None,
    patience: int | None = None,
    rows: Sequence[Row] | None = None,
    validation_rows: Sequence[Row] | None = None,
    keep: int = 2,
    batch_size: int = 2,
    trunk_bytes: int = 0,
    packed: bool = False,
    grouped: bool = False,
    **training: Any,
) -> Finished:
    """A run that is ready to be started by `.trainer.train()`.

    Args:
        folder: Where checkpoints go.
        name: A key of `tiny_models.BUILDERS`.
        method: A leaf of `methods/`.
        settings: Its settings; None for LoRA's below.
        phases: A strategy's name or phases.
        targets: LoRA's targets.
        num_layers: Layers of each stack.
        dropout: LoRA's dropout.
        dtype: Of base and adapter.
        probe: Whether gradient norms are kept.
        stop_after: Step after which to stop with a checkpoint.
        patience: Validations without a lower loss.
        rows: Training rows.
        validation_rows: Validation rows.
        keep: Checkpoints to keep.
        batch_size: Rows of a batch.
        trunk_bytes: Most bytes of kept hidden states.
        packed: Whether rows are packed.
        grouped: Whether padded batches are divided by length.
        training: Further settings of `training`.

    Returns:
        The run.
    """
    head = tiny_models.HEADS[name]
    base = tiny_models.build(name, num_layers).to(dtype)
    leaf = METHODS.load(method)
    given = {"targets": targets, "dropout": dropout, "rank": 2, "alpha": 4} if settings is None else settings
    attached = leaf.attach(base, map_model(base), leaf.Settings(**given), head=head, seed=1)
    attached.model.to(dtype)
    defaults = {
        "max_steps": STEPS, "accumulation_steps": 2, "warmup_steps": 2, "learning_rate": RATE,
        "validation_steps": 4, "save_steps": 4, "weight_decay": 0.1, "seed": SEED,
    }  # fmt: skip
    asked = {"batch_size": batch_size} | defaults | training
    config = build_config({"training": asked, "model": {"device": "cpu"}})
    steps = config.training.max_steps
    wanted = strategy_phases(phases, total_steps=steps) if isinstance(phases, str) else phases
    schedule = Schedule(
        place_phases(wanted, total_steps=steps),
        steps,
        config.training.learning_rate,
        config.training.warmup_steps,
    )
    watcher = Watcher(stop_after=stop_after)
    watcher.attachment = attached
    groups = GradientGroups(attached.family, attached.parameters())
    probes = {"gradient_norms": gradient_norms.start(ProbeContext(groups), gradient_norms.Settings())}
    events: list[tuple[str, dict[str, Any]]] = []
    parts = TrainingParts(
        attachment=attached,
        schedule=schedule,
        objective=ModelLoss(head),
        collator=Collator(0, head),
        train_rows=make_rows(head) if rows is None else rows,
        validation_rows=make_rows(head, 5, seed=9) if validation_rows is None else validation_rows,
        probes=probes if probe else {},
        event=lambda kind, **fields: events.append((kind, fields)),
        keep_checkpoints=keep,
        seed=SEED,
        trunk_bytes=trunk_bytes,
        isolation=Isolation(attached.model) if packed else None,
        grouping=Grouping(head, pass_tokens=2) if grouped else None,
    )
    callback = Progress(patience=patience, quiet=True)
    trainer = LabTrainer(parts, make_arguments(config, Path(folder), schedule), [callback, watcher])
    callback.watch(trainer)
    return Finished(trainer, attached, watcher, events)


def run(folder: Path, name: str = "llama", *, resume: Path | None = None, **changes: Any) -> Finished:
    """Carry a tiny run out.

    Args:
        folder: Where checkpoints go.
        name: A key of `tiny_models.BUILDERS`.
        resume: A checkpoint to go on from.
        changes: Arguments of `prepare`.

    Returns:
        The finished run.
    """
    made = prepare(folder, name, **changes)
    made.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are bit-equal."""
    return list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
