"""Memorization of groups of near duplicates: what no copy in training would cost.

A copy hides its twin: with one copy in, models know the other. At ratio r, two copies that cover
each other have memorization 1 - r each, however much the pair is memorized.

Shapes: N training examples, G of them with copies in training, T trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.scores.estimates import Estimate, difference_of_proportions
from raymem.scores.trial_sums import Outcomes


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Training examples that share their near-duplicate group with another training example."""

    rows: NDArray[np.int64]
    """[G] Their indices."""
    group: NDArray[np.int64]
    """[G] The group of each."""


def copies_in(index: pa.Table) -> Copies:
    """The training examples with copies in training; `index` is examples.parquet."""
    is_train = np.asarray(index["split"].to_pylist()) == "train"
    number = (
        index["near_duplicate_group"]
        .combine_chunks()
        .fill_null(-1)
        .to_numpy(zero_copy_only=False)[is_train]
    )
    groups, counts = np.unique(number, return_counts=True)
    shared = groups[(groups >= 0) & (counts > 1)]
    rows = np.flatnonzero(np.isin(number, shared))
    return Copies(rows=rows, group=number[rows])


def group_columns(copies: Copies, outcomes: Outcomes, n_rows: int) -> dict[str, object]:
    """The columns n_out_group and group_memorization* of scores/examples.parquet, train first.

    The in-arm of an example is the trials with it, as in memorization; its out-arm is the trials
    without any copy.
    """
    inside, right = outcomes.of_members()
    nobody = np.zeros_like(inside)
    for group in np.unique(copies.group):
        members = copies.group == group
        nobody[:, members] = ~inside[:, members].any(axis=1, keepdims=True)
    n_out = nobody.sum(axis=0)
    estimate: Estimate = difference_of_proportions(
        (right & inside).sum(axis=0), inside.sum(axis=0), (right & nobody).sum(axis=0), n_out
    )

    def spread(values: NDArray[np.generic]) -> NDArray[np.float64]:
        whole = np.full(n_rows, np.nan)
        whole[copies.rows] = values
        return whole

    counts = spread(n_out)
    return {
        "n_out_group": pa.array(np.nan_to_num(counts).astype(np.int32), mask=np.isnan(counts)),
        "group_memorization": spread(estimate.value),
        "group_memorization_stderr": spread(estimate.stderr),
        "group_memorization_low": spread(estimate.low),
        "group_memorization_high": spread(estimate.high),
    }
