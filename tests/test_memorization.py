from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from raymem import memorization
from raymem.scores import (
    difference_of_means,
    difference_of_proportions,
    forecast_trials,
    reliability,
)

shapes = st.tuples(st.integers(1, 25), st.integers(1, 8))


@st.composite
def fleets(draw):
    shape = draw(shapes)
    masks, correct = (draw(hnp.arrays(bool, shape)) for _ in range(2))
    p_true = draw(hnp.arrays(float, shape, elements=st.floats(0, 1)))
    return masks, correct, p_true


@settings(max_examples=100, deadline=None)
@given(fleets())
def test_agrees_with_the_definition(fleet):
    masks, correct, p_true = fleet
    result = memorization(masks, correct, p_true)
    for found, values in ((result.value, correct), (result.soft.value, p_true)):
        expected = reference.memorization(masks, values)
        assert [None if np.isnan(v) else v for v in found] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(fleets())
def test_properties(fleet):
    masks, correct, p_true = fleet
    result = memorization(masks, correct, p_true)
    complement = memorization(~masks, correct, p_true)
    defined = ~np.isnan(result.value)
    assert (np.abs(result.value[defined]) <= 1).all()
    for a, b in ((result, complement), (result.soft, complement.soft)):
        assert np.allclose(a.value, -b.value, equal_nan=True, atol=1e-12)
        assert np.allclose(a.low, -b.high, equal_nan=True, atol=1e-9)
    # The estimate lies in its interval, the interval in [-1, 1].
    for e in (result, result.soft):
        ok = ~np.isnan(e.low)
        assert (e.low[ok] <= e.value[ok] + 1e-12).all()
        assert (e.value[ok] <= e.high[ok] + 1e-12).all()
        assert (e.low[ok] >= -1 - 1e-12).all()
        assert (e.high[ok] <= 1 + 1e-12).all()
    # An arm without trials has no value, one trial has no standard error.
    assert np.array_equal(defined, (result.n_in > 0) & (result.n_out > 0))
    assert np.array_equal(~np.isnan(result.stderr), (result.n_in > 1) & (result.n_out > 1))


@settings(max_examples=50, deadline=None)
@given(fleets(), st.randoms())
def test_the_order_of_trials_and_examples_does_not_matter(fleet, random):
    masks, correct, _ = fleet
    T, N = masks.shape
    trials, examples = random.sample(range(T), T), random.sample(range(N), N)
    expected = memorization(masks, correct).value[examples]
    found = memorization(masks[trials][:, examples], correct[trials][:, examples]).value
    assert np.array_equal(found, expected, equal_nan=True)


# Newcombe 1998 (Statistics in Medicine 17), Table II, method 10.
NEWCOMBE = [
    ((56, 70, 48, 80), (0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.1705, 0.8090)),
    ((10, 10, 0, 20), (0.6791, 1.0000)),
    ((10, 10, 0, 10), (0.6075, 1.0000)),
]


@pytest.mark.parametrize(("counts", "limits"), NEWCOMBE)
def test_intervals_are_newcombes_published_ones(counts, limits):
    e = difference_of_proportions(*([c] for c in counts))
    assert (e.low[0], e.high[0]) == pytest.approx(limits, abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_intervals_are_made_of_wilsons(data):
    n1, n2 = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    k1, k2 = data.draw(st.integers(0, n1)), data.draw(st.integers(0, n2))
    z = 1.959963984540054
    (l1, u1), (l2, u2) = reference.wilson(k1, n1, z), reference.wilson(k2, n2, z)
    p1, p2 = k1 / n1, k2 / n2
    e = difference_of_proportions([k1], [n1], [k2], [n2])
    assert e.low[0] == pytest.approx(p1 - p2 - math.hypot(p1 - l1, u2 - p2), abs=1e-9)
    assert e.high[0] == pytest.approx(p1 - p2 + math.hypot(u1 - p1, p2 - l2), abs=1e-9)


def sums_of(arm):
    return arm.sum(-1), (arm**2).sum(-1), np.full(arm.shape[:-1], arm.shape[-1])


def test_soft_intervals_are_welchs_with_a_zero_and_a_one_more_in_each_arm():
    generator = np.random.default_rng(0)
    for n_in, n_out in ((14, 6), (2, 2), (100, 40)):
        a, b = generator.beta(5, 1, n_in), generator.beta(1, 1, n_out)
        e = difference_of_means(*sums_of(a[None]), *sums_of(b[None]))
        welch = stats.ttest_ind(
            np.append(a, [0, 1]), np.append(b, [0, 1]), equal_var=False
        ).confidence_interval(0.95)
        value = a.mean() - b.mean()
        limits = max(min(welch.low, value), -1), min(max(welch.high, value), 1)
        assert (e.low[0], e.high[0]) == pytest.approx(limits, abs=1e-9)
        variance = a.var(ddof=1) / n_in + b.var(ddof=1) / n_out
        assert e.stderr[0] == pytest.approx(math.sqrt(variance), rel=1e-9)
    one = difference_of_means([0.5], [0.25], [1], [0.5], [0.5], [4])
    assert math.isnan(one.low[0])
    assert math.isnan(one.high[0])


def bounded(generator, kind, mean, shape):
    """Values in [0, 1] of a mean: right or wrong; rare hits at 0.9; betas from wide to narrow."""
    if kind == "bit":
        return (generator.random(shape) < mean).astype(float)
    if kind == "rare":
        rare = min(mean, 1 - mean)
        hits = np.where(generator.random(shape) < rare / 0.9, 0.9, 0.0)
        return hits if mean <= 0.5 else 1 - hits
    strength = {"wide": 0.3, "middle": 1.5, "narrow": 8.0}[kind]
    return generator.beta(mean * strength, (1 - mean) * strength, shape)


@pytest.mark.slow
@pytest.mark.parametrize("T", [40, 100, 200, 400])
def test_soft_intervals_cover_at_small_memorization(T):
    """Nominal 95%, over means, shapes and both usual ratios: 94% or more everywhere, where 1.2%
    are three standard errors of 3,000 draws. Welch's interval alone falls to 40 to 90%."""
    generator = np.random.default_rng(T)
    worst, of_welch = 1.0, 1.0
    for ratio in (0.5, 0.7):
        n_in = round(ratio * T)
        for kind in ("bit", "rare", "wide", "middle", "narrow"):
            for p_in, p_out in (
                (0.999, 0.999), (0.99, 0.98), (0.999, 0.95), (0.99, 0.9), (0.98, 0.8),
                (0.98, 0.5), (0.5, 0.45), (0.95, 0.05),
            ):  # fmt: skip
                a = bounded(generator, kind, p_in, (3000, n_in))
                b = bounded(generator, kind, p_out, (3000, T - n_in))
                e, truth = difference_of_means(*sums_of(a), *sums_of(b)), p_in - p_out
                worst = min(worst, np.mean((e.low <= truth) & (truth <= e.high)))
                if T <= 100 and p_in - p_out < 0.2:
                    with np.errstate(invalid="ignore"):
                        half = 2 * e.stderr
                    of_welch = min(of_welch, np.mean(abs(e.value - truth) <= half))
    assert worst >= 0.94 - 0.012
    assert T > 100 or of_welch < 0.9


@pytest.mark.parametrize(("p_in", "p_out"), [(0.99, 0.5), (1.0, 0.3), (0.9, 0.9), (0.5, 0.5)])
def test_newcombe_covers_at_forty_trials(p_in, p_out):
    # Nominal 95%; 0.93 or more of 20,000 is what is promised, binomial error 0.0015.
    generator = np.random.default_rng(1)
    n = 20_000
    e = difference_of_proportions(
        generator.binomial(28, p_in, n), 28, generator.binomial(12, p_out, n), 12
    )
    covered = ((e.low - 1e-12 <= p_in - p_out) & (p_in - p_out <= e.high + 1e-12)).mean()
    assert covered > 0.93


def test_the_standard_error_is_unbiased_where_the_estimate_varies():
    generator = np.random.default_rng(2)
    n, p_in, p_out = 50_000, 0.8, 0.4
    e = difference_of_proportions(
        generator.binomial(28, p_in, n), 28, generator.binomial(12, p_out, n), 12
    )
    truth = p_in * (1 - p_in) / 28 + p_out * (1 - p_out) / 12
    assert (e.stderr**2).mean() == pytest.approx(truth, rel=0.02)
    assert e.value.var() == pytest.approx(truth, rel=0.03)


def test_reliability_predicts_the_correlation_with_the_truth():
    generator = np.random.default_rng(3)
    N, F, per_fold = 4000, 10, 20
    truth_in, truth_out = generator.beta(20, 1, N), generator.beta(2, 1, N)
    n_in, n_out = np.full((F, N), 14), np.full((F, N), 6)
    right_in, right_out = (
        generator.binomial(14, truth_in, (F, N)),
        generator.binomial(6, truth_out, (F, N)),
    )
    R = reliability(right_in, n_in, right_out, n_out)
    found = right_in.sum(0) / (14 * F) - right_out.sum(0) / (6 * F)
    actual = np.corrcoef(found, truth_in - truth_out)[0, 1]
    assert math.sqrt(R) == pytest.approx(actual, abs=0.01)
    # And the forecast: what 200 trials say of 1,000 holds.
    forecast = forecast_trials(F * per_fold, R, 0.98)
    more = 50
    R_more = reliability(
        generator.binomial(14, truth_in, (more, N)),
        np.full((more, N), 14),
        generator.binomial(6, truth_out, (more, N)),
        np.full((more, N), 6),
    )
    assert forecast == pytest.approx(forecast_trials(more * per_fold, R_more, 0.98), rel=0.1)


def test_reliability_is_undefined_without_halves_or_variation():
    ones = np.ones((1, 5))
    assert math.isnan(reliability(ones, ones, ones, ones))
    same = np.ones((4, 5))
    assert math.isnan(reliability(same, same, same, same))
    assert math.isnan(forecast_trials(10, math.nan, 0.9))


@pytest.mark.parametrize(
    ("masks", "correct", "p_true", "message"),
    [
        ([True], [True], None, "trials by examples"),
        ([[1, 0]], [[1]], None, "both are"),
        ([[2, 0]], [[1, 0]], None, "true or false"),
        ([[1, 0]], [[1, 0]], [[0.5]], "both are"),
        ([[1, 0]], [[1, 0]], [[0.5, 1.5]], "probabilities"),
        ([[1, 0]], [[1, 0]], [[0.5, math.nan]], "probabilities"),
    ],
)
def test_wrong_arrays_are_refused(masks, correct, p_true, message):
    with pytest.raises(ValueError, match=message):
        memorization(masks, correct, p_true)


def test_reliability_of_opposite_and_of_unequal_halves():
    opposite = np.array([[0, 1, 2], [2, 1, 0]])
    n, none = np.full((2, 3), 2), np.zeros((2, 3))
    assert reliability(opposite, n, none, n) == -1
    # 20 and 10 trials: the truth is the squared correlation with what is estimated.
    generator = np.random.default_rng(0)
    p = generator.random(20_000)
    n_out = np.array([[6], [3]]) * np.ones((1, 20_000), int)
    n_in = np.array([[14], [7]]) * np.ones((1, 20_000), int)
    out = generator.binomial(n_out, p)
    R = reliability(n_in, n_in, out, n_out)
    estimate = 1 - out.sum(axis=0) / 9
    assert pytest.approx(np.corrcoef(estimate, 1 - p)[0, 1] ** 2, abs=0.03) == R
