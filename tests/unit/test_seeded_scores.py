"""Means over seeds, their two intervals, and when one method may be called better than another."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftlab import seeded_scores
from peftlab.errors import EvaluationError
from peftlab.metric import Score
from peftlab.metrics import accuracy, macro_f1
from peftlab.seeded_scores import compare_all, gather, holm, over_seeds
from peftlab.task import Example

EXAMPLES = [Example(f"test-{i}", "s", label=i % 3) for i in range(60)]


def answers(right: int, shift: int = 0) -> list[str]:
    """Answers of which so many are right; which ones follows from the shift."""
    chosen = {(i + shift) % 60 for i in range(right)}
    return [str(i % 3 if i in chosen else (i + 1) % 3) for i in range(60)]


def accuracies(*rights: int, shift: int = 0) -> list[Score]:
    return [accuracy.score(answers(right, shift), EXAMPLES, seed=1) for right in rights]


def test_the_table_of_students_t_is_students() -> None:
    for freedom, quantile in enumerate(seeded_scores._T, start=1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        places = np.linspace(0, quantile, 200_001)
        heights = scale * (1 + places**2 / freedom) ** (-(freedom + 1) / 2)
        area = float((heights[1:] + heights[:-1]).sum() / 2 * (places[1] - places[0]))
        assert 0.5 + area == pytest.approx(0.975, abs=2e-5), freedom


def test_an_interval_over_seeds() -> None:
    low, high = over_seeds([0.2, 0.4, 0.9])
    spread = np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 4.303 * spread)
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5)
    for wrong in ([0.5], [0.5] * 11):
        with pytest.raises(EvaluationError, match=r"takes 2 to 10 of them"):
            over_seeds(wrong)


def test_the_mean_over_seeds_and_its_interval_over_examples() -> None:
    found = gather(accuracies(30, 36, 45), seed=1)
    assert found.mean == pytest.approx((30 + 36 + 45) / 180)
    hits = np.stack([score.rows for score in found.scores]).mean(axis=0)
    standard_error = hits.std() / math.sqrt(60)
    assert found.over_examples[1] - found.over_examples[0] == pytest.approx(3.92 * standard_error, rel=0.1)
    f1 = gather([macro_f1.score(answers(right), EXAMPLES, seed=1) for right in (30, 45)], seed=1)
    assert f1.mean == pytest.approx(sum(f1.values) / 2)
    assert f1.over_examples[0] < f1.mean < f1.over_examples[1]
    assert f1.to_dict()["count"] == 60


def test_what_cannot_be_gathered() -> None:
    with pytest.raises(EvaluationError, match=r"one metric on the same examples"):
        gather([*accuracies(30), macro_f1.score(answers(30), EXAMPLES, seed=1)], seed=1)
    short = accuracy.score(answers(30)[:50], EXAMPLES[:50], seed=1)
    with pytest.raises(EvaluationError, match=r"on 50, 60 examples"):
        gather([*accuracies(30), short], seed=1)
    with pytest.raises(EvaluationError, match=r"keeps no value per example"):
        gather([Score("accuracy", 0.5, "rate", True, 60)] * 2, seed=1)
    with pytest.raises(EvaluationError, match=r"a has 3 seeds and b 2"):
        compare_all(
            {"a": gather(accuracies(30, 30, 31), seed=1), "b": gather(accuracies(30, 31), seed=1)}, seed=1
        )


def test_a_clear_difference_is_named() -> None:
    methods = {
        "weak": gather(accuracies(20, 21, 22), seed=1),
        "strong": gather(accuracies(50, 50, 52), seed=1),
    }
    (found,) = compare_all(methods, seed=1, num_resamples=1000)
    assert found.value == pytest.approx((152 - 63) / 180)
    assert (found.better, found.verdict) == ("strong", "strong is better")
    assert found.over_examples[0] > 0
    assert found.over_seeds[0] > 0
    (other,) = compare_all(dict(reversed(methods.items())), seed=1, num_resamples=1000)
    assert (other.better, other.value) == ("strong", pytest.approx(-found.value))


def test_examples_alone_or_seeds_alone_do_not_decide() -> None:
    base = gather(accuracies(30, 30, 30), seed=1)
    unsteady = gather(accuracies(58, 56, 30), seed=1)  # far ahead over examples, but one seed fails
    (by_seed,) = compare_all({"base": base, "unsteady": unsteady}, seed=1, num_resamples=1000)
    assert by_seed.p_value < 0.05
    assert by_seed.over_seeds[0] < 0
    assert (by_seed.better, by_seed.verdict) == (None, "not decided")
    steady = gather(accuracies(32, 32, 32, shift=30), seed=1)  # always a little ahead, on other examples
    (by_example,) = compare_all({"base": base, "steady": steady}, seed=1, num_resamples=1000)
    assert by_example.over_seeds[0] > 0
    assert by_example.p_value > 0.05
    assert by_example.better is None


def test_equal_methods_do_not_differ() -> None:
    one = gather(accuracies(30, 33), seed=1)
    (found,) = compare_all({"a": one, "b": one}, seed=1, num_resamples=200)
    assert (found.value, found.p_value, found.better) == (0, 1, None)


def test_every_pair_is_corrected_for_all() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    methods = {name: gather(accuracies(n, n + 1), seed=1) for name, n in (("a", 20), ("b", 40), ("c", 55))}
    pairs = compare_all(methods, seed=1, num_resamples=1000)
    assert [(p.first, p.second) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("p_value", "by_seed", "by_example", "better"),
    [
        (0.05, (0.01, 0.2), (0.01, 0.2), "b"),
        (0.06, (0.01, 0.2), (0.01, 0.2), None),
        (0.01, (0.0, 0.2), (0.01, 0.2), None),
        (0.01, (0.01, 0.2), (-0.01, 0.2), None),
    ],
)
def test_all_three_must_agree(
    p_value: float, by_seed: tuple[float, float], by_example: tuple[float, float], better: str | None
) -> None:
    for higher, expected in ((True, better), (False, better and "a")):
        found = seeded_scores._judge(
            "a", "b", 0.1, by_seed, by_example, p_value=p_value, higher_is_better=higher
        )
        assert found.better == expected
