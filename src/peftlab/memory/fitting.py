"""Whether a run fits into memory, what would make it fit, and the largest batch that does: all by prediction.

Nothing is found by running out of memory. Each answer is a prediction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peftlab.config import RunConfig
from peftlab.errors import ModelError, RunError
from peftlab.loading import ModelSource
from peftlab.memory.budget import Budget, find_budget
from peftlab.memory.measuring import MeasuredPeak
from peftlab.memory.prediction import (
    Attach,
    MemoryPrediction,
    check_positions,
    find_structure,
    planned_device,
    predict_memory,
)
from peftlab.memory.search import largest_fitting
from peftlab.memory.steps import BatchShape

BATCH_SIZES = (1, 2, 4, *range(8, 4097, 8))
"""The batch sizes that are chosen from where the rows of an optimizer step may change with them."""
_LENGTH_STEP = 64

_MODEL_CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("gradient checkpointing", "gradient_checkpointing", True),
    ("weights in bfloat16", "dtype", "bfloat16"),
)
"""What can be changed about the model: in words, the key below `model`, its value."""

FITS, FITS_IF, DOES_NOT_FIT, NOT_PREDICTED = "fits", "fits if", "does not fit", "not predicted"
"""What can be said of a run. The last is for who plans more than memory: here it is a `ModelError`."""


@dataclass(frozen=True, slots=True)
class MemoryOption:
    """A change to a run that does not fit, with its own prediction.

    Attributes:
        change: What is changed, in words.
        settings: How: config keys to values.
        prediction: What a step takes then.
        needed_bytes: What that may need of the budget.
        fits: Whether it fits.
    """

    change: str
    settings: dict[str, Any]
    prediction: MemoryPrediction
    needed_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The largest batch that fits.

    Attributes:
        batch_size: Rows of one forward pass.
        accumulation_steps: Forward passes of an optimizer step with it.
        prediction: What a step of it takes on the longest batch.
        too_large: The next larger batch that was considered; None where it is the largest of all.
        measured: What a real step of it took; None where none was taken.
    """

    batch_size: int
    accumulation_steps: int
    prediction: MemoryPrediction
    too_large: int | None
    measured: MeasuredPeak | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Whether a run fits, and what would make it fit.

    Attributes:
        verdict: "fits", "fits if" (one of the options that fit is taken) or "does not fit".
        prediction: What a step takes as asked for.
        needed_bytes: What that may need of the budget.
        budget: The memory there is.
        options: Changes that were tried; none where it fits as it is.
        batch: The largest batch that fits; None where not even one row does, or where none was looked for.
        warning: What can go wrong though it fits; "" for nothing.
    """

    verdict: str
    prediction: MemoryPrediction
    needed_bytes: int
    budget: Budget
    options: tuple[MemoryOption, ...]
    batch: BatchChoice | None
    warning: str = ""
    searched: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Case:
    """A run on its longest batch.

    Attributes:
        config: The run.
        shape: The batch.
        source: The base.
        attach: Makes the base tunable.
        keep_step: Whether an optimizer step keeps its rows when the batch size changes.
        known: Predictions made so far, of this and its changed forms.
    """

    config: RunConfig
    shape: BatchShape
    source: ModelSource
    attach: Attach | None
    keep_step: bool = False
    known: dict[tuple[str, BatchShape], MemoryPrediction] = field(default_factory=dict)

    def predict(self) -> MemoryPrediction:
        """What a step takes; predicted once."""
        key = (self.config.fingerprint(), self.shape)
        if key not in self.known:
            self.known[key] = predict_memory(
                self.config, source=self.source, shape=self.shape, attach=self.attach
            )
        return self.known[key]

    def with_model(self, **settings: Any) -> _Case:
        """The same with other settings of the model."""
        model = self.config.model.model_copy(update=settings)
        return replace(self, config=self.config.model_copy(update={"model": model}))

    def with_rows(self, rows: int) -> _Case:
        """The same with another batch size, and where the step keeps its rows in as many forward passes as they take."""
        training = self.config.training
        changed = {"batch_size": rows}
        if self.keep_step:
            changed["accumulation_steps"] = training.batch_size * training.accumulation_steps // rows
        config = self.config.model_copy(update={"training": training.model_copy(update=changed)})
        return replace(self, config=config, shape=replace(self.shape, rows=rows))

    def with_length(self, length: int) -> _Case:
        """The same with rows of at most so many tokens."""
        shape = self.shape
        cut = replace(shape, length=min(shape.length, length), label_length=min(shape.label_length, length))
        return replace(self, shape=cut)


def plan_memory(
    config: RunConfig,
    *,
    source: ModelSource | None = None,
    shape: BatchShape | None = None,
    attach: Attach | None = None,
    memory: int | None = None,
    search: bool = True,
) -> MemoryPlan:
    """Answer whether a run fits into memory, before a weight is read.

    Args:
        config: The run.
        source: The base, where it is found already.
        shape: The longest batch; None takes `training.batch_size` rows of `task.max_length` tokens.
        attach: Makes the base tunable; None takes the config's method.
        memory: Bytes there are; None looks at the device.
        search: Whether the largest batch is looked for where the run fits too; it takes several predictions.

    Returns:
        The answer with its numbers.

    Raises:
        ModelError: The config cannot be built, or its memory cannot be predicted.
        ConfigError: The device is not here, and no memory is given; or rows are longer than the model's positions.
    """
    case = _make_case(config, source, shape, attach)
    budget = find_budget(planned_device(config)[0], memory=memory)
    asked = case.predict()
    fits = budget.fits(asked.peak_bytes)
    searched = search or not fits
    batch = _largest_batch(case, budget) if searched else None
    options = [] if fits else _options(case, budget, asked, batch)
    verdict = FITS if fits else FITS_IF if any(option.fits for option in options) else DOES_NOT_FIT
    peak = asked.peak_bytes
    return MemoryPlan(
        verdict, asked, budget.needed(peak), budget, tuple(options), batch, budget.warning(peak), searched
    )


def choose_batch_size(
    config: RunConfig,
    *,
    source: ModelSource | None = None,
    shape: BatchShape | None = None,
    attach: Attach | None = None,
    memory: int | None = None,
    keep_step: bool = False,
    confirm: Callable[[RunConfig, BatchShape], MeasuredPeak] | None = None,
) -> BatchChoice:
    """Choose the largest batch whose longest rows fit into memory; no step runs out of it on the way.

    Args:
        config: The run.
        source: The base, where it is found already.
        shape: The longest rows; their number is what is chosen.
        attach: Makes the base tunable; None takes the config's method.
        memory: Bytes there are; None looks at the device.
        keep_step: Whether an optimizer step keeps its rows: then the divisors of their number are chosen from, each with
            the forward passes that it takes; else `BATCH_SIZES`.
        confirm: Takes real steps of a run with the chosen batch and measures them, as `confirm_with` gives it; None
            believes the prediction.

    Returns:
        The choice.

    Raises:
        ModelError: Not even one row fits, or its memory cannot be predicted.
        RunError: The real step took more than there is.
    """
    case = replace(_make_case(config, source, shape, attach), keep_step=keep_step)
    budget = find_budget(planned_device(config)[0], memory=memory)
    choice = _largest_batch(case, budget)
    if choice is None:
        least = case.with_rows(1).predict()
        raise ModelError(
            f"not even one row of {case.shape.length} tokens fits: it needs {budget.needed(least.peak_bytes):,} bytes"
            f" and there are {budget.total_bytes:,} ({budget.account})"
        )
    if confirm is None:
        return choice
    measured = confirm(case.with_rows(choice.batch_size).config, choice.prediction.shape)
    if measured.peak_bytes + budget.beside_bytes > budget.total_bytes:
        raise RunError(
            f"a step of {choice.batch_size} rows was predicted to take {choice.prediction.peak_bytes:,} bytes and took"
            f" {measured.peak_bytes:,}, more than the {budget.total_bytes:,} there are ({budget.account}); choose a smaller"
            " training.batch_size"
        )
    return replace(choice, measured=measured)


def _make_case(
    config: RunConfig, source: ModelSource | None, shape: BatchShape | None, attach: Attach | None
) -> _Case:
    """The run on its longest batch, with what was left out filled in."""
    length = config.task.max_length
    shape = shape or BatchShape(config.training.batch_size, length, length)
    source = source or find_structure(config)
    check_positions(source, shape)
    return _Case(config, shape, source, attach)


def _largest_batch(case: _Case, budget: Budget) -> BatchChoice | None:
    """The largest batch that fits, None where none does."""
    sizes = _divisors(case.config) if case.keep_step else BATCH_SIZES
    searched = sizes
    if case.keep_step:
        # a batch that is the whole step meets no gradients of an earlier pass, and may take less than its half does
        whole = case.with_rows(sizes[-1]).predict()
        if budget.fits(whole.peak_bytes):
            return BatchChoice(sizes[-1], 1, whole, None)
        searched = sizes[:-1]
    found = _largest(case.with_rows, searched, budget, near=case.shape.rows)
    if found is None:
        return None
    place = sizes.index(found[0]) + 1
    accumulation_steps = case.with_rows(found[0]).config.training.accumulation_steps
    return BatchChoice(found[0], accumulation_steps, found[1], sizes[place] if place < len(sizes) else None)


def _divisors(config: RunConfig) -> tuple[int, ...]:
    """The batch sizes that the rows of an optimizer step can be divided into, rising."""
    rows = config.training.batch_size * config.training.accumulation_steps
    return tuple(size for size in range(1, rows + 1) if rows % size == 0)


def _largest(
    change: Callable[[int], _Case], sizes: Sequence[int], budget: Budget, *, near: int | None = None
) -> tuple[int, MemoryPrediction] | None:
    """The largest size of a changed case that fits, with its prediction."""
    made: dict[int, MemoryPrediction] = {}

    def peak_of(size: int) -> int:
        made[size] = change(size).predict()
        return made[size].peak_bytes

    size = largest_fitting(sizes, peak_of, budget.largest_peak(), near=near)
    return None if size is None else (size, made[size])


def _options(
    case: _Case, budget: Budget, asked: MemoryPrediction, batch: BatchChoice | None
) -> list[MemoryOption]:
    """What could be changed, each alone, least harm first; all at once only where no single change is enough."""
    options: list[MemoryOption] = []

    def add(change: str, settings: dict[str, Any], prediction: MemoryPrediction) -> None:
        fits = budget.fits(prediction.peak_bytes)
        needed = budget.needed(prediction.peak_bytes)
        options.append(MemoryOption(change, settings, prediction, needed, fits))

    frugal = case
    spared: dict[str, Any] = {}
    for change, key, value in _MODEL_CHANGES:
        changed = case.with_model(**{key: value})
        prediction = None if changed.config == case.config or value == asked.dtype else _possible(changed)
        if prediction is not None:
            add(change, {f"model.{key}": value}, prediction)
            frugal, spared = frugal.with_model(**{key: value}), spared | {f"model.{key}": value}
    if batch is not None and batch.batch_size < case.shape.rows:
        add("smaller batches", {"training.batch_size": batch.batch_size}, batch.prediction)
    lengths = range(_LENGTH_STEP, case.shape.length, _LENGTH_STEP)
    shorter = _largest(case.with_length, lengths, budget)
    if shorter is not None:
        add("shorter rows", {"task.max_length": shorter[0]}, shorter[1])
    if not any(option.fits for option in options):
        largest = _largest_batch(frugal, budget)
        rows = 1 if largest is None else largest.batch_size
        prediction = frugal.with_rows(1).predict() if largest is None else largest.prediction
        add("all of these", spared | {"training.batch_size": rows}, prediction)
    return options


def _possible(case: _Case) -> MemoryPrediction | None:
    """The prediction, None where the model cannot be run that way (it has no checkpointing)."""
    try:
        return case.predict()
    except ModelError:
        return None
