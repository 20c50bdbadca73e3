"""Membership inference from a fleet's margins: who was in a model's subset, told from its answers.

`membership(store)` is all there is to call; `online`, `offline` and `scores` take plain arrays.
"""

from raymem.membership.crossed import RankCorrelation
from raymem.membership.lira import Moments, Sums, offline, online, scores, vulnerability
from raymem.membership.roc import Attack, Rate, attack
from raymem.membership.stored import (
    Attacked,
    Membership,
    membership,
    read_membership,
)

__all__ = [
    "Attack",
    "Attacked",
    "Membership",
    "Moments",
    "RankCorrelation",
    "Rate",
    "Sums",
    "attack",
    "membership",
    "offline",
    "online",
    "read_membership",
    "scores",
    "vulnerability",
]
