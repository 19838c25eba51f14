"""Scoring: ask every test example once, score the answers against all its references, keep the answers.

An evaluation that cannot be completed raises; there is no score in place of one that could not be computed (law 7).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from peftlab.batches import RowBuilder
from peftlab.catalog import METRICS
from peftlab.errors import DataError
from peftlab.files import write_json, write_text
from peftlab.generation import classify, generate, max_prompt_tokens
from peftlab.method import Head
from peftlab.metric import Score
from peftlab.task import Example, choose, render_prompt


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one model on one split.

    Attributes:
        scores: By metric name, the headline first.
        predictions: One answer per example.
        seconds: Time the answers took.
    """

    scores: dict[str, Score]
    predictions: list[str]
    seconds: float


class Evaluator:
    """Asks and scores one split for one tokenizer and kind of head.

    Args:
        task: The task's module.
        examples: The split.
        tokenizer: The model's tokenizer.
        head: What the model ends in.
        max_length: Longest training row, which bounds the source of seq2seq and classification prompts.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts decoded together.
        seed: Seeds the bootstrap.

    Raises:
        DataError: The split is empty.
    """

    def __init__(
        self,
        task: ModuleType,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        head: Head,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ) -> None:
        if not examples:
            raise DataError("there are no test examples to evaluate on")
        self.task, self.examples, self.tokenizer, self.head = task, list(examples), tokenizer, head
        self.max_length, self.max_new_tokens, self.batch_size, self.seed = (
            max_length,
            max_new_tokens,
            batch_size,
            seed,
        )

    def run(self, model: Any, *, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Ask and score.

        Args:
            model: The model as it stands.
            progress: Told how many answers have been added.

        Returns:
            The scores and the answers.

        Raises:
            EvaluationError: A score cannot be computed.
        """
        builder = RowBuilder(
            self.tokenizer, prompt=self.task.PROMPT, head=self.head, max_length=self.max_length
        )
        room = max_prompt_tokens(model, self.max_new_tokens) if self.head == "causal" else self.max_length
        prompts = [builder.prompt_ids(example.source, room=room) for example in self.examples]
        began = time.perf_counter()
        if self.head == "classification":
            predictions = classify(
                model, prompts, pad_id=self.tokenizer.pad_token_id, batch_size=self.batch_size
            )
        else:
            predictions = generate(
                model,
                self.tokenizer,
                prompts,
                head=self.head,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                progress=progress,
            )
        seconds = time.perf_counter() - began
        names = ("accuracy",) if self.head == "classification" else self.task.METRICS
        scores = {n: METRICS.load(n).score(predictions, self.examples, seed=self.seed) for n in names}
        return Evaluation(scores, predictions, seconds)

    def describe(self, evaluation: Evaluation, predictions_file: str) -> dict[str, Any]:
        """One half of `{task}_evaluation.json`.

        Args:
            evaluation: What `run` gave.
            predictions_file: Name of the file that holds the answers.

        Returns:
            JSON-ready metrics, decoding, the answers' file and seconds.
        """
        decoding = (
            {"kind": "argmax of the class logits"}
            if self.head == "classification"
            else {"kind": "greedy", "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        )
        return {
            "metrics": {name: score.to_dict() for name, score in evaluation.scores.items()},
            "decoding": decoding,
            "predictions": predictions_file,
            "seconds": evaluation.seconds,
        }

    def write_predictions(self, evaluation: Evaluation, path: Path) -> Path:
        """Write the answers beside what was asked.

        Args:
            evaluation: What `run` gave.
            path: A .jsonl file.

        Returns:
            The path.
        """
        lines = [
            json.dumps(
                {
                    "id": example.id,
                    "source": example.source,
                    "prompt": render_prompt(self.task.PROMPT, example.source),
                    "prediction": prediction,
                    "references": list(example.references)
                    or ([str(example.label)] if example.label is not None else []),
                },
                ensure_ascii=False,
            )
            for example, prediction in zip(self.examples, evaluation.predictions, strict=True)
        ]
        return write_text(path, "\n".join(lines) + "\n")


def evaluate_saved(
    reference: str,
    *,
    task: str | None = None,
    data_dir: Path | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    output: Path | None = None,
    directory: Path = Path("runs"),
) -> dict[str, Any]:
    """Score a finished run or a base model on a task's test split.

    Args:
        reference: A run's path or name, "last", or a model's folder or hub name.
        task: The task; a run's own where None.
        data_dir: The task's data; a run's own where None.
        num_samples: How many test examples; as many as the run scored, or all, where None.
        batch_size: Prompts decoded together.
        output: A folder for the evaluation and the answers; nothing is written where None.
        directory: Where run folders lie.

    Returns:
        As in `{task}_evaluation.json`, with the scores under "after".

    Raises:
        InputError: There is no such run, model, task or data.
        EvaluationError: A score cannot be computed.
    """
    from peftlab.store import open_run_or_model

    opened = open_run_or_model(reference, task=task, data_dir=data_dir, directory=directory)
    settings = opened.config.evaluation
    limit = settings.num_samples if num_samples is None else num_samples
    examples = choose(opened.splits.test, limit, seed=opened.config.training.seed)
    evaluator = Evaluator(
        opened.task,
        examples,
        opened.tokenizer,
        head=opened.head,
        max_length=opened.config.task.max_length,
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch_size or settings.batch_size,
        seed=opened.config.training.seed,
    )
    evaluation = evaluator.run(opened.model)
    result = {
        "task": opened.config.task.name,
        "split": "test",
        "num_examples": len(examples),
        "before": None,
        "after": evaluator.describe(evaluation, "predictions.after.jsonl"),
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        evaluator.write_predictions(evaluation, output / "predictions.after.jsonl")
        write_json(output / f"{opened.config.task.name}_evaluation.json", result)
    return result
