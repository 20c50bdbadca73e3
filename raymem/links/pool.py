"""The examples that an earlier study found most memorized: candidates of a private study, and what
removal and leave-one-out experiments leave out.

Shapes: N training examples, F folds.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.data import ABSENT, Examples, different, rows_of
from raymem.errors import PlanError
from raymem.experiments import (
    COUNTS,
    GROUPS,
    STREAM_LEAVE_ONE_OUT,
    Group,
    LeaveOneOut,
    Removal,
    check_sizes,
    philox,
)
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.folds import memorization_of
from raymem.scores import trial_folds
from raymem.store import Store

SHOWN = 3
# Two that choose, two that score: so that the scores' error is known.
LEAST_FOLDS = 4


def most_memorized(examples: Examples, store: str | os.PathLike[str], n: int) -> tuple[int, ...]:
    """Rows, among the training examples of `examples`, of the n that `store` finds most memorized.

    In the set's order; see `ranked`.
    """
    rows, _ = ranked(examples, store, n)
    return tuple(sorted(rows))


def removal_by_scores(
    examples: Examples, store: str | os.PathLike[str], sizes: Sequence[int]
) -> Removal:
    """The removal experiment on `examples` whose most memorized examples are those of `store`.

    Raises PlanError if a size is too large, and what `ranked` raises.
    """
    check_sizes(sizes, len(examples.train_ids))
    source = Store(store)
    rows, memorization = ranked(examples, store, max(sizes))
    return Removal(
        sizes=tuple(sizes),
        ranking=rows,
        memorization=memorization,
        labels=tuple(examples.y_train.tolist()),
        scored_study=source.study().hash,
        scored_trials=spans(key.trial for key in source.scored(math.inf)),
    )


def spans(numbers: Iterable[int]) -> str:
    """Increasing numbers, shortly.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def ranked(
    examples: Examples, store: str | os.PathLike[str], n: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Rows, among the training examples of `examples`, of the n that `store` finds most memorized,
    the most memorized first, and their memorization.

    By the point estimate at epsilon inf (Ravikumar et al. 2024, section 6.5: 500 of CIFAR-100).
    Rows are joined by example id, and checked by content hash and label: another set, or one in
    another order, cannot be mistaken for this one.

    Raises PlanError if the store has no such examples, StoreError if it has no scores.
    """
    source = Store(store)
    scores = train_at(source.scores(), math.inf)
    rows = scores.select(["example_id", "memorization"]).drop_null()
    if rows.num_rows < n:
        raise PlanError(
            f"{source.url} has memorization of {rows.num_rows:,} examples at epsilon inf, fewer "
            f"than {n:,}; train more trials there, or take fewer"
        )
    order = [("memorization", "descending"), ("example_id", "ascending")]
    top = rows.take(pc.sort_indices(rows, order))
    chosen = _rows_of(examples, source, top["example_id"].to_pylist()[:n], "most memorized")
    return tuple(chosen), tuple(top["memorization"].to_pylist()[:n])


def _rows_of(examples: Examples, source: Store, ids: Sequence[str], what: str) -> list[int]:
    """Rows of these examples of `source`. Raises PlanError if they are not the same examples."""
    there = source.examples()
    there = there.filter(pc.equal(there["split"], "train"))
    there = there.take(rows_of(ids, there["example_id"]))
    rows, N = rows_of(ids, examples.train_ids), len(examples.y_train)
    here = pa.table({"label": examples.y_train, "content_hash": examples.content_hashes[:N]})
    here = here.take(pa.array(rows, mask=rows == ABSENT))
    bad = pc.or_(pc.is_null(here["label"]), pc.is_null(there["label"])).to_numpy()
    for name in ("label", "content_hash"):
        bad[different(there[name], here[name])] = True
    wrong = [ids[row] for row in np.flatnonzero(bad).tolist()]
    if wrong:
        raise PlanError(
            f"{len(wrong):,} of the {len(ids):,} {what} examples of {source.url} are not in "
            f"{examples.name} with the same pixels and label, such as {', '.join(wrong[:SHOWN])}; "
            "take the store of a study of the same set"
        )
    return list(rows.tolist())


def leave_one_out_by_scores(
    examples: Examples, store: str | os.PathLike[str], k: int, *, seed: int = 0
) -> LeaveOneOut:
    """The experiment that leaves out `k` training examples of `examples`, one by one: a third
    drawn at random, a third the most memorized of the others by `store`, a third the nearest to
    memorization 0.25 of the rest.

    Folds of even number of the store's trials choose the examples, those of odd number are what
    the result is compared with. One sample for both would call the luck of the chosen bias: among
    the highest of many noisy scores most are too high.

    Raises PlanError if `k` is too small or large or there are too few blocks, StoreError without
    scores.
    """
    n = len(examples.train_ids)
    if not len(GROUPS) <= k < n:
        raise PlanError(
            f"{k:,} examples cannot be left out one by one, a third of them for each of three "
            f"reasons; take {len(GROUPS)} to {n - 1:,}"
        )
    source = Store(store)
    source.scores()  # a store without scores says so
    keys = source.scored(math.inf)
    folds = train_at(source.scores("folds"), math.inf)
    F = len(set(folds["fold"].to_pylist()))
    if not keys or F < LEAST_FOLDS:
        raise PlanError(
            f"{source.url} has {F} blocks of trials at epsilon inf: half of them choose the "
            f"examples and half score them; train {LEAST_FOLDS} blocks or more "
            f"({LEAST_FOLDS * source.plan().block} trials)"
        )
    counts = {name: floats(folds, name).reshape(F, -1) for name in COUNTS}
    mem = memorization_of(*(counts[name][::2].sum(axis=0) for name in COUNTS))
    chosen = _three_groups(mem, k, seed)
    places = [place for group in chosen.values() for place in group]
    index = source.examples()
    ids = index.filter(pc.equal(index["split"], "train"))["example_id"].to_pylist()
    fold_of = trial_folds(keys, source.plan())
    return LeaveOneOut(
        rows=tuple(_rows_of(examples, source, [ids[place] for place in places], "chosen")),
        groups=tuple(name for name, group in chosen.items() for _ in group),
        labels=tuple(examples.y_train.tolist()),
        **{name: tuple(map(tuple, counts[name][1::2][:, places].tolist())) for name in COUNTS},
        scored_ratio=source.plan().subset_ratio,
        scored_study=source.study().hash,
        scored_trials=spans(key.trial for key in keys if fold_of(key) % 2),
        chosen_by=spans(key.trial for key in keys if not fold_of(key) % 2),
    )


def _three_groups(mem: Floats, k: int, seed: int) -> dict[Group, list[int]]:
    """Places of k examples by group; examples whose memorization is not known are not taken."""
    keys = philox(seed, STREAM_LEAVE_ONE_OUT, 0).random_raw(len(mem))
    orders: dict[Group, NDArray[np.int64]] = {
        "random": np.argsort(keys, kind="stable"),
        "most memorized": np.argsort(-mem, kind="stable"),
        "near 0.25": np.argsort(np.abs(mem - 0.25), kind="stable"),
    }
    taken: set[int] = set()
    found: dict[Group, list[int]] = {}
    for i, name in enumerate(GROUPS):
        size = k // len(GROUPS) + (i < k % len(GROUPS))
        free = (int(p) for p in orders[name] if np.isfinite(mem[p]) and int(p) not in taken)
        found[name] = list(itertools.islice(free, size))
        taken.update(found[name])
    return found
