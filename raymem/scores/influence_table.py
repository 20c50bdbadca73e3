"""scores/influence.parquet: the pairs worth keeping, found in this process or by Ray tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.fleet.cluster import connected
from raymem.scores.influence_pairs import (
    InfluencePairs,
    PairRule,
    find_pairs,
    join_pairs,
    of_one_class,
    pairs_work,
)
from raymem.scores.trial_sums import Outcomes
from raymem.store import columns

# Multiplications from which Ray's start pays: some minutes of one core.
WORK_FOR_RAY = 5e12
# Test examples per Ray task.
TESTS_PER_TASK = 2048


def influence_pairs(
    outcomes: Outcomes,
    mem: NDArray[np.float64],
    y_train: NDArray[np.int64],
    y_test: NDArray[np.int64],
    rule: PairRule,
) -> InfluencePairs:
    """The pairs that `rule` keeps; on Ray tasks if it takes minutes. mem is [N]."""
    arguments = (outcomes.masks, outcomes.correct, mem, y_train, y_test, rule)
    if pairs_work(len(outcomes.masks), y_train, y_test, rule) < WORK_FOR_RAY:
        return find_pairs(*arguments)
    return _on_ray(arguments, parts_of(y_train, y_test, rule))


def parts_of(
    y_train: NDArray[np.int64], y_test: NDArray[np.int64], rule: PairRule
) -> list[NDArray[np.int64]]:
    """Test examples, [M] in all, by tasks of about the same size.

    Where only pairs of one class count, a task has whole classes, but for its first and its last:
    the training examples of a class are then gathered once.
    """
    order = np.arange(len(y_test))
    if of_one_class(rule, y_train, y_test):
        order = np.argsort(y_test, kind="stable")
    return [order[at : at + TESTS_PER_TASK] for at in range(0, len(order), TESTS_PER_TASK)]


def _on_ray(arguments: tuple[Any, ...], parts: list[NDArray[np.int64]]) -> InfluencePairs:
    packed = sum(len(bits) * bits.width // 8 for bits in arguments[:2])
    with connected(data_bytes=packed):
        import ray

        def part(arguments: tuple[Any, ...], tests: NDArray[np.int64]) -> InfluencePairs:
            return find_pairs(*arguments, tests=tests)

        task = ray.remote(part).options(num_cpus=1, max_retries=-1)
        shared = ray.put(arguments)
        found = ray.get([task.remote(shared, tests) for tests in parts])
        return join_pairs(found, arguments[-1])


def pairs_table(
    pairs: InfluencePairs, index: pa.Table, mem: NDArray[np.float64], epsilon: float
) -> pa.Table:
    """Pairs as rows of scores/influence.parquet; `index` is examples.parquet, train first."""
    N = len(mem)
    train, test = index.take(pairs.train_index), index.take(N + pairs.test_index)
    values = {
        "train_id": train["example_id"],
        "test_id": test["example_id"],
        "train_index": pairs.train_index,
        "test_index": pairs.test_index,
        "train_label": train["label"],
        "test_label": test["label"],
        "epsilon": np.full(len(pairs.influence), epsilon),
        "influence": pairs.influence,
        "influence_stderr": pa.array(pairs.stderr, from_pandas=True),
        "memorization": pa.array(mem[pairs.train_index], from_pandas=True),
        "strong": pairs.strong,
    }
    return pa.table(values).cast(columns.schema(columns.INFLUENCE))
