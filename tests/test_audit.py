"""Bounds and audits: right where privacy holds, and with teeth where it is broken."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import optimize, stats

from raymem import import_npz, score
from raymem.links import memorized_by_epsilon
from raymem.privacy import (
    Mechanism,
    bounds_on_memorization,
    certified_epsilon,
    clopper_pearson,
    fixed_size_bound,
    honest_bound,
    lower_limit_of_difference,
    one_run_epsilon,
    one_run_p_value,
    paper_bound,
    sharp_bound,
    tightest,
)
from raymem.privacy.accounting import spent_epsilon
from raymem.store import Target, TrialKey

GRID = [(0.1, 1e-5), (1.0, 0.01), (1.0, 1e-5), (4.0, 1e-3)]


# Bounds, against linear programs that know nothing of the formulas.


def largest_difference(epsilon, delta, *, replaced=False):
    """Largest P - Q over all pairs that (eps, delta)-DP allows, with a common neighbour if
    `replaced`."""
    e = math.exp(epsilon)
    # Variables P, Q, R: events' probabilities with i, without i, and for the common neighbour.
    pairs = [(0, 2), (1, 2)] if replaced else [(0, 1)]
    rows, limits = [], []
    for a, b in (pair for one in pairs for pair in (one, one[::-1])):
        row = np.zeros(3)
        row[a], row[b] = 1, -e
        rows.append(row)  # p_a - e p_b <= delta
        limits.append(delta)
        rows.append(-row)  # (1 - p_a) - e (1 - p_b) <= delta
        limits.append(delta - 1 + e)
    found = optimize.linprog([-1, 1, 0], rows, limits, bounds=[(0, 1)] * 3)
    return -found.fun


@pytest.mark.parametrize(("epsilon", "delta"), GRID)
def test_the_sharp_bound_is_attained(epsilon, delta):
    assert sharp_bound(epsilon, delta) == pytest.approx(largest_difference(epsilon, delta))
    assert sharp_bound(epsilon, delta) <= honest_bound(epsilon, delta)


@pytest.mark.parametrize(("epsilon", "delta"), GRID)
def test_the_fixed_size_bound_is_attained(epsilon, delta):
    """By neighbours of a common subset; deltas in the corner where the formula is exact."""
    exact = largest_difference(epsilon, delta, replaced=True)
    assert fixed_size_bound(epsilon, delta) >= exact - 1e-12
    assert fixed_size_bound(epsilon, delta) == pytest.approx(exact, rel=0.02)
    assert fixed_size_bound(epsilon, delta) > sharp_bound(epsilon, delta)


def test_published_values_of_the_bounds():
    # Ravikumar et al. 2024, Theorem 5.4, and the linear program's optimum at eps 1, delta .01.
    assert paper_bound(1.0) == pytest.approx(0.632, abs=5e-4)
    assert sharp_bound(1.0, 0.01) == pytest.approx(0.467496, abs=1e-6)
    assert honest_bound(1.0, 0.01) == pytest.approx(0.6358, abs=5e-5)
    assert paper_bound(math.inf) == sharp_bound(math.inf, 1e-5) == 1


def mechanism(epsilon=1.0, tv=0.1):
    return Mechanism(
        epsilon=epsilon,
        delta=1e-5,
        sample_rate=0.1,
        expected_batch=10,
        steps=10,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        accountant="prv",
        spent_epsilon=epsilon,
        total_variation=tv,
    )


def test_which_bound_holds_for_which_subsets():
    for kind in ("balanced", "candidate-pool"):
        holds = {b.name: b.holds for b in bounds_on_memorization(mechanism(), kind)}
        assert holds == {
            "paper": False, "honest": True, "sharp": True, "fixed-size": True,
            "total-variation": True,
        }  # fmt: skip
        assert tightest(bounds_on_memorization(mechanism(), kind)).name == "total-variation"
    fixed = {b.name: b for b in bounds_on_memorization(mechanism(), "fixed-size")}
    assert not fixed["sharp"].holds
    assert not fixed["honest"].holds
    assert fixed["total-variation"].value == pytest.approx(0.2)
    assert bounds_on_memorization(mechanism(math.inf), "balanced") == []


def test_bounds_that_say_nothing_are_marked():
    bounds = {b.name: b.vacuous for b in bounds_on_memorization(mechanism(8.0, 0.43), "balanced")}
    assert bounds == {
        "paper": True, "honest": True, "sharp": True, "fixed-size": True, "total-variation": False,
    }  # fmt: skip
    without = bounds_on_memorization(mechanism(1.0, None), "balanced")
    assert tightest(without).name == "sharp"


# Limits.


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.9, 0.2), (0.99, 0.01), (1.0, 0.0)])
def test_lower_limits_of_differences_fail_as_rarely_as_they_say(p, q):
    """Exactly, over all outcomes of 12 and 8 trials."""
    n, m, alpha = 12, 8, 0.05
    k = np.arange(n + 1)[:, None] * np.ones(m + 1)
    j = np.arange(m + 1)[None] * np.ones((n + 1, 1))
    limits = lower_limit_of_difference(k, np.full(k.shape, n), j, np.full(k.shape, m), alpha)
    weight = stats.binom.pmf(k, n, p) * stats.binom.pmf(j, m, q)
    assert weight[limits > p - q].sum() <= alpha


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_certified_epsilons_fail_as_rarely_as_they_say(epsilon):
    """Exactly, for randomized response, the hardest mechanism there is."""
    n, alpha = 30, 0.05
    p = 1 / (1 + math.exp(-epsilon))
    k = np.arange(n + 1)[:, None] * np.ones(n + 1)
    j = np.arange(n + 1)[None] * np.ones((n + 1, 1))
    ones = np.full(k.shape, n)
    found = certified_epsilon(k, ones, j, ones, delta=0.0, alpha=alpha)
    weight = stats.binom.pmf(k, n, p) * stats.binom.pmf(j, n, 1 - p)
    assert weight[found > epsilon + 1e-12].sum() <= alpha


def test_arms_without_trials_certify_nothing():
    found = certified_epsilon(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1), delta=0, alpha=0.05)
    assert np.isnan(found).all()


def test_what_perfect_attacks_could_certify():
    """Published for two-sided 95% Clopper-Pearson limits: 3.3 at 100 trials an arm, 5.6 at 1000."""
    for n, expected in ((100, 3.3), (1000, 5.6)):
        low, _ = clopper_pearson(np.array([n]), np.array([n]), 0.05)
        _, high = clopper_pearson(np.array([0]), np.array([n]), 0.05)
        assert math.log(low[0] / high[0]) == pytest.approx(expected, abs=0.05)
        # Ours takes the larger of two directions, at half the level each.
        all_of = np.array([float(n)])
        ours = certified_epsilon(all_of, all_of, 0 * all_of, all_of, delta=0.0, alpha=0.05)
        assert 0 < expected - ours[0] < 0.3


# One run with canaries (Steinke et al. 2023).


def exact_p_value(m, r, v, epsilon):
    """Of randomized response on r of m canaries, by enumeration."""
    q = 1 / (1 + math.exp(-epsilon))
    return sum(
        math.prod(q if right else 1 - q for right in outcome)
        for outcome in itertools.product((0, 1), repeat=r)
        if sum(outcome) >= v
    )


def test_p_values_of_one_run():
    for v in range(7):
        got = one_run_p_value(v, 6, 10, epsilon=1.0, delta=0.0)
        assert got == pytest.approx(exact_p_value(10, 6, v, 1.0))
        assert one_run_p_value(v, 6, 10, epsilon=1.0, delta=1e-3) >= got


@pytest.mark.parametrize(("m", "expected"), [(200, 4.2), (1000, 5.8), (5000, 7.4)])
def test_what_one_perfect_run_certifies(m, expected):
    assert one_run_epsilon(m, m, m, delta=0.0) == pytest.approx(expected, abs=0.06)


def test_one_run_bounds_fail_as_rarely_as_they_say():
    """Randomized response of epsilon 1: the bound is above 1 in at most 5% of runs, exactly."""
    m, epsilon = 60, 1.0
    q = 1 / (1 + math.exp(-epsilon))
    above = [v for v in range(m + 1) if one_run_epsilon(v, m, m, delta=0.0) > epsilon]
    assert 0.01 < stats.binom.pmf(above, m, q).sum() <= 0.05
    assert one_run_epsilon(30, m, m, delta=0.0) == 0
    assert one_run_epsilon(0, 0, m, delta=0.0) == 0


# Teeth: a claim of epsilon 4 by mechanisms that are broken (scalar DP-SGD, 20,000 runs an arm).

T, Q, SIGMA, DELTA, RUNS = 60, 0.1, 1.2, 1e-5, 20_000


def runs(rng, *, inside, sigma=SIGMA, clip=1.0, copies=1, steps=T):
    """Of `RUNS` models, one example of gradient 3 among none: what an adversary who sees every
    noisy gradient makes of them, the log likelihood ratio under the mechanism that is claimed."""
    drawn = rng.random((RUNS, steps)) < Q
    gradient = copies * min(3.0, clip)
    seen = inside * drawn * gradient + rng.normal(0, sigma, (RUNS, steps))
    return np.log1p(Q * np.expm1((2 * seen - 1) / (2 * SIGMA**2))).sum(1)


def audited(**broken):
    """Lower bound on epsilon, the threshold chosen on other runs than it is judged on."""
    rng = np.random.default_rng(0)
    found = []
    tuning = [runs(rng, inside=inside, **broken) for inside in (True, False)]
    thresholds = np.quantile(tuning[1], [0.5, 0.9, 0.99, 0.999, 0.9999])

    def epsilon(arms, t, alpha):
        k = [np.array([(arm > t).sum()]) for arm in arms]
        n = np.array([RUNS])
        return float(certified_epsilon(k[0], n, k[1], n, delta=DELTA, alpha=alpha)[0])

    best = max(thresholds, key=lambda t: epsilon(tuning, t, 0.05))
    found = [runs(rng, inside=inside, **broken) for inside in (True, False)]
    return epsilon(found, best, 0.05)


def test_the_claim_is_what_the_accountant_says():
    assert spent_epsilon(SIGMA, Q, T, DELTA, "prv") == pytest.approx(4.0, abs=0.35)


def test_a_sound_mechanism_is_not_refuted():
    assert 1 < audited() < 4.0


@pytest.mark.parametrize(
    "broken",
    [{"sigma": SIGMA / 2}, {"clip": math.inf}, {"copies": 2}],
    ids=["noise too small", "no clipping", "an example counted twice"],
)
def test_broken_mechanisms_are_caught(broken):
    assert audited(**broken) > 4.0


def test_extra_steps_are_not_caught():
    """What an audit cannot see: these are counted where they are taken (see test_privacy)."""
    assert audited(steps=2 * T) < 4.0


def test_what_privacy_changes_for_the_memorized_examples(tmp_path):
    """Five examples that only models which saw them get right; with privacy it is a coin's fall."""
    rng = np.random.default_rng(3)
    masks = rng.random((40, 30)) < 0.5
    right = np.ones_like(masks)
    right[:, :5] = masks[:, :5]
    np.savez(tmp_path / "fleet.npz", masks=masks, correct_train=right)
    store = import_npz(tmp_path / "fleet.npz", tmp_path / "store")
    assert memorized_by_epsilon(score_all(store), store) == []
    coins = rng.random((40, 30)) < 0.5
    for key in sorted(store.done()):
        table = store.trial(key)
        for name, values in (
            ("epsilon", np.full(30, 2.0)), ("correct", coins[key.trial]),
        ):  # fmt: skip
            place = table.column_names.index(name)
            field = table.schema.field(name)
            table = table.set_column(place, field, pa.array(values, field.type))
        store.commit(TrialKey(2.0, key.trial), table, store.provenance(key))
    store.target = Target(trials=40, epsilons=(2.0, math.inf))
    private, free = memorized_by_epsilon(score_all(store), store)
    assert (private.epsilon, free.epsilon) == (2.0, math.inf)
    assert (free.memorized.value, free.others.value) == (1, 0)
    assert (free.memorized.examples, free.others.examples) == (5, 25)
    dense = [coins[masks[:, i], i].mean() - coins[~masks[:, i], i].mean() for i in range(30)]
    assert private.memorized.value == pytest.approx(np.mean(dense[:5]))
    assert private.others.value == pytest.approx(np.mean(dense[5:]))
    assert private.memorized.low < 0 < private.memorized.high


def score_all(store):
    score(store)
    return store
