"""What a model answers to a task, on the disk as soon as it has answered, with the weights that answered."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftlab.config import RunConfig
from peftlab.continual.lessons import Lesson
from peftlab.errors import CheckpointError, EvaluationError
from peftlab.evaluator import Evaluator
from peftlab.files import write_json
from peftlab.inspection.model_fingerprint import hash_tensor
from peftlab.loading import ModelSource

EVALUATION, PREDICTIONS = "evaluation.json", "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers of one model to one task.

    Attributes:
        label: The task.
        folder: Where they lie.
        weights: What the model's own tensors were.
        metrics: Metric to score, as in a run's evaluation.
    """

    label: str
    folder: Path
    weights: str
    metrics: Mapping[str, Mapping[str, Any]]

    def answers(self) -> list[str]:
        """The answers, in the order of the examples."""
        lines = (self.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["prediction"]) for line in lines]


def ask(
    model: Any, lesson: Lesson, source: ModelSource, config: RunConfig, folder: Path, *, weights: str
) -> Asked:
    """Ask a model all test examples of a task, and keep answers and scores; the scores' file is written last.

    Args:
        model: The model as it stands.
        lesson: The task.
        source: The base's tokenizer and head.
        config: How answers are decoded.
        folder: Where they go; made if needed.
        weights: What the model's own tensors are; answers that a killed evaluation of these left are gone on with.

    Returns:
        The answers.

    Raises:
        EvaluationError: A score cannot be computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.evaluation
    evaluator = Evaluator(
        lesson.task,
        lesson.test_examples,
        source.tokenizer,
        head=source.head,
        max_length=lesson.settings.max_length,
        max_new_tokens=settings.answer_tokens(lesson.task),
        batch_size=settings.batch_size,
        seed=config.data_seed,
        decoding=settings,
    )
    log = folder / f"{PREDICTIONS}.partial"
    evaluation = evaluator.run(model, progress=lambda _: None, log=log, identity=weights)
    evaluator.write_predictions(evaluation, folder / PREDICTIONS)
    told = evaluator.describe(evaluation, PREDICTIONS)
    kept = {key: told[key] for key in ("metrics", "decoding", "seconds")}
    write_json(folder / EVALUATION, {"task": lesson.label, "weights": weights} | kept)
    return read_asked(folder, lesson.label)


def read_asked(folder: Path, label: str) -> Asked:
    """What a folder of answers holds.

    Args:
        folder: The folder.
        label: The task.

    Returns:
        The answers.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        return Asked(label, folder, str(found["weights"]), found["metrics"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / EVALUATION} cannot be read ({error}); remove it and repeat"
        ) from None


def take_over(before: Asked, folder: Path) -> Asked:
    """Take the answers of weights that have answered already.

    Args:
        before: What they answered.
        folder: Where it is kept once more; made if needed.

    Returns:
        The answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(before.folder / PREDICTIONS, folder / PREDICTIONS)
    told = json.loads((before.folder / EVALUATION).read_text(encoding="utf-8"))
    write_json(folder / EVALUATION, told | {"seconds": 0.0, "taken_over_from": before.folder.parents[1].name})
    return read_asked(folder, before.label)


def check_equal_weights(asked: Sequence[Asked]) -> None:
    """Refuse answers that differ where weights do not: then something else than the weights has decided them.

    Args:
        asked: Answers of one course.

    Raises:
        EvaluationError: Equal weights answered the same task in two ways.
    """
    first: dict[tuple[str, str], Asked] = {}
    for one in asked:
        known = first.setdefault((one.label, one.weights), one)
        if known is not one and known.answers() != one.answers():
            pairs = zip(known.answers(), one.answers(), strict=True)
            differ = sum(a != b for a, b in pairs)
            raise EvaluationError(
                f"{one.label}: the same weights answered {differ} examples otherwise in {one.folder} than in {known.folder}:"
                " what is measured would be noise, not forgetting"
            )


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors: names, shapes, types and bits.

    Args:
        tensors: By name.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {hash_tensor(tensor)}\n".encode())
    return digest.hexdigest()[:32]
