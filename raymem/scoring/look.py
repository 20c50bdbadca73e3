"""A look at how well memorization is known, without scoring: for rules that stop a fleet.

Shapes: F folds of whole blocks, N training examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from raymem.memorization import Look, reliability
from raymem.scoring.sums import folds
from raymem.store import Store, TrialKey, read_ahead


def look(store: Store, keys: Sequence[TrialKey]) -> Look:
    """Of the trials `keys` of one epsilon, in the folds that scores have too."""
    plan = store.plan()
    fold_of = folds(keys, plan)
    n_folds = len({fold_of(key) for key in keys})
    n, right = (np.zeros((2, n_folds, plan.n)) for _ in range(2))
    for key, table in read_ahead(keys, partial(store.train_rows, names=["in_subset", "correct"])):
        inside, correct = (table[name].to_numpy().astype(bool) for name in table.column_names)
        fold = fold_of(key)
        for arm, mask in enumerate((inside, ~inside)):
            n[arm, fold] += mask
            right[arm, fold] += mask & correct
    known = math.nan
    if n_folds > 1:
        known = reliability(right[0], n[0], right[1], n[1])
    return Look(trials=len(keys), reliability=float(known), right=right.sum(1), n=n.sum(1))
