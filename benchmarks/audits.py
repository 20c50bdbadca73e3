"""How often link 3's audit refutes mechanisms with the noise they claim, and with less.

Simulated Gaussian mechanisms: of each candidate every trial releases whether it trained on it, plus
noise, which is exactly what is claimed, and nothing can be told better than from that. Other
candidates are as hard as they are, and never the same. Prints the table of docs/privacy.md.

    python -m benchmarks.audits --correct 1000 --broken 200
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import numpy as np
from scipy import optimize, stats

from raymem import Plan
from raymem.links.audit import ALPHA, TESTS, Audit, Evidence, Outcome, audit_epsilon
from raymem.privacy import Mechanism, gaussian_delta
from raymem.store import TrialKey

T, N, DELTA = 60, 200, 1e-5
EPSILONS, NOISES = (1.0, 4.0, 8.0), (1.0, 0.5, 0.25)
REASONS = {
    "membership in one of two trials": "pairs",
    "a candidate's membership": "candidates",
    "mean memorization": "mean",
    "memorization of single": "single examples",
}


def gaussian_mechanism(epsilon: float, delta: float = DELTA) -> Mechanism:
    """One release with the noise that (epsilon, delta) takes, and its exact profile."""
    mu = optimize.brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-3, 100)
    grid = epsilon * np.linspace(0, 1, 16) ** 1.5
    return Mechanism(
        epsilon=epsilon,
        delta=delta,
        sample_rate=1.0,
        expected_batch=1,
        steps=1,
        noise_multiplier=1 / mu,
        max_grad_norm=1.0,
        accountant="prv",
        spent_epsilon=epsilon,
        total_variation=gaussian_delta(mu, 0.0),
        profile=tuple((float(e), gaussian_delta(mu, float(e))) for e in grid),
    )


def simulated(mechanism: Mechanism, noise: float, seed: int, plan: Plan | None = None) -> Audit:
    """The audit of trials with `noise` times the noise that is claimed, all N examples named."""
    plan = plan or Plan(n=N, subset_ratio=0.5, seed=seed)
    rng = np.random.default_rng(seed)
    inside = plan.masks(range(T))
    released = inside + noise * mechanism.noise_multiplier * rng.normal(size=(T, N))
    correct, margins = released > 0.5, released + rng.normal(0, 2 * noise, N)
    n_in = inside.sum(0).astype(float)
    found = Evidence(
        epsilon=mechanism.epsilon,
        keys=[TrialKey(mechanism.epsilon, t) for t in range(T)],
        n_in=n_in,
        n_out=T - n_in,
        k_in=(correct & inside).sum(0).astype(float),
        k_out=(correct & ~inside).sum(0).astype(float),
        pool=np.arange(N),
        what="candidates",
        named=True,
        read=lambda key: Outcome(inside[key.trial], correct[key.trial], margins[key.trial]),
        mechanism=mechanism,
    )
    return audit_epsilon(found, plan, level=ALPHA / TESTS)


def row(epsilon: float, noise: float, runs: int) -> str:
    """One line of the table: of `runs` audits, how many refuted the claim, and by which test."""
    mechanism, seen, told = gaussian_mechanism(epsilon), Counter[str](), []
    for seed in range(runs):
        audit = simulated(mechanism, noise, seed)
        seen["any"] += audit.refuted
        seen.update(name for start, name in REASONS.items() if start in audit.reasons)
        assert audit.pairs is not None
        told.append(audit.pairs.accuracy)
    best = stats.norm.cdf(1 / (noise * mechanism.noise_multiplier * math.sqrt(2)))
    counts = " | ".join(f"{seen[name]:,}" for name in ("any", *REASONS.values()))
    assert audit.pairs is not None
    return (
        f"| {epsilon:g} | {noise:g} | {runs:,} | {counts} | {np.mean(told):.1%} of at best "
        f"{best:.1%} | {audit.pairs.allowed:.1%} | {audit.pairs.refuted_from:.1%} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--correct", type=int, default=1000, help="Audits with the noise claimed.")
    parser.add_argument("--broken", type=int, default=200, help="Audits with less.")
    asked = parser.parse_args()
    names = " | ".join(("any", *REASONS.values()))
    print(
        f"| epsilon | noise / claimed | audits | refuted: {names} | told apart | claim allows | "
        "refuted from |\n" + "|---" * 11 + "|"
    )
    for epsilon in EPSILONS:
        for noise in NOISES:
            runs = asked.correct if noise == 1 else asked.broken
            print(row(epsilon, noise, runs), flush=True)


if __name__ == "__main__":
    main()
