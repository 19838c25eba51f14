"""What all continual learners share: one base, a model for each task, learned one after another and switched.

They are a face: models are made, saved and loaded by the extensions, trained by the one trainer, scored by the one
evaluator. The base is never changed, and is checked not to be; a bundle is loaded whole or not at all.
"""

from __future__ import annotations

import logging
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import nn

from peftlab.batches import Row, RowBuilder
from peftlab.catalog import METHODS
from peftlab.config import ModelSettings, build_config
from peftlab.continual.answers import hash_tensors
from peftlab.continual.fitting import fit_rows
from peftlab.continual.lessons import check_positions
from peftlab.decoding import DecodingSettings
from peftlab.errors import DataError, InputError, RunError, UnknownNameError
from peftlab.evaluator import Evaluator
from peftlab.extensions.bundles import record_of
from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.life_cycle import Extension, head_of
from peftlab.folders import check_name
from peftlab.metric import Score
from peftlab.streams import seed_for
from peftlab.task import Example, choose

_log = logging.getLogger(__name__)
NUM_SAMPLES = 500
_MOST_WATCHED = 32
Data = Sequence[Example] | Iterable[Mapping[str, Any]]
"""Examples of a task, or rows {"prompt": ..., "completion": ...}."""


class ContinualLearner(ABC):
    """One base and an extension of it for each task.

    Args:
        model_name: A model's folder or hub name, or a live transformers model with its tokenizer.
        tokenizer: The tokenizer of a live model; None is the named model's own.
        device: Where the models shall be: auto (CUDA, then MPS, then CPU), cpu, cuda or mps. A live model stays where it is.
        config: The extensions' settings; where models are saved is `save_directory`.
        prompt: The template of prompts, with `{source}`; the same for training and for answers.
        metrics: What answers are scored by, the headline first.
        learning_rate: Peak learning rate; None is 2e-4 times what the method begins with.
        max_length: Longest training row in tokens; a longer one loses the end of its source.
        max_new_tokens: Longest answer in tokens.
        seed: Seeds order and dropout, and the adapters' start.

    Attributes:
        base_model: The base, after `prepare_model`.
        current_model: The model of the current task; the base where there is none.
        current_task: The task that was trained, or switched to, last.

    Raises:
        InputError: A live model came without its tokenizer, the template has no `{source}`, or the base shall train.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        model_name: str | Path | nn.Module,
        tokenizer: Any = None,
        device: str = "auto",
        *,
        config: ExtensionConfig | None = None,
        prompt: str = "{source}",
        metrics: Sequence[str] = ("bleu", "rouge_l"),
        learning_rate: float | None = None,
        max_length: int = 512,
        max_new_tokens: int = 96,
        seed: int = 42,
    ) -> None:
        if isinstance(model_name, nn.Module) and tokenizer is None:
            raise InputError("give a live model together with its tokenizer, or a model's folder or hub name")
        if "{source}" not in prompt:
            raise InputError(
                f"the prompt template {prompt!r} has no {{source}}, so a model would be told nothing"
            )
        self.model_name, self.tokenizer, self.device = model_name, tokenizer, device
        self.config = ExtensionConfig() if config is None else config
        if not self.config.freeze_base:
            raise InputError(
                "freeze_base=False: a learner's tasks share one base, which none of them may train"
            )
        self.learning_rate, self.max_length, self.seed = learning_rate, max_length, seed
        self.max_new_tokens, self.metrics = max_new_tokens, tuple(metrics)
        self.base_model: Any = None
        self.current_model: Any = None
        self.current_task: str | None = None
        self._task = ModuleType("peftlab_continual_task")
        vars(self._task).update(PROMPT=prompt, METRICS=self.metrics)
        self._extension: Any = None
        self._models: dict[str, Any] = {}
        self._bits = ""

    @abstractmethod
    def _make_extension(self) -> Extension:
        """What makes the models."""

    @abstractmethod
    def _create(self, task_name: str) -> Any:
        """A new model for a task."""

    @abstractmethod
    def _save(self, task_name: str) -> None:
        """Save a task's model; one that was saved before is replaced."""

    @abstractmethod
    def _load(self, task_name: str) -> Any:
        """A task's saved model."""

    @abstractmethod
    def list_tasks(self) -> list[str]:
        """The tasks with a saved model, sorted; they are found in any process."""

    def prepare_model(self) -> None:
        """Load the base; what was trained and saved before is there to be switched to.

        Raises:
            ModelError: There is no such model, or it does not write.
            ConfigError: The device is not there.
        """
        if isinstance(self.model_name, nn.Module):
            self.base_model = self.model_name
        else:
            from peftlab.loading import find_model, load_model

            settings = ModelSettings(name=str(self.model_name), device=self.device)
            source = find_model(settings)
            self.tokenizer = source.tokenizer if self.tokenizer is None else self.tokenizer
            self.base_model = load_model(source, settings)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._extension = self._make_extension()
        self._bits, self._models = self._hash_base(), {}
        self.current_model, self.current_task = self.base_model, None

    def train_task(self, train_data: Data, task_name: str, epochs: int = 5, batch_size: int = 16) -> float:
        """Make a model for a task, train it and save it.

        Args:
            train_data: Examples, or rows {"prompt": ..., "completion": ...}; equal prompts are one example.
            task_name: The task's name; one that was trained before is trained anew and replaced.
            epochs: Passes over the rows.
            batch_size: Rows of a step.

        Returns:
            Minutes of training.

        Raises:
            InputError: The model is not prepared, the name is none, or a number is below 1.
            DataError: There are no rows, or none fits.
            RunError: Something that shall train does not, or the base has changed.
        """
        self._require_prepared()
        check_name(task_name)
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of 1 or more, got {value!r}")
        rows = self._rows(train_data, task_name)
        model = self._seeded(task_name)
        minutes = self._train_model(model, rows, epochs, batch_size)
        self._models[task_name] = self.current_model = model
        self.current_task = task_name
        self._check_base(f"training {task_name}")
        self._save(task_name)
        _log.info("task %s learned in %.2f minutes", task_name, minutes)
        return minutes

    def _rows(self, data: Data, task_name: str) -> list[Row]:
        """Rows of tokens of a task's data, none longer than the base's positions."""
        rows, count = self._builder().build(_examples(data))
        if not rows:
            why = "; ".join(f"{reason}: {n}" for reason, n in count.dropped.items())
            raise DataError(
                f"{task_name}: no row is left to train on ({why}); raise max_length or check the data"
            )
        check_positions(self.base_model.config, rows, task_name)
        return rows

    def _train_model(self, model: Any, train_data: Any, epochs: int, batch_size: int) -> float:
        """Train a model of the extension, and say how many minutes it took; the document's own step."""
        record = record_of(model)
        if record is None:
            raise InputError("this model is not of an extension; make it with one, as train_task does")
        is_rows = isinstance(train_data, list) and all(isinstance(row, Row) for row in train_data)
        rows = train_data if is_rows else self._rows(train_data, record.task)
        steps = epochs * -(-len(rows) // batch_size)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="peftlab-") as folder:
            fit_rows(
                record.attachment, rows, rows[:_MOST_WATCHED], self._training(steps, batch_size), Path(folder),
                pad_id=self.tokenizer.pad_token_id, head=head_of(self.base_model),
            )  # fmt: skip
        model.eval()
        return (time.perf_counter() - began) / 60

    def switch_to_task(self, task_name: str) -> None:
        """Make a task's model the current one: the base stays, only what was added is exchanged.

        Args:
            task_name: A task that was trained here, or saved by any process.

        Raises:
            InputError: The model is not prepared, or there is no such task.
            CheckpointError: What was saved is damaged, or of another base; nothing of it is loaded.
        """
        self._require_prepared()
        if task_name not in self._models:
            known = self.list_tasks()
            if task_name not in known:
                raise (
                    UnknownNameError("task with a model", task_name, known)
                    if known
                    else InputError(
                        f"no task has been trained yet (asked for: '{task_name}'); call train_task first"
                    )
                )
            self._models[task_name] = self._load(task_name)
        self.current_model, self.current_task = self._models[task_name], task_name

    def evaluate_task(
        self, eval_data: Data, task_name: str, num_samples: int | None = NUM_SAMPLES
    ) -> dict[str, Score]:
        """Switch to a task's model and score its greedy answers.

        Args:
            eval_data: Examples or rows, with their accepted answers.
            task_name: Whose model answers.
            num_samples: How many, a seeded choice; None, or more than there are, takes all.

        Returns:
            Metric to score, the headline first.

        Raises:
            InputError: There is no such task.
            DataError: There is nothing to evaluate on.
            EvaluationError: A score cannot be computed; none is given in its place.
        """
        self.switch_to_task(task_name)
        return self._score(self.current_model, eval_data, num_samples)

    def evaluate_base(self, eval_data: Data, num_samples: int | None = NUM_SAMPLES) -> dict[str, Score]:
        """Score the base's own answers, without any task's model.

        Args:
            eval_data: As for `evaluate_task`.
            num_samples: How many.

        Returns:
            Metric to score.

        Raises:
            DataError: There is nothing to evaluate on.
            EvaluationError: A score cannot be computed.
        """
        self._require_prepared()
        return self._score(self.base_model, eval_data, num_samples)

    def _score(self, model: Any, eval_data: Data, num_samples: int | None) -> dict[str, Score]:
        """The scores of a model's greedy answers."""
        if num_samples is not None and (isinstance(num_samples, bool) or num_samples < 1):
            raise InputError(
                f"num_samples must be a whole number of 1 or more, or None for all; got {num_samples!r}"
            )
        examples = _examples(eval_data)
        limit = None if num_samples is None or num_samples >= len(examples) else num_samples
        evaluator = Evaluator(
            self._task, choose(examples, limit, seed=self.seed), self.tokenizer, head=head_of(self.base_model),
            max_length=self.max_length, max_new_tokens=self.max_new_tokens, batch_size=32, seed=self.seed,
            decoding=DecodingSettings(metrics=self.metrics),
        )  # fmt: skip
        return evaluator.run(model, progress=lambda _: None).scores

    def _seeded(self, task_name: str) -> Any:
        """A new model whose start depends on the seed and the task's name alone."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "adapter", task_name))
            return self._create(task_name)

    def _builder(self) -> RowBuilder:
        return RowBuilder(
            self.tokenizer,
            prompt=self._task.PROMPT,
            head=head_of(self.base_model),
            max_length=self.max_length,
        )

    def _training(self, steps: int, batch_size: int) -> Any:
        """The config of a training."""
        rate = self.learning_rate or 2e-4 * float(METHODS.load(self.kind).RATE_TO_LORA)
        training = {
            "max_steps": steps, "batch_size": batch_size, "learning_rate": rate, "warmup_steps": steps // 20,
            "validation_steps": steps, "keep_checkpoints": 1, "select_best": False, "seed": self.seed,
        }  # fmt: skip
        device = next(self.base_model.parameters()).device.type
        return build_config({"training": training, "model": {"device": device}})

    def _require_prepared(self) -> None:
        if self.base_model is None:
            raise InputError("the base is not loaded yet: call prepare_model first")

    def _hash_base(self) -> str:
        return hash_tensors(dict(self.base_model.named_parameters()))

    def _check_base(self, after: str) -> None:
        """Refuse to go on with a base that has changed (law 2)."""
        if self._hash_base() != self._bits:
            raise RunError(f"{after} left the base changed: its parameters have other bits than before")


def _examples(data: Data) -> list[Example]:
    """Examples as they are, or rows as examples."""
    given = list(data)
    if not given:
        raise DataError("there are no rows; give examples, or rows {'prompt': ..., 'completion': ...}")
    if all(isinstance(one, Example) for one in given):
        return [one for one in given if isinstance(one, Example)]
    grouped: dict[str, list[str]] = {}
    for place, row in enumerate(given):
        keys = set(row) if isinstance(row, Mapping) else set()
        if not isinstance(row, Mapping) or keys != {"prompt", "completion"}:
            found = ", ".join(sorted(map(str, keys))) or type(row).__name__
            raise DataError(
                f"row {place}: expected an Example, or a mapping with 'prompt' and 'completion'; got {found}"
            )
        if wrong := [key for key in row if not isinstance(row[key], str) or not row[key].strip()]:
            raise DataError(
                f"row {place}: '{wrong[0]}' must be a text that is not empty, got {row[wrong[0]]!r}"
            )
        grouped.setdefault(row["prompt"], []).append(row["completion"])
    pairs = enumerate(grouped.items())
    return [Example(f"row-{place}", prompt, tuple(answers)) for place, (prompt, answers) in pairs]
