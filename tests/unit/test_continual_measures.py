"""Measures of a matrix of scores: the published formulas, bounds, directions, and exactly nothing where nothing changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.continual.measures import (
    MEASURES,
    ScoreMatrix,
    average_forgetting,
    average_score,
    backward_transfer,
    forward_transfer,
    retention,
)
from peftlab.errors import EvaluationError

SCORES = st.floats(0, 100, allow_nan=False)
SMALL = ScoreMatrix(("a", "b", "c"), (1.0, 2.0, 3.0), ((10.0, 4.0, 3.0), (7.0, 20.0, 5.0), (8.0, 15.0, 30.0)))


@st.composite
def matrices(draw: Any) -> ScoreMatrix:
    number = draw(st.integers(2, 5))
    row = st.lists(SCORES, min_size=number, max_size=number).map(tuple)
    tasks = tuple(f"task {i}" for i in range(number))
    return ScoreMatrix(tasks, draw(row), tuple(draw(row) for _ in range(number)))


def value(measure: Any) -> float:
    assert measure.value is not None, measure.reason
    return float(measure.value)


def with_cell(matrix: ScoreMatrix, stage: int, task: int, score: float) -> ScoreMatrix:
    rows = [list(row) for row in matrix.after]
    rows[stage][task] = score
    return ScoreMatrix(matrix.tasks, matrix.zero_shot, tuple(map(tuple, rows)), matrix.higher_is_better)


def test_the_published_numbers_of_a_small_matrix() -> None:
    assert value(average_score(SMALL)) == pytest.approx((8 + 15 + 30) / 3)
    assert value(backward_transfer(SMALL)) == pytest.approx(((8 - 10) + (15 - 20)) / 2)
    assert value(forward_transfer(SMALL)) == pytest.approx(((4 - 2) + (5 - 3)) / 2)
    assert value(average_forgetting(SMALL)) == pytest.approx(((10 - 8) + (20 - 15)) / 2)
    assert value(retention(SMALL)) == pytest.approx((0.8 + 0.75) / 2)


@given(matrices())
def test_measures_are_their_formulas_by_hand(matrix: ScoreMatrix) -> None:
    rows, last = matrix.after, len(matrix.tasks) - 1
    transfer = [rows[last][j] - rows[j][j] for j in range(last)]
    ahead = [rows[j - 1][j] - matrix.zero_shot[j] for j in range(1, last + 1)]
    lost = [max(rows[k][j] for k in range(j, last)) - rows[last][j] for j in range(last)]
    lost_in_the_paper = [max(rows[k][j] for k in range(last)) - rows[last][j] for j in range(last)]
    assert value(backward_transfer(matrix)) == pytest.approx(sum(transfer) / last, abs=1e-9)
    assert value(forward_transfer(matrix)) == pytest.approx(sum(ahead) / last, abs=1e-9)
    assert value(average_forgetting(matrix)) == pytest.approx(sum(lost) / last, abs=1e-9)
    found = value(average_forgetting(matrix, from_learning=False))
    assert found == pytest.approx(sum(lost_in_the_paper) / last, abs=1e-9)
    assert found >= value(average_forgetting(matrix)) - 1e-9 >= -value(backward_transfer(matrix)) - 2e-9


@given(matrices(), st.booleans())
def test_what_never_changes_once_learned_forgets_exactly_nothing(matrix: ScoreMatrix, higher: bool) -> None:
    learned = [row[j] or 1.0 for j, row in enumerate(matrix.after)]
    rows = tuple(
        tuple(learned[j] if j <= k else matrix.zero_shot[j] for j in range(len(learned)))
        for k in range(len(learned))
    )
    isolated = ScoreMatrix(matrix.tasks, matrix.zero_shot, rows, higher)
    assert backward_transfer(isolated).value == 0.0
    assert average_forgetting(isolated).value == 0.0
    assert forward_transfer(isolated).value == 0.0
    assert retention(isolated).value == 1.0


@given(matrices())
def test_the_direction_of_a_metric_turns_differences_around(matrix: ScoreMatrix) -> None:
    turned = ScoreMatrix(
        matrix.tasks,
        tuple(-v for v in matrix.zero_shot),
        tuple(tuple(-v for v in row) for row in matrix.after),
        higher_is_better=False,
    )
    for measure in (backward_transfer, forward_transfer, average_forgetting):
        assert value(measure(turned)) == pytest.approx(value(measure(matrix)), abs=1e-9)
    assert value(average_score(turned)) == pytest.approx(-value(average_score(matrix)))


@given(matrices(), st.data())
def test_losing_more_is_never_told_as_losing_less(matrix: ScoreMatrix, data: Any) -> None:
    task = data.draw(st.integers(0, len(matrix.tasks) - 2))
    lower = data.draw(st.floats(0, matrix.final[task], allow_nan=False))
    worse = with_cell(matrix, len(matrix.after) - 1, task, lower)
    assert value(backward_transfer(worse)) <= value(backward_transfer(matrix)) + 1e-9
    assert value(average_forgetting(worse)) >= value(average_forgetting(matrix)) - 1e-9
    assert value(average_score(worse)) <= value(average_score(matrix)) + 1e-9
    if (kept := retention(matrix).value) is not None:
        assert value(retention(worse)) <= kept + 1e-12


@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_stages_between_does_not_change_what_the_first_task_lost(
    matrix: ScoreMatrix, source: Any
) -> None:
    between = list(matrix.after[1:-1])
    source.shuffle(between)
    other = ScoreMatrix(matrix.tasks, matrix.zero_shot, (matrix.after[0], *between, matrix.after[-1]))
    for measure in (average_forgetting, backward_transfer, retention):
        assert measure(other).by_task[0] == measure(matrix).by_task[0]


@given(matrices(), st.booleans())
def test_retention_lies_between_nothing_and_all(matrix: ScoreMatrix, higher: bool) -> None:
    found = retention(ScoreMatrix(matrix.tasks, matrix.zero_shot, matrix.after, higher))
    assert found.value is None or 0.0 <= found.value <= 1.0
    assert all(share is None or 0.0 <= share <= 1.0 for _, share in found.by_task)
    assert bool(found.reason) or found.value is not None


def test_retention_says_what_it_clipped_and_where_it_is_not_defined() -> None:
    better = with_cell(SMALL, 2, 0, 12.0)
    assert value(retention(better)) == pytest.approx((1.0 + 0.75) / 2)
    assert retention(better).reason == "1 of 2 above 1, clipped"
    nothing = retention(with_cell(SMALL, 0, 0, 0.0))
    assert nothing.value is None
    assert "no score to keep right after learning: a" in nothing.reason
    assert dict(nothing.by_task) == {"a": None, "b": 0.75}
    errors = ScoreMatrix(("a", "b"), (9.0, 9.0), ((2.0, 9.0), (8.0, 1.0)), higher_is_better=False)
    assert retention(errors).value == 0.25
    assert retention(with_cell(errors, 1, 0, 0.0)).value == 1.0  # no error is left: more than was kept
    assert retention(with_cell(errors, 0, 0, 0.0)).value == 0.0


def test_learned_at_once_or_alone_has_nothing_before_or_after() -> None:
    joint = ScoreMatrix(("a", "b"), (0.0, 0.0), ((5.0, 7.0),))
    alone = ScoreMatrix(("a",), (0.0,), ((5.0,),))
    for matrix, why in ((joint, "learned at once"), (alone, "one task")):
        for name, measure in MEASURES.items():
            found = measure(matrix)
            assert (found.value is None) == (name != "average")
            assert found.value is not None or why in found.reason
    assert average_score(joint).value == 6.0


@pytest.mark.parametrize(
    ("zero_shot", "after", "message"),
    [
        ((0.0,), ((1.0, 2.0), (1.0, 2.0)), r"rows of as many scores"),
        ((0.0, 0.0), ((1.0, 2.0), (1.0, math.nan)), r"not finite"),
        ((0.0, 0.0), (), r"got 0 rows"),
    ],
)
def test_what_is_no_matrix_is_refused(zero_shot: Any, after: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        ScoreMatrix(("a", "b"), zero_shot, after)
