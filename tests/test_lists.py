"""The list of memorized examples: its probabilities and its realised false discoveries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from raymem.scores import list_with_fdr, probability_above


@pytest.mark.parametrize(
    "counts",
    [
        (14, 14, 0, 6),
        (70, 70, 20, 30),
        (70, 70, 30, 30),
        (60, 70, 10, 30),
        (0, 14, 6, 6),
        (1, 1, 0, 1),
    ],
)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.9])
def test_probability_is_the_integral_over_both_posteriors(counts, threshold):
    k_in, n_in, k_out, n_out = counts
    p_in = stats.beta(k_in + 0.5, n_in - k_in + 0.5)
    p_out = stats.beta(k_out + 0.5, n_out - k_out + 0.5)

    def both(u):
        return p_out.pdf(u) * p_in.sf(min(u + threshold, 1))

    points = [1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6]
    exact = sum(
        integrate.quad(both, a, b, limit=500)[0]
        for a, b in zip([0, *points], [*points, 1], strict=True)
    )
    found = probability_above(threshold, *counts)
    assert float(found[0]) == pytest.approx(exact, abs=2e-3)


def test_probability_agrees_with_drawing_from_the_posteriors():
    generator = np.random.default_rng(0)
    n = 200_000
    p_in, p_out = generator.beta(60.5, 10.5, n), generator.beta(14.5, 16.5, n)
    share = (p_in - p_out > 0.25).mean()
    (found,) = probability_above(0.25, 60, 70, 14, 30)
    assert found == pytest.approx(share, abs=4.9 * np.sqrt(share * (1 - share) / n))


def test_undefined_arms_are_nan_and_off_the_list():
    found = probability_above(0.25, [0, 10, 10], [0, 10, 10], [0, 0, 0], [10, 0, 10])
    assert np.isnan(found).tolist() == [True, True, False]
    assert list_with_fdr(found).tolist() == [False, False, True]
    assert list_with_fdr([]).tolist() == []
    assert list_with_fdr([0.9, 0.8]).tolist() == [False, False]


def test_the_list_is_the_longest_with_that_mean_and_ties_stay_together():
    probability = np.array([0.99, 0.97, 0.94, 0.94, 0.5, np.nan])
    # Means of 1 - p: .01, .02, .0333, .04, .132
    assert list_with_fdr(probability).tolist() == [True] * 4 + [False] * 2
    assert list_with_fdr(probability, 0.035).tolist() == [True] * 2 + [False] * 4
    assert list_with_fdr(probability, 0.021).tolist() == [True] * 2 + [False] * 4


def realised(trials: int, seed: int) -> tuple[float, float]:
    """False-discovery proportion and power on a simulated fleet of 4,000 examples at r = 0.7."""
    generator = np.random.default_rng(seed)
    n, n_in = 4000, round(0.7 * trials)
    p_in = generator.beta(60, 1, n)
    easy = generator.random(n) < 0.7
    p_out = np.where(easy, generator.beta(20, 1, n), generator.beta(1.2, 1, n)) * p_in
    truth = p_in - p_out > 0.25
    counts = (
        generator.binomial(n_in, p_in), np.full(n, n_in),
        generator.binomial(trials - n_in, p_out), np.full(n, trials - n_in),
    )  # fmt: skip
    listed = list_with_fdr(probability_above(0.25, *counts))
    return (listed & ~truth).sum() / max(listed.sum(), 1), listed[truth].mean()


@pytest.mark.parametrize(
    ("trials", "power"),
    [
        (100, 0.87),
        pytest.param(200, 0.93, marks=pytest.mark.slow),
        pytest.param(400, 0.98, marks=pytest.mark.slow),
    ],
)
def test_realised_false_discoveries_are_at_most_nominal(trials, power):
    found = np.array([realised(trials, seed) for seed in range(30)])
    mean = found.mean(axis=0)
    noise = found.std(axis=0) / np.sqrt(30)
    assert mean[0] <= 0.05 + 4.9 * noise[0]
    assert mean[1] >= power
