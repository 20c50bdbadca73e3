"""Link 3: memorization against epsilon (Ravikumar et al. 2024, Theorem 5.4), and its audit.

In:  scores and trial files of a private study.
Out: for each epsilon the bounds on memorization that its mechanism implies, how many examples
     exceed each beyond chance, the pool's mean memorization, and the epsilon that the data certify.

Shapes: N training examples, P of them in the pool, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from raymem.encoding import epsilon_name
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.epsilons import plain
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
    one_run_p_value,
    tightest,
)
from raymem.store import Store, TrialKey

# Family-wise over all tests, examples and epsilons of a study: of a thousand studies that are as
# private as they claim, at most one is expected to be refuted.
ALPHA = 1e-3
# Examples against the bounds, the pool's mean against the bounds, certified epsilons, one run.
TESTS = 4
CONFIDENCE = 0.95
# Shares of the canaries that are guessed about; the best of them is reported, at a level for all.
GUESSED = (0.1, 1 / 3, 1.0)


@dataclass(frozen=True, kw_only=True)
class BoundCheck:
    """A bound, and what the data say to it."""

    bound: Bound
    violations: int
    """Examples whose lower limit of memorization, at the level of the verdict, is above it."""
    mean_above: bool
    """Is the lower limit of the pool's mean, at that level, above it?"""


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
    """Lower bound on epsilon from the example that says most, at the level of the verdict."""
    certifiable: float
    """What it would be if every trial had told in from out: claims above cannot be refuted."""
    one_run: float | None
    """Lower bound on epsilon, 95%, from guesses which canaries were in; None: not possible here.
    It describes; the verdict rests on `one_run_p`."""
    one_run_p: float | None
    """p-value of these guesses if training were as private as it claims; None without a claim."""
    level: float
    """Error probability of each of the four tests that the verdict combines, at this epsilon."""
    one_run_about: str
    """How it came about, or why there is none."""

    @property
    def refuted(self) -> bool:
        """Do the data contradict the epsilon that was claimed, by any of the four tests?"""
        if self.mechanism is None or math.isinf(self.epsilon):
            return False
        exceeded = any(c.bound.holds and (c.violations or c.mean_above) for c in self.bounds)
        guessed = self.one_run_p is not None and self.one_run_p <= self.level
        return exceeded or self.certified > self.mechanism.spent_epsilon or guessed

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
                    "one_run_p_value": self.one_run_p,
                    "level_of_each_test": self.level,
                    "refuted": self.refuted,
                }
            ),
            "one_run_about": self.one_run_about,
            "refuted": self.refuted,
        }


def link3(store: Store, *, alpha: float = ALPHA) -> list[Audit]:
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
    level = alpha / TESTS / max(1, sum(math.isfinite(epsilon) for epsilon in epsilons))
    found = []
    for epsilon in epsilons:
        here = train_at(scores, epsilon)
        found.append(
            audit_epsilon(
                _evidence(store, here, store.scored(epsilon), pool, what), plan, level=level
            )
        )
    return found


def _pool(store: Store, plan: Plan) -> tuple[NDArray[np.int64], str]:
    """The rows whose mean is told, chosen without looking at what was trained."""
    if plan.pool is not None:
        return np.array(plan.pool), "the candidates"
    flipped = store.study().flipped
    if flipped:
        return np.array(flipped), "training examples with flipped labels"
    return np.arange(plan.n), "all training examples"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the trials at one epsilon show, and what was claimed of them."""

    epsilon: float
    keys: Sequence[TrialKey]
    n_in: Floats
    """[N] Trials that trained on the example."""
    n_out: Floats
    k_in: Floats
    """[N] Of these, trials that are right on it."""
    k_out: Floats
    pool: NDArray[np.int64]
    """[P] Rows whose mean is told."""
    what: str
    """Which rows these are."""
    read: Callable[[TrialKey, NDArray[np.int64], str], tuple[NDArray[np.bool_], Floats]]
    """Of rows in one trial: were they in the subset, and a column (`correct`, `margin`)."""
    mechanism: Mechanism | None
    """None: nothing was claimed."""


def audit_epsilon(found: Evidence, plan: Plan, *, level: float) -> Audit:
    """The audit of one epsilon; each of its four tests has error probability `level`.

    The tests share nothing but the trials, so that by Bonferroni the chance that any of them
    refutes a mechanism which is as private as it claims is at most 4 `level`.
    """
    private = found.mechanism is not None and math.isfinite(found.epsilon)
    drawn = (found.n_in > 0) & (found.n_out > 0)
    counts = found.k_in, found.n_in, found.k_out, found.n_out
    of_each = level / max(1, int(drawn.sum()))
    limits = lower_limit_of_difference(*counts, of_each)
    steps_apart, delta = _neighbours(plan, found.mechanism)
    certified = certified_epsilon(*counts, delta=delta, alpha=of_each) / steps_apart
    mean = _pool_mean(found, found.pool[drawn[found.pool]])
    checks = []
    for bound in bounds_on_memorization(found.mechanism, plan.kind) if found.mechanism else []:
        over = mean is not None and _one_sided(mean, len(found.keys), level) > bound.value
        count = int((limits > bound.value).sum())
        checks.append(BoundCheck(bound=bound, violations=count, mean_above=bool(over)))
    one_run, one_run_p, one_run_about = _one_run(found, plan)
    most = max(
        (
            largest_certifiable(int(found.n_in[i]), int(found.n_out[i]), delta=delta, alpha=of_each)
            for i in np.flatnonzero(drawn)[:1]
        ),
        default=0.0,
    )
    return Audit(
        epsilon=found.epsilon,
        trials=len(found.keys),
        pool=mean,
        mechanism=found.mechanism if private else None,
        bounds=checks,
        largest_limit=_largest(limits),
        certified=_largest(certified),
        certifiable=most / steps_apart,
        one_run=one_run,
        one_run_p=one_run_p,
        level=level,
        one_run_about=one_run_about,
    )


def _evidence(
    store: Store, table: pa.Table, keys: Sequence[TrialKey], pool: NDArray[np.int64], what: str
) -> Evidence:
    about = store.provenance(keys[0]).get("privacy") if keys else None
    n_in, n_out = (floats(table, f"n_{arm}") for arm in ("in", "out"))
    k_in, k_out = (
        np.rint(np.nan_to_num(floats(table, f"accuracy_{arm}")) * n)
        for arm, n in (("in", n_in), ("out", n_out))
    )

    def read(
        key: TrialKey, rows: NDArray[np.int64], column: str
    ) -> tuple[NDArray[np.bool_], Floats]:
        trial = store.train_rows(key, ["in_subset", column]).take(pa.array(rows))
        inside = trial["in_subset"].to_numpy().astype(bool)
        return inside, trial[column].cast(pa.float64()).to_numpy()

    return Evidence(
        epsilon=keys[0].epsilon if keys else float(table["epsilon"][0].as_py()),
        keys=keys,
        n_in=n_in,
        n_out=n_out,
        k_in=k_in,
        k_out=k_out,
        pool=pool,
        what=what,
        read=read,
        mechanism=None if about is None else Mechanism.from_dict(about),
    )


def _neighbours(plan: Plan, mechanism: Mechanism | None) -> tuple[int, float]:
    """How many steps of adding or removing an example are between models with and without one, and
    the delta of so many.

    In subsets of a fixed size another example takes the place, two steps, which are
    (2 eps, (1 + e^eps) delta)-DP.
    """
    delta = 0.0 if mechanism is None else mechanism.delta
    if plan.kind != "fixed-size":
        return 1, delta
    spent = 0.0 if mechanism is None else mechanism.spent_epsilon
    return 2, min(1.0, delta * (1 + math.exp(min(spent, 700.0)))) if delta else 0.0


def _largest(values: Floats) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _pool_mean(found: Evidence, pool: NDArray[np.int64]) -> PoolMean | None:
    """Mean memorization over the pool. Examples of one run are not independent: its standard error
    is that of a sum over runs, of each run's share of the mean (linearized, clusters are runs)."""
    T = len(found.keys)
    if T < 2 or len(pool) == 0:
        return None
    n_in, n_out = found.n_in[pool], found.n_out[pool]
    p, q = found.k_in[pool] / n_in, found.k_out[pool] / n_out
    shares = []
    for key in found.keys:
        inside, right = found.read(key, pool, "correct")
        residual = np.where(inside, (right - p) / n_in, -(right - q) / n_out)
        shares.append(residual.mean())
    value = float((p - q).mean())
    stderr = math.sqrt(T / (T - 1) * float(np.square(shares).sum()))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, T - 1)) * stderr
    return PoolMean(
        value=value,
        low=max(-1.0, value - half),
        high=min(1.0, value + half),
        stderr=stderr,
        examples=len(pool),
        what=found.what,
    )


def _one_sided(mean: PoolMean, trials: int, alpha: float) -> float:
    """Lower limit of the pool's mean that fails with probability alpha."""
    return mean.value - float(stats.t.ppf(1 - alpha, trials - 1)) * mean.stderr


def _one_run(found: Evidence, plan: Plan) -> tuple[float | None, float | None, str]:
    """Steinke et al. 2023 on the first trial of each block, which are independent runs: the epsilon
    that is seen at 95%, the p-value of the claimed one, and how it came about.

    A canary's score is its margin above its mean margin in the out-trials of other blocks: those
    say what its margin is without it, and nothing of which it was in here.
    """
    if plan.kind not in ("balanced", "candidate-pool") or abs(plan.subset_ratio - 0.5) > 1e-9:
        needs = "needs each canary in with probability 1/2: balanced subsets of ratio 0.5"
        return None, None, needs
    scored = _canary_scores(found, plan)
    if not scored:
        return None, None, "needs the first trial of a block"
    R, P = len(scored), len(found.pool)
    guesses = {share: max(2, round(share * P)) for share in GUESSED}
    right = {
        share: sum(best_guesses(score, inside, n) for score, inside in scored)
        for share, n in guesses.items()
    }
    delta = 0.0 if found.mechanism is None else found.mechanism.delta
    alpha = (1 - CONFIDENCE) / len(GUESSED)
    seen = {
        share: one_run_epsilon(right[share], R * n, R * P, delta=delta, alpha=alpha)
        for share, n in guesses.items()
    }
    best = max(GUESSED, key=lambda share: seen[share])
    p_value = None
    if found.mechanism is not None and math.isfinite(found.mechanism.spent_epsilon):
        spent = found.mechanism.spent_epsilon
        p_values = [
            one_run_p_value(right[share], R * n, R * P, epsilon=spent, delta=delta)
            for share, n in guesses.items()
        ]
        p_value = min(1.0, len(GUESSED) * min(p_values))
    about = f"{right[best]:,} of {R * guesses[best]:,} guesses right, in {R} runs of {P:,} canaries"
    return seen[best], p_value, about


def _canary_scores(found: Evidence, plan: Plan) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """Of the first trial of each block: scores of the canaries, and which were in, [P] each."""
    blocks = sorted({key.trial // plan.block for key in found.keys})
    place = {block: k for k, block in enumerate(blocks)}
    sums = np.zeros((2, len(blocks), len(found.pool)))
    first: dict[int, tuple[NDArray[np.bool_], Floats]] = {}
    for key in found.keys:
        inside, margin = found.read(key, found.pool, "margin")
        block = place[key.trial // plan.block]
        sums[0, block] += np.where(inside, 0, margin)
        sums[1, block] += ~inside
        if key.trial % plan.block == 0:
            first[block] = inside, margin
    total = sums.sum(1)
    scored = []
    for block, (inside, margin) in first.items():
        others = total - sums[:, block]
        with np.errstate(invalid="ignore", divide="ignore"):
            usual = np.where(others[1] > 0, others[0] / others[1], 0.0)
        scored.append((margin - usual, inside))
    return scored


def verdict(audits: Sequence[Audit]) -> Verdict:
    """Link 3 in one sentence, with its numbers."""
    private = [a for a in audits if a.mechanism is not None]
    if not private:
        return Verdict(text="link 3: no trial is private; train with --epsilons")
    level = f"at family-wise level {TESTS * sum(a.level for a in private):.3g}"
    least = min(private, key=lambda a: a.epsilon)
    estimate: dict[str, float] = {}
    if least.pool is not None:
        estimate = {name: getattr(least.pool, name) for name in ("low", "high")}
        estimate["estimate"] = least.pool.value
    refuted = [a for a in private if a.refuted]
    if refuted:
        return Verdict(
            text="link 3: the claimed privacy is REFUTED at epsilon "
            + ", ".join(epsilon_name(a.epsilon) for a in refuted)
            + f" ({level}): the mechanism is not what it claims, or trials are not independent",
            not_shown="which of the two",
            **estimate,
        )
    useful = [a for a in private if (b := tightest([c.bound for c in a.bounds])) and not b.vacuous]
    text = (
        "link 3: no example's memorization, nor the mean, is significantly above a bound that "
        f"holds, at any of {len(private)} epsilons ({level}); bounds say something at "
        f"{len(useful)} of them{_mean_and_bound(least)}"
    )
    seen = [
        f"{a.one_run:.2f} of {epsilon_name(a.epsilon)}" for a in private if a.one_run is not None
    ]
    return Verdict(
        text=text + (f"; the audit in one run saw {', '.join(seen)} (95%)" if seen else ""),
        not_shown="privacy: example by example these trials could have refuted at most epsilon "
        f"{max(a.certifiable for a in private):.1f}",
        **estimate,
    )


def _mean_and_bound(least: Audit) -> str:
    bound = tightest([check.bound for check in least.bounds])
    if least.pool is None or bound is None:
        return ""
    pool = least.pool
    return (
        f"; at epsilon {epsilon_name(least.epsilon)} the mean of {pool.what} is {pool.value:.3f} "
        f"[{pool.low:.3f}, {pool.high:.3f}], the tightest bound {bound.value:.3f}"
    )
