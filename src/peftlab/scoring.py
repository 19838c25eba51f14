"""Scoring a file of outputs: what a system of any make has answered, against a task's references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peftlab.catalog import TASKS
from peftlab.decoding import DecodingSettings
from peftlab.evaluation import (
    Evaluator,
    Scored,
    choose_examples,
    describe_result,
    scores_file,
)
from peftlab.example_choice import check_split
from peftlab.files import write_json
from peftlab.opening import find_reference
from peftlab.predictions import make_folder, read_predictions
from peftlab.task_data import load_splits


def evaluate_file(
    predictions: Path,
    *,
    reference: str | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    split: str = "test",
    num_samples: int | Literal["all"] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    output: Path | None = None,
    directory: Path = Path("runs"),
) -> dict[str, Any]:
    """Score answers that stand in a file; no model is loaded.

    Args:
        predictions: A .jsonl file of rows with "id" and "prediction", or a text file with one answer on each line.
        reference: A run, an adapter or a model whose task and data are meant; None where `task` says it.
        task: The task; the reference's own where None.
        data_dir: The task's data; the reference's own where None.
        split: "train", "validation" or "test".
        num_samples: How many examples the file answers, the seeded choice; None and "all" take the whole split.
        changes: More settings of the section "task".
        output: A folder for the evaluation; nothing is written where None.
        directory: Where run folders lie.

    Returns:
        As in `{task}_evaluation.json`, with the scores under "after".

    Raises:
        InputError: There is no such task or data, or the file does not answer exactly the examples.
        EvaluationError: A score cannot be computed.
    """
    return score_file(
        predictions,
        reference=reference,
        task=task,
        data_dir=data_dir,
        split=split,
        num_samples=num_samples,
        changes=changes,
        output=output,
        directory=directory,
    ).result


def score_file(
    predictions: Path,
    *,
    reference: str | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    split: str = "test",
    num_samples: int | Literal["all"] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    output: Path | None = None,
    directory: Path = Path("runs"),
) -> Scored:
    """What `evaluate_file` does, with the texts of the examples.

    Args:
        predictions: As for `evaluate_file`; so are the others.
        reference: A run, an adapter or a model.
        task: The task.
        data_dir: The task's data.
        split: The split.
        num_samples: How many examples the file answers.
        changes: More settings.
        output: A folder for the evaluation.
        directory: Where run folders lie.

    Returns:
        The evaluation and its rows.

    Raises:
        InputError: There is no such task or data, or the file does not answer exactly the examples.
        EvaluationError: A score cannot be computed.
    """
    check_split(split)
    found = find_reference(reference, task=task, data_dir=data_dir, changes=changes, directory=directory)
    config, module = found.config, TASKS.load(found.config.task.name)
    splits = load_splits(config.task, seed=config.data_seed)
    limit = num_samples if isinstance(num_samples, int) else None
    examples = choose_examples(splits, split, limit, config.data_seed)
    answers = read_predictions(predictions, examples)
    labels_only = bool(splits.labels) and not any(example.references for example in examples)
    if labels_only:
        answers = [_class_index(answer.strip(), splits.labels) for answer in answers]
    evaluator = Evaluator(
        module,
        examples,
        None,
        head="classification" if labels_only else "causal",
        max_length=config.task.max_length,
        max_new_tokens=1,
        batch_size=1,
        seed=config.training.seed,
        labels=splits.labels,
        decoding=DecodingSettings(metrics=config.evaluation.metrics),
    )
    half = evaluator.describe_scores(
        evaluator.score(answers), decoding={"kind": "given"}, predictions=str(predictions), seconds=0.0
    )
    result = describe_result(config, split, examples, half)
    if output is not None:
        make_folder(output)
        write_json(output / scores_file(config), result)
    return Scored(result, evaluator.rows(answers))


def _class_index(answer: str, labels: Sequence[str]) -> str:
    """The index of the class that an answer names; its number names it too, but where names are numbers themselves."""
    if answer in labels:
        return str(labels.index(answer))
    return f"no class: {answer}" if all(name.isdecimal() for name in labels) else answer
