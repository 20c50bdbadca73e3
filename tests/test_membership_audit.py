"""Trade-off curves, and the distributions of right guesses that audits compare with: against linear
programs, enumeration, and mechanisms that attain them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from raymem.privacy import (
    Mechanism,
    Tradeoff,
    fixed_size_bound,
    gaussian_delta,
    guess_distribution,
    guess_p_value,
    highest_are_in,
    rank_tail,
    sharp_bound,
    summed,
)

GRID = [(0.1, 1e-5), (1.0, 0.01), (1.0, 0.0), (4.0, 1e-3)]
RESPONSE = Tradeoff.from_points([(1.0, 0.0)])  # attained by randomized response


# Curves.


@pytest.mark.parametrize(("epsilon", "delta"), GRID)
def test_curves_of_one_epsilon_have_the_bounds_on_memorization(epsilon, delta):
    """Two derivations of each: corners of a curve, and a formula proven by a linear program."""
    curve = Tradeoff.from_points([(epsilon, delta)])
    assert curve.total_variation == pytest.approx(sharp_bound(epsilon, delta))
    replaced = curve.replaced.total_variation
    assert replaced == pytest.approx(fixed_size_bound(epsilon, delta), rel=0.02)
    assert replaced <= fixed_size_bound(epsilon, delta) + 1e-12


@pytest.mark.parametrize("mu", [0.25, 1.0, 3.0])
def test_curves_of_gaussian_mechanisms_are_above_the_exact_ones(mu):
    q = np.logspace(-8, -0.5, 500)
    for curve, exact in ((Tradeoff.gaussian(mu), mu), (Tradeoff.gaussian(mu).swapped, mu * 2**0.5)):
        above = curve.most_likely(q) - stats.norm.cdf(stats.norm.ppf(q) + exact)
        assert above.min() > -1e-12
        assert above.max() < 0.015
        again = curve.least_likely(curve.most_likely(q))
        assert (again <= q + 1e-12).all()
        # Concave, and the same with the two arms exchanged.
        assert (np.diff(curve.most_likely(np.linspace(0, 1, 400)), 2) < 1e-9).all()
        assert np.allclose(curve.most_likely(1 - curve.most_likely(q)), 1 - q, atol=1e-9)


def test_two_models_tell_what_both_say():
    """Randomized response of epsilon 1 twice: log likelihood ratios -2, 0 and 2."""
    p = 1 / (1 + math.exp(-1))
    both = RESPONSE.swapped
    assert float(both.most_likely((1 - p) ** 2)) == pytest.approx(p**2)
    assert both.total_variation == pytest.approx(p**2 - (1 - p) ** 2)


def test_more_points_make_a_curve_tighter_and_vacuous_ones_change_nothing():
    few, more = Tradeoff.from_points([(1.0, 0.01)]), Tradeoff.from_points([(1.0, 0.01), (0, 0.2)])
    assert more.total_variation == pytest.approx(0.2)
    assert few.total_variation > 0.4
    same = Tradeoff.from_points([(1.0, 0.01), (900.0, 1e-5), (2.0, 1.0)])
    assert same.p.tolist() == few.p.tolist()
    assert Tradeoff.from_points([]).total_variation == 1


def test_a_mechanism_claims_all_that_its_accountant_says():
    values = {
        "epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.1, "expected_batch": 10, "steps": 10,
        "noise_multiplier": 1.0, "max_grad_norm": 1.0, "accountant": "prv", "spent_epsilon": 1.0,
        "total_variation": 0.1,
    }  # fmt: skip
    old = Mechanism.from_dict(values)
    assert old.profile == ()
    assert old.tradeoff.total_variation == pytest.approx(0.1)
    new = Mechanism.from_dict({**values, "profile": [[0.0, 0.1], [0.25, 0.02]]})
    assert Mechanism.from_dict(new.as_dict()) == new
    assert new.tradeoff.most_likely(0.01) < old.tradeoff.most_likely(0.01)


# One example by itself.


def test_ranks_are_counted_in_the_half_with_the_highest_scores():
    scores = np.array([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    inside = np.array([[True, True], [False, True], [True, False], [False, False]])
    assert highest_are_in(scores, inside).tolist() == [1, 0]


def test_rank_tails_are_those_of_randomized_response():
    """By enumeration of answers about 3 trials in and 2 out, ties broken at random."""
    p, exact = 1 / (1 + math.exp(-1)), np.zeros(4)
    for answers in itertools.product((0, 1), repeat=5):
        says_in, truth = np.array(answers), np.array([1, 1, 1, 0, 0])
        weight = np.prod(np.where(says_in == truth, p, 1 - p))
        orders = list(itertools.permutations(range(5)))
        for order in orders:
            top = sorted(order, key=lambda t: -says_in[t])[:3]
            exact[truth[top].sum()] += weight / len(orders)
    assert np.allclose(rank_tail(3, 2, RESPONSE), exact[::-1].cumsum()[::-1])


def test_rank_tails_are_those_of_a_gaussian_mechanism():
    rng = np.random.default_rng(0)
    B, runs = 20, 40_000
    inside = np.arange(B)[:, None] < np.full(runs, B // 2)
    right = highest_are_in(inside + rng.normal(size=(B, runs)), inside)
    seen = (right[:, None] >= np.arange(B // 2 + 1)).mean(0)
    tail = rank_tail(B // 2, B // 2, Tradeoff.gaussian(1.0))
    assert (seen <= tail + 4 * np.sqrt(tail * (1 - tail) / runs) + 1e-9).all()
    assert (seen >= tail - 0.02).all()


def test_trials_that_differ_more_among_themselves_say_less():
    """Other examples move scores: the tail holds whatever they do."""
    rng = np.random.default_rng(0)
    inside = np.arange(20)[:, None] < np.full(20_000, 10)
    noise = rng.normal(size=inside.shape) * rng.uniform(0.5, 1, inside.shape)
    shifts = rng.normal(0, 2, (20, 1))
    right = highest_are_in(0.5 * inside + noise + shifts, inside)
    tail = rank_tail(10, 10, Tradeoff.gaussian(1.0))
    seen = (right[:, None] >= np.arange(11)).mean(0)
    assert (seen <= tail + 4 * np.sqrt(tail * (1 - tail) / 20_000)).all()


# Many together.


def largest_mean(coins, guesses, curve, phi):
    """Of phi(right guesses), over all distributions that the curve allows: a linear program."""
    j, rows, limits = np.arange(guesses + 1), [], []
    slopes = np.diff(curve.p) / np.diff(curve.q)
    for c in range(1, guesses + 1):
        right, wrong = (j >= c) * j / coins, (j >= c - 1) * (guesses - j) / coins
        for slope, q, p in zip(slopes, curve.q, curve.p, strict=False):
            rows.append(right - slope * wrong)
            limits.append(p - slope * q)
    total = np.ones((1, guesses + 1))
    found = optimize.linprog(-phi, rows, limits, total, [1.0], bounds=(0, 1))
    return -found.fun


@pytest.mark.parametrize("points", [[(1.0, 0.01)], [(0.0, 0.2), (0.5, 0.05), (2.0, 1e-3)]])
@pytest.mark.parametrize(("coins", "guesses"), [(8, 8), (12, 5)])
def test_no_distribution_that_a_curve_allows_is_larger(points, coins, guesses):
    """In the mean of every convex rising function, and it is one of them."""
    curve = Tradeoff.from_points(points)
    mass, j = guess_distribution(coins, guesses, curve), np.arange(guesses + 1)
    assert mass.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    bends = [np.maximum(j - t, 0.0) for t in range(guesses)]
    for phi in (*bends, np.exp(j / 2), rng.exponential(size=guesses) @ np.array(bends)):
        assert mass @ phi == pytest.approx(largest_mean(coins, guesses, curve, phi), abs=1e-7)


def test_many_guesses_are_right_as_often_as_one():
    curve = Tradeoff.gaussian(1.0).swapped
    for n in (20, 2000):
        mean = guess_distribution(n, n, curve) @ np.arange(n + 1) / n
        assert mean == pytest.approx(curve.accuracy, abs=1e-6)


def test_guesses_that_are_chosen_may_be_better_ones():
    curve = Tradeoff.gaussian(1.0)
    few = guess_distribution(30, 10, curve) @ np.arange(11) / 10
    assert few > curve.accuracy + 0.05
    # Not under pure epsilon-DP, where every guess has the same limit.
    mass = guess_distribution(30, 10, RESPONSE)
    assert np.allclose(mass, stats.binom.pmf(np.arange(11), 10, 1 / (1 + math.exp(-1))))


@pytest.mark.parametrize("runs", [1, 5])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_p_values_of_pairs_hold_for_the_hardest_mechanisms(runs, alpha):
    """Exactly: randomized response by itself for each coin, and one that tells all coins of a run
    at once in one run of ten and else says nothing."""
    n, p = 12, 1 / (1 + math.exp(-1))
    response = stats.binom.pmf(np.arange(n + 1), n, p)
    failing = 0.9 * stats.binom.pmf(np.arange(n + 1), n, 0.5)
    failing[n] += 0.1
    told = Tradeoff.from_points([(0.0, 0.1)])
    for one, curve in ((response, RESPONSE), (failing, told)):
        p_values = [guess_p_value(k, runs, n, n, curve) for k in range(runs * n + 1)]
        assert (np.diff(p_values) <= 1e-12).all()
        refuted = np.array(p_values) <= alpha
        assert summed(one, runs)[refuted].sum() <= alpha
    # As if runs of the second were independent coins: refuted where nothing is wrong.
    naive = stats.binom.sf(np.arange(runs * n + 1) - 1, runs * n, told.accuracy) <= alpha
    assert summed(failing, runs)[naive].sum() > alpha


def test_p_values_of_pairs_are_not_far_above_the_exact_ones():
    n, runs, p = 50, 20, 1 / (1 + math.exp(-1))
    exact = stats.binom.isf(1e-4, n * runs, p) + 1
    ours = next(
        k for k in range(n * runs) if guess_p_value(k, runs, n, n, RESPONSE) <= 1e-4
    )  # the least number that is refuted
    assert exact <= ours <= exact + 10


def test_the_delta_of_gaussian_mechanisms():
    """Balle & Wang 2018, Figure 1's mechanism by numerical integration."""
    for mu, epsilon in ((1.0, 0.0), (0.5, 1.0), (2.0, 3.0)):
        x = np.linspace(-12, 14, 400_001)
        p, q = stats.norm.pdf(x, mu), stats.norm.pdf(x)
        exact = np.maximum(p - math.exp(epsilon) * q, 0).sum() * (x[1] - x[0])
        assert gaussian_delta(mu, epsilon) == pytest.approx(exact, abs=1e-6)
