"""Memorized examples that another training example explains: twins, found by their influence.

An example whose twin is in training is known without having been seen: out-models are right with
the twin and wrong without, and the example's own memorization says how often the twin was there,
not what the example itself is worth. A pair that covers each other has memorization 1 - r at ratio
r and none by leaving one out. Science calls such pairs false positives of the subset estimator.

In:  a scored store's trials. Out: `Twins` by epsilon.

Shapes: T trials, M targets (memorized examples of a class), C training examples of that class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.links.column_arrays import Floats, floats, train_at
from raymem.scores import hypergeometric_tail, ratio
from raymem.store import Store, TrialKey, read_ahead
from raymem.store.columns import Row

# P(right | out, twin in) - P(right | out, twin out): above it the twin explains the example.
EXPLAINS = 0.3
LEAST_MEMORIZATION = 0.15
# Examples that models without them are always wrong (or right) about have no twin.
VARIES = (0.1, 0.95)
MOST_TARGETS = 500
# Bytes of masks held at once; of larger sets the first trials must do.
MOST_BYTES = 500_000_000
# Chance of one false pair or more in the whole search.
FAMILY_WISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Pairs of training examples of one class in which the twin explains the memorized example."""

    targets: int
    """Examples looked at: memorized above 0.15, that models without them are sometimes right on."""
    pairs: int
    """Pairs looked at."""
    trials: int
    rows: list[Row] = field(default_factory=list)
    """The best twin of each target that has one, strongest first: example_id, twin_id, label,
    memorization, right_with_twin and right_without_twin (of models that did not see the example),
    group_memorization (against models that saw neither), p_value."""


def find_twins(store: Store) -> dict[float, Twins]:
    """The twins at each epsilon. Raises StoreError without scores."""
    scores = store.scores()
    found = {}
    for epsilon in sorted(set(scores["epsilon"].to_pylist())):
        found[epsilon] = _at(store, train_at(scores, epsilon), store.scored(epsilon))
    return found


def _at(store: Store, here: pa.Table, keys: Sequence[TrialKey]) -> Twins:
    mem, out = floats(here, "memorization"), floats(here, "accuracy_out")
    labels = floats(here, "label")
    likely = (mem > LEAST_MEMORIZATION) & (out > VARIES[0]) & (out < VARIES[1])
    order = np.flatnonzero(likely & np.isfinite(labels))
    targets = order[np.argsort(-mem[order], kind="stable")][:MOST_TARGETS]
    candidates = np.flatnonzero(np.isin(labels, labels[targets]))
    if not len(targets) or not keys:
        return Twins(targets=len(targets), pairs=0, trials=len(keys))
    keys = keys[: max(1, MOST_BYTES // len(candidates))]
    masks, right = _outcomes(store, keys, targets, candidates)
    classes = [np.flatnonzero(labels[targets] == label) for label in np.unique(labels[targets])]
    pairs = sum(len(t) * ((labels[candidates] == labels[targets[t[0]]]).sum() - 1) for t in classes)
    level = FAMILY_WISE / max(1, pairs)
    rows: list[Row] = []
    for places in classes:
        same = np.flatnonzero(labels[candidates] == labels[targets[places[0]]])
        own = np.searchsorted(candidates[same], targets[places])
        with_twin, without, p = _compared(masks[:, same], right[:, places], own, level)
        best = np.argmax(np.where(p <= level, with_twin - without, -math.inf), axis=1)
        for k, twin in enumerate(best):
            a, b = float(with_twin[k, twin]), float(without[k, twin])
            if p[k, twin] <= level:
                target = int(targets[places[k]])
                row = _row(here, target, int(candidates[same][twin]))
                rows.append(
                    {
                        **row,
                        "right_with_twin": a,
                        "right_without_twin": b,
                        "group_memorization": row["accuracy_in"] - b,
                        "p_value": float(p[k, twin]),
                    }
                )
    rows.sort(key=lambda row: row["right_without_twin"] - row["right_with_twin"])
    return Twins(targets=len(targets), pairs=int(pairs), trials=len(keys), rows=rows)


def _outcomes(
    store: Store,
    keys: Sequence[TrialKey],
    targets: NDArray[np.int64],
    candidates: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Who saw whom [T, candidates], and what was right [T, targets]."""
    masks, right = [], []
    for _, table in read_ahead(keys, partial(store.train_rows, names=["in_subset", "correct"])):
        masks.append(table["in_subset"].take(pa.array(candidates)).to_numpy())
        right.append(table["correct"].take(pa.array(targets)).to_numpy())
    return np.array(masks, bool), np.array(right, bool)


def _compared(
    masks: NDArray[np.bool_], right: NDArray[np.bool_], own: NDArray[np.int64], level: float
) -> tuple[Floats, Floats, Floats]:
    """Share right among models without the target [M, C], with and without each candidate, and the
    hypergeometric p-value of a difference, 1 where it is not above EXPLAINS or not below `level`.

    `own` are the targets' places among the candidates. NaN-free: shares are 0 where unknown.
    """
    seen = masks.astype(np.float32)
    outside = 1 - seen[:, own]
    hits = outside * right
    n_with, k_with = outside.T @ seen, hits.T @ seen
    n_all, k_all = (
        np.broadcast_to(counts.sum(0)[:, None], n_with.shape) for counts in (outside, hits)
    )
    with_twin, without = ratio(k_with, n_with), ratio(k_all - k_with, n_all - n_with)
    explains = with_twin - without > EXPLAINS
    explains[np.arange(len(own)), own] = False
    p = np.ones(explains.shape)
    k, n, m, T = (np.rint(v[explains]).astype(np.int64) for v in (k_with, n_with, k_all, n_all))
    p[explains] = hypergeometric_tail(k, n, m, T, below=level)
    return np.nan_to_num(with_twin), np.nan_to_num(without), p


def _row(here: pa.Table, target: int, twin: int) -> Row:
    columns = ("example_id", "label", "memorization", "accuracy_in")
    row = {name: here[name][target].as_py() for name in columns}
    return row | {"twin_id": here["example_id"][twin].as_py()}
