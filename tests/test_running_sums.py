"""Running sums against numpy's two-pass formulas on the values themselves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from raymem.scores.running_sums import IN, OUT, RunningSums, by_arm

T, N = 60, 7
SHAPES = {
    "around 0": (0.0, 1.0),
    "far from 0": (1e8, 1e-2),
    "far from 0, negative": (-3e6, 1e-4),
    "of very different sizes": (1e3, np.geomspace(1e-6, 1e6, N)),
}


@pytest.fixture(params=SHAPES)
def values(request):
    """[T, N], whatever their size."""
    centre, spread = SHAPES[request.param]
    return centre + spread * np.random.default_rng(1).standard_normal((T, N))


@pytest.fixture
def masks():
    """[T, N], at least two trials in either arm."""
    return np.random.default_rng(2).random((T, N)) < 0.4


def summed(values, masks, origin=None):
    sums = RunningSums.zeros(
        (2, N), ["x"], squares=["x"], origin=None if origin is None else {"x": origin}
    )
    for row, inside in zip(values, masks, strict=True):
        sums.add(by_arm(inside), x=row)
    return sums


def two_pass(values, masks):
    """Counts, means and unbiased variances of each arm, [2, N], one example at a time."""
    arms = [[values[masks[:, i] == arm, i] for i in range(N)] for arm in (False, True)]
    return tuple(
        np.array([[f(v) for v in arm] for arm in arms])
        for f in (len, np.mean, lambda v: np.var(v, ddof=1))
    )


def assert_equal(sums, values, masks, relative=1e-9):
    n, mean, variance = two_pass(values, masks)
    assert (sums.n == n).all()
    np.testing.assert_allclose(sums.mean("x"), mean, rtol=1e-13, atol=1e-9 * variance.min() ** 0.5)
    np.testing.assert_allclose(sums.variance("x"), variance, rtol=relative)
    np.testing.assert_allclose(sums.stderr("x"), np.sqrt(variance / n), rtol=relative)


def test_means_and_variances_are_those_of_two_passes(values, masks):
    assert_equal(summed(values, masks, origin=values[0]), values, masks)


def test_without_an_origin_squares_of_large_means_lose_digits(masks):
    """Why there is an origin: the same values about 0 have no correct digit."""
    values = 1e8 + 1e-2 * np.random.default_rng(1).standard_normal((T, N))
    _, _, variance = two_pass(values, masks)
    error = np.abs(summed(values, masks).variance("x") / variance - 1)
    assert error.min() > 0.99


def test_parts_about_other_origins_merge_and_can_be_taken_out_again(values, masks):
    parts = [
        summed(values[k : k + 20], masks[k : k + 20], origin=values[k]) for k in range(0, T, 20)
    ]
    whole = parts[0] + parts[1] + parts[2]
    assert_equal(whole, values, masks)
    assert_equal(whole - parts[1], np.delete(values, slice(20, 40), 0),
                 np.delete(masks, slice(20, 40), 0), relative=1e-8)  # fmt: skip


def test_weighted_folds_are_folds_that_are_repeated(values, masks):
    parts = [summed(values[k : k + 20], masks[k : k + 20], values[0]) for k in range(0, T, 20)]
    folds = RunningSums(
        n=np.stack([part.n for part in parts]),
        total={"x": np.stack([part.total["x"] for part in parts])},
        squares={"x": np.stack([part.squares["x"] for part in parts])},
        origin=parts[0].origin,
    )
    drawn = [0, 0, 2]
    trials = np.concatenate([np.arange(20 * k, 20 * k + 20) for k in drawn])
    rows = np.array([4, 1])
    merged = folds.at(rows).merged(np.bincount(drawn, minlength=3))
    n, mean, variance = two_pass(values[trials], masks[trials])
    assert (merged.n == n[:, rows]).all()
    np.testing.assert_allclose(merged.mean("x"), mean[:, rows], rtol=1e-13)
    np.testing.assert_allclose(merged.variance("x"), variance[:, rows], rtol=1e-9)


def test_sums_of_bits_are_exact():
    """Means of 0 and 1 are the fractions of integers, and equal values do not vary at all."""
    right = np.random.default_rng(3).random((T, N)) < 0.3
    masks = np.random.default_rng(4).random((T, N)) < 0.5
    sums = summed(right, masks)
    for arm, inside in ((OUT, ~masks), (IN, masks)):
        for i in range(N):
            of = Fraction(int((right & inside)[:, i].sum()), int(inside[:, i].sum()))
            assert sums.mean("x")[arm, i] == float(of)
    same = summed(np.full((T, N), 0.1), masks, origin=np.full(N, 0.1))
    assert (same.variance("x") == 0).all()


def test_few_trials_have_no_mean_and_no_variance():
    sums = RunningSums.zeros((2, 3), ["x"], squares=["x"])
    sums.add(by_arm([True, True, False]), x=[1.0, 2.0, 3.0])
    sums.add(by_arm([True, False, False]), x=[2.0, 2.0, 3.0])
    assert np.isnan(sums.mean("x")).tolist() == [[True, False, False], [False, False, True]]
    assert np.isnan(sums.variance("x")).tolist() == [[True, True, False], [False, True, True]]
    assert np.isnan(sums.stderr("x")).tolist() == np.isnan(sums.variance("x")).tolist()


def test_a_value_that_is_not_known_makes_its_example_unknown():
    sums = RunningSums.zeros((2,), ["x"])
    sums.add(np.array([True, True]), x=[np.nan, 1.0])
    sums.add(np.array([True, True]), x=[1.0, 3.0])
    assert sums.n.tolist() == [2, 2]
    assert np.isnan(sums.mean("x")).tolist() == [True, False]
