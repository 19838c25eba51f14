"""Scoring: ask every test example once, score the answers against all its references, keep the answers.

An evaluation that cannot be completed raises; there is no score in place of one that could not be computed (law 7).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from peftlab.batches import RowBuilder
from peftlab.catalog import METRICS
from peftlab.config import RunConfig
from peftlab.decoding import DecodingSettings
from peftlab.errors import DataError, EvaluationError, NotComputedError, OutputError, UnknownNameError
from peftlab.files import write_json, write_text
from peftlab.generation import GREEDY, classify, generate, max_prompt_tokens
from peftlab.method import Head
from peftlab.metric import Score
from peftlab.opening import Reference, find_reference
from peftlab.predictions import PredictionLog
from peftlab.task import Example, Splits, choose, render_prompt

SPLITS = ("train", "validation", "test")
NUM_EVALUATED = 100
"""Examples scored where neither a person, a run nor the task says how many: as many as the seeds did."""


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
        batch_size: Most prompts decoded together.
        seed: Seeds the bootstrap, and draws that have no seed of their own.
        decoding: How answers are decoded.

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
        decoding: DecodingSettings = GREEDY,
    ) -> None:
        if not examples:
            raise DataError("there are no examples to evaluate on; choose another split, or check the data")
        self.decoding, self.not_computed = decoding, dict[str, str]()
        self.task, self.examples, self.tokenizer, self.head = task, list(examples), tokenizer, head
        self.max_length, self.max_new_tokens, self.batch_size, self.seed = (
            max_length,
            max_new_tokens,
            batch_size,
            seed,
        )

    def run(
        self,
        model: Any,
        *,
        progress: Callable[[int], None] | None = None,
        log: Path | None = None,
        identity: str = "",
    ) -> Evaluation:
        """Ask and score.

        Args:
            model: The model as it stands.
            progress: Told how many answers have been added; a bar on a terminal where None.
            log: A file for answers as they come, "NAME.partial" for a `write_predictions` to NAME, which removes it.
                One that a killed evaluation of the same left is gone on with.
            identity: What the model is, so that the answers of another one in the log are not taken over.

        Returns:
            The scores and the answers.

        Raises:
            EvaluationError: A score cannot be computed.
            OutputError: The log cannot be written.
        """
        began = time.perf_counter()
        predictions = self._ask(model, progress, log, identity)
        seconds = time.perf_counter() - began
        return Evaluation(self.score(predictions), predictions, seconds)

    def score(self, predictions: Sequence[str]) -> dict[str, Score]:
        """Score answers.

        Args:
            predictions: One for each example, in their order.

        Returns:
            The scores by metric.

        Raises:
            EvaluationError: A score cannot be computed.
        """
        names = ("accuracy",) if self.head == "classification" else self.task.METRICS
        scores, self.not_computed = {}, {}
        for name in names:
            try:
                scores[name] = METRICS.load(name).score(predictions, self.examples, seed=self.seed)
            except NotComputedError as error:  # Java or a database is missing: said in its place, never a 0
                self.not_computed[name] = str(error)
        if not scores:
            raise EvaluationError(f"no metric can be computed: {'; '.join(self.not_computed.values())}")
        return scores

    def _ask(
        self, model: Any, progress: Callable[[int], None] | None, log: Path | None, identity: str
    ) -> list[str]:
        """The model's answers; those of the log are not asked again."""
        builder = RowBuilder(
            self.tokenizer, prompt=self.task.PROMPT, head=self.head, max_length=self.max_length
        )
        room = max_prompt_tokens(model, self.max_new_tokens) if self.head == "causal" else self.max_length
        prompts = [builder.prompt_ids(example.source, room=room) for example in self.examples]
        if self.head == "classification":
            return classify(model, prompts, pad_id=self.tokenizer.pad_token_id, batch_size=self.batch_size)
        ids = [example.id for example in self.examples]
        asked = [identity, self._decoding(), dict(zip(ids, prompts, strict=True))]
        with PredictionLog(log, asked) if log is not None else nullcontext() as kept:
            found = {} if kept is None else dict(kept.found)
            open_ids = [i for i in range(len(ids)) if ids[i] not in found]
            with self._bar(len(found), hidden=progress is not None) as bar:

                def keep(made: Mapping[int, str]) -> None:
                    """Note a batch of answers."""
                    answers = {ids[open_ids[i]]: text for i, text in made.items()}
                    found.update(answers)
                    if kept is not None:
                        kept.add(answers)
                    bar.update(len(made))

                generate(
                    model,
                    self.tokenizer,
                    [prompts[i] for i in open_ids],
                    head=self.head,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    decoding=self.decoding,
                    seed=self.seed,
                    ids=[ids[i] for i in open_ids],
                    progress=progress,
                    keep=keep,
                )
        return [found[name] for name in ids]

    def _bar(self, done: int, *, hidden: bool) -> Any:
        """A bar on a terminal; nothing elsewhere."""
        from tqdm import tqdm

        return tqdm(
            total=len(self.examples),
            initial=done,
            desc="answers",
            disable=True if hidden else None,
            leave=False,
        )

    def _decoding(self) -> dict[str, Any]:
        """How answers are decoded, without what cannot change them."""
        return self.decoding.describe(seed=self.seed) | {"max_new_tokens": self.max_new_tokens}

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
            else self._decoding() | {"batch_size": self.batch_size}
        )
        return {
            "metrics": {name: score.to_dict() for name, score in evaluation.scores.items()},
            "decoding": decoding,
            "predictions": predictions_file,
            "seconds": evaluation.seconds,
        } | ({"not_computed": self.not_computed} if self.not_computed else {})

    def write_predictions(self, evaluation: Evaluation, path: Path) -> Path:
        """Write the answers beside what was asked, and remove the log of answers as they came.

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
        written = write_text(path, "\n".join(lines) + "\n")
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        return written


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
        reference: A run's path or name, "last", an adapter's folder, or a model's folder or hub name.
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
    found = find_reference(reference, task=task, data_dir=data_dir, changes=changes, directory=directory)
    opened = found.open()
    settings, seed = opened.config.evaluation, opened.config.training.seed
    examples = choose_examples(opened.splits, split, _limit(found, opened.task, num_samples), seed)
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
    )
    file = "predictions.after.jsonl"
    if output is not None:
        make_folder(output)
    log = None if output is None else output / f"{file}.partial"
    evaluation = evaluator.run(opened.model, log=log, identity=found.identity())
    result = describe_result(opened.config, split, examples, evaluator.describe(evaluation, file))
    if output is not None:
        evaluator.write_predictions(evaluation, output / file)
        write_json(output / scores_file(opened.config), result)
    return result


def make_folder(path: Path) -> None:
    """Make a folder for scores.

    Args:
        path: The folder; it may be there.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {path} cannot be made: {error.strerror or error}") from None


def _limit(found: Reference, task: ModuleType, asked: int | Literal["all"] | None) -> int | None:
    """How many examples are scored; None for all."""
    if asked is not None:
        return asked if isinstance(asked, int) else None
    if found.own_task and found.bundle is not None:
        return found.config.evaluation.num_samples
    usual: int = getattr(task, "NUM_EVALUATED", NUM_EVALUATED)
    return usual


def choose_examples(splits: Splits, split: str, limit: int | None, seed: int) -> list[Example]:
    """A split, or a seeded choice of it.

    Args:
        splits: A task's data.
        split: "train", "validation" or "test".
        limit: How many examples; None takes all.
        seed: Seeds the choice.

    Returns:
        The examples.

    Raises:
        UnknownNameError: There is no such split.
        DataError: There is nothing in it.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    examples: Sequence[Example] = getattr(splits, split)
    if not examples:
        raise DataError(
            f"the split '{split}' is empty; choose another one of {', '.join(SPLITS)}, or check the data"
        )
    return choose(examples, limit, seed=seed)


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
