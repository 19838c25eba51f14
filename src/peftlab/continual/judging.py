"""From the answers of all courses to matrices, measures and what may be said of the arms.

Answers are scored again example by example and must give the scores that were kept. Average and backward transfer are
compared over the examples of all tasks together: a resample draws examples, of whatever task, the same for every arm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peftlab.catalog import METRICS
from peftlab.continual.answers import Asked
from peftlab.continual.arms import Arm
from peftlab.continual.course import Learned
from peftlab.continual.lessons import Lesson
from peftlab.continual.measures import MEASURES, Measure, ScoreMatrix
from peftlab.errors import ConfigError, EvaluationError, RunError
from peftlab.metric import Score, digest_examples
from peftlab.seeded_scores import SeededScore, compare_all, gather, over_seeds
from peftlab.study.scoring import LEAST_SEEDS, Verdict

_CLOSE = 1e-6
AVERAGE, BACKWARD = "average", "backward transfer"
Term = tuple[int, Score, float]
"""A block of examples, a score of theirs, and how much it counts."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        arm: The arm.
        courses: One for each seed.
        matrices: Metric to one matrix for each seed.
        scores: One for each seed: the scores of the headline after each stage, shape (stages, tasks).
    """

    arm: Arm
    courses: tuple[Learned, ...]
    matrices: Mapping[str, tuple[ScoreMatrix, ...]]
    scores: tuple[tuple[tuple[Score, ...], ...], ...]

    def measures(self, metric: str) -> dict[str, list[Measure]]:
        """Every measure of every seed.

        Args:
            metric: The metric.
        """
        return {name: [of(matrix) for matrix in self.matrices[metric]] for name, of in MEASURES.items()}

    def mean_matrix(self, metric: str) -> ScoreMatrix:
        """The mean over seeds of every cell.

        Args:
            metric: The metric.
        """
        found = self.matrices[metric]
        after = np.mean([matrix.after for matrix in found], axis=0)
        return replace(found[0], after=tuple(tuple(map(float, row)) for row in after))


def shared_metrics(asked: Sequence[Asked], wanted: str | None) -> list[str]:
    """The metrics that every task was scored by, the headline first.

    Args:
        asked: One evaluation of each task.
        wanted: The headline; None is the first that all tasks have, in the first task's order.

    Returns:
        Their names.

    Raises:
        ConfigError: There is none, or not the one that is wanted.
    """
    shared = [name for name in asked[0].metrics if all(name in one.metrics for one in asked)]
    if not shared or (wanted is not None and wanted not in shared):
        each = "; ".join(f"{one.label}: {', '.join(one.metrics)}" for one in asked)
        raise ConfigError(f"all tasks must be scored by {wanted or 'one metric'}, but they have {each}")
    return [wanted, *(name for name in shared if name != wanted)] if wanted else shared


def score_again(asked: Asked, lesson: Lesson, metric: str, *, seed: int) -> Score:
    """A task's answers, scored with the rows of each example.

    Args:
        asked: The answers.
        lesson: The task.
        metric: The metric.
        seed: Seeds its bootstrap.

    Returns:
        The score.

    Raises:
        RunError: It is not the score that was kept.
    """
    score: Score = METRICS.load(metric).score(asked.answers(), lesson.test_examples, seed=seed)
    kept = float(asked.metrics[metric]["value"])
    if not math.isclose(score.value, kept, rel_tol=_CLOSE, abs_tol=_CLOSE):
        raise RunError(
            f"{asked.folder}: its answers score {metric} {score.value:.6g}, its evaluation says {kept:.6g}: the files do not"
            " belong together; remove the folder and repeat"
        )
    return score


def gather_arm(
    arm: Arm,
    courses: Sequence[Learned],
    lessons: Sequence[Lesson],
    zero_shot: Sequence[Asked],
    metrics: Sequence[str],
    *,
    seed: int,
) -> ArmResult:
    """The matrices of one arm.

    Args:
        arm: The arm.
        courses: One for each seed.
        lessons: The tasks.
        zero_shot: The base's answers to each.
        metrics: The metrics, the headline first.
        seed: Seeds the bootstrap.

    Returns:
        The result.

    Raises:
        RunError: Answers and scores do not belong together.
    """
    labels = tuple(lesson.label for lesson in lessons)
    matrices = {}
    for metric in metrics:
        zero = tuple(float(one.metrics[metric]["value"]) for one in zero_shot)
        higher = bool(zero_shot[0].metrics[metric]["higher_is_better"])
        matrices[metric] = tuple(
            ScoreMatrix(
                labels, zero,
                tuple(tuple(float(one.metrics[metric]["value"]) for one in stage) for stage in course.asked), higher,
            )
            for course in courses
        )  # fmt: skip
    scores = tuple(
        tuple(
            tuple(
                score_again(one, lesson, metrics[0], seed=seed)
                for one, lesson in zip(stage, lessons, strict=True)
            )
            for stage in course.asked
        )
        for course in courses
    )
    return ArmResult(arm, tuple(courses), matrices, scores)


def judge_arms(
    results: Sequence[ArmResult], lessons: Sequence[Lesson], metric: str, *, seed: int, num_resamples: int
) -> list[Verdict]:
    """What may be said of the arms, by average and by backward transfer.

    Args:
        results: The arms.
        lessons: The tasks.
        metric: The headline.
        seed: Seeds the tests.
        num_resamples: Resamples and swaps of each.

    Returns:
        One verdict for each of the two; backward transfer is of the arms that learn in sequence.
    """
    found = []
    last = len(lessons) - 1
    asked = digest_examples([example for lesson in lessons for example in lesson.test_examples])
    for name in (AVERAGE, BACKWARD):
        kept: dict[str, list[Score]] = {}
        values: dict[str, tuple[float, ...]] = {}
        for result in results:
            in_sequence = all(matrix.in_sequence for matrix in result.matrices[metric])
            if name == BACKWARD and not in_sequence:
                continue
            terms = [
                _average(stages) if name == AVERAGE else _backward(stages, last) for stages in result.scores
            ]
            kept[result.arm.name] = [combine(of, f"{name} of {metric}", asked=asked) for of in terms]
            values[result.arm.name] = tuple(score.value for score in kept[result.arm.name])
        if values:
            found.append(
                _verdict(f"{name} of {metric}", kept, values, seed=seed, num_resamples=num_resamples)
            )
    return found


def _average(stages: Sequence[Sequence[Score]]) -> list[Term]:
    """The mean over tasks after the last stage."""
    return [(place, score, 1 / len(stages[-1])) for place, score in enumerate(stages[-1])]


def _backward(stages: Sequence[Sequence[Score]], last: int) -> list[Term]:
    """What is left of each earlier task less what it was right after learning; upwards is better for every metric."""
    sign = (1.0 if stages[0][0].higher_is_better else -1.0) / last
    after = [(place, stages[-1][place], sign) for place in range(last)]
    return [*after, *((place, stages[place][place], -sign) for place in range(last))]


def combine(terms: Sequence[Term], name: str, *, asked: str = "") -> Score:
    """A weighted sum of scores over several sets of examples, as one score over all of their examples.

    Args:
        terms: Scores, the set of examples that each is of, and their weights.
        name: What it is called.
        asked: What was answered, as of `metric.digest_examples`.

    Returns:
        The score, with a row for each example of each set; without rows where one of the scores has none. A negative weight
        makes it a difference, of which higher is always better.

    Raises:
        EvaluationError: A resample left a set without examples.

    Example:
        >>> from peftlab.text_scores import mean_score
        >>> kept = {"unit": "rate", "higher_is_better": True, "signature": "", "seed": 1}
        >>> one, two = mean_score("m", [0.0, 1.0], **kept), mean_score("m", [1.0, 1.0, 1.0], **kept)
        >>> combine([(0, one, 0.5), (1, two, 0.5)], "average of m").value
        0.75
    """
    value = math.fsum(weight * score.value for _, score, weight in terms)
    first = terms[0][1]
    is_difference = any(weight < 0 for _, _, weight in terms)
    counts = {block: score.count for block, score, _ in terms}
    whole = Score(
        name, value, first.unit, is_difference or first.higher_is_better, sum(counts.values()), asked=asked
    )
    if any(score.rows is None for _, score, _ in terms):
        return whole
    starts = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    tables = [np.asarray(score.rows, dtype=np.float64).reshape(score.count, -1) for _, score, _ in terms]
    edges = np.cumsum([0, *(table.shape[1] for table in tables)]).tolist()
    rows = np.zeros((whole.count, edges[-1] + len(counts)))
    for place, ((block, score, _), table) in enumerate(zip(terms, tables, strict=True)):
        here = slice(starts[block], starts[block] + score.count)
        rows[here, edges[place] : edges[place + 1]] = table
    for place, (block, count) in enumerate(counts.items()):
        rows[starts[block] : starts[block] + count, edges[-1] + place] = 1
    whole_numbers = [np.issubdtype(np.asarray(score.rows).dtype, np.integer) for _, score, _ in terms]
    kinds = [np.int64 if counted else None for counted in whole_numbers]
    columns = {block: edges[-1] + place for place, block in enumerate(counts)}

    def value_of(sums: np.ndarray) -> float:
        """The weighted sum, from the sum of the rows of some examples."""
        parts = []
        for place, (block, score, weight) in enumerate(terms):
            own, number = sums[edges[place] : edges[place + 1]], float(sums[columns[block]])
            own = own if kinds[place] is None else own.astype(kinds[place])  # counts stay whole numbers
            if number < 1:
                raise EvaluationError(
                    "a resample left a task without examples; ask more test examples of each"
                )
            parts.append(weight * (float(own[0]) / number if score.value_of is None else score.value_of(own)))
        return math.fsum(parts)

    return replace(whole, rows=rows, value_of=value_of)


def _verdict(
    name: str,
    kept: Mapping[str, Sequence[Score]],
    values: dict[str, tuple[float, ...]],
    *,
    seed: int,
    num_resamples: int,
) -> Verdict:
    """What may be said by one measure."""
    num_seeds, first = len(next(iter(values.values()))), next(iter(kept.values()))[0]
    has_rows = all(score.rows is not None for scores in kept.values() for score in scores)
    withheld = ""
    if num_seeds < LEAST_SEEDS:
        withheld = f"{num_seeds} seed{'s' * (num_seeds > 1)}, from {LEAST_SEEDS} on one may be"
    elif not has_rows:
        withheld = "the metric keeps no value for each example"
    elif len(values) < 2:
        withheld = "there is one arm"
    scores: dict[str, SeededScore] = {}
    if num_seeds > 1 and has_rows:
        scores = {arm: gather(found, seed=seed) for arm, found in kept.items()}
    differences = [] if withheld else compare_all(scores, seed=seed, num_resamples=num_resamples)
    return Verdict(name, first.unit, first.higher_is_better, values, scores, differences, withheld)


def spread(
    values: Sequence[float | None], *, within: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float | None, tuple[float, float] | None]:
    """The mean over seeds and Student's 95 % interval of it.

    Args:
        values: One for each seed.
        within: What the measure cannot leave, nor its interval.

    Returns:
        The mean, None where a value is not defined; the interval, None of one seed.
    """
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return None, None
    if len(found) < 2:
        return statistics.fmean(found), None
    low, high = over_seeds(found)
    return statistics.fmean(found), (max(low, within[0]), min(high, within[1]))


def bounds_of(measure: str) -> tuple[float, float]:
    """What a measure cannot leave.

    Args:
        measure: Its name.
    """
    return (0.0, 1.0) if measure == "retention" else (-math.inf, math.inf)


def describe_measures(result: ArmResult, metric: str) -> dict[str, Any]:
    """All measures of an arm as JSON-ready values.

    Args:
        result: The arm.
        metric: The metric.
    """
    found = {}
    for name, measures in result.measures(metric).items():
        mean, interval = spread([measure.value for measure in measures], within=bounds_of(name))
        found[name] = {
            "mean": mean,
            "over_seeds": interval,
            "seeds": [measure.to_dict() for measure in measures],
        }
    return found
