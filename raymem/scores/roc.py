"""How well scores tell members from others: the ROC curve, and its standard errors over targets.

Shapes: S scores, pooled over K target trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Truths = NDArray[np.bool_]
LOW_FPR, FPR = 0.001, 0.01
# False-positive rates at which a curve is kept.
GRID = np.geomspace(1e-5, 1.0, 76)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A number between 0 and 1, and its standard error over target trials."""

    value: float
    stderr: float
    """By a jackknife that leaves out one target trial at a time; NaN with one target."""


@dataclass(frozen=True, kw_only=True)
class Roc:
    """A ROC curve; empty without members, or without others."""

    fpr: list[float] = field(default_factory=list)
    """False-positive rates."""
    tpr: list[float] = field(default_factory=list)
    """The largest true-positive rate at or below each."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What one attack reached on the scores of all target trials together."""

    name: str
    auc: Rate
    """Probability that a member's score is above another's, ties half."""
    balanced_accuracy: Rate
    """(TPR + 1 - FPR) / 2 at the threshold that turned out best: 0.5 or more by construction."""
    tpr_at_low_fpr: Rate
    """The largest true-positive rate of a threshold with a false-positive rate of 0.1% or less."""
    tpr_at_fpr: Rate
    """The same at 1%."""
    roc: Roc = field(default_factory=Roc)


def attack(name: str, scores: ArrayLike, members: ArrayLike, targets: ArrayLike) -> Attack:
    """The attack that calls an example a member if its score is above a threshold.

    scores float [S], members bool [S], targets int [S] (which target trial each score is of). All
    numbers are NaN if there are no members, or nothing else.

    >>> found = attack("a", [3.0, 2.0, 1.0, 0.0], [True, False, True, False], [0, 0, 1, 1])
    >>> found.auc.value, found.balanced_accuracy.value, found.tpr_at_fpr.value
    (0.75, 0.75, 0.5)
    """
    values, member, target = np.asarray(scores), np.asarray(members, bool), np.asarray(targets)
    order = np.argsort(-values, kind="stable")
    values, member, target = values[order], member[order], target[order]
    whole = _numbers(values, member)
    # Sorted scores stay sorted when a target's are left out.
    kept = (target != k for k in np.unique(target))
    left_out = np.array([_numbers(values[rest], member[rest]) for rest in kept])
    K = len(left_out)
    if K > 1:
        apart = left_out - left_out.mean(0)
        stderr = np.sqrt((K - 1) / K * (apart**2).sum(0))
    else:
        stderr = np.full(len(whole), math.nan)
    rates = [Rate(value=float(v), stderr=float(s)) for v, s in zip(whole, stderr, strict=True)]
    fpr, tpr = curve(values, member)
    # Below one over the number of non-members no rate is resolved.
    grid = [float(f) for f in GRID if f * (~member).sum() >= 1 and member.any()]
    return Attack(
        name=name,
        auc=rates[0],
        balanced_accuracy=rates[1],
        tpr_at_low_fpr=rates[2],
        tpr_at_fpr=rates[3],
        roc=Roc(fpr=grid, tpr=[at_fpr(fpr, tpr, limit) for limit in grid]),
    )


def auc(scores: ArrayLike, members: ArrayLike) -> float:
    """Probability that a member's score is above another's, ties half; NaN without both.

    >>> auc([3.0, 2.0, 1.0, 0.0], [True, False, True, False])
    0.75
    """
    values, member = np.asarray(scores), np.asarray(members, bool)
    order = np.argsort(-values, kind="stable")
    return _numbers(values[order], member[order])[0]


def curve(scores: Floats, members: Truths) -> tuple[Floats, Floats]:
    """False- and true-positive rates of every threshold, from (0, 0) on; scores falling, [S].

    >>> curve(np.array([2.0, 1.0, 1.0]), np.array([True, True, False]))
    (array([0., 0., 1.]), array([0. , 0.5, 1. ]))
    """
    # Examples with equal scores are on the same side of any threshold.
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
    hits, false = (np.append(0, np.cumsum(who)[last]) for who in (members, ~members))
    with np.errstate(invalid="ignore"):
        return false / np.float64(false[-1]), hits / np.float64(hits[-1])


def at_fpr(fpr: Floats, tpr: Floats, limit: float) -> float:
    """The largest true-positive rate at a false-positive rate of `limit` or less, on a curve."""
    return float(tpr[np.searchsorted(fpr, limit, side="right") - 1])


def _numbers(scores: Floats, members: Truths) -> tuple[float, float, float, float]:
    """AUC, best balanced accuracy, and true-positive rates at both limits; scores falling."""
    if members.all() or not members.any():
        return (math.nan,) * 4
    fpr, tpr = curve(scores, members)
    area = float(np.trapezoid(tpr, fpr))
    best = float((tpr + 1 - fpr).max()) / 2
    return area, best, at_fpr(fpr, tpr, LOW_FPR), at_fpr(fpr, tpr, FPR)
