"""Methods that were trained with several seeds and scored on the same examples: their means, and whether they differ.

There are two things that chance decides: which examples were asked, and which seed was trained with. Each has an interval
of its own. Over examples it is the percentile bootstrap, every example with the answers of all seeds; over seeds it is
Student's, mean +- t * s / sqrt(n), wide for three seeds because three say little.

Source: Efron and Tibshirani 1993, section 13.3; Student 1908; Holm 1979; Noreen 1989, chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.metric import Score, bootstrap_interval
from peftlab.significance import NUM_RESAMPLES, paired_bootstrap, permutation_test

SIGNIFICANCE = 0.05
"""Largest p-value, after Holm's correction, at which a difference is called one."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 %, for 1, 2, 3 ... degrees of freedom."""
MOST_SEEDS = len(_T) + 1

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class SeededScore:
    """One metric of one method over its seeds.

    Attributes:
        metric: The metric's name.
        scores: One score for each seed, on the same examples.
        over_seeds: 95 % interval of the mean over seeds.
        over_examples: 95 % interval of the mean over examples.
    """

    metric: str
    scores: tuple[Score, ...]
    over_seeds: Interval
    over_examples: Interval

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each seed."""
        return tuple(score.value for score in self.scores)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.values) / len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON-ready values."""
        return {
            "metric": self.metric,
            "mean": self.mean,
            "values": list(self.values),
            "over_seeds": list(self.over_seeds),
            "over_examples": list(self.over_examples),
            "count": self.scores[0].count,
        }


@dataclass(frozen=True, slots=True)
class SeededDifference:
    """One method against another, by one metric.

    Attributes:
        first: The one method.
        second: The other.
        value: Second minus first, the mean over seeds.
        over_seeds: 95 % interval of the difference over seeds; a pair is two runs of one seed.
        over_examples: 95 % interval of the difference over examples.
        p_value: Of the permutation test over examples, after Holm's correction for all pairs that were compared.
        better: The better method; None where the data cannot decide.
    """

    first: str
    second: str
    value: float
    over_seeds: Interval
    over_examples: Interval
    p_value: float
    better: str | None

    @property
    def verdict(self) -> str:
        """What may be said."""
        return f"{self.better} is better" if self.better else "not decided"

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON-ready values."""
        return {
            "first": self.first,
            "second": self.second,
            "value": self.value,
            "over_seeds": list(self.over_seeds),
            "over_examples": list(self.over_examples),
            "p_value": self.p_value,
            "better": self.better,
        }


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's 95 % interval of a mean.

    Args:
        values: One for each seed, 2 to 10.

    Returns:
        (low, high).

    Raises:
        EvaluationError: There are too few or too many.

    Example:
        >>> low, high = over_seeds([0.5, 0.6, 0.7])
        >>> round(low, 3), round(high, 3)
        (0.352, 0.848)
    """
    if not 2 <= len(values) <= MOST_SEEDS:
        raise EvaluationError(f"an interval over seeds takes 2 to {MOST_SEEDS} of them, got {len(values)}")
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = _T[len(values) - 2] * spread / math.sqrt(len(values))
    return mean - half, mean + half


def gather(scores: Sequence[Score], *, seed: int) -> SeededScore:
    """One metric of one method over its seeds.

    Args:
        scores: One for each seed, on the same examples, with their rows.
        seed: Seeds the bootstrap.

    Returns:
        The score.

    Raises:
        EvaluationError: There are too few or too many, they are of unlike metrics or examples, or a metric keeps no rows.
    """
    rows = _side_by_side(scores)
    interval = bootstrap_interval(
        len(rows), lambda chosen: _value(scores, rows[chosen].sum(axis=0)), seed=seed
    )
    if interval is None:
        raise EvaluationError("an interval over examples takes at least 2 of them, got 1")
    return SeededScore(
        scores[0].metric, tuple(scores), over_seeds([score.value for score in scores]), interval
    )


def compare_all(
    methods: Mapping[str, SeededScore], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> list[SeededDifference]:
    """Every method against every other, by one metric.

    A method is called better where all three agree: the permutation test over examples after Holm's correction, the
    interval over examples and the one over seeds.

    Args:
        methods: Name to score; the same seeds in the same order, the same examples.
        seed: Seeds the resampling.
        num_resamples: How many resamples and swaps to draw.

    Returns:
        One difference for each pair.

    Raises:
        EvaluationError: The methods have unlike numbers of seeds or examples.
    """
    found = []
    for (first, one), (second, other) in combinations(methods.items(), 2):
        if len(one.scores) != len(other.scores):
            raise EvaluationError(
                f"{first} has {len(one.scores)} seeds and {second} {len(other.scores)}: a pair is two runs of one seed"
            )
        rows = _side_by_side(one.scores), _side_by_side(other.scores)

        def value_of(sums: np.ndarray, scores: Sequence[Score] = one.scores) -> float:
            """The mean over seeds."""
            return _value(scores, sums)

        bootstrap = paired_bootstrap(*rows, seed=seed, value_of=value_of, num_resamples=num_resamples)
        test = permutation_test(*rows, seed=seed, value_of=value_of, num_resamples=num_resamples)
        by_seed = over_seeds([b - a for a, b in zip(one.values, other.values, strict=True)])
        found.append((first, second, bootstrap.value, by_seed, bootstrap.interval, test.p_value))
    corrected = holm([pair[-1] for pair in found])
    higher = next(iter(methods.values())).scores[0].higher_is_better
    return [
        _judge(*pair[:-1], p_value=p_value, higher_is_better=higher)
        for pair, p_value in zip(found, corrected, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests.

    Args:
        p_values: One for each test.

    Returns:
        The corrected ones, in the same order.

    Example:
        >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _judge(
    first: str,
    second: str,
    value: float,
    by_seed: Interval,
    by_example: Interval | None,
    *,
    p_value: float,
    higher_is_better: bool,
) -> SeededDifference:
    """What may be said of two methods."""
    if by_example is None:
        raise EvaluationError("the bootstrap gave no interval")
    decided = p_value <= SIGNIFICANCE and all(low > 0 or high < 0 for low, high in (by_seed, by_example))
    better = second if (value > 0) == higher_is_better else first
    return SeededDifference(first, second, value, by_seed, by_example, p_value, better if decided else None)


def _side_by_side(scores: Sequence[Score]) -> np.ndarray:
    """The rows of all seeds, those of an example in one row, shape (batch, seeds * width)."""
    names, counts = {score.metric for score in scores}, {score.count for score in scores}
    if len(names) != 1 or len(counts) != 1:
        raise EvaluationError(
            f"the seeds must be scored by one metric on the same examples, got {', '.join(sorted(names))} on"
            f" {', '.join(map(str, sorted(counts)))} examples"
        )
    rows = []
    for score in scores:
        if score.rows is None:
            raise EvaluationError(f"{score.metric} keeps no value per example, so seeds cannot be gathered")
        rows.append(score.rows.reshape(score.count, -1))
    return np.concatenate(rows, axis=1)


def _value(scores: Sequence[Score], sums: np.ndarray) -> float:
    """The mean over seeds, from the sums of all their rows."""
    values, start = [], 0
    for score in scores:
        width = 1 if score.rows is None else score.rows.reshape(score.count, -1).shape[1]
        own = sums[start : start + width]
        values.append(float(own[0]) / score.count if score.value_of is None else score.value_of(own))
        start += width
    return math.fsum(values) / len(values)
