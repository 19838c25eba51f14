"""What a matrix of scores says of learning one task after another: averages, transfer, forgetting, retention.

R[k][j] is the score on task j after stage k, in which task k was learned; row 0 is of the base before anything was learned.
T is the number of tasks. Where a lower score is better, differences change their sign: a positive transfer is a gain and a
positive forgetting a loss, whatever the metric.

Source: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning" (arXiv:1706.08840), section 3;
Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning" (arXiv:1801.10112), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftlab.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Measure:
    """One number that a matrix gives, or why it gives none.

    Attributes:
        value: The number; None where it is not defined.
        reason: Why it is not defined, or what was done to it; "" where there is nothing to say.
        by_task: Task to its own number, where the measure is a mean over tasks.
    """

    value: float | None
    reason: str = ""
    by_task: tuple[tuple[str, float | None], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The measure as JSON-ready values."""
        return {"value": self.value, "reason": self.reason, "by_task": dict(self.by_task)}


@dataclass(frozen=True, slots=True)
class ScoreMatrix:
    """The scores of all tasks after all stages, by one metric of one way of learning.

    Attributes:
        tasks: The tasks, in the order of learning.
        zero_shot: Score of each task before anything was learned: row 0.
        after: Scores of each task after each stage, shape (stages, tasks). One stage for each task, or a single
            one where all were learned at once.
        higher_is_better: The metric's direction.

    Raises:
        EvaluationError: The rows have unlike lengths, or a score is not finite.
    """

    tasks: tuple[str, ...]
    zero_shot: tuple[float, ...]
    after: tuple[tuple[float, ...], ...]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        rows = [self.zero_shot, *self.after]
        if not self.tasks or any(len(row) != len(self.tasks) for row in rows):
            raise EvaluationError(
                f"a matrix of {len(self.tasks)} tasks needs rows of as many scores, got {[len(row) for row in rows]}"
            )
        if len(self.after) not in (1, len(self.tasks)):
            raise EvaluationError(
                f"{len(self.tasks)} tasks are learned in as many stages or in one, got {len(self.after)} rows"
            )
        if not all(math.isfinite(value) for row in rows for value in row):
            raise EvaluationError("a score of the matrix is not finite; check how it was computed")

    @property
    def final(self) -> tuple[float, ...]:
        """The scores after the last stage."""
        return self.after[-1]

    @property
    def in_sequence(self) -> bool:
        """Whether tasks were learned one after another."""
        return len(self.after) == len(self.tasks) > 1

    @property
    def gains(self) -> np.ndarray:
        """The scores after each stage so that higher is better, shape (stages, tasks)."""
        return np.array(self.after, dtype=np.float64) * (1.0 if self.higher_is_better else -1.0)


def average_score(matrix: ScoreMatrix) -> Measure:
    """The mean score over all tasks after the last stage, in the metric's unit: 1/T sum_j R[T][j].

    Args:
        matrix: The scores.

    Returns:
        The measure; always defined.

    Source: Lopez-Paz and Ranzato 2017, section 3, "ACC".
    """
    return _mean(matrix.tasks, matrix.final)


def backward_transfer(matrix: ScoreMatrix) -> Measure:
    """What later tasks did to earlier ones, in the metric's unit: 1/(T-1) sum_{j<T} (R[T][j] - R[j][j]).

    Args:
        matrix: The scores.

    Returns:
        The measure; below 0 where later tasks made earlier ones worse.

    Source: Lopez-Paz and Ranzato 2017, section 3, "BWT".
    """
    if not matrix.in_sequence:
        return _not_in_sequence(matrix)
    gains = matrix.gains
    return _mean(matrix.tasks[:-1], [float(gains[-1, j] - gains[j, j]) for j in range(len(gains) - 1)])


def forward_transfer(matrix: ScoreMatrix) -> Measure:
    """What earlier tasks did to a task before it was learned: 1/(T-1) sum_{j>1} (R[j-1][j] - R[0][j]).

    The paper subtracts the score at a random start; here it is the base's own, before anything was learned.

    Args:
        matrix: The scores.

    Returns:
        The measure, in the metric's unit.

    Source: Lopez-Paz and Ranzato 2017, section 3, "FWT".
    """
    if not matrix.in_sequence:
        return _not_in_sequence(matrix)
    gains, sign = matrix.gains, 1.0 if matrix.higher_is_better else -1.0
    found = [float(gains[j - 1, j] - sign * matrix.zero_shot[j]) for j in range(1, len(gains))]
    return _mean(matrix.tasks[1:], found)


def average_forgetting(matrix: ScoreMatrix, *, from_learning: bool = True) -> Measure:
    """The best that was known of each earlier task less what is left: 1/(T-1) sum_{j<T} (max_k R[k][j] - R[T][j]).

    The paper takes the maximum over all stages k < T. A stage before j was learned says nothing of what was learned, so
    here it is over j <= k < T; `from_learning=False` gives the paper's. They differ only where learning a task made it
    worse. Both can be negative: a later task may help.

    Args:
        matrix: The scores.
        from_learning: Whether only stages count in which the task had been learned.

    Returns:
        The measure, in the metric's unit; exactly 0 where each task's scores never change once it is learned.

    Source: Chaudhry et al. 2018, section 3, "forgetting measure".
    """
    if not matrix.in_sequence:
        return _not_in_sequence(matrix)
    gains = matrix.gains
    found = []
    for j in range(len(gains) - 1):
        first = j if from_learning else 0
        found.append(float(gains[first:-1, j].max() - gains[-1, j]))
    return _mean(matrix.tasks[:-1], found)


def retention(matrix: ScoreMatrix) -> Measure:
    """The share of each earlier task's score that is left at the end, in [0, 1]: mean of clip(R[T][j] / R[j][j], 0, 1).

    R[j][j] is the score right after learning. Where a lower score is better the ratio is turned around. A share above 1 is
    clipped to 1, and that is told: a task that got better has been kept whole, and must not make up for one that was lost.

    Args:
        matrix: The scores.

    Returns:
        The measure; not defined where a task scored 0 or less right after learning, since nothing of nothing can be kept.

    Source: peftlab's own definition; the seed system's was a mean of ratios to the untrained base, without a bound.
    """
    if not matrix.in_sequence:
        return _not_in_sequence(matrix)
    shares = [
        _share(matrix.after[j][j], matrix.final[j], higher_is_better=matrix.higher_is_better)
        for j in range(len(matrix.tasks) - 1)
    ]
    kept = [None if share is None else min(1.0, share) for share in shares]
    by_task = tuple(zip(matrix.tasks[:-1], kept, strict=True))
    lost = [task for task, share in by_task if share is None]
    if lost:
        return Measure(
            None, f"not defined: no score to keep right after learning: {', '.join(lost)}", by_task
        )
    above = sum(share > 1 for share in shares if share is not None)
    told = f"{above} of {len(shares)} above 1, clipped" if above else ""
    return Measure(math.fsum(share for share in kept if share is not None) / len(kept), told, by_task)


def _share(learned: float, left: float, *, higher_is_better: bool) -> float | None:
    """The share of a score that is left, not yet clipped; None where there is nothing of which it could be one."""
    whole, rest = (learned, left) if higher_is_better else (left, learned)
    if learned < 0 or left < 0 or (whole == 0 and higher_is_better):
        return None
    if learned == left:
        return 1.0
    return math.inf if whole == 0 else rest / whole


def _mean(tasks: Sequence[str], values: Sequence[float]) -> Measure:
    """A mean over tasks with its parts."""
    return Measure(math.fsum(values) / len(values), "", tuple(zip(tasks, values, strict=True)))


def _not_in_sequence(matrix: ScoreMatrix) -> Measure:
    """Why a matrix of one stage says nothing of what came before or after."""
    why = "there is one task" if len(matrix.tasks) == 1 else "all tasks were learned at once, or none"
    return Measure(None, f"not defined: {why}")


MEASURES = {
    "average": average_score,
    "backward transfer": backward_transfer,
    "forward transfer": forward_transfer,
    "forgetting": average_forgetting,
    "retention": retention,
}
"""Name to function, in the order of tables."""
