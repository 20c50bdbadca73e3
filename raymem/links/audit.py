"""Link 3: memorization against epsilon (Ravikumar et al. 2024, Theorem 5.4), and its audit.

In:  scores and trial files of a private study.
Out: for each epsilon the bounds on memorization that its mechanism implies, how many examples
     exceed each beyond chance, the pool's mean memorization, and what guesses of membership say
     against the claim.

Shapes: N training examples, P of them in the pool, T trials.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from raymem.data import ABSENT, rows_of
from raymem.encoding import JsonObject, epsilon_name
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.membership_guesses import (
    CONFIDENCE,
    CandidateAudit,
    Candidates,
    PairAudit,
    audit_candidates,
    audit_pairs,
)
from raymem.links.verdicts import Verdict
from raymem.plan import Plan
from raymem.privacy import (
    Bound,
    Mechanism,
    bounds_on_memorization,
    lower_limit_of_difference,
    tightest,
)
from raymem.store import Store, TrialKey

# Family-wise over all tests, examples and epsilons of a study: of a thousand studies that are as
# private as they claim, at most one is expected to be refuted.
ALPHA = 1e-3
# Examples against the bounds, the pool's mean against the bounds, candidates one by one, pairs.
TESTS = 4
# Candidates of a study that names none: as many, chosen by its first block.
CHOSEN = 200
NO_BLOCKS = "needs trials with and without an example in one block of trials"
# Kinds of plans in which membership is random given that of all other examples, or of one alone.
RANDOM = ("balanced", "candidate-pool", "fixed-size")
NOT_PAIRED = {
    "fixed-size": "needs examples that are drawn independently of each other; in subsets of a "
    "fixed size they are not",
    "imported": "needs to know how subsets were drawn; these were drawn elsewhere",
    "removal": "needs random subsets",
    "leave-one-out": "needs random subsets",
}


@dataclass(frozen=True, kw_only=True)
class BoundCheck(JsonObject):
    """A bound, and what the data say to it."""

    bound: Bound
    violations: int
    """Examples whose lower limit of memorization, at the level of the verdict, is above it."""
    mean_above: bool
    """Is the lower limit of the pool's mean, at that level, above it?"""

    def json_fields(self) -> Mapping[str, object]:
        """The bound's fields, and what the data say to it."""
        return {
            **vars(self.bound),
            "vacuous": self.bound.vacuous,
            "violations": self.violations,
            "pool_mean_above": self.mean_above,
        }


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
class Audit(JsonObject):
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
    candidates: CandidateAudit | None
    """Each candidate by itself; None: not possible here."""
    pairs: PairAudit | None
    """All candidates together; None: not possible here."""
    why_no_pairs: str
    """What the audit by pairs needs, if it is not possible; else empty."""
    level: float
    """Error probability of each of the four tests that the verdict combines, at this epsilon."""

    @property
    def refuted(self) -> bool:
        """Do the data contradict the epsilon that was claimed, by any of the four tests?"""
        if self.mechanism is None or math.isinf(self.epsilon):
            return False
        return bool(self.reasons)

    @property
    def reasons(self) -> str:
        """Which of the four tests refute the claim."""
        over = [c for c in self.bounds if c.bound.holds]
        told = [
            (any(c.violations for c in over), "memorization of single examples above a bound"),
            (any(c.mean_above for c in over), "mean memorization above a bound"),
            (
                self.candidates is not None and self._refutes(self.candidates.p_value),
                "a candidate's membership is told too well",
            ),
            (
                self.pairs is not None and self._refutes(self.pairs.p_value),
                "membership in one of two trials is told too well",
            ),
        ]
        return "; ".join(reason for refutes, reason in told if refutes)

    def _refutes(self, p_value: float | None) -> bool:
        return p_value is not None and p_value <= self.level

    @property
    def could_refute(self) -> bool:
        """Would trials that tell membership without error refute the claim, by either audit?"""
        singly = self.candidates is not None and self.candidates.least_p_value
        together = self.pairs is not None and self.pairs.refuted_from
        return bool((singly and singly <= self.level) or (together and together <= 1))

    def json_fields(self) -> Mapping[str, object]:
        """As links.json has it."""
        return {
            "epsilon": self.epsilon,
            "trials": self.trials,
            "pool_mean_memorization": self.pool,
            "mechanism": self.mechanism,
            "bounds": self.bounds,
            "largest_lower_limit": self.largest_limit,
            "level_of_each_test": self.level,
            "candidates": self.candidates,
            "pairs": self.pairs,
            "why_no_pairs": self.why_no_pairs,
            "could_refute": self.could_refute,
            "refuted": self.refuted,
        }


def link3(store: Store, *, alpha: float = ALPHA) -> list[Audit]:
    """Link 3 of a scored study, an entry for each epsilon, rising.

    A clean result proves nothing: it says that these trials could not refute the claim, and
    `could_refute` whether any could have. What audits cannot see at all: steps that were taken and
    not counted, batches that were shuffled and not sampled; the trials' own counts are checked
    against the plan when they are trained.

    Raises StoreError without scores.
    """
    scores, plan = store.scores(), store.plan()
    epsilons = sorted(set(scores["epsilon"].to_pylist()))
    pool = _pool(store, plan)
    level = alpha / TESTS / max(1, sum(math.isfinite(epsilon) for epsilon in epsilons))
    found = []
    for epsilon in epsilons:
        here = train_at(scores, epsilon)
        evidence = _evidence(store, here, store.scored(epsilon), pool)
        found.append(audit_epsilon(evidence, plan, level=level))
    return found


class Pool(NamedTuple):
    """Rows whose mean is told."""

    rows: NDArray[np.int64]
    what: str
    named: bool


def _pool(store: Store, plan: Plan) -> Pool:
    """The rows whose mean is told, chosen without looking at what was trained."""
    study = store.study()
    if study.canaries:
        return Pool(np.array(study.canaries), "canaries", True)
    if plan.pool is not None:
        return Pool(np.array(plan.pool), "the candidates", True)
    if study.flipped:
        return Pool(np.array(study.flipped), "training examples with flipped labels", True)
    return Pool(np.arange(plan.n), "all training examples", False)


class Outcome(NamedTuple):
    """One trial on the training examples, [N] each."""

    inside: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    margin: Floats


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
    read: Callable[[TrialKey], Outcome]
    """One trial."""
    named: bool
    """Is the pool a part of the examples that was chosen beforehand? Then it is audited."""
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
    limits = lower_limit_of_difference(*counts, level / max(1, int(drawn.sum())))
    mean = _pool_mean(found, found.pool[drawn[found.pool]])
    checks = []
    for bound in bounds_on_memorization(found.mechanism, plan.kind) if found.mechanism else []:
        over = mean is not None and _one_sided(mean, len(found.keys), level) > bound.value
        count = int((limits > bound.value).sum())
        checks.append(BoundCheck(bound=bound, violations=count, mean_above=bool(over)))
    candidates = _candidates(found, plan) if drawn.any() and plan.kind in RANDOM else None
    singly = pairs = None
    why = NOT_PAIRED.get(plan.kind, "")
    if candidates is not None:
        singly = audit_candidates(candidates, plan, found.mechanism, level=level)
        pairs = None if why else audit_pairs(candidates, found.mechanism, level=level)
    return Audit(
        epsilon=found.epsilon,
        trials=len(found.keys),
        pool=mean,
        mechanism=found.mechanism if private else None,
        bounds=checks,
        largest_limit=float(np.nanmax(limits)) if np.isfinite(limits).any() else math.nan,
        candidates=singly,
        pairs=pairs,
        why_no_pairs="" if pairs else why or NO_BLOCKS,
        level=level,
    )


def _evidence(store: Store, table: pa.Table, keys: Sequence[TrialKey], pool: Pool) -> Evidence:
    about = store.provenance(keys[0]).get("privacy") if keys else None
    n_in, n_out = (floats(table, f"n_{arm}") for arm in ("in", "out"))
    k_in, k_out = (
        np.rint(np.nan_to_num(floats(table, f"accuracy_{arm}")) * n)
        for arm, n in (("in", n_in), ("out", n_out))
    )

    def read(key: TrialKey) -> Outcome:
        rows = store.train_rows(key, ["in_subset", "correct", "margin"])
        inside, correct = (rows[name].to_numpy().astype(bool) for name in rows.column_names[:2])
        return Outcome(inside, correct, rows["margin"].cast(pa.float64()).to_numpy())

    return Evidence(
        epsilon=keys[0].epsilon if keys else float(table["epsilon"][0].as_py()),
        keys=keys,
        n_in=n_in,
        n_out=n_out,
        k_in=k_in,
        k_out=k_out,
        pool=pool.rows,
        what=pool.what,
        named=pool.named,
        read=read,
        mechanism=None if about is None else Mechanism.from_dict(about),
    )


def _candidates(found: Evidence, plan: Plan) -> Candidates | None:
    """The pool, if it was chosen beforehand or is small; else the examples that the first block
    tells apart best, with the trials of the other blocks only. None without margins."""
    blocks = np.array([key.trial // plan.block for key in found.keys])
    everything = found.named or len(found.pool) <= CHOSEN or len(np.unique(blocks)) < 2
    if everything:
        return _scores_of(found.pool, found.keys, blocks, found)
    first = blocks == blocks[0]
    keys = [key for key, is_first in zip(found.keys, first, strict=True) if is_first]
    seen = _scores_of(found.pool, keys, blocks[first], found)
    if seen is None:
        return None
    n_in = seen.inside.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = (seen.scores * seen.inside).sum(0) / n_in
        gap -= (seen.scores * ~seen.inside).sum(0) / (len(keys) - n_in)
        clear = np.nan_to_num(gap / seen.scores.std(0), nan=-math.inf)
    rows = np.sort(found.pool[np.argsort(-clear, kind="stable")[:CHOSEN]])
    rest = [key for key, is_first in zip(found.keys, first, strict=True) if not is_first]
    chosen = _scores_of(rows, rest, blocks[~first], found)
    what = f"the {CHOSEN} training examples that the first block told apart best, in the others"
    return None if chosen is None else dataclasses.replace(chosen, what=what)


def _scores_of(
    rows: NDArray[np.int64], keys: Sequence[TrialKey], blocks: NDArray[np.int64], found: Evidence
) -> Candidates | None:
    inside = np.zeros((len(keys), len(rows)), bool)
    scores = np.zeros((len(keys), len(rows)))
    for t, key in enumerate(keys):
        trial = found.read(key)
        if not np.isfinite(trial.margin).all():
            return None
        inside[t] = trial.inside[rows]
        scores[t] = trial.margin[rows] - np.median(trial.margin)
    return Candidates(what=found.what, blocks=blocks, inside=inside, scores=scores)


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
        trial = found.read(key)
        inside, right = trial.inside[pool], trial.correct[pool]
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


class Memorized(NamedTuple):
    """Mean memorization at one epsilon of the examples that are memorized without privacy."""

    epsilon: float
    memorized: PoolMean
    others: PoolMean


def memorized_by_epsilon(store: Store, private: Store) -> list[Memorized]:
    """What privacy changes for the examples on `store`'s list of memorized ones at epsilon inf, and
    for all others: their mean memorization by the trials of `private`, an entry for each epsilon,
    rising; empty if the list is, or if `private` has no finite epsilon.

    If both stores are one, the trials at inf chose the list, and their mean of it is too high.

    Raises StoreError without scores.
    """
    listed = train_at(store.scores(), math.inf)
    listed = listed.filter(pc.fill_null(listed["memorized"], False))
    scores = private.scores()
    epsilons = sorted(set(scores["epsilon"].to_pylist()))
    if not listed.num_rows or not any(map(math.isfinite, epsilons)):
        return []
    found = []
    for epsilon in epsilons:
        here = train_at(scores, epsilon)
        ids = here["example_id"].to_pylist()
        drawn = (floats(here, "n_in") > 0) & (floats(here, "n_out") > 0)
        rows = rows_of(listed["example_id"].to_pylist(), ids)
        is_listed = np.isin(np.arange(len(ids)), rows[rows != ABSENT])
        means = []
        for what, chosen in (("memorized", is_listed), ("others", ~is_listed)):
            pool = Pool(np.flatnonzero(chosen & drawn), what, True)
            means.append(
                _pool_mean(_evidence(private, here, private.scored(epsilon), pool), pool.rows)
            )
        if means[0] is not None and means[1] is not None:
            found.append(Memorized(epsilon, means[0], means[1]))
    return found


def _one_sided(mean: PoolMean, trials: int, alpha: float) -> float:
    """Lower limit of the pool's mean that fails with probability alpha."""
    return mean.value - float(stats.t.ppf(1 - alpha, trials - 1)) * mean.stderr


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
            + ", ".join(f"{epsilon_name(a.epsilon)} ({a.reasons})" for a in refuted)
            + f", {level}: the mechanism is not what it claims, or trials are not independent",
            not_shown="which of the two",
            **estimate,
        )
    useful = [a for a in private if (b := tightest([c.bound for c in a.bounds])) and not b.vacuous]
    text = (
        f"link 3: the claimed privacy is not refuted at any of {len(private)} epsilons ({level}); "
        f"bounds on memorization say something at {len(useful)} of them{_mean_and_bound(least)}"
        f"{_pairs_and_claim(least)}"
    )
    beyond = [epsilon_name(a.epsilon) for a in private if not a.could_refute]
    return Verdict(
        text=text,
        not_shown="that training is private: a better attack may see more"
        + (
            f"; at epsilon {', '.join(beyond)} even guesses without error could not have refuted "
            "the claim, with so few trials and candidates"
            if beyond
            else ""
        ),
        **estimate,
    )


def _mean_and_bound(audit: Audit) -> str:
    bound = tightest([check.bound for check in audit.bounds])
    if audit.pool is None or bound is None:
        return ""
    pool = audit.pool
    return (
        f"; at epsilon {epsilon_name(audit.epsilon)} the mean of {pool.what} is {pool.value:.3f} "
        f"[{pool.low:.3f}, {pool.high:.3f}], the tightest bound {bound.value:.3f}"
    )


def _pairs_and_claim(audit: Audit) -> str:
    pairs = audit.pairs
    if pairs is None or pairs.allowed is None or pairs.refuted_from is None:
        return ""
    needed = "no accuracy would refute it"
    if pairs.refuted_from <= 1:
        needed = f"{pairs.refuted_from:.1%} would refute it"
    return (
        f"; at epsilon {epsilon_name(audit.epsilon)}, of two trials the one that trained on an "
        f"example is told in {pairs.accuracy:.1%} [{pairs.low:.1%}, "
        f"{pairs.high:.1%}] of cases, the claim allows {pairs.allowed:.1%}, {needed}"
    )
