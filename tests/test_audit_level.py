"""How often the audit of link 3 refutes mechanisms that are as private as they claim, and others.

Shapes: T trials, N training examples, all of them candidates.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.audits import N, T, gaussian_mechanism, simulated
from raymem import Plan
from raymem.links import audit as audits
from raymem.links.audit import ALPHA, TESTS, Evidence, Outcome, audit_epsilon, verdict
from raymem.links.membership_guesses import Candidates, References, audit_candidates, audit_pairs
from raymem.privacy import Mechanism
from raymem.store import TrialKey

LEVEL = ALPHA / TESTS


def pure(epsilon):
    return Mechanism(
        epsilon=epsilon, delta=0.0, sample_rate=0.1, expected_batch=4, steps=10,
        noise_multiplier=1.0, max_grad_norm=1.0, accountant="prv", spent_epsilon=epsilon,
        total_variation=None,
    )  # fmt: skip


def response(seed, claimed, true=None, level=LEVEL):
    """Randomized response to each example's membership: exactly (true, 0)-DP, and memorization is
    exactly its bound tanh(eps / 2). No mechanism is nearer to being refuted by its mean."""
    rng = np.random.default_rng(seed)
    plan = Plan(n=N, subset_ratio=0.5, seed=seed)
    inside = plan.masks(range(T))
    honest = 1 / (1 + math.exp(-(true or claimed)))
    correct = inside == (rng.random((T, N)) < honest)
    found = Evidence(
        epsilon=claimed,
        keys=[TrialKey(claimed, t) for t in range(T)],
        n_in=inside.sum(0).astype(float),
        n_out=(~inside).sum(0).astype(float),
        k_in=(correct & inside).sum(0).astype(float),
        k_out=(correct & ~inside).sum(0).astype(float),
        pool=np.arange(N),
        what="all training examples",
        named=True,
        read=lambda key: Outcome(inside[key.trial], correct[key.trial], 1.0 * correct[key.trial]),
        mechanism=pure(claimed),
    )
    return audit_epsilon(found, plan, level=level)


@pytest.mark.slow
def test_correct_mechanisms_are_refuted_at_most_at_alpha():
    """1,000 audits of Gaussian mechanisms, which are told apart as well as their claim allows, and
    1,000 of randomized response."""
    refuted = 0
    for seed in range(1000):
        epsilon = (1.0, 4.0, 8.0)[seed % 3]
        refuted += simulated(gaussian_mechanism(epsilon), 1.0, seed).refuted
    assert refuted <= stats.binom.ppf(0.999, 1000, ALPHA)
    for alpha in (ALPHA, 0.05):
        found = [response(s, (0.5, 2.0)[s % 2], level=alpha / TESTS).refuted for s in range(500)]
        assert sum(found) <= stats.binom.ppf(0.999, 500, alpha)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_too_little_noise_is_refuted_and_enough_is_not(epsilon):
    """At a level of 0.001: by chance none of the correct ones is refuted."""
    mechanism = gaussian_mechanism(epsilon)
    for seed in range(2):
        assert not simulated(mechanism, 1.0, seed).refuted
        half, quarter = (simulated(mechanism, noise, seed) for noise in (0.5, 0.25))
        assert half.refuted
        assert half.pairs.low > half.pairs.allowed
        assert "one of two trials" in quarter.reasons


def test_a_false_claim_is_refuted_and_a_true_one_is_not():
    false = response(0, claimed=0.5, true=3.0)
    assert false.refuted
    assert false.pairs.p_value < 1e-6
    assert 0.5 < false.pairs.epsilon < 3.0
    assert false.candidates.certified < false.candidates.certifiable < 3.0
    said = verdict([false])
    assert "REFUTED at epsilon 0.5 (" in said.text
    assert "at family-wise level 0.001" in said.text
    assert said.low < said.estimate < said.high
    true = response(0, claimed=3.0)
    assert not true.refuted
    said = verdict([true])
    assert "is not refuted at any of 1 epsilons" in said.text
    assert f"the tightest bound {math.tanh(1.5):.3f}" in said.text
    assert "a better attack may see more" in said.not_shown
    assert "even guesses without error" not in said.not_shown
    assert true.as_dict()["level_of_each_test"] == LEVEL


def test_a_verdict_says_what_could_not_have_been_refuted():
    audit = response(0, claimed=60.0, true=1.0)
    assert not audit.could_refute
    assert audit.pairs.refuted_from > 1
    said = verdict([audit])
    assert "at epsilon 60 even guesses without error could not" in said.not_shown
    assert "no accuracy would refute it" in said.text


def candidates(scores, inside, blocks):
    return Candidates(what="candidates", blocks=blocks, inside=inside, scores=scores)


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_every_trial_of_every_block_is_used(ratio):
    """Guesses without error, at any subset ratio."""
    plan = Plan(n=200, subset_ratio=ratio)
    inside, blocks = plan.masks(range(60)), np.arange(60) // 20
    perfect = candidates(inside.astype(float), inside, blocks)
    pairs = audit_pairs(perfect, None, level=LEVEL)
    told_apart = 2 * ratio * (1 - ratio) * 20 / 19
    assert pairs.runs == 30
    assert 0.75 * 200 * told_apart < pairs.guesses <= 200 * told_apart
    assert pairs.accuracy == 1.0
    singly = audit_candidates(perfect, plan, None, level=LEVEL)
    assert singly.right == singly.guesses == round(60 * ratio)
    assert singly.certified == singly.certifiable > 0
    assert singly.p_value is None


def test_scores_are_weighted_by_what_earlier_pairs_showed(monkeypatch):
    """Half of the candidates leak, and half are noise a hundred times as loud: with references the
    clear ones are guessed first. Nothing of a pair's own membership is used to weight it."""
    rng = np.random.default_rng(0)
    plan = Plan(n=200, subset_ratio=0.5)
    inside, leaks = plan.masks(range(60)), np.arange(200) < 100
    scores = np.where(leaks, inside + 0.5 * rng.normal(size=(60, 200)), 50 * rng.normal(size=200))
    scores = scores + np.where(leaks, 0, 50 * rng.normal(size=(60, 200)))
    found = audit_pairs(candidates(scores, inside, np.arange(60) // 20), pure(0.5), level=LEVEL)
    # All guesses: half at random. A third, the clearest: nearly all right.
    assert found.accuracy < 0.8
    assert found.p_value < 1e-6
    monkeypatch.setattr(References, "weights", lambda self: np.ones(200))
    loud = audit_pairs(candidates(scores, inside, np.arange(60) // 20), pure(1.0), level=LEVEL)
    monkeypatch.undo()
    clear = audit_pairs(candidates(scores, inside, np.arange(60) // 20), pure(1.0), level=LEVEL)
    assert clear.p_value < LEVEL < loud.p_value
    random = rng.normal(size=(60, 200))
    null = audit_pairs(candidates(random, inside, np.arange(60) // 20), pure(0.1), level=LEVEL)
    assert null.p_value > 0.05
    assert null.low < 0.5 < null.high


def test_without_names_candidates_are_chosen_by_the_first_block_alone():
    """Noise: chosen for their gap in the first block, candidates have none in the others."""
    rng = np.random.default_rng(1)
    plan = Plan(n=1000, subset_ratio=0.5)
    inside, margins = plan.masks(range(60)), rng.normal(size=(60, 1000))
    found = Evidence(
        epsilon=1.0, keys=[TrialKey(1.0, t) for t in range(60)], n_in=inside.sum(0),
        n_out=(~inside).sum(0), k_in=inside.sum(0), k_out=(~inside).sum(0), pool=np.arange(1000),
        what="all training examples", named=False, mechanism=pure(1.0),
        read=lambda key: Outcome(inside[key.trial], inside[key.trial], margins[key.trial]),
    )  # fmt: skip
    chosen = audits._candidates(found, plan)
    assert chosen.inside.shape == (40, audits.CHOSEN)
    assert set(chosen.blocks.tolist()) == {1, 2}
    pairs = audit_pairs(chosen, None, level=LEVEL)
    assert pairs.low < 0.5 < pairs.high


def test_fixed_sizes_are_audited_one_by_one_with_the_curve_of_a_replacement():
    plan = Plan(n=N, subset_ratio=0.5, kind="fixed-size", seed=3)
    audit = simulated(gaussian_mechanism(1.0), 0.05, 0, plan)
    assert audit.pairs is None
    assert "of a fixed size" in audit.why_no_pairs
    assert "a candidate's membership" in audit.reasons
    balanced = simulated(gaussian_mechanism(1.0), 0.05, 0)
    assert balanced.candidates.least_p_value < audit.candidates.least_p_value
