"""Whether one system is better than another, from their values on the same examples: bootstrap and permutation, paired.

Both systems answered the same examples, so what is resampled is the examples, for both at once (bootstrap), or which
system gave which answer (permutation). Differences that lie within what chance does say nothing about the systems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.metric import CONFIDENCE, Score

NUM_RESAMPLES = 10_000
FEW = 30
"""Below so many examples the bootstrap calls differences significant that are none, so its p-value is not taken."""
_MOST_EXACT = 12  # up to so many examples, all 2^n ways to swap are gone through

ValueOf = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class Difference:
    """One system against another.

    Attributes:
        value: Second minus first, in the metric's unit.
        p_value: How often chance alone gives a difference as large, two-sided; 1 where the systems do not differ.
        interval: 95 % interval of the difference (low, high) by the bootstrap; None for the permutation test. Of few
            examples it is too narrow.
        count: How many examples both answered.
        test: What was done, with the number of resamples.
    """

    value: float
    p_value: float
    interval: tuple[float, float] | None
    count: int
    test: str

    def __str__(self) -> str:
        low_high = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        return f"{self.value:+.4g}{low_high} (p = {self.p_value:.4f}, n={self.count}, {self.test})"


def paired_bootstrap(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    seed: int,
    value_of: ValueOf | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """Resample the examples, the same for both systems.

    Args:
        first: One row per example, shape (batch,) or (batch, width).
        second: The same for the other system, examples in the same order.
        seed: Seeds the resampling.
        value_of: A corpus score from the rows' sum of shape (width,), e.g. `text_scores.bleu_from_statistics`; the mean
            over examples where None.
        num_resamples: How many resamples to draw.

    Returns:
        The difference; its p-value is twice the share of resamples in which the difference is not on the side where
        it was seen, one added to both counts so that it is never 0. Below 30 examples it is the permutation test's: of
        2 examples from systems alike, the bootstrap calls every second difference significant.

    Raises:
        EvaluationError: The systems answered unlike numbers of examples, fewer than 2, or a value is not finite.

    Example:
        >>> paired_bootstrap([0.0] * 20, [1.0] * 20, seed=1).value
        1.0

    Source: Koehn 2004, section 4; Efron and Tibshirani 1993, sections 13.3 and 16.4.
    """
    one, other = _paired(first, second)
    of = _value_of(one, other, value_of)
    generator = np.random.default_rng(seed)
    count = len(one)
    observed = of(other, slice(None)) - of(one, slice(None))
    draws = (generator.integers(0, count, size=count) for _ in range(num_resamples))
    found = np.array([of(other, chosen) - of(one, chosen) for chosen in draws])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    side = found if observed > 0 else -found
    p_value = 1.0 if observed == 0 else min(1.0, 2 * (1 + int((side <= 0).sum())) / (num_resamples + 1))
    told = f"paired bootstrap, {num_resamples:,} resamples"
    if count < FEW:
        swapped = permutation_test(first, second, seed=seed, value_of=value_of, num_resamples=num_resamples)
        p_value, told = swapped.p_value, f"{told}; p by the {swapped.test}"
    return Difference(observed, p_value, (float(low), float(high)), count, told)


def permutation_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    seed: int,
    value_of: ValueOf | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """Swap the systems' answers at random, example by example; were they alike, nothing would change.

    Args:
        first: One row per example, shape (batch,) or (batch, width).
        second: The same for the other system, examples in the same order.
        seed: Seeds the swaps; without effect up to 12 examples, where all ways to swap are gone through.
        value_of: A corpus score from the rows' sum; the mean over examples where None.
        num_resamples: How many swaps to draw.

    Returns:
        The difference; its p-value is the share of swaps, the one seen among them, with a difference at least as large.

    Raises:
        EvaluationError: The systems answered unlike numbers of examples, fewer than 2, or a value is not finite.

    Example:
        >>> permutation_test([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], seed=1).p_value
        0.25

    Source: Noreen 1989, chapter 2; Riezler and Maxwell 2005, section 4; Phipson and Smyth 2010 for the p-value.
    """
    one, other = _paired(first, second)
    of = _value_of(one, other, value_of)
    count = len(one)
    observed = of(other, slice(None)) - of(one, slice(None))
    is_exact = count <= _MOST_EXACT
    if is_exact:
        ways = (np.array([way >> place & 1 for place in range(count)], dtype=bool) for way in range(2**count))
    else:
        generator = np.random.default_rng(seed)
        ways = (generator.random(count) < 0.5 for _ in range(num_resamples))
    least = abs(observed) - 1e-12 * max(
        1.0, abs(observed)
    )  # sums in another order differ in their last digits
    as_large = number = 0
    for swapped in ways:
        shape = swapped.reshape(-1, *[1] * (one.ndim - 1))
        difference = of(np.where(shape, one, other), slice(None)) - of(
            np.where(shape, other, one), slice(None)
        )
        as_large += abs(difference) >= least
        number += 1
    p_value = as_large / number if is_exact else (as_large + 1) / (number + 1)
    told = f"all {number:,} swaps" if is_exact else f"{number:,} swaps"
    return Difference(observed, float(p_value), None, count, f"permutation test, {told}")


def compare_scores(first: Score, second: Score, *, seed: int, test: str = "bootstrap") -> Difference:
    """Compare two systems by their scores of one metric on the same examples.

    Args:
        first: One system's score.
        second: The other's.
        seed: Seeds the test.
        test: "bootstrap" or "permutation".

    Returns:
        The difference, second minus first.

    Raises:
        EvaluationError: The scores are of unlike metrics or of other examples, or the metric keeps no row per example.

    Example:
        >>> from peftlab.text_scores import mean_score
        >>> kept = {"unit": "rate", "higher_is_better": True, "signature": "", "seed": 1}
        >>> one, other = mean_score("m", [0.0, 1.0] * 9, **kept), mean_score("m", [1.0, 1.0] * 9, **kept)
        >>> compare_scores(one, other, seed=1).value
        0.5
    """
    tests = {"bootstrap": paired_bootstrap, "permutation": permutation_test}
    if test not in tests:
        raise EvaluationError(f"there is no test '{test}'; there is: {', '.join(tests)}")
    if first.metric != second.metric or first.unit != second.unit:
        raise EvaluationError(
            f"{first.metric} and {second.metric} are not the same metric and cannot be compared"
        )
    if first.asked and second.asked and first.asked != second.asked:
        raise EvaluationError(
            f"the two scores of {first.metric} are of different examples, or of the same in another order, so they cannot"
            " be compared example by example; score both systems on the same split with the same seed and number"
        )
    if first.rows is None or second.rows is None:
        raise EvaluationError(
            f"{first.metric} keeps no value per example, so two systems cannot be compared by it; "
            "score both again in this process, or choose a metric that does"
        )
    return tests[test](first.rows, second.rows, seed=seed, value_of=first.value_of)


def _paired(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both systems' rows, after a look at them."""
    one, other = np.asarray(first), np.asarray(second)  # counts stay whole numbers
    if one.shape != other.shape:
        raise EvaluationError(
            f"the systems must have answered the same examples, got {one.shape} and {other.shape} values"
        )
    if len(one) < 2:
        raise EvaluationError(f"comparing two systems needs at least 2 examples, got {len(one)}")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise EvaluationError("a value to compare is not finite; check how it was computed")
    return one, other


def _value_of(
    one: np.ndarray, other: np.ndarray, value_of: ValueOf | None
) -> Callable[[np.ndarray, slice | np.ndarray], float]:
    """The score of some rows of one system."""
    if value_of is None:
        if one.ndim != 1:
            raise EvaluationError(f"rows of {one.shape[1:]} numbers need value_of, the score of their sum")
        return lambda rows, chosen: math.fsum(rows[chosen]) / len(rows)
    return lambda rows, chosen: value_of(rows[chosen].sum(axis=0))
