"""Scoring what a person names: a finished run, an adapter or a base model, on a split of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from peftlab.config import RunConfig
from peftlab.evaluator import Evaluation as Evaluation
from peftlab.evaluator import Evaluator as Evaluator
from peftlab.example_choice import SPLITS as SPLITS
from peftlab.example_choice import check_split
from peftlab.example_choice import choose_examples as choose_examples
from peftlab.files import write_json
from peftlab.opening import Reference, find_reference
from peftlab.predictions import make_folder as make_folder
from peftlab.task import Example

NUM_EVALUATED = 100
"""Examples scored where neither a person, a run nor the task says how many: as many as the seeds did."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An evaluation with the texts of its examples.

    Attributes:
        result: As in `{task}_evaluation.json`, with the scores under "after".
        rows: As in `predictions.after.jsonl`.
    """

    result: dict[str, Any]
    rows: list[dict[str, Any]]


def evaluate_saved(
    reference: str,
    *,
    task: str | None = None,
    data_dir: Path | None = None,
    split: str = "test",
    num_samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    output: Path | None = None,
    directory: Path = Path("runs"),
) -> dict[str, Any]:
    """Score a finished run, an adapter or a base model on a split of a task.

    Args:
        reference: A run's path or name, "last", an adapter's folder (peftlab's, or a plain one of peft's), or a model's
            folder or hub name.
        task: The task; a run's or an adapter's own where None.
        data_dir: The task's data; a run's own where None.
        split: "train", "validation" or "test".
        num_samples: How many examples, a seeded choice, or "all". None takes as many as the run scored on its own task,
            else the task's `NUM_EVALUATED`, else 100.
        batch_size: Most prompts decoded together.
        changes: More settings of the sections "task" and "evaluation".
        output: A folder for the evaluation and the answers, which a killed evaluation goes on from; nothing is written
            where None.
        directory: Where run folders lie.

    Returns:
        As in `{task}_evaluation.json`, with the scores under "after".

    Raises:
        InputError: There is no such run, model, task or data.
        EvaluationError: A score cannot be computed.
    """
    return score_saved(
        reference,
        task=task,
        data_dir=data_dir,
        split=split,
        num_samples=num_samples,
        batch_size=batch_size,
        changes=changes,
        output=output,
        directory=directory,
    ).result


def score_saved(
    reference: str,
    *,
    task: str | None = None,
    data_dir: Path | None = None,
    split: str = "test",
    num_samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    output: Path | None = None,
    directory: Path = Path("runs"),
) -> Scored:
    """What `evaluate_saved` does, with the texts of the examples.

    Args:
        reference: As for `evaluate_saved`; so are the others.
        task: The task.
        data_dir: The task's data.
        split: The split.
        num_samples: How many examples.
        batch_size: Most prompts decoded together.
        changes: More settings.
        output: A folder for the evaluation.
        directory: Where run folders lie.

    Returns:
        The evaluation and its rows.

    Raises:
        InputError: There is no such run, model, task or data.
        EvaluationError: A score cannot be computed.
    """
    check_split(split)
    found = find_reference(reference, task=task, data_dir=data_dir, changes=changes, directory=directory)
    opened = found.open()
    settings, seed = opened.config.evaluation, opened.config.training.seed
    examples = choose_examples(
        opened.splits, split, _limit(found, opened.task, num_samples), opened.config.data_seed
    )
    evaluator = Evaluator(
        opened.task,
        examples,
        opened.tokenizer,
        head=opened.head,
        max_length=opened.config.task.max_length,
        max_new_tokens=settings.answer_tokens(opened.task),
        batch_size=batch_size or settings.batch_size,
        seed=seed,
        decoding=settings,
        labels=opened.labels,
    )
    file = "predictions.after.jsonl"
    if output is not None:
        make_folder(output)
    log = None if output is None else output / f"{file}.partial"
    evaluation = evaluator.run(opened.model, log=log, identity=found.identity())
    result = describe_result(opened.config, split, examples, evaluator.describe(evaluation, file))
    if output is not None:
        evaluator.write_predictions(evaluation, output / file, keep_log=True)
        write_json(output / scores_file(opened.config), result)
        (output / f"{file}.partial").unlink(missing_ok=True)  # last: a kill before goes on from it
    return Scored(result, evaluator.rows(evaluation.predictions, evaluation.probabilities))


def _limit(found: Reference, task: ModuleType, asked: int | Literal["all"] | None) -> int | None:
    """How many examples are scored; None for all."""
    if asked is not None:
        return asked if isinstance(asked, int) else None
    if found.own_task and found.bundle is not None:
        return found.config.evaluation.num_samples
    usual: int = getattr(task, "NUM_EVALUATED", NUM_EVALUATED)
    return usual


def describe_result(
    config: RunConfig, split: str, examples: Sequence[Example], half: dict[str, Any]
) -> dict[str, Any]:
    """What `{task}_evaluation.json` holds.

    Args:
        config: The task's config.
        split: The split.
        examples: What was scored.
        half: What `Evaluator.describe` gave.

    Returns:
        JSON-ready.
    """
    return {
        "task": config.task.name,
        "split": split,
        "num_examples": len(examples),
        "before": None,
        "after": half,
    }


def scores_file(config: RunConfig) -> str:
    """Name of the file of scores, `{task}_evaluation.json`.

    Args:
        config: The task's config.
    """
    return f"{config.task.name.rpartition('.')[2]}_evaluation.json"
