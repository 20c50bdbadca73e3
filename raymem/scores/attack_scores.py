"""The scores of every attack on target trials, and what they come to.

In:  target trials and what their reference trials say, one target at a time. Out: each attack's
     rates, and the best attack's AUC on each example.

Shapes: N training examples, K target trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.scores import lira, rmia
from raymem.scores.estimates import Floats, ratio
from raymem.scores.lira import Moments
from raymem.scores.roc import Attack, attack, auc

Truths = NDArray[np.bool_]
LOSS_THRESHOLD = "loss threshold"
ATTACKS = (
    "LiRA online",
    "LiRA offline",
    LOSS_THRESHOLD,
    "RMIA online",
    "RMIA offline",
    "margin minus mean",
)


def attack_scores(margins: Floats, others: Moments, population: NDArray[np.int64]) -> list[Floats]:
    """Scores of a target trial by each of `ATTACKS`, [N] each.

    All of them want reference trials with and without the example, also those that could do with
    fewer, so that they are compared on the same examples; NaN for other examples. Raises ValueError
    if no variance is known.
    """
    scores = (
        lira.online(margins, others),
        lira.offline(margins, others),
        margins,
        rmia.online(margins, others, population),
        rmia.offline(margins, others, population),
        lira.above_mean(margins, others),
    )
    return [np.where(others.known, values, np.nan) for values in scores]


class TargetScores:
    """Scores of all target trials: 4 bytes for each attack, target and example."""

    def __init__(self, population: NDArray[np.int64]) -> None:
        self.population = population
        self.scores: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ATTACKS}
        self.members: list[Truths] = []
        self.known: list[Truths] = []

    def add(self, margins: Floats, inside: Truths, others: Moments) -> None:
        """Add one target trial, [N] each. Raises ValueError as `attack_scores` does."""
        found = attack_scores(margins, others, self.population)
        for name, values in zip(ATTACKS, found, strict=True):
            self.scores[name].append(values.astype(np.float32))
        self.members.append(inside)
        self.known.append(others.known)

    @property
    def attackable(self) -> Truths:
        """The examples that some target was attacked on, [N]."""
        found: Truths = np.any(self.known, axis=0)
        return found

    @property
    def counts(self) -> tuple[int, int]:
        """Scores of members and of others, over all targets."""
        known, inside = np.stack(self.known), np.stack(self.members)
        return int((known & inside).sum()), int((known & ~inside).sum())

    def attacks(self) -> list[Attack]:
        """What each attack reached on the scores of all targets together."""
        known = np.stack(self.known)
        target, _ = np.nonzero(known)
        member = np.stack(self.members)[known]
        return [
            attack(name, np.stack(self.scores[name])[known], member, target) for name in ATTACKS
        ]


@dataclass(frozen=True, kw_only=True)
class ByExample:
    """How well the best attack tells targets that saw an example from those that did not."""

    attack: NDArray[np.object_]
    """Its name, [N]; None where the AUC is not known."""
    auc: Floats
    """Probability that its score is higher in a target that saw the example, ties half, [N]; NaN
    without targets of both kinds."""
    stderr: Floats
    """Standard error of the AUC over targets, [N]; NaN at 0 and 1, where it is not known."""
    n_in: NDArray[np.int64]
    """Targets that saw the example, [N]."""
    n_out: NDArray[np.int64]
    """Targets that did not, [N]."""


def by_example(halves: Sequence[TargetScores], N: int) -> ByExample:
    """The best attack's AUC on each of N examples; `halves` hold the targets of one half of the
    trials each, attacked with references of the other half.

    References must not be targets here: where every target is a reference of the others, an
    example's scores depend on each other, and on noise its AUC is below 0.5 (0.44 with 12 trials).

    Which attack is best is decided on other examples: for those at even positions, the one with the
    highest AUC on those at odd positions, and the other way round. An example's own scores have no
    say, so that its AUC is not the largest of several.
    """
    best = [_best(halves, 1 - parity) for parity in (0, 1)]
    wins, pairs, counts = np.zeros(N), np.zeros(N), []
    for half in halves:
        known, inside = np.stack(half.known), np.stack(half.members)
        values = np.stack(half.scores[best[0]])
        values[:, 1::2] = np.stack(half.scores[best[1]])[:, 1::2]
        counts.append(((known & inside).sum(0), (known & ~inside).sum(0)))
        wins += np.nan_to_num(auc_by_example(values, inside)) * counts[-1][0] * counts[-1][1]
        pairs += counts[-1][0] * counts[-1][1]
    area = ratio(wins, pairs)
    name = np.array([best[i % 2] for i in range(N)], object)
    name[np.isnan(area)] = None
    return ByExample(
        attack=name,
        auc=area,
        stderr=auc_stderr(area, counts),
        n_in=sum((n_in for n_in, _ in counts), np.zeros(N, np.int64)),
        n_out=sum((n_out for _, n_out in counts), np.zeros(N, np.int64)),
    )


def _best(halves: Sequence[TargetScores], parity: int) -> str:
    """The attack with the highest AUC on every second example from `parity` on; the first of
    equals, also where there is none to tell."""
    if not halves:
        return ATTACKS[0]
    known = np.concatenate([np.stack(half.known)[:, parity::2] for half in halves])
    inside = np.concatenate([np.stack(half.members)[:, parity::2] for half in halves])[known]
    areas = []
    for name in ATTACKS:
        scores = np.concatenate([np.stack(half.scores[name])[:, parity::2] for half in halves])
        areas.append(auc(scores[known], inside))
    return ATTACKS[int(np.argmax(np.nan_to_num(areas)))]


def auc_by_example(scores: NDArray[np.float32], members: Truths) -> Floats:
    """The AUC of each column, [N], from the ranks of its scores [K, N]; NaN scores do not count.

    >>> scores = np.array([[2.0, 1.0], [1.0, 1.0], [np.nan, 0.0]], np.float32)
    >>> auc_by_example(scores, np.array([[True, True], [False, False], [True, False]])).tolist()
    [1.0, 0.75]
    """
    known = ~np.isnan(scores)
    # Scores that do not count have the lowest ranks, and are subtracted from the others'.
    ranks = stats.rankdata(np.where(known, scores, -np.inf), axis=0) - (~known).sum(0)
    inside = known & members
    n_in, n_out = inside.sum(0), (known & ~members).sum(0)
    above = np.where(inside, ranks, 0.0).sum(0) - n_in * (n_in + 1) / 2
    return ratio(above, n_in * n_out)


def auc_stderr(
    area: Floats, counts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> Floats:
    """Hanley & McNeil 1982, for exponential scores; NaN at 0 and 1, where it would be 0.

    `counts` are the targets in and out, [N] each, of each half that is compared within itself.

    >>> auc_stderr(np.array([0.75]), [(np.array([10]), np.array([10]))]).round(3).tolist()
    [0.112]
    """
    inside, out = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    variance, pairs = np.zeros(len(area)), np.zeros(len(area))
    for n_in, n_out in counts:
        spread = area * (1 - area) + (n_in - 1) * inside + (n_out - 1) * out
        variance += n_in * n_out * spread
        pairs += n_in * n_out
    error = np.sqrt(np.maximum(ratio(variance, pairs**2), 0.0))
    return np.where((area > 0) & (area < 1), error, np.nan)
