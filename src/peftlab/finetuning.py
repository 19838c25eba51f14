"""The Python door: fine-tune in one call, in a script or a notebook.

run = peftlab.finetune("path/to/model", [{"prompt": "2+2=", "completion": "4"}, ...], max_steps=100)
run.scores["after"]["bleu"]
run.generate(["3+3="])
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.catalog import METHODS
from peftlab.config import build_config
from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.files import checksums, write_text
from peftlab.run import RunFolder

if TYPE_CHECKING:
    from peftlab.store import Opened


@dataclass(frozen=True)
class FinetunedRun:
    """A finished run, as Python sees it.

    Attributes:
        folder: The run folder.
    """

    folder: RunFolder

    @property
    def path(self) -> Path:
        """The run folder's path."""
        return self.folder.path

    @property
    def scores(self) -> dict[str, dict[str, float] | None]:
        """Metric to value, "before" and "after"; None where it was not evaluated."""
        scores: dict[str, dict[str, float] | None] = self.folder.summary()["scores"]
        return scores

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.path / "report.html"

    @cached_property
    def _opened(self) -> Opened:
        """The model with its adapter, loaded once."""
        from peftlab.store import open_run

        return open_run(str(self.path), directory=self.path.parent)

    @property
    def model(self) -> Any:
        """The model with its adapter, in evaluation mode."""
        return self._opened.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._opened.tokenizer

    def generate(
        self, prompts: str | Sequence[str], *, adapter: bool = True, max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers, or class names from a classifier.

        Args:
            prompts: Source texts, before the task's prompt template.
            adapter: Whether the adapter takes part.
            max_new_tokens: Longest answer in tokens; the run's own setting where None.

        Returns:
            One answer for each prompt.
        """
        from peftlab.generation import respond

        with self._opened.adapter(on=adapter):
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            return respond(self._opened, texts, max_new_tokens=max_new_tokens)

    def __repr__(self) -> str:
        return f"FinetunedRun({str(self.path)!r}, scores={self.scores})"

    def _repr_html_(self) -> str:
        """Scores before and after as a notebook shows them."""
        from peftlab.tables import render_html

        scores = self.scores
        rows = [
            [
                name,
                f"{(scores['before'] or {}).get(name, float('nan')):.2f}" if scores["before"] else "",
                f"{value:.2f}",
            ]
            for name, value in (scores["after"] or {}).items()
        ]
        return render_html([["metric", "before", "after"], *rows])


def finetune(
    model: Any,
    data: str | Path | Sequence[Mapping[str, Any]],
    method: str = "lora",
    *,
    tokenizer: Any = None,
    method_settings: Mapping[str, Any] | None = None,
    schedule: str | Sequence[Mapping[str, Any]] | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    output_dir: str | Path = "runs",
    name: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> FinetunedRun:
    """Fine-tune a model on data; the same run as `peftlab run`, with the same folder.

    Args:
        model: A folder, a hub name, "peftlab/tiny-base", or a live transformers model (with `tokenizer`).
        data: A task's name ("embedded"), "task:folder" for a task's own files, or rows:
            `{"prompt": ..., "completion": ...}` or `{"text": ..., "label": ...}`.
        method: A method of `peftlab list methods`.
        tokenizer: The tokenizer of a live model.
        method_settings: The method's settings, e.g. `{"rank": 8, "targets": "both"}`.
        schedule: A strategy's name, or phases as in the config.
        max_steps: Optimizer steps.
        batch_size: Rows per forward pass.
        learning_rate: Peak learning rate.
        seed: Root of all random streams.
        output_dir: Folder in which the run folder is made.
        name: Start of the run folder's name.
        settings: Further config, e.g. `{"evaluation": {"num_samples": 50}}`; the arguments above win.

    Returns:
        The finished run.

    Raises:
        InputError: Something does not fit; nothing heavy has started.
        RunError: The run failed.
    """
    from peftlab.execute import execute

    values: dict[str, Any] = {key: dict(value) for key, value in (settings or {}).items()}
    output = Path(output_dir)
    values["task"] = values.get("task", {}) | _task_values(data, output)
    values["method"] = {"name": METHODS.check(method), **(method_settings or {})}
    given = {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    values["training"] = values.get("training", {}) | {key: v for key, v in given.items() if v is not None}
    if schedule is not None:
        key = "strategy" if isinstance(schedule, str) else "phases"
        values["schedule"] = {
            key: schedule if isinstance(schedule, str) else [dict(phase) for phase in schedule]
        }
    values["output"] = {"directory": str(output_dir), "name": name}
    values["model"] = values.get("model", {}) | {"name": _model_name(model, tokenizer, output)}
    return FinetunedRun(execute(build_config(values)))


def _task_values(data: str | Path | Sequence[Mapping[str, Any]], output: Path) -> dict[str, str]:
    """The config's task values; rows are written beside the runs, so that a run's config repeats it."""
    if isinstance(data, str | Path):
        task_name, _, folder = str(data).partition(":")
        return {"name": task_name} | ({"data_dir": folder} if folder else {})
    try:
        lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in data)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"rows must be mappings of texts, such as {{'prompt': ..., 'completion': ...}}: {error}"
        ) from None
    folder_path = output / "data" / hashlib.sha256(lines.encode()).hexdigest()[:12]
    folder_path.mkdir(parents=True, exist_ok=True)
    write_text(folder_path / "rows.jsonl", lines)
    return {"name": "rows", "data_dir": str(folder_path)}


def _model_name(model: Any, tokenizer: Any, output: Path) -> str:
    """The name or folder of a model; a live one is written beside the runs, so that a run's config repeats it."""
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError(
                "a tokenizer is only needed for a live model; a folder or hub name brings its own"
            )
        return str(model)
    if tokenizer is None or not hasattr(model, "save_pretrained"):
        raise ModelError(
            "give a live transformers model together with its tokenizer, or a folder or hub name"
        )
    with tempfile.TemporaryDirectory(prefix="peftlab-") as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        folder = output / "bases" / hashlib.sha256(str(checksums(Path(aside))).encode()).hexdigest()[:12]
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(aside, folder)
    return str(folder)
