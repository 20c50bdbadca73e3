"""How often the audit of link 3 refutes a mechanism that is exactly as private as it claims.

Shapes: T trials, N training examples, all of them canaries.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raymem import Plan
from raymem.links.audit import ALPHA, TESTS, Evidence, audit_epsilon, verdict
from raymem.privacy import Mechanism
from raymem.store import TrialKey

T, N = 40, 40


def mechanism(epsilon):
    return Mechanism(
        epsilon=epsilon, delta=0.0, sample_rate=0.1, expected_batch=4, steps=10,
        noise_multiplier=1.0, max_grad_norm=1.0, accountant="prv", spent_epsilon=epsilon,
        total_variation=None,
    )  # fmt: skip


def evidence(seed, claimed, true=None):
    """Randomized response to each example's membership: exactly (true, 0)-DP, and memorization is
    exactly its bound tanh(eps / 2). No mechanism is nearer to being refuted."""
    rng = np.random.default_rng(seed)
    plan = Plan(n=N, subset_ratio=0.5, seed=seed)
    inside = np.array([plan.mask(t) for t in range(T)])
    honest = 1 / (1 + math.exp(-(true or claimed)))
    correct = inside == (rng.random((T, N)) < honest)
    columns = {"correct": correct.astype(float), "margin": np.where(correct, 1.0, -1.0)}

    def read(key, rows, column):
        return inside[key.trial][rows], columns[column][key.trial][rows]

    found = Evidence(
        epsilon=claimed,
        keys=[TrialKey(claimed, t) for t in range(T)],
        n_in=inside.sum(0).astype(float),
        n_out=(~inside).sum(0).astype(float),
        k_in=(correct & inside).sum(0).astype(float),
        k_out=(correct & ~inside).sum(0).astype(float),
        pool=np.arange(N),
        what="all training examples",
        read=read,
        mechanism=mechanism(claimed),
    )
    return found, plan


@pytest.mark.slow
def test_a_correct_mechanism_is_refuted_at_most_at_alpha():
    """1,000 audits, half at epsilon 0.5 and half at 2. By the rule before (a one-run bound at 95%
    beside limits at 0.001) some 2 to 3% were refuted."""
    refuted = {0.05: 0, ALPHA: 0}
    before = 0
    for seed in range(1000):
        claimed = 0.5 if seed % 2 else 2.0
        found, plan = evidence(seed, claimed)
        for alpha in refuted:
            audited = audit_epsilon(found, plan, level=alpha / TESTS)
            refuted[alpha] += audited.refuted
        before += audited.one_run > claimed
    for alpha, count in refuted.items():
        assert count <= stats.binom.ppf(0.999, 1000, alpha), (alpha, count)
    assert before > refuted[ALPHA] + 5


def test_a_false_claim_is_refuted_and_a_true_one_is_not():
    found, plan = evidence(0, claimed=0.5, true=3.0)
    false = audit_epsilon(found, plan, level=ALPHA / TESTS)
    assert false.refuted
    assert false.one_run_p < 1e-6
    said = verdict([false])
    assert "REFUTED at epsilon 0.5 (at family-wise level 0.001)" in said.text
    assert said.low < said.estimate < said.high
    found, plan = evidence(0, claimed=3.0)
    true = audit_epsilon(found, plan, level=ALPHA / TESTS)
    assert not true.refuted
    said = verdict([true])
    assert "could have refuted at most epsilon" in said.not_shown
    assert f"the tightest bound {math.tanh(1.5):.3f}" in said.text
    assert true.as_dict()["level_of_each_test"] == ALPHA / TESTS


def test_replacing_an_example_costs_two_steps_and_their_delta():
    from raymem.links.audit import _neighbours

    fixed = Plan(n=N, subset_ratio=0.5, kind="fixed-size")
    claim = Mechanism(**{**vars(mechanism(1.0)), "delta": 1e-5})
    assert _neighbours(fixed, claim) == (2, pytest.approx(1e-5 * (1 + math.e)))
    assert _neighbours(Plan(n=N, subset_ratio=0.5), claim) == (1, 1e-5)
    far = Mechanism(**{**vars(claim), "spent_epsilon": 5000.0})
    assert _neighbours(fixed, far) == (2, 1.0)
