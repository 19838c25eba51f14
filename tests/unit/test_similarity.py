"""Debiased CKA against the estimator as it was published, and what it is blind to."""

from __future__ import annotations

import numpy as np
import pytest

from peftlab.errors import DataError
from peftlab.inspection.similarity import chance_level, cka_matrix, debiased_cka, without_top_dimensions


def _unbiased_hsic(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, equation 5."""
    n = len(k)
    k, other = k.copy(), other.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(other, 0)
    one = np.ones(n)
    found = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return float((found - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3)))


def test_cka_is_that_of_the_unbiased_estimator() -> None:
    source = np.random.default_rng(0)
    first, second = source.normal(size=(30, 8)) + 3, source.normal(size=(30, 5))
    second[:, :3] += first[:, :3]
    k, other = first @ first.T, second @ second.T
    expected = _unbiased_hsic(k, other) / np.sqrt(_unbiased_hsic(k, k) * _unbiased_hsic(other, other))
    assert debiased_cka(first, second) == pytest.approx(expected, rel=1e-9)
    assert cka_matrix([first, second], [second]).shape == (2, 1)


def test_independent_noise_has_nothing_in_common_and_a_rotation_everything() -> None:
    source = np.random.default_rng(1)
    first, second = source.normal(size=(64, 768)), source.normal(size=(64, 768))
    rotation, _ = np.linalg.qr(source.normal(size=(768, 768)))
    assert abs(debiased_cka(first, second)) < 0.02  # without debiasing it is 0.92
    assert debiased_cka(first, 3 * first @ rotation + 7) == pytest.approx(1, abs=1e-9)
    assert chance_level([first], [first]) < 0.05


def test_one_large_dimension_decides_alone_unless_it_is_left_out() -> None:
    source = np.random.default_rng(2)
    first, second = source.normal(size=(128, 64)), source.normal(size=(128, 64))
    first[:, 3] = second[:, 9] = 100 * source.normal(size=128)
    assert debiased_cka(first, second) > 0.99
    cut = [without_top_dimensions(side) for side in (first, second)]
    assert cut[0].shape == (128, 61)
    assert abs(debiased_cka(*cut)) < 0.05


def test_similarity_of_too_little_is_refused_and_of_a_constant_unknown() -> None:
    with pytest.raises(DataError, match="at least 4"):
        debiased_cka(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(DataError, match="the same number"):
        debiased_cka(np.ones((5, 2)), np.ones((6, 2)))
    assert np.isnan(debiased_cka(np.ones((6, 2)), np.random.default_rng(0).normal(size=(6, 2))))
