"""Continual learning: what learning one task after another costs the earlier ones, by what the tasks share.

S0's experiments, set right: tasks one after another, every task asked after every stage, the same rows, steps and greedy
decoding for every way of learning. What is isolated must not change by a bit, and is checked to; what is shared shows what
sharing costs. The default tasks contradict each other, so that forgetting must be seen; with `code` they are functions in
Python, JavaScript and Java, as the document has them; with `configs` any.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.catalog import METHODS
from peftlab.settings import Settings as _Settings
from peftlab.study.settings import Factors, Seeds

QUESTION = "What does learning one task after another cost the earlier ones?"
_Plan = Literal["isolated", "sequential", "replay", "joint", "full", "shared_layer"]


class Settings(_Settings):
    """What can be set on the experiment."""

    model: str | None = None
    """A model's folder or hub name, causal or encoder-decoder; none is the embedded base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the base's weights."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, cuda, mps."""
    tasks: tuple[str, ...] = ()
    """The tasks in the order of learning: languages where `code` is given, labels of `configs`, or some of sentence,
    backwards, sorted, praise and denial. None is all there is, of the embedded ones the first three."""
    code: Path | None = None
    """A folder with functions in several languages, as CodeXGLUE has them."""
    code_task: Literal["code_summarization", "code_generation"] = "code_summarization"
    """What is learned of them: to describe a function, or to write one."""
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Your own tasks: label to what the section `task` of a config holds."""
    methods: tuple[str, ...] = ("lora",)
    """What is attached: lora, new_layer, hybrid, or another method without ranks or starts that rows decide."""
    plans: tuple[_Plan, ...] = ("isolated", "sequential", "replay", "joint", "full")
    """What tasks share: isolated, sequential, replay, joint, full (the base itself, one after another), and for hybrid
    shared_layer (LoRA of its own, one new layer for all)."""
    adapter: dict[str, Any] = Field(default_factory=dict)
    """Settings of the methods, each taken by those that have it, such as {rank: 8}; dropout is 0 where it is not set."""
    replay_share: float = Field(default=0.2, gt=0, lt=1)
    """The share of old rows in the plan replay."""
    steps: int = Field(default=40, ge=2)
    """Steps for each task; joint learning has as many as all tasks together."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of a step."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """LoRA's peak learning rate, from which those of other methods follow; none is 8e-3 for the embedded base, else 2e-4."""
    factors: Factors = (1.0,)
    """Factors on the learning rate, smallest first. Of several each method takes the one of the lowest validation loss on
    the first task, found with the first seed."""
    num_samples: int | None = Field(default=None, ge=1)
    """Training rows of each task; none is all."""
    max_length: int = Field(default=192, ge=8)
    """Longest training row in tokens."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; none is the task's own."""
    eval_samples: int | None = Field(default=40, ge=10)
    """Test examples of each task; none is all."""
    eval_batch_size: int = Field(default=32, ge=1)
    """Prompts answered together."""
    validation_rows: int = Field(default=32, ge=1)
    """Most rows of each task's validation loss."""
    metric: str | None = None
    """The metric of the matrix; none is the first task's headline. All tasks must have it."""
    seeds: Seeds = (1, 2, 3)
    """Seeds of order, adapter and dropout; a number N stands for 1 to N. From three on a winner may be named."""
    data_seed: int = Field(default=42, ge=0)
    """Seeds which rows are trained on and asked, the same for all arms and seeds."""
    recheck: bool = True
    """Whether weights that have answered a task answer it again, which must give the same; else their answers are taken."""
    resamples: int = Field(default=10_000, ge=100)
    """Resamples and swaps of each test."""
    runs: Path | None = None
    """Folder of what is learned; what is finished there is not done again. None is `runs` beside the experiment's folder."""

    @field_validator("methods", "plans", "tasks", mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        return (values,) if isinstance(values, str) else values

    @field_validator("methods", "plans", "tasks")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{twice[0]} is named twice")
        return values

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(METHODS.check(name) for name in methods)
        if "full" in found:
            raise ValueError("full fine-tuning is the plan full; methods are what is attached")
        return found

    @model_validator(mode="after")
    def _one_source(self) -> Settings:
        if self.code is not None and self.configs:
            raise ValueError("the tasks come from one place; give code or configs")
        if not self.plans:
            raise ValueError("at least one plan is needed")
        if self.methods == () and self.plans != ("full",):
            raise ValueError("at least one method is needed for what is not full fine-tuning")
        return self


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Learn the tasks in every way and compare.

    Args:
        settings: What was set.
        folder: Where tables, charts and page go.
        show: Is given each text for a person.

    Returns:
        The files that were written.

    Raises:
        InputError: Model, tasks, methods or settings do not fit.
        RunError: A stage failed; what is finished stays, and the same command goes on.
        EvaluationError: A score cannot be computed, or equal weights answered in two ways.
    """
    from peftlab.continual.conducting import conduct

    return conduct(QUESTION, settings, folder, show)
