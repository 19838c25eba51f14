"""Asking a model every example once and scoring the answers against all references.

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
from typing import Any

from peftlab.batches import Collator, RowBuilder
from peftlab.catalog import METRICS
from peftlab.decoding import DecodingSettings, check_asked
from peftlab.errors import DataError, EvaluationError, NotComputedError
from peftlab.example_choice import pick_examples
from peftlab.files import write_text
from peftlab.generation import BATCH_SIZE, GREEDY, generate
from peftlab.likelihoods import class_probabilities, compare_answers
from peftlab.method import Head
from peftlab.metric import Score
from peftlab.perplexity import perplexity
from peftlab.predictions import PredictionLog
from peftlab.prompt_room import prompt_room, row_room
from peftlab.task import Example, render_prompt


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one model on one split.

    Attributes:
        scores: By metric name, the headline first.
        predictions: One answer per example.
        seconds: Time the answers took.
        probabilities: What the model gave each of its answers, in 0-1, where it chose among classes or labels; None
            where it wrote.
    """

    scores: dict[str, Score]
    predictions: list[str]
    seconds: float
    probabilities: list[float] | None = None


class Evaluator:
    """Asks and scores one split for one tokenizer and kind of head.

    Args:
        task: The task's module.
        examples: The split.
        tokenizer: The model's tokenizer.
        head: What the model ends in.
        max_length: Longest training row, which bounds the source of seq2seq and classification prompts.
        max_new_tokens: Longest answer in tokens.
        batch_size: Most prompts decoded together; as many as are fast and fit the memory where None.
        seed: Seeds the bootstrap, the examples shown, and draws that have no seed of their own.
        decoding: What is asked of the model, and how its answers are decoded.
        labels: Class names of a label task, by which its answers are written to files.

    Attributes:
        not_computed: Metrics that this machine cannot compute, with the reason, after `score`.

    Raises:
        DataError: The split is empty.
        ConfigError: Task or model have no place for what is asked.
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
        batch_size: int | None,
        seed: int,
        decoding: DecodingSettings = GREEDY,
        labels: Sequence[str] = (),
    ) -> None:
        if not examples:
            raise DataError("there are no examples to evaluate on; choose another split, or check the data")
        check_asked(task, head, decoding)
        self.decoding, self.not_computed = decoding, dict[str, str]()
        self.task, self.examples, self.tokenizer, self.head = task, list(examples), tokenizer, head
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.batch_size, self.seed, self.labels = batch_size, seed, tuple(labels)
        self._rows_together = batch_size or BATCH_SIZE
        self._by_generate: dict[str, str] = {}

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
            ConfigError: The model's positions leave no room for a prompt.
            OutputError: The log cannot be written.
        """
        began = time.perf_counter()
        predictions, probabilities, before = self._ask(model, progress, log, identity)
        seconds = before + time.perf_counter() - began
        scores = self.score(predictions)
        if self.decoding.perplexity:
            scores["perplexity"] = self._perplexity(model)
        return Evaluation(scores, predictions, seconds, probabilities)

    def score(self, predictions: Sequence[str]) -> dict[str, Score]:
        """Score answers.

        Args:
            predictions: One for each example, in their order.

        Returns:
            The scores by metric.

        Raises:
            EvaluationError: A score cannot be computed.
        """
        usual = ("accuracy",) if self.head == "classification" else self.task.METRICS
        names = self.decoding.metrics or usual
        scores, self.not_computed = {}, {}
        for name in names:
            try:
                scores[name] = METRICS.load(name).score(predictions, self.examples, seed=self.seed)
            except NotComputedError as error:  # Java or a database is missing: said in its place, never a 0
                self.not_computed[name] = str(error)
        if not scores:
            raise EvaluationError(f"no metric can be computed: {'; '.join(self.not_computed.values())}")
        return scores

    def _builder(self, model: Any) -> RowBuilder:
        """What makes this evaluation's rows."""
        return RowBuilder(
            self.tokenizer,
            prompt=self.task.PROMPT,
            head=self.head,
            max_length=row_room(model, self.max_length),
        )

    def _ask(
        self, model: Any, progress: Callable[[int], None] | None, log: Path | None, identity: str
    ) -> tuple[list[str], list[float] | None, float]:
        """The model's answers, those of the log not asked again, how sure it is where it chose, and the log's seconds."""
        builder = self._builder(model)
        compared = self.decoding.answers == "likelihood"
        written = 0 if compared else self.max_new_tokens
        room = prompt_room(model, self.head, max_length=self.max_length, max_new_tokens=written)
        room = builder.max_length if compared else room
        prompts = [builder.prompt_ids(example.source, room=room) for example in self.examples]
        if self.head == "classification":
            pad_id = self.tokenizer.pad_token_id
            found = class_probabilities(model, prompts, pad_id=pad_id, batch_size=self._rows_together)
            return [str(row.index(max(row))) for row in found], [max(row) for row in found], 0.0
        ids = [example.id for example in self.examples]
        asked = [identity, self._decoding(), dict(zip(ids, prompts, strict=True))]
        with PredictionLog(log, asked) if log is not None else nullcontext() as kept:
            answers = {} if kept is None else dict(kept.found)
            sure = {} if kept is None else dict(kept.probabilities)
            waiting = [i for i in range(len(ids)) if ids[i] not in answers]
            with self._bar(len(answers), hidden=progress is not None) as bar:

                def keep(made: Mapping[int, str], surely: Mapping[int, float] | None = None) -> None:
                    """Note a batch of answers, by place among those that wait."""
                    told = {ids[waiting[i]]: p for i, p in (surely or {}).items()}
                    new = {ids[waiting[i]]: text for i, text in made.items()}
                    answers.update(new)
                    sure.update(told)
                    if kept is not None:
                        kept.add(new, told)
                    bar.update(len(made))

                open_prompts = [prompts[i] for i in waiting]
                if compared:
                    examples = [self.examples[i] for i in waiting]
                    self._compare(model, builder, examples, open_prompts, keep, progress)
                else:
                    self._generate(model, [ids[i] for i in waiting], open_prompts, keep, progress)
        before = 0.0 if kept is None else kept.seconds
        return [answers[name] for name in ids], [sure[name] for name in ids] if compared else None, before

    def _generate(
        self,
        model: Any,
        ids: list[str],
        prompts: list[list[int]],
        keep: Callable[[Mapping[int, str]], None],
        progress: Callable[[int], None] | None,
    ) -> None:
        """Have the model write."""
        generate(
            model,
            self.tokenizer,
            prompts,
            head=self.head,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            decoding=self.decoding,
            seed=self.seed,
            ids=ids,
            progress=progress,
            keep=keep,
            tell=lambda why: self._by_generate.update(by_generate=why),
        )

    def _compare(
        self,
        model: Any,
        builder: RowBuilder,
        examples: list[Example],
        prompts: list[list[int]],
        keep: Callable[[Mapping[int, str], Mapping[int, float]], None],
        progress: Callable[[int], None] | None,
    ) -> None:
        """Take the label that the model finds the most likely, prompts of similar length together."""
        labels: Sequence[str] = self.task.LABELS
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self._rows_together):
            chosen = order[start : start + self._rows_together]
            asked = [examples[i] for i in chosen]
            rows = compare_answers(model, builder, asked, labels, batch_size=self._rows_together)
            pairs = list(zip(chosen, rows, strict=True))
            keep({i: labels[row.index(max(row))] for i, row in pairs}, {i: max(row) for i, row in pairs})
            if progress is not None:
                progress(len(chosen))

    def _perplexity(self, model: Any) -> Score:
        """Perplexity over the references' tokens."""
        builder = self._builder(model)
        rows, count = builder.build(self.examples)
        rows.sort(key=lambda row: len(row.input_ids))
        number = {example.id: i for i, example in enumerate(self.examples)}
        collate = Collator(self.tokenizer.pad_token_id, self.head)
        device = next(model.parameters()).device
        size = self._rows_together
        batches = (collate(rows[start : start + size]) for start in range(0, len(rows), size))
        return perplexity(
            model,
            ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches),
            seed=self.seed,
            groups=[number[row.id.rpartition("/")[0]] for row in rows],
            left_out=sum(count.dropped.values()),
        )

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
        """How answers are got, without what cannot change them."""
        if self.head == "classification":
            return {"kind": "argmax of the class logits"}
        told = self.decoding.describe(seed=self.seed)
        if self.decoding.answers == "likelihood":
            return told | {"labels": list(self.task.LABELS)}
        return told | {"max_new_tokens": self.max_new_tokens}

    def describe(self, evaluation: Evaluation, predictions_file: str) -> dict[str, Any]:
        """One half of `{task}_evaluation.json`.

        Args:
            evaluation: What `run` gave.
            predictions_file: Name of the file that holds the answers.

        Returns:
            JSON-ready metrics, decoding, the answers' file, seconds, and which examples to show.
        """
        told = self._decoding()
        written = {} if self.head == "classification" else {"batch_size": self.batch_size or "auto"}
        return self.describe_scores(
            evaluation.scores,
            probabilities=evaluation.probabilities,
            decoding=told | written | self._by_generate,
            predictions=predictions_file,
            seconds=evaluation.seconds,
        )

    def describe_scores(
        self, scores: Mapping[str, Score], *, probabilities: Sequence[float] | None = None, **facts: Any
    ) -> dict[str, Any]:
        """Scores, with the examples to show and what was not computed.

        Args:
            scores: By metric, the headline first.
            probabilities: What the model gave its answers; None where that is not known.
            facts: What else is to be said.

        Returns:
            JSON-ready.
        """
        ids = [example.id for example in self.examples]
        headline = next(iter(scores.values()))
        return {
            "metrics": {name: score.to_dict() for name, score in scores.items()},
            **facts,
            "examples": pick_examples(headline, ids, seed=self.seed, probabilities=probabilities),
        } | ({"not_computed": self.not_computed} if self.not_computed else {})

    def tell(self, evaluation: Evaluation) -> str:
        """The scores on one line, and what was not computed.

        Args:
            evaluation: What `run` gave.
        """
        missing = [f"{name} not computed: {why}" for name, why in self.not_computed.items()]
        return "; ".join([*map(str, evaluation.scores.values()), *missing])

    def rows(
        self, predictions: Sequence[str], probabilities: Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """The answers beside what was asked.

        Args:
            predictions: One for each example, in their order.
            probabilities: What the model gave them; None where that is not known.

        Returns:
            For each example its id, source, prompt, prediction, references, and probability where there is one; classes
            by name.
        """
        sure = (
            [{}] * len(self.examples)
            if probabilities is None
            else [{"probability": p} for p in probabilities]
        )
        return [
            {
                "id": example.id,
                "source": example.source,
                "prompt": render_prompt(self.task.PROMPT, example.source),
                "prediction": self._named(prediction),
                "references": list(example.references)
                or ([self._named(str(example.label))] if example.label is not None else []),
            }
            | probability
            for example, prediction, probability in zip(self.examples, predictions, sure, strict=True)
        ]

    def _named(self, answer: str) -> str:
        """A class by its name; any other answer as it is."""
        names = {str(index): name for index, name in enumerate(self.labels)}
        return names.get(answer, answer) if self.head == "classification" else answer

    def write_predictions(self, evaluation: Evaluation, path: Path, *, keep_log: bool = False) -> Path:
        """Write the answers beside what was asked, and remove the log of answers as they came.

        Args:
            evaluation: What `run` gave.
            path: A .jsonl file.
            keep_log: Whether the log stays, where scores are still to be written.

        Returns:
            The path.
        """
        rows = self.rows(evaluation.predictions, evaluation.probabilities)
        written = write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if not keep_log:
            path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        return written
