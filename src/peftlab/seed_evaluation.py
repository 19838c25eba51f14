"""S1's evaluation functions, kept under their names and signatures.

They are a face: data come from the tasks, prompts and scores from `Evaluator`, as in a run. Every evaluation gives the one
`EvaluationResult`, where S1 gave an object for two data sets and a dictionary for the two others. Answers are decoded
greedily unless sampling is asked for; a score that cannot be computed raises or says why, and is never 0.

Data sets are read from their own files: `data_dir` names the folder. A finished run knows its own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftlab.errors import ConfigError, InputError, did_you_mean
from peftlab.evaluation import Evaluator
from peftlab.evaluation_result import EvaluationResult
from peftlab.experiment_config import DatasetType, member
from peftlab.opening import find_reference
from peftlab.store import Opened
from peftlab.task import choose

__all__ = [
    "EvaluationResult",
    "ModelEvaluator",
    "evaluate_e2e",
    "evaluate_multi_nli",
    "evaluate_samsum",
    "evaluate_wikisql",
]

NUM_SAMPLES, NUM_SAMPLES_MULTI_NLI, BATCH_SIZE = 100, 1000, 8
_OWN = ("device", "torch_dtype", "directory")


class ModelEvaluator:
    """Asks and scores one model.

    Args:
        model_path: A run, an adapter's folder that peftlab or peft wrote, or a whole model; None is the bare base.
        base_model_id: The base, a hub name or a folder; None is the one that the adapter names.
        device: auto (CUDA, then MPS, then CPU), cpu, cuda or mps.
        torch_dtype: auto, float32, bfloat16, float16 or float64.
        directory: Where run folders lie.

    Raises:
        InputError: Neither a model nor a base is given.
    """

    def __init__(
        self,
        model_path: str | Path | None,
        base_model_id: str | None = None,
        *,
        device: str = "auto",
        torch_dtype: str = "auto",
        directory: str | Path = "runs",
    ) -> None:
        if model_path is None and base_model_id is None:
            raise InputError("give model_path (a run, an adapter, a model) or base_model_id")
        self.model_path, self.base_model_id = model_path, base_model_id
        self._placed = {"device": device, "dtype": torch_dtype}
        self._directory = Path(directory)

    def evaluate(
        self,
        dataset: DatasetType | str,
        num_samples: int | None = NUM_SAMPLES,
        batch_size: int = BATCH_SIZE,
        *,
        data_dir: str | Path | None = None,
        split: str = "test",
        by_likelihood: bool = False,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> EvaluationResult:
        """Score the model on a data set.

        Args:
            dataset: The data set.
            num_samples: How many examples, a seeded choice; None or 0 takes all.
            batch_size: Most prompts decoded together; 1 or more.
            data_dir: The folder with the data set's own files; None is a finished run's own.
            split: train, validation or test.
            by_likelihood: Whether a model that writes answers with the label that it finds the most likely; for data
                sets with labels alone.
            max_new_tokens: Longest answer in tokens; None is the data set's own.
            do_sample: Whether answers are drawn; greedy where not.
            temperature: Of drawing; refused where nothing is drawn.
            top_p: Of drawing; refused where nothing is drawn.
            seed: Seeds the choice, the drawing and the intervals.

        Returns:
            The result.

        Raises:
            InputError: There is no such model or data, or a setting does not fit.
            EvaluationError: A score cannot be computed.
        """
        asked: dict[str, float | None] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        changes |= {"decoding": "sample"} if do_sample else {}
        changes |= {"answers": "likelihood"} if by_likelihood else {}
        _check_number("num_samples", num_samples or 0, 0)
        _check_number("batch_size", batch_size, 1)
        _check_number("seed", seed, 0)
        name = member(DatasetType, dataset, "dataset").value
        opened = self._open(name, data_dir, changes)
        if split not in ("train", "validation", "test"):
            raise ConfigError(f"there is no split '{split}'; there is: train, validation, test")
        examples = choose(getattr(opened.splits, split), num_samples or None, seed=seed)
        settings = opened.config.evaluation
        evaluator = Evaluator(
            opened.task,
            examples,
            opened.tokenizer,
            head=opened.head,
            max_length=opened.config.task.max_length,
            max_new_tokens=settings.answer_tokens(opened.task),
            batch_size=batch_size,
            seed=seed,
            decoding=settings,
            labels=opened.labels,
        )
        evaluation = evaluator.run(opened.model)
        told = evaluator.describe(evaluation, "")
        return EvaluationResult(
            task=name,
            model_path=str(self.model_path or self.base_model_id),
            base_model_id=opened.config.model.name,
            split=split,
            num_samples=len(examples),
            metrics=json.loads(json.dumps(told["metrics"])),
            decoding=json.loads(json.dumps(told["decoding"])),
            seconds=told["seconds"],
            not_computed=dict(told.get("not_computed", {})),
            predictions=[
                {key: row[key] for key in ("id", "prediction", "references")}
                for row in evaluator.rows(evaluation.predictions)
            ],
            examples=told["examples"],
        )

    def _open(self, task: str, data_dir: str | Path | None, evaluation: Mapping[str, Any]) -> Opened:
        """The model with a task's data."""
        found = find_reference(
            str(self.model_path or self.base_model_id),
            task=task,
            data_dir=None if data_dir is None else Path(data_dir),
            changes={"evaluation": evaluation},
            base=self.base_model_id,
            directory=self._directory,
        )
        changed = {key: value for key, value in self._placed.items() if value != "auto"}
        changed |= {} if self.base_model_id is None or found.bundle is None else {"name": self.base_model_id}
        model = found.config.model.model_copy(update=changed)
        return replace(found, config=found.config.model_copy(update={"model": model})).open()


def evaluate_e2e(
    model_path: str | Path | None,
    base_model_id: str | None = None,
    num_samples: int | None = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    output_path: str | Path | None = None,
    **options: Any,
) -> EvaluationResult:
    """Score a model on E2E NLG's test texts, each against all its references.

    Args:
        model_path: A run, an adapter's folder, or a whole model; None is the bare base.
        base_model_id: The base; None is the one that the adapter names.
        num_samples: How many examples, a seeded choice; None or 0 takes all.
        batch_size: Most prompts decoded together.
        output_path: A file for the result as JSON; nothing is written where None.
        options: More for `ModelEvaluator` (device, torch_dtype, directory) and its `evaluate` (data_dir, split,
            by_likelihood, max_new_tokens, do_sample, temperature, top_p, seed).

    Returns:
        The result.

    Raises:
        InputError: There is no such model or data.
        EvaluationError: A score cannot be computed.
    """
    return _evaluate(
        DatasetType.E2E_NLG, model_path, base_model_id, num_samples, batch_size, output_path, options
    )


def evaluate_samsum(
    model_path: str | Path | None,
    base_model_id: str | None = None,
    num_samples: int | None = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    output_path: str | Path | None = None,
    **options: Any,
) -> EvaluationResult:
    """Score a model on SAMSum's test dialogues.

    Args:
        model_path: As for `evaluate_e2e`; so are the others.
        base_model_id: The base.
        num_samples: How many examples.
        batch_size: Most prompts decoded together.
        output_path: A file for the result.
        options: More for `ModelEvaluator` and its `evaluate`.

    Returns:
        The result.

    Raises:
        InputError: There is no such model or data.
        EvaluationError: A score cannot be computed.
    """
    return _evaluate(
        DatasetType.SAMSUM, model_path, base_model_id, num_samples, batch_size, output_path, options
    )


def evaluate_wikisql(
    model_path: str | Path | None,
    base_model_id: str | None = None,
    num_samples: int | None = NUM_SAMPLES,
    batch_size: int = BATCH_SIZE,
    output_path: str | Path | None = None,
    **options: Any,
) -> EvaluationResult:
    """Score a model on WikiSQL's test questions.

    S1's "exact_match" ignored case; here it does not, as the texts of conditions keep theirs. "logical_form" compares
    queries by their parts, whatever their case.

    Args:
        model_path: As for `evaluate_e2e`; so are the others.
        base_model_id: The base.
        num_samples: How many examples.
        batch_size: Most prompts decoded together.
        output_path: A file for the result.
        options: More for `ModelEvaluator` and its `evaluate`.

    Returns:
        The result.

    Raises:
        InputError: There is no such model or data.
        EvaluationError: A score cannot be computed.
    """
    return _evaluate(
        DatasetType.WIKISQL, model_path, base_model_id, num_samples, batch_size, output_path, options
    )


def evaluate_multi_nli(
    model_path: str | Path | None,
    base_model_id: str | None = None,
    num_samples: int | None = NUM_SAMPLES_MULTI_NLI,
    batch_size: int = BATCH_SIZE,
    output_path: str | Path | None = None,
    **options: Any,
) -> EvaluationResult:
    """Score a model on MultiNLI's matched development set: by its class, or by the label that it writes.

    Args:
        model_path: As for `evaluate_e2e`; so are the others.
        base_model_id: The base.
        num_samples: How many examples.
        batch_size: Most prompts decoded together.
        output_path: A file for the result.
        options: More for `ModelEvaluator` and its `evaluate`.

    Returns:
        The result.

    Raises:
        InputError: There is no such model or data.
        EvaluationError: A score cannot be computed.
    """
    return _evaluate(
        DatasetType.MULTI_NLI, model_path, base_model_id, num_samples, batch_size, output_path, options
    )


def _check_number(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of {least} or more, got {value!r}")


def _evaluate(
    dataset: DatasetType,
    model_path: str | Path | None,
    base_model_id: str | None,
    num_samples: int | None,
    batch_size: int,
    output_path: str | Path | None,
    options: Mapping[str, Any],
) -> EvaluationResult:
    """One evaluation from start to file."""
    known = [*_OWN, *list(inspect.signature(ModelEvaluator.evaluate).parameters)[4:]]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"unknown option '{key}'{did_you_mean(key, known)}; there is: {', '.join(known)}"
            )
    own = {key: options[key] for key in _OWN if key in options}
    rest = {key: value for key, value in options.items() if key not in own}
    evaluator = ModelEvaluator(model_path, base_model_id, **own)
    result = evaluator.evaluate(dataset, num_samples, batch_size, **rest)
    if output_path is not None:
        result.save(output_path)
    return result
