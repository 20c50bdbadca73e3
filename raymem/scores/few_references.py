"""Attacks by number of reference models: the rates with only 2, 4 or 8 of them.

In:  the trials of one epsilon. Out: each attack's rates with K references, for rising K.

Every target trial has references of its own, drawn from the trials whose subsets are independent of
its subset, in an order that the seed fixes. Of these an example takes the first so many that
trained on it and the first so many that did not: as many as it would have in K trials of a balanced
plan. The counts are then the same for all examples, and say nothing of the target. Offline attacks
use the out-trials only.

Trials are read one at a time, for each K anew; memory is a few numbers for each example, and 26
bytes for each example and target. Shapes: N training examples. Arms are rows: 0 out, 1 in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raymem.scores.attack_scores import LOSS_THRESHOLD, TargetScores
from raymem.scores.lira import Moments, add_margins, margin_sums, with_some_variance
from raymem.scores.roc import Attack, Roc
from raymem.scores.running_sums import RunningSums
from raymem.scores.trial_margins import TrialMargins
from raymem.store import TrialKey

REFERENCES = (2, 4, 8, 16, 32, 64)
SEED = 0


@dataclass(frozen=True, kw_only=True)
class WithReferences:
    """Rates of the attacks with a given number of reference models."""

    references: int
    """Number of reference trials of each example in each attack on it."""
    references_in: int
    """How many of these trained on it."""
    examples: int
    """Training examples that have so many for some target."""
    attacks: list[Attack]
    """All attacks that use references; without curves."""


def by_references(
    trials: TrialMargins, targets: Sequence[TrialKey], population: NDArray[np.int64]
) -> list[WithReferences]:
    """The attacks on `targets` with 2, 4, 8, ... references, as long as examples have so
    many for at least half of the targets, on average."""
    found = []
    for references in REFERENCES:
        here = _with(trials, targets, population, references)
        if here is None:
            break
        found.append(here)
    return found


def arms(references: int, subset_ratio: float) -> tuple[int, int]:
    """How many of an example's references are out and in: one of each at least.

    >>> arms(2, 0.5), arms(8, 0.7), arms(4, 0.9)
    ((1, 1), (2, 6), (1, 3))
    """
    inside = min(max(round(references * subset_ratio), 1), references - 1)
    return references - inside, inside


def reference_sums(trials: TrialMargins, target: TrialKey, wanted: tuple[int, int]) -> RunningSums:
    """Sums over the first references of each example, `wanted` out and in, or as many as there are.

    Trials of the target's own group are no references.
    """
    group = trials.group(target)
    eligible = [key for key in trials.keys if trials.group(key) != group]
    order = np.random.default_rng((SEED, target.trial)).permutation(len(eligible))
    sums, limit = margin_sums(trials.sums.origin["margin"]), np.array(wanted)
    every = np.arange(trials.plan.n)
    for _, margins, inside in trials.read(eligible[k] for k in order):
        arm = inside.astype(np.int64)
        add_margins(sums, margins, inside, sums.n[arm, every] < limit[arm])
        if (sums.n == limit[:, None]).all():
            break
    return sums


def _with(
    trials: TrialMargins,
    targets: Sequence[TrialKey],
    population: NDArray[np.int64],
    references: int,
) -> WithReferences | None:
    wanted = arms(references, trials.plan.subset_ratio)
    scores = TargetScores(population)
    for target, sums in _references(trials, targets, wanted):
        moments = Moments.of(sums)
        if not moments.known[population].any():
            return None
        scores.add(*trials.one(target), with_some_variance(moments))
    enough = sum(scores.counts) >= len(targets) * trials.plan.n / 2
    if not enough or not all(scores.counts):
        return None
    attacks = [replace(a, roc=Roc()) for a in scores.attacks() if a.name != LOSS_THRESHOLD]
    return WithReferences(
        references=references,
        references_in=wanted[1],
        examples=int(scores.attackable.sum()),
        attacks=attacks,
    )


def _references(
    trials: TrialMargins, targets: Sequence[TrialKey], wanted: tuple[int, int]
) -> Iterator[tuple[TrialKey, RunningSums]]:
    """Each target with its reference sums, of the examples that have all references."""
    for target in targets:
        sums = reference_sums(trials, target, wanted)
        short = (sums.n < np.array(wanted)[:, None]).any(0)
        sums.n[:, short] = 0
        yield target, sums
