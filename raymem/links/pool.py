"""The examples that an earlier study found most memorized: candidates of a private study, and what
a removal experiment leaves out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import pyarrow.compute as pc

from raymem.data import Examples
from raymem.errors import PlanError
from raymem.plan import Removal, check_sizes
from raymem.store import Store

SHOWN = 3


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
    scores, index = source.scores(), source.examples()
    here = pc.and_(pc.equal(scores["split"], "train"), pc.equal(scores["epsilon"], math.inf))
    rows = scores.filter(here).select(["example_id", "memorization"]).drop_null()
    if rows.num_rows < n:
        raise PlanError(
            f"{source.url} has memorization of {rows.num_rows:,} examples at epsilon inf, fewer "
            f"than {n:,}; train more trials there, or take fewer"
        )
    order = [("memorization", "descending"), ("example_id", "ascending")]
    top = rows.take(pc.sort_indices(rows, order))
    chosen = top["example_id"].to_pylist()[:n]
    place = {example_id: row for row, example_id in enumerate(examples.train_ids)}
    there = {
        row["example_id"]: row
        for row in index.filter(pc.equal(index["split"], "train")).to_pylist()
    }
    hashes = examples.content_hashes
    wrong = [
        example_id
        for example_id in chosen
        if example_id not in place
        or there[example_id]["label"] != int(examples.y_train[place[example_id]])
        or there[example_id]["content_hash"] not in (None, hashes[place[example_id]])
    ]
    if wrong:
        raise PlanError(
            f"{len(wrong):,} of the {n:,} most memorized examples of {source.url} are not in "
            f"{examples.name} with the same pixels and label, such as {', '.join(wrong[:SHOWN])}; "
            "take the store of a study of the same set"
        )
    values = top["memorization"].to_pylist()[:n]
    return tuple(place[example_id] for example_id in chosen), tuple(values)
