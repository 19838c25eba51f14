"""One arm with one seed: learn a task, keep what was learned, ask all tasks, go on with the next.

What a task learned is a set of named tensors. Some are the task's own, the others are shared: those are, for every task, as
the last stage left them. Putting own and shared values into one attachment is what it is to answer a task after a stage.

Every stage and every evaluation is on the disk when it is over, written last under its name: a killed course goes on with
the same numbers. A stage goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftlab.catalog import METHODS
from peftlab.checkpoint import ADAPTER_FILE, load_adapter
from peftlab.config import ModelSettings, RunConfig
from peftlab.continual.answers import (
    EVALUATION,
    Asked,
    ask,
    check_equal_weights,
    hash_tensors,
    read_asked,
    take_over,
)
from peftlab.continual.arms import Arm
from peftlab.continual.fitting import fit_rows
from peftlab.continual.lessons import Lesson, mix_in
from peftlab.errors import CheckpointError, EvaluationError, RunError
from peftlab.files import new_folder, verify_folder, write_json
from peftlab.loading import ModelSource, load_model
from peftlab.mapping import map_model
from peftlab.method import Attachment

STATE, ANSWERS = "state", "answers"
_FACTS = "facts.json"
Show = Callable[[str], object]


class Base:
    """The base of all courses: loaded once, when it is first needed, and bit-equal ever after.

    Args:
        source: Where it is from.
        settings: Its dtype and device.
    """

    def __init__(self, source: ModelSource, settings: ModelSettings) -> None:
        self.source, self.settings = source, settings

    @cached_property
    def model(self) -> Any:
        """The live base."""
        return load_model(self.source, self.settings)

    @cached_property
    def bits(self) -> str:
        """What its parameters were when it was loaded."""
        return hash_tensors(dict(self.model.named_parameters()))

    def check(self, after: str) -> None:
        """Refuse to go on with a base that has changed (law 2).

        Args:
            after: What has been done to it.

        Raises:
            RunError: A parameter has other bits than at the start.
        """
        if hash_tensors(dict(self.model.named_parameters())) != self.bits:
            raise RunError(f"{after} left the base changed: its parameters have other bits than before")


@dataclass(frozen=True, slots=True)
class Learned:
    """A finished course.

    Attributes:
        arm: How the tasks were learned.
        seed: With which seed.
        folder: Where it lies.
        stages: For each stage its facts: rows, old rows, steps, seconds, validation loss, parameters, bytes.
        asked: For each stage every task's answers, in the order of the tasks.
    """

    arm: Arm
    seed: int
    folder: Path
    stages: tuple[Mapping[str, Any], ...]
    asked: tuple[tuple[Asked, ...], ...]


@dataclass(slots=True)
class Course:
    """One arm with one seed.

    Attributes:
        arm: How the tasks are learned.
        seed: Seeds order, adapter and dropout.
        configs: Each task's config with the arm's method and rate, in the order of learning.
        lessons: The tasks.
        base: The base.
        folder: Where the course lies.
        replay_share: The share of old rows, for the plan replay.
        recheck: Whether weights that have answered a task answer it again.
        show: Is given a line for each stage.
    """

    arm: Arm
    seed: int
    configs: Sequence[RunConfig]
    lessons: Sequence[Lesson]
    base: Base
    folder: Path
    replay_share: float
    recheck: bool
    show: Show
    _attachment: Attachment | None = field(default=None, init=False)
    _start: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _known: dict[tuple[str, str], Asked] = field(default_factory=dict, init=False)

    @property
    def num_stages(self) -> int:
        """As many as tasks, or one where all are learned at once."""
        return 1 if self.arm.plan == "joint" else len(self.lessons)

    def carry_out(self) -> Learned:
        """Learn and ask whatever has not been yet.

        Returns:
            The finished course.

        Raises:
            RunError: A stage failed, or the base came back changed.
            EvaluationError: Equal weights gave unlike answers, or a score cannot be computed.
            CheckpointError: What lies there is damaged.
        """
        try:
            stages, asked = [], []
            for stage in range(1, self.num_stages + 1):
                stages.append(self._learn(stage))
                asked.append(tuple(self._ask(stage, lesson) for lesson in self.lessons))
        finally:
            if self._attachment is not None:
                self._attachment.remove()
        if self._attachment is not None:
            self.base.check(f"{self.arm.name}, seed {self.seed}")
        learned = Learned(self.arm, self.seed, self.folder, tuple(stages), tuple(asked))
        check_equal_weights([asked for stage in learned.asked for asked in stage])
        if self.arm.isolated:
            check_isolated(learned)
        return learned

    def learn_alone(self) -> dict[str, Any]:
        """Learn the first task and ask nothing: what a choice of the learning rate needs.

        Returns:
            The stage's facts.

        Raises:
            RunError: The stage failed.
        """
        try:
            return self._learn(1)
        finally:
            if self._attachment is not None:
                self._attachment.remove()

    def _place(self, stage: int) -> Path:
        return self.folder / f"stage-{stage}"

    def _attached(self) -> Attachment:
        """The method on the base, as it starts with this seed."""
        if self._attachment is None:
            model, source = self.base.model, self.base.source
            _ = self.base.bits
            method, adapter = METHODS.load(self.arm.method), self.configs[0].adapters[0]
            made: Attachment = method.attach(
                model, map_model(model), method.Settings(**adapter.settings), head=source.head, seed=self.seed
            )
            self._attachment, self._start = made, made.tensors()
        return self._attachment

    def _learn(self, stage: int) -> dict[str, Any]:
        """Train a stage, or read what it came to."""
        place = self._place(stage)
        if (place / STATE).is_dir():
            verify_folder(place / STATE)
            facts: dict[str, Any] = json.loads((place / STATE / _FACTS).read_text(encoding="utf-8"))
            return facts
        attachment, lesson = self._attached(), self.lessons[stage - 1]
        rows, old = self._rows(stage)
        attachment.load(self._values(stage - 1, lesson))
        source = self.base.source
        done = fit_rows(
            attachment, rows, self._validation_rows(stage), self.configs[stage - 1], place / "training",
            pad_id=source.tokenizer.pad_token_id, head=source.head,
        )  # fmt: skip
        values = attachment.tensors()
        facts = {
            "tasks": [lesson.label] if self.num_stages > 1 else [lesson.label for lesson in self.lessons],
            "rows": len(rows),
            "old_rows": old,
            "steps": done.steps,
            "seconds": round(done.seconds, 3),
            "validation_loss": done.validation_loss,
            "trainable_parameters": sum(p.numel() for p in attachment.parameters().values()),
            "own_bytes": self._bytes(values, shared=False),
            "shared_bytes": self._bytes(values, shared=True),
        }
        with new_folder(place / STATE) as folder:
            save_file(values, folder / ADAPTER_FILE)
            write_json(folder / _FACTS, facts)
        shutil.rmtree(place / "training" / "checkpoints", ignore_errors=True)
        told = " + ".join(facts["tasks"])
        self.show(
            f"{self.arm.name}, seed {self.seed}: {told} learned in {facts['steps']} steps, {done.seconds:.0f} s"
        )
        return facts

    def _rows(self, stage: int) -> tuple[list[Any], int]:
        """The rows of a stage, and how many of them are of earlier tasks."""
        if self.num_stages == 1:
            return [row for lesson in self.lessons for row in lesson.train_rows], 0
        new = self.lessons[stage - 1].train_rows
        if self.arm.plan != "replay" or stage == 1:
            return list(new), 0
        before = [lesson.train_rows for lesson in self.lessons[: stage - 1]]
        return mix_in(new, before, share=self.replay_share, seed=self.seed)

    def _validation_rows(self, stage: int) -> list[Any]:
        chosen = self.lessons if self.num_stages == 1 else [self.lessons[stage - 1]]
        return [row for lesson in chosen for row in lesson.validation_rows]

    def _values(self, stage: int, lesson: Lesson) -> dict[str, torch.Tensor]:
        """The tensors with which a task is answered after a stage; those of the start where nothing was learned."""
        of_layer = self._of_layer()
        place = self.lessons.index(lesson) + 1
        own = self._read(place) if place <= stage and self.num_stages > 1 else self._start
        shared = self._read(stage) if stage else self._start
        return {name: (shared if self.arm.shares(name, of_layer) else own)[name] for name in self._start}

    def _bytes(self, values: Mapping[str, torch.Tensor], *, shared: bool) -> int:
        """Bytes of what is a task's own, or of what is one for all."""
        of_layer = self._of_layer()
        chosen = [t for name, t in values.items() if self.arm.shares(name, of_layer) == shared]
        return sum(tensor.numel() * tensor.element_size() for tensor in chosen)

    def _of_layer(self) -> frozenset[str]:
        """The names of the new layer's tensors."""
        layers = getattr(self._attached(), "layers", None)
        return frozenset(layers.state()) if layers is not None else frozenset()

    def _read(self, stage: int) -> dict[str, torch.Tensor]:
        """What a stage left."""
        folder = self._place(stage) / STATE
        verify_folder(folder)
        found = load_adapter(folder)
        if found.keys() != self._start.keys():
            raise CheckpointError(
                f"{folder} holds other tensors than {self.arm.name} has; remove the folder and repeat"
            )
        return found

    def _ask(self, stage: int, lesson: Lesson) -> Asked:
        """Ask a task after a stage, or read what was answered."""
        folder = self._place(stage) / ANSWERS / lesson.label
        if (folder / EVALUATION).exists():
            found = read_asked(folder, lesson.label)
        else:
            attachment = self._attached()
            attachment.load(self._values(stage, lesson))
            weights = hash_tensors(attachment.tensors())
            before = None if self.recheck else self._known.get((lesson.label, weights))
            if before is None:
                found = ask(
                    attachment.model, lesson, self.base.source, self.configs[0], folder, weights=weights
                )
            else:
                found = take_over(before, folder)
        self._known.setdefault((lesson.label, found.weights), found)
        return found


def check_isolated(learned: Learned) -> None:
    """Refuse an isolated course in which a task's weights or answers changed after it was learned.

    Args:
        learned: The course.

    Raises:
        EvaluationError: They did; forgetting would not be exactly 0.
    """
    for place, stage in enumerate(learned.asked):
        own = stage[place]
        for later in learned.asked[place + 1 :]:
            now = later[place]
            if now.weights != own.weights or now.answers() != own.answers():
                what = "weights" if now.weights != own.weights else "answers"
                raise EvaluationError(
                    f"{learned.arm.name}, seed {learned.seed}: the {what} of {own.label} changed after it was learned"
                    f" ({now.folder}): an isolated adapter must give exactly no forgetting"
                )
