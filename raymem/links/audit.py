"""Link 3: memorization against epsilon (Ravikumar et al. 2024, Theorem 5.4), and its audit.

In:  scores and trial files of a private study.
Out: for each epsilon the bounds on memorization that its mechanism implies, how many examples
     exceed each beyond chance, the pool's mean memorization, and the epsilon that the data certify.

Shapes: N training examples, P of them in the pool, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from raymem.links.epsilons import plain
from raymem.links.rows import Floats, floats, train_at
from raymem.links.verdicts import Verdict
from raymem.plan import Plan
from raymem.privacy import (
    Bound,
    Mechanism,
    best_guesses,
    bounds_on_memorization,
    certified_epsilon,
    largest_certifiable,
    lower_limit_of_difference,
    one_run_epsilon,
    tightest,
)
from raymem.store import Store, TrialKey

# Family-wise over all examples and epsilons: of a thousand studies that are as private as they
# claim, one is expected to show any violation.
ALPHA = 1e-3
CONFIDENCE = 0.95
# Shares of the canaries that are guessed about; the best of them is reported, at a level for all.
GUESSED = (0.1, 1 / 3, 1.0)


@dataclass(frozen=True, kw_only=True)
class BoundCheck:
    """A bound, and what the data say to it."""

    bound: Bound
    violations: int
    """Examples whose lower limit of memorization, family-wise at ALPHA, is above it."""
    mean_above: bool
    """Is the lower limit of the pool's mean, at ALPHA, above it?"""


@dataclass(frozen=True, kw_only=True)
class PoolMean:
    """Mean memorization of the pool, with a 95% interval over runs."""

    value: float
    low: float
    high: float
    stderr: float
    examples: int
    what: str
    """Which examples: the candidates, those with planted labels, or all."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the trials at one epsilon say of memorization, and of the privacy that was claimed."""

    epsilon: float
    trials: int
    pool: PoolMean | None
    """None without trials in and out."""
    mechanism: Mechanism | None
    """None: not private, or unknown."""
    bounds: list[BoundCheck]
    largest_limit: float
    """The highest lower limit of any example's memorization."""
    certified: float
    """Lower bound on epsilon from the example that says most, family-wise at ALPHA."""
    certifiable: float
    """What it would be if every trial had told in from out: claims above cannot be refuted."""
    one_run: float | None
    """Lower bound on epsilon, 95%, from guesses which canaries were in; None: not possible here."""
    one_run_about: str
    """How it came about, or why there is none."""

    @property
    def refuted(self) -> bool:
        """Do the data contradict the epsilon that was claimed?"""
        if self.mechanism is None or math.isinf(self.epsilon):
            return False
        exceeded = any(c.bound.holds and (c.violations or c.mean_above) for c in self.bounds)
        spent = self.mechanism.spent_epsilon
        return exceeded or self.certified > spent or (self.one_run or 0.0) > spent

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon,
            "trials": self.trials,
            "pool_mean_memorization": None if self.pool is None else plain(vars(self.pool)),
            "mechanism": None if self.mechanism is None else self.mechanism.as_dict(),
            "bounds": [
                {
                    **vars(check.bound),
                    "vacuous": check.bound.vacuous,
                    "violations": check.violations,
                    "pool_mean_above": check.mean_above,
                }
                for check in self.bounds
            ],
            **plain(
                {
                    "largest_lower_limit": self.largest_limit,
                    "certified_epsilon": self.certified,
                    "largest_certifiable_epsilon": self.certifiable,
                    "one_run_epsilon": self.one_run,
                }
            ),
            "one_run_about": self.one_run_about,
            "refuted": self.refuted,
        }


def link3(store: Store) -> list[Audit]:
    """Link 3 of a scored study, an entry for each epsilon, rising.

    A clean result proves nothing: it says that these trials could not refute the claim, and
    `certifiable` how much they could have. What audits cannot see at all: steps that were taken and
    not counted, batches that were shuffled and not sampled; the trials' own counts are checked
    against the plan when they are trained.

    Raises StoreError without scores.
    """
    scores, plan = store.scores(), store.plan()
    epsilons = sorted(set(scores["epsilon"].to_pylist()))
    pool, what = _pool(store, plan)
    found = []
    for epsilon in epsilons:
        keys = store.scored(epsilon)
        found.append(_at(store, plan, train_at(scores, epsilon), keys, pool, what, len(epsilons)))
    return found


def _pool(store: Store, plan: Plan) -> tuple[NDArray[np.int64], str]:
    """The rows whose mean is told, chosen without looking at what was trained."""
    if plan.pool is not None:
        return np.array(plan.pool), "the candidates"
    planted = store.study()["study"]["data"].get("planted")
    if planted:
        return np.array(planted), "training examples with flipped labels"
    return np.arange(plan.n), "all training examples"


def _at(
    store: Store,
    plan: Plan,
    table: pa.Table,
    keys: Sequence[TrialKey],
    pool: NDArray[np.int64],
    what: str,
    n_epsilons: int,
) -> Audit:
    epsilon = keys[0].epsilon if keys else float(table["epsilon"][0].as_py())
    about = store.provenance(keys[0]).get("privacy") if keys else None
    mechanism = None if about is None else Mechanism.from_dict(about)
    n_in, n_out = (floats(table, f"n_{arm}") for arm in ("in", "out"))
    k_in, k_out = (
        np.rint(np.nan_to_num(floats(table, f"accuracy_{arm}")) * n)
        for arm, n in (("in", n_in), ("out", n_out))
    )
    drawn = (n_in > 0) & (n_out > 0)
    level = ALPHA / max(1, int(drawn.sum()) * n_epsilons)
    limits = lower_limit_of_difference(k_in, n_in, k_out, n_out, level)
    delta = 0.0 if mechanism is None else mechanism.delta
    private = mechanism is not None and math.isfinite(epsilon)
    # Where another example takes the place, two steps of adding or removing are between them.
    steps_apart = 2 if plan.kind == "fixed-size" else 1
    certified = certified_epsilon(k_in, n_in, k_out, n_out, delta=delta, alpha=level) / steps_apart
    mean = _pool_mean(store, keys, pool[drawn[pool]], what, n_in, n_out, k_in, k_out)
    checks = []
    for bound in bounds_on_memorization(mechanism, plan.kind) if mechanism is not None else []:
        over = mean is not None and _one_sided(mean, len(keys), ALPHA / n_epsilons) > bound.value
        count = int((limits > bound.value).sum())
        checks.append(BoundCheck(bound=bound, violations=count, mean_above=bool(over)))
    one_run, one_run_about = _one_run(store, plan, keys, pool, delta)
    typical = np.flatnonzero(drawn)
    most = max(
        (
            largest_certifiable(int(n_in[i]), int(n_out[i]), delta=delta, alpha=level)
            for i in typical[:1]
        ),
        default=0.0,
    )
    return Audit(
        epsilon=epsilon,
        trials=len(keys),
        pool=mean,
        mechanism=mechanism if private else None,
        bounds=checks,
        largest_limit=_largest(limits),
        certified=_largest(certified),
        certifiable=most / steps_apart,
        one_run=one_run,
        one_run_about=one_run_about,
    )


def _largest(values: Floats) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _pool_mean(
    store: Store,
    keys: Sequence[TrialKey],
    pool: NDArray[np.int64],
    what: str,
    n_in: Floats,
    n_out: Floats,
    k_in: Floats,
    k_out: Floats,
) -> PoolMean | None:
    """Mean memorization over the pool. Examples of one run are not independent: its standard error
    is that of a sum over runs, of each run's share of the mean (linearized, clusters are runs)."""
    if len(keys) < 2 or len(pool) == 0:
        return None
    p, q = k_in[pool] / n_in[pool], k_out[pool] / n_out[pool]
    shares = []
    for key in keys:
        inside, right = _of_pool(store, key, pool, "correct")
        residual = np.where(inside, (right - p) / n_in[pool], -(right - q) / n_out[pool])
        shares.append(residual.mean())
    T = len(keys)
    value = float((p - q).mean())
    stderr = math.sqrt(T / (T - 1) * float(np.square(shares).sum()))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, T - 1)) * stderr
    return PoolMean(
        value=value,
        low=max(-1.0, value - half),
        high=min(1.0, value + half),
        stderr=stderr,
        examples=len(pool),
        what=what,
    )


def _one_sided(mean: PoolMean, trials: int, alpha: float) -> float:
    """Lower limit of the pool's mean that fails with probability alpha."""
    return mean.value - float(stats.t.ppf(1 - alpha, trials - 1)) * mean.stderr


def _of_pool(
    store: Store, key: TrialKey, pool: NDArray[np.int64], column: str
) -> tuple[NDArray[np.bool_], Floats]:
    """Of the pool in one trial: was it in the subset, and a column. Each [P]."""
    table = store.train_rows(key, ["in_subset", column]).take(pa.array(pool))
    inside = table["in_subset"].to_numpy().astype(bool)
    return inside, table[column].cast(pa.float64()).to_numpy()


def _one_run(
    store: Store, plan: Plan, keys: Sequence[TrialKey], pool: NDArray[np.int64], delta: float
) -> tuple[float | None, str]:
    """Steinke et al. 2023 on the first trial of each block, which are independent runs.

    A canary's score is its margin above its mean margin in the out-trials of other blocks: those
    say what its margin is without it, and nothing of which it was in here.
    """
    if plan.kind not in ("balanced", "candidate-pool") or abs(plan.subset_ratio - 0.5) > 1e-9:
        return None, "needs each canary in with probability 1/2: balanced subsets of ratio 0.5"
    runs = [key for key in keys if key.trial % plan.block == 0]
    if not runs:
        return None, "needs the first trial of a block"
    n_blocks = len({key.trial // plan.block for key in keys})
    sums = np.zeros((2, n_blocks, len(pool)))
    block_of = {b: i for i, b in enumerate(sorted({key.trial // plan.block for key in keys}))}
    first: dict[int, tuple[NDArray[np.bool_], Floats]] = {}
    for key in keys:
        inside, margin = _of_pool(store, key, pool, "margin")
        block = block_of[key.trial // plan.block]
        sums[0, block] += np.where(inside, 0, margin)
        sums[1, block] += ~inside
        if key in runs:
            first[block] = inside, margin
    total = sums.sum(1)
    right = dict.fromkeys(GUESSED, 0)
    guesses = {share: max(2, round(share * len(pool))) for share in GUESSED}
    for block, (inside, margin) in first.items():
        others = total - sums[:, block]
        with np.errstate(invalid="ignore", divide="ignore"):
            usual = np.where(others[1] > 0, others[0] / others[1], 0.0)
        for share in GUESSED:
            right[share] += best_guesses(margin - usual, inside, guesses[share])
    R, alpha = len(first), (1 - CONFIDENCE) / len(GUESSED)
    found = {
        share: one_run_epsilon(
            right[share], R * guesses[share], R * len(pool), delta=delta, alpha=alpha
        )
        for share in GUESSED
    }
    best = max(GUESSED, key=lambda share: found[share])
    return found[best], (
        f"{right[best]:,} of {R * guesses[best]:,} guesses right, in {R} runs of {len(pool):,} "
        "canaries"
    )


def verdict(audits: Sequence[Audit]) -> Verdict:
    """Link 3 in one sentence, with its numbers."""
    private = [a for a in audits if a.mechanism is not None]
    if not private:
        return Verdict(text="link 3: no trial is private; train with --epsilons")
    refuted = [a for a in private if a.refuted]
    if refuted:
        return Verdict(
            text="link 3: the claimed privacy is REFUTED at epsilon "
            + ", ".join(f"{a.epsilon:g}" for a in refuted)
            + ": the mechanism is not what it claims, or trials are not independent"
        )
    useful = [a for a in private if (b := tightest([c.bound for c in a.bounds])) and not b.vacuous]
    text = (
        f"link 3: no example's memorization is above a bound that holds, at any of {len(private)} "
        f"epsilons; bounds say something at {len(useful)} of them. This does not prove privacy: "
        "example by example these trials could have refuted at most epsilon "
        f"{max(a.certifiable for a in private):.1f}"
    )
    seen = [f"{a.one_run:.2f} of {a.epsilon:g}" for a in private if a.one_run is not None]
    return Verdict(text=text + (f"; the audit in one run saw {', '.join(seen)}" if seen else ""))
