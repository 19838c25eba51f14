"""Paired bootstrap and permutation: by hand, seeded, sure where it is clear and silent where nothing differs."""

from __future__ import annotations

import doctest
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab import significance
from peftlab.errors import EvaluationError
from peftlab.metric import Score
from peftlab.metrics import bleu, exact_match, macro_f1, rouge_l, value_coverage
from peftlab.significance import compare_scores, paired_bootstrap, permutation_test
from peftlab.task import Example

TESTS = [paired_bootstrap, permutation_test]


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(significance).failed == 0


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("count", [5, 200])
def test_a_system_against_itself_has_p_1(test: object, count: int) -> None:
    values = np.random.default_rng(1).random(count)
    found = test(values, values, seed=1, num_resamples=500)  # type: ignore[operator]
    assert (found.value, found.p_value, found.count) == (0.0, 1.0, count)


@pytest.mark.parametrize("test", TESTS)
def test_a_clear_difference_has_a_small_p_and_none_a_large_one(test: object) -> None:
    generator = np.random.default_rng(1)
    base = generator.random(200)
    better = base + 0.1 + 0.1 * generator.standard_normal(200)
    clear = test(base, better, seed=1, num_resamples=1000)  # type: ignore[operator]
    assert clear.value == pytest.approx(float((better - base).mean()))
    assert 0 < clear.p_value <= 2 / 1001  # chance is never ruled out
    back = test(better, base, seed=1, num_resamples=1000)  # type: ignore[operator]
    assert (back.value, back.p_value) == (
        pytest.approx(-clear.value),
        pytest.approx(clear.p_value, abs=0.002),
    )
    noise = base + 0.3 * generator.standard_normal(200)
    assert test(base, noise - (noise - base).mean() + 0.005, seed=1).p_value > 0.5  # type: ignore[operator]


@pytest.mark.parametrize("test", TESTS)
def test_results_are_seeded(test: object) -> None:
    generator = np.random.default_rng(1)
    base, other = generator.random(50), generator.random(50)
    first, again, another = (test(base, other, seed=s, num_resamples=300) for s in (1, 1, 2))  # type: ignore[operator]
    assert first == again
    assert first != another


def test_the_permutation_test_of_few_examples_goes_through_all_swaps() -> None:
    first, second = [0.1, 0.5, 0.3, 0.7], [0.4, 0.4, 0.9, 1.0]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    seen = abs(sum(differences))
    ways = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=4)
    ]
    expected = sum(way >= seen - 1e-12 for way in ways) / 16
    found = permutation_test(first, second, seed=1)
    assert found.p_value == expected
    assert "all 16 swaps" in found.test


def test_the_permutation_test_of_hits_is_the_sign_test() -> None:
    """10 examples, one system right on 8 of those where they differ and wrong on 1: an exact binomial tail."""
    first = [0.0] * 8 + [1.0, 1.0]
    second = [1.0] * 8 + [0.0, 1.0]
    found = permutation_test(first, second, seed=1)
    assert found.p_value == pytest.approx(2 * (comb(9, 8) + comb(9, 9)) / 2**9)


def test_the_drawn_swaps_come_near_the_exact_p() -> None:
    """13 examples are drawn, not gone through: one system is right on 10, the other on 3 others."""
    first, second = [1.0] * 3 + [0.0] * 10, [0.0] * 3 + [1.0] * 10
    exact = 2 * sum(comb(13, k) for k in range(10, 14)) / 2**13
    assert permutation_test(first, second, seed=1).p_value == pytest.approx(exact, abs=0.01)


def test_the_bootstrap_by_hand() -> None:
    """40 examples of which one differs: a resample without it is not above 0."""
    found = paired_bootstrap([0.0] * 40, [0.0] * 39 + [1.0], seed=1, num_resamples=20_000)
    assert found.value == 1 / 40
    assert found.p_value == pytest.approx(2 * (39 / 40) ** 40, abs=0.02)
    few = paired_bootstrap([0.0, 0.0], [0.0, 1.0], seed=1, num_resamples=2000)
    assert few.interval == (0.0, 1.0)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_chance_is_not_called_significant_on_few_examples(count: int) -> None:
    """Two systems alike, 200 times: at most some 5 % lie below 0.05. The bootstrap alone gives 48 % of 2 examples."""
    generator = np.random.default_rng(1)
    pairs = [(generator.normal(size=count), generator.normal(size=count)) for _ in range(200)]
    found = [paired_bootstrap(*pair, seed=1, num_resamples=100) for pair in pairs]
    assert np.mean([one.p_value < 0.05 for one in found]) < 0.09
    assert found[0].p_value == permutation_test(*pairs[0], seed=1, num_resamples=100).p_value
    assert "p by the permutation test" in found[0].test


def test_scores_of_different_examples_are_not_compared() -> None:
    def scored(name: str, answer: str) -> Score:
        return exact_match.score([answer] * 2, [Example(f"{name}-{i}", "s", ("x",)) for i in (1, 2)], seed=1)

    one, other = scored("a", "x"), scored("b", "x")
    with pytest.raises(EvaluationError, match=r"are of different examples"):
        compare_scores(one, other, seed=1)
    assert compare_scores(one, scored("a", "y"), seed=1).value == -1
    assert "asked" not in one.to_dict()


def test_the_bootstrap_interval_is_as_wide_as_the_normal_one() -> None:
    difference = np.random.default_rng(1).standard_normal(400)
    found = paired_bootstrap(np.zeros(400), difference, seed=1, num_resamples=3000)
    assert found.interval is not None
    half = 1.96 * difference.std() / 20
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * half, rel=0.06)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_p_is_a_probability_and_never_0(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.random(15), generator.random(15)
    for test in TESTS:
        assert 0 < test(first, second, seed=seed, num_resamples=50).p_value <= 1


def test_two_systems_are_compared_by_their_scores() -> None:
    examples = [
        Example(f"e{i}", "s", (f"the cheap pub {i} is near the old river",), values=(f"pub {i}",))
        for i in range(30)
    ]
    good = [e.references[0] for e in examples]
    bad = [text.replace("pub", "bar") if i % 3 == 0 else text for i, text in enumerate(good)]
    for module in (bleu, rouge_l, exact_match, value_coverage):
        one, other = (module.score(answers, examples, seed=1) for answers in (bad, good))
        for test in ("bootstrap", "permutation"):
            found = compare_scores(one, other, seed=1, test=test)
            assert found.value == pytest.approx(other.value - one.value)
            assert found.p_value < 0.05
        assert compare_scores(one, one, seed=1).p_value == 1


def test_a_corpus_score_is_compared_as_such() -> None:
    labels = [0, 0, 0, 0, 0, 0, 1, 1]
    examples = [Example(f"e{i}", "s", label=label) for i, label in enumerate(labels)]
    one = macro_f1.score(["0"] * 8, examples, seed=1)
    other = macro_f1.score([str(label) for label in labels], examples, seed=1)
    assert compare_scores(one, other, seed=1).value == pytest.approx(1 - one.value)


def test_what_cannot_be_compared_is_refused() -> None:
    examples = [Example(f"e{i}", "s", ("a b c d",)) for i in range(3)]
    scores = {module: module.score(["a b c d"] * 3, examples, seed=1) for module in (bleu, rouge_l)}
    with pytest.raises(EvaluationError, match=r"bleu and rouge_l are not the same metric"):
        compare_scores(scores[bleu], scores[rouge_l], seed=1)
    with pytest.raises(EvaluationError, match=r"there is no test 't-test'; there is: bootstrap, permutation"):
        compare_scores(scores[bleu], scores[bleu], seed=1, test="t-test")
    with pytest.raises(EvaluationError, match=r"the same examples, got \(2,\) and \(3,\)"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0], seed=1)
    with pytest.raises(EvaluationError, match=r"at least 2 examples, got 1"):
        permutation_test([1.0], [2.0], seed=1)
    with pytest.raises(EvaluationError, match=r"not finite"):
        permutation_test([1.0, float("nan")], [2.0, 1.0], seed=1)
    with pytest.raises(EvaluationError, match=r"need value_of"):
        paired_bootstrap(np.ones((3, 2)), np.ones((3, 2)), seed=1)
