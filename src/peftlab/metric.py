"""What a metric is: a function from predictions and references to a Score, and nothing else.

A leaf in `metrics/` is a module with `NAME`, `UNIT`, `HIGHER_IS_BETTER` and
`score(predictions, examples, *, seed) -> Score`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.task import Example

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """One number with all that is needed to read it.

    Attributes:
        metric: The metric's name.
        value: The number, in `unit`.
        unit: "0-100" for text scores, "rate" for 0-1, else the physical unit.
        higher_is_better: The direction.
        count: How many examples it was computed from.
        interval: 95 % bootstrap interval over examples (low, high), or None where it is not defined.
        signature: What exactly was computed, e.g. sacrebleu's signature.
        rows: What was summed or averaged, one row per example, so that two systems can be compared
            (`significance.compare_scores`); not written to files. None where the metric keeps none.
        value_of: The score from the rows' sum; None where the score is the rows' mean.
        asked: What was answered, as of `digest_examples`, so that only scores of the same examples are compared; not
            written to files. "" where that is not known.
    """

    metric: str
    value: float
    unit: str
    higher_is_better: bool
    count: int
    interval: tuple[float, float] | None = None
    signature: str = ""
    rows: np.ndarray | None = field(default=None, repr=False, compare=False)
    value_of: Callable[[np.ndarray], float] | None = field(default=None, repr=False, compare=False)
    asked: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise EvaluationError(
                f"{self.metric} is {self.value} over {self.count} examples: no score can be given"
            )
        if self.count < 1:
            raise EvaluationError(f"{self.metric} was asked to score no examples")

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON-ready values."""
        kept = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "value_of", "asked")
        }
        return kept | {"interval": list(self.interval) if self.interval else None}

    def __str__(self) -> str:
        low_high = f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]" if self.interval else ""
        return f"{self.metric} {self.value:.2f}{low_high} ({self.unit}, n={self.count})"


@runtime_checkable
class Metric(Protocol):
    """A leaf of `metrics/` (a module satisfies this)."""

    NAME: str
    UNIT: str
    HIGHER_IS_BETTER: bool

    def score(self, predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
        """Score predictions, one per example, in the same order.

        Args:
            predictions: The model's answers.
            examples: The examples they answer.
            seed: Seeds the bootstrap.

        Returns:
            The score.

        Raises:
            EvaluationError: Counts differ, there is nothing to score, or an example lacks what the metric needs.
            NotComputedError: This machine lacks what the metric needs, e.g. Java; the message has the install line.
        """
        ...


def require_pairs(name: str, predictions: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuse to score unequal or empty lists.

    Args:
        name: The metric's name, for the message.
        predictions: The model's answers.
        examples: The examples.

    Raises:
        EvaluationError: Counts differ or are zero.
    """
    if len(predictions) != len(examples):
        raise EvaluationError(f"{name}: {len(predictions)} predictions for {len(examples)} examples")
    if not examples:
        raise EvaluationError(f"{name}: there is nothing to score")


def digest_examples(examples: Sequence[Example]) -> str:
    """A text that is the same for the same examples in the same order, and for no others.

    Args:
        examples: The examples.

    Returns:
        The hexadecimal SHA-256 of their ids, sources, references and labels.
    """
    told = [[e.id, e.source, e.references, e.label] for e in examples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def bootstrap_interval(
    count: int, value_of: Callable[[np.ndarray], float], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a corpus score.

    Args:
        count: Number of examples.
        value_of: The score of a resample, given its example indices, shape (count,).
        seed: Seeds the resampling.
        num_resamples: How many resamples to draw.

    Returns:
        (low, high) at 95 %, or None for fewer than 2 examples.

    Source: Efron and Tibshirani 1993, section 13.3 (percentile interval); Koehn 2004 for its use on BLEU.
    """
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [value_of(generator.integers(0, count, size=count)) for _ in range(num_resamples)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
