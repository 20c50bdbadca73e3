"""Trial files -> scores/examples.parquet, scores/trials.parquet, scores/folds.parquet.

Trials are read one by one into running sums, so memory grows with the number of examples, not of
trials; a few files are read ahead. Scoring can be repeated at any time, also while the fleet runs:
it takes the trials that are committed when it starts, and always writes one row per (epsilon,
example).

Shapes: N training and M test examples, F folds. Rows of a trial file are M test, then N train.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from raymem import memorization as estimators
from raymem.errors import DamagedObjectError, StudyMismatchError
from raymem.memorization import ratio
from raymem.plan import Plan
from raymem.store import Store, TrialKey, columns
from raymem.store.trials import metadata_of

LARGEST_NUMBER_OF_FOLDS = 20
READ_AHEAD = 8
# Split halves of more examples than this would only cost memory.
EXAMPLES_FOR_RELIABILITY = 100_000
TARGETS = (0.9, 0.95, 0.98)
NEEDED = (
    "in_subset", "correct", "margin", "cumulative_loss", "learning_epoch", "forgetting_count",
)  # fmt: skip

Sums = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class EpsilonSummary:
    """What the trials at one epsilon say together."""

    epsilon: float
    trials: int
    """Trials scored."""
    accuracy_in: float
    """Mean accuracy of models on their own subsets, NaN without trials."""
    accuracy_out: float
    """Mean accuracy on the training examples they did not see."""
    accuracy_test: float
    """Mean accuracy on the test examples."""
    reliability: float
    """Split-half reliability of memorization (bit); NaN with fewer than two blocks."""
    reliability_soft: float
    """The same for memorization_soft."""
    forecast: dict[str, float]
    """Trials that would reach a reliability (bit), by reliability."""
    null: dict[str, int]
    """How many training examples have no memorization, by reason."""


def score(store: Store) -> list[EpsilonSummary]:
    """Score all committed trials of a store; replaces its scores/*.parquet.

    Raises DamagedObjectError for a trial that does not read back.
    """
    body = store.study()
    plan, target, index = store.plan(), store.target, store.examples()
    done = store.done()
    epsilons = sorted({*target.epsilons, *(key.epsilon for key in done)})
    summaries, example_tables, fold_tables, trial_rows = [], [], [], []
    for epsilon in epsilons:
        keys = sorted(key for key in done if key.epsilon == epsilon)
        rows: list[dict[str, Any]] = []
        folds = list(_fold_sums(store, keys, plan, index.num_rows, body["hash"], rows))
        fold_tables += [_fold_table(index, epsilon, n, sums) for n, sums in enumerate(folds)]
        total = _total(folds, index.num_rows)
        table = _example_table(index, epsilon, total, plan)
        example_tables.append(table)
        trial_rows += sorted(rows, key=lambda row: int(row["trial"]))
        summaries.append(_summary(epsilon, rows, table, folds, plan))
    trial_rows += _unfinished(store, done)
    about = {
        "study_hash": body["hash"],
        "summary": {f"eps-{s.epsilon:.12g}": _as_json(s) for s in summaries},
    }
    store.write_scores("folds", _concatenate(fold_tables, columns.FOLDS), about)
    trials_schema = columns.schema(columns.SCORES_TRIALS)
    store.write_scores("trials", pa.Table.from_pylist(trial_rows, schema=trials_schema), about)
    examples = _concatenate(example_tables, columns.SCORES_EXAMPLES)
    store.write_scores("examples", examples, about)
    return summaries


def _fold_sums(
    store: Store,
    keys: Sequence[TrialKey],
    plan: Plan,
    n_rows: int,
    study_hash: str,
    rows: list[dict[str, Any]],
) -> Iterator[Sums]:
    """Sums over the trials of each fold, in order; what is known of each trial goes to `rows`.

    A fold is every F-th block: a block is never cut, so folds have the plan's balance.
    """
    n_folds = min(LARGEST_NUMBER_OF_FOLDS, len({key.trial // plan.block for key in keys}))

    def fold_of(key: TrialKey) -> int:
        return (key.trial // plan.block) % n_folds

    sums = _zeros(n_rows)
    before: int | None = None
    for key, table in _read_ahead(store, sorted(keys, key=lambda k: (fold_of(k), k.trial))):
        if before is not None and fold_of(key) != before:
            yield sums
            sums = _zeros(n_rows)
        before = fold_of(key)
        rows.append(_add(sums, key, table, n_rows, study_hash))
    if before is not None:
        yield sums


def _read_ahead(store: Store, keys: Sequence[TrialKey]) -> Iterator[tuple[TrialKey, pa.Table]]:
    """Trial tables in order, the next few being read while one is used."""
    waiting: deque[tuple[TrialKey, Future[pa.Table]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="raymem-read") as pool:
        for key in keys:
            waiting.append((key, pool.submit(store.trial, key, NEEDED)))
            if len(waiting) == READ_AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for key, future in waiting:
            yield key, future.result()


def _zeros(n_rows: int) -> Sums:
    return {
        name: np.zeros(n_rows, column.type.to_pandas_dtype())
        for name, column in columns.SUMS.items()
    }


def _add(
    sums: Sums, key: TrialKey, table: pa.Table, n_rows: int, study_hash: str
) -> dict[str, Any]:
    """Add one trial to the sums; returns its row of scores/trials.parquet."""
    about = metadata_of(table, key.object_key)
    if about["study_hash"] != study_hash:
        raise StudyMismatchError(
            f"{key.object_key} belongs to another study; run `raymem verify STORE --repair`"
        )
    if table.num_rows != n_rows:
        raise DamagedObjectError(
            f"{key.object_key} has {table.num_rows} rows instead of {n_rows}; run `raymem verify "
            "STORE --repair`"
        )
    M = table["in_subset"].null_count
    inside = _numpy(table, "in_subset", False)
    right = _numpy(table, "correct", False)
    margin = _numpy(table, "margin", 0.0).astype(np.float64)
    p_true, loss = expit(margin), np.logaddexp(0, -margin)
    history = {
        name: _numpy(table, name, 0)
        for name in ("cumulative_loss", "learning_epoch", "forgetting_count")
    }
    for arm, member in (("in", inside), ("out", ~inside)):
        sums[f"n_{arm}"] += member
        sums[f"correct_{arm}"] += right & member
        sums[f"p_true_{arm}"] += p_true * member
        sums[f"p_true_squared_{arm}"] += p_true**2 * member
        sums[f"loss_{arm}"] += loss * member
    for name, values in history.items():
        sums[name] += values
    sums["learned"] += history["learning_epoch"] > 0
    out = ~inside
    out[:M] = False
    return {
        "trial": key.trial,
        "epsilon": key.epsilon,
        "status": "done",
        "attempt": about["attempt"],
        **{f"seed_{name}": seed for name, seed in about["seeds"].items()},
        "subset_size": int(inside.sum()),
        "accuracy_in": _mean(right[inside]),
        "accuracy_out": _mean(right[out]),
        "accuracy_test": _mean(right[:M]),
        "loss_in": _mean(loss[inside]),
        "loss_out": _mean(loss[out]),
        "seconds": about["seconds"],
        "device": about["device"],
        "host": about["host"],
        "digest": about["digest"],
    }


def _total(folds: Iterable[Sums], n_rows: int) -> Sums:
    total = _zeros(n_rows)
    for sums in folds:
        for name, values in sums.items():
            total[name] += values
    return total


def _example_table(index: pa.Table, epsilon: float, sums: Sums, plan: Plan) -> pa.Table:
    """scores/examples.parquet at one epsilon: train, then test, in the order of `index`."""
    sums = _train_first(sums, plan.n)
    is_test = np.asarray(index["split"].to_pylist()) == "test"
    n_in = np.where(is_test, 0, sums["n_in"])
    bit = estimators.difference_of_proportions(
        sums["correct_in"], n_in, sums["correct_out"], sums["n_out"]
    )
    soft = estimators.difference_of_means(
        sums["p_true_in"],
        sums["p_true_squared_in"],
        n_in,
        sums["p_true_out"],
        sums["p_true_squared_out"],
        sums["n_out"],
    )
    reason = np.select(
        [is_test, (n_in == 0) & (sums["n_out"] == 0), n_in == 0, sums["n_out"] == 0],
        ["test example", "no trial yet", "no in-trial", "no out-trial"],
        "",
    )
    values: dict[str, Any] = {
        "n_in": pa.array(n_in.astype(np.int32), mask=is_test),
        "n_out": sums["n_out"],
        "loss_in": ratio(sums["loss_in"], n_in),
        "loss_out": ratio(sums["loss_out"], sums["n_out"]),
        "cumulative_loss": ratio(sums["cumulative_loss"], n_in),
        "learning_epoch": ratio(sums["learning_epoch"], sums["learned"]),
        "forgetting_count": ratio(sums["forgetting_count"], n_in),
        "epsilon": np.full(len(n_in), epsilon),
        "null_reason": pa.array(reason, mask=reason == ""),
    }
    for arm, n in (("in", n_in), ("out", sums["n_out"])):
        values[f"accuracy_{arm}"] = ratio(sums[f"correct_{arm}"], n)
        values[f"p_true_{arm}"] = ratio(sums[f"p_true_{arm}"], n)
    for name, estimate in (("memorization", bit), ("memorization_soft", soft)):
        values[name] = estimate.value
        values[f"{name}_stderr"] = estimate.stderr
        values[f"{name}_low"] = estimate.low
        values[f"{name}_high"] = estimate.high
    return _as_table(index, values, columns.SCORES_EXAMPLES)


def _fold_table(index: pa.Table, epsilon: float, fold: int, sums: Sums) -> pa.Table:
    n_train = int(np.sum(np.asarray(index["split"].to_pylist()) == "train"))
    values: dict[str, Any] = {
        **_train_first(sums, n_train),
        "epsilon": np.full(index.num_rows, epsilon),
        "fold": np.full(index.num_rows, fold, np.int32),
    }
    return _as_table(index, values, columns.FOLDS)


def _summary(
    epsilon: float,
    rows: Sequence[dict[str, Any]],
    table: pa.Table,
    folds: Sequence[Sums],
    plan: Plan,
) -> EpsilonSummary:
    step = math.ceil(plan.n / EXAMPLES_FOR_RELIABILITY)
    train = slice(table.num_rows - plan.n, None, step)

    def stack(name: str) -> NDArray[Any]:
        return np.array([sums[name][train] for sums in folds])

    if len(folds) > 1:
        counts = stack("n_in"), stack("n_out")
        hard = estimators.reliability(
            stack("correct_in"), counts[0], stack("correct_out"), counts[1]
        )
        soft = estimators.reliability(stack("p_true_in"), counts[0], stack("p_true_out"), counts[1])
    else:
        hard = soft = math.nan
    reasons = Counter(table["null_reason"].slice(0, plan.n).drop_null().to_pylist())
    return EpsilonSummary(
        epsilon=epsilon,
        trials=len(rows),
        accuracy_in=_mean_of(rows, "accuracy_in"),
        accuracy_out=_mean_of(rows, "accuracy_out"),
        accuracy_test=_mean_of(rows, "accuracy_test"),
        reliability=hard,
        reliability_soft=soft,
        forecast={f"{t:g}": estimators.forecast_trials(len(rows), hard, t) for t in TARGETS},
        null=dict(reasons),
    )


def _unfinished(store: Store, done: set[TrialKey]) -> list[dict[str, Any]]:
    """Rows of trials that have only failed so far: their last failure."""
    last = {failure.key: failure for failure in store.failures() if failure.key not in done}
    return [
        {
            "trial": failure.key.trial,
            "epsilon": failure.key.epsilon,
            "status": failure.cause,
            "attempt": failure.attempt,
        }
        for failure in last.values()
    ]


def _train_first(sums: Sums, n_train: int) -> Sums:
    """Trial files have test rows first, score tables train rows first."""
    return {name: np.concatenate([v[-n_train:], v[:-n_train]]) for name, v in sums.items()}


def _as_table(index: pa.Table, values: dict[str, Any], of: columns.Columns) -> pa.Table:
    """The columns of `of` from `values` or the index; NaN becomes null."""
    arrays = {
        name: pa.array(values[name], from_pandas=True) if name in values else index[name]
        for name in of
    }
    return pa.Table.from_pydict(arrays).cast(columns.schema(of))


def _concatenate(tables: Sequence[pa.Table], of: columns.Columns) -> pa.Table:
    return pa.concat_tables([columns.schema(of).empty_table(), *tables]).combine_chunks()


def _numpy(table: pa.Table, name: str, missing: float) -> NDArray[Any]:
    column = table[name].combine_chunks().fill_null(missing)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return math.fsum(values) / len(values) if values else math.nan


def _as_json(summary: EpsilonSummary) -> dict[str, Any]:
    data = json.loads(json.dumps(vars(summary)))  # a copy; NaN and inf become null below
    return {key: _finite(value) for key, value in data.items() if key != "epsilon"}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
