"""Trial files -> scores/examples.parquet, trials.parquet, folds.parquet, influence.parquet.

Trials are read one by one into running sums, so memory grows with the number of examples, and by
one bit per example and trial; a few files are read ahead. Sums of folds wait on the local disk.

Shapes: N training and M test examples, F folds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.encoding import JsonObject, epsilon_name
from raymem.errors import StoreError
from raymem.plan import Plan
from raymem.scores.copy_groups import Copies, copies_in, group_columns
from raymem.scores.estimates import (
    difference_of_means,
    difference_of_proportions,
    forecast_trials,
    reliability,
)
from raymem.scores.fold_buffer import FoldBuffer, FoldColumns
from raymem.scores.influence_pairs import InfluencePairs, PairRule
from raymem.scores.influence_table import influence_pairs, pairs_table
from raymem.scores.lists import list_with_fdr, probability_above
from raymem.scores.running_sums import IN, OUT, RunningSums
from raymem.scores.streamed_curvature import StreamedCurvature
from raymem.scores.trial_sums import ARMS, Outcomes, TrialSums, fold_sums
from raymem.store import Store, TrialKey, columns
from raymem.store.columns import Row

# More examples than this would add nothing to split halves but memory.
EXAMPLES_FOR_RELIABILITY = 100_000
FOR_RELIABILITY = ("n_in", "n_out", "correct_in", "correct_out", "p_true_in", "p_true_out")
TARGETS = (0.9, 0.95, 0.98)
MEMORIZED_ABOVE = 0.25
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True, kw_only=True)
class EpsilonSummary(JsonObject):
    """Summary of the trials at one epsilon."""

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
    """Split-half reliability of memorization_soft."""
    forecast: dict[str, float]
    """Trials that would reach a reliability (bit), by reliability."""
    null: dict[str, int]
    """Number of training examples without memorization, by reason."""
    memorized: int
    """Training examples on the list memorized above 0.25, at a false-discovery rate of 5%."""
    strong_pairs: int
    """Influence pairs above 0.15, and above the noise."""
    pairs: int
    """Influence pairs kept in all."""
    pairs_level: float
    """Largest p-value that strong pairs could have."""
    pairs_considered: int
    """Pairs among which strong ones were looked for."""
    curvature_modes: tuple[str, ...]
    """How trials computed the trace; values of different modes must not be averaged."""
    pairs_dropped: int
    """Pairs dropped because of --max-pairs."""

    def json_fields(self) -> Mapping[str, object]:
        """All but the epsilon, which is the key."""
        return {name: value for name, value in vars(self).items() if name != "epsilon"}


def score(store: Store, rule: PairRule | None = None) -> list[EpsilonSummary]:
    """Score all committed trials of a store; replaces its scores/*.parquet.

    `rule` says which influence pairs are kept. Raises DamagedObjectError for a trial that does not
    read back, StoreError for an experiment.
    """
    study = store.study()
    plan = study.plan
    if plan.experiment is not None:
        raise StoreError(
            f"{store.url} is a {plan.kind} experiment, which has no random subsets to score; see "
            f"`raymem {plan.kind} {store.url}`"
        )
    done, index = store.done(), store.examples()
    target = store.target
    epsilons = sorted({*target.epsilons, *(key.epsilon for key in done)})
    tables: dict[str, list[pa.Table]] = {"examples": [], "influence": []}
    summaries, trial_rows = [], []
    with FoldBuffer() as folds:
        scorer = _Scorer(
            store, study.plan, index, study.canaries, study.hash, rule or PairRule(), folds
        )
        for epsilon in epsilons:
            keys = sorted(key for key in done if key.epsilon == epsilon)
            summary, rows = scorer.at(epsilon, keys, tables)
            summaries.append(summary)
            trial_rows += sorted(rows, key=lambda row: int(row["trial"]))
        trial_rows += _unfinished(store, done)
        about = {
            "study_hash": study.hash,
            "summary": {f"eps-{epsilon_name(s.epsilon)}": s.as_dict() for s in summaries},
        }
        private = columns.TRIALS_PRIVACY if study.privacy is not None else {}
        over_training = (study.curvature or {}).get("every_epochs") is not None
        more = columns.TRIALS_OVER_TRAINING if over_training else {}
        trials_schema = columns.schema({**columns.SCORES_TRIALS, **private, **more})
        store.write_scores("trials", pa.Table.from_pylist(trial_rows, schema=trials_schema), about)
        of = _with_more(columns.FOLDS, columns.SUMS_CURVATURE, folds.names)
        parts = (_fold_table(index, *fold, of) for fold in folds)
        empty = columns.schema(of).empty_table()
        store.write_scores_in_parts("folds", empty.schema, itertools.chain([empty], parts), about)
    of = columns.INFLUENCE
    store.write_scores("influence", _concatenate(tables["influence"], of), about)
    names = {name for table in tables["examples"] for name in table.column_names}
    of = _with_more(
        columns.SCORES_EXAMPLES, {**columns.SCORES_CURVATURE, **columns.SCORES_PRIVACY}, names
    )
    store.write_scores("examples", _concatenate(tables["examples"], of), about)
    return summaries


@dataclass(frozen=True)
class _Scorer:
    """Scores the epsilons of one study, one after the other."""

    store: Store
    plan: Plan
    index: pa.Table
    canaries: Sequence[int]
    study_hash: str
    rule: PairRule
    folds: FoldBuffer

    def at(
        self, epsilon: float, keys: Sequence[TrialKey], tables: dict[str, list[pa.Table]]
    ) -> tuple[EpsilonSummary, list[Row]]:
        """The summary and the rows of the trials; adds this epsilon's part to each table."""
        N, n_rows = self.plan.n, self.index.num_rows
        copies = copies_in(self.index)
        outcomes = Outcomes(N, n_rows - N, copies.rows)
        rows: list[Row] = []
        sampled: list[FoldColumns] = []
        streamed = StreamedCurvature(self.store, self.index)
        folds = fold_sums(self.store, keys, self.plan, self.study_hash, rows, outcomes, streamed)
        sums = sum(self._kept(epsilon, folds, sampled), TrialSums.zeros(n_rows))
        table = _example_table(self.index, epsilon, sums, N, copies, outcomes, self.canaries)
        table = _with_privacy(table, rows)
        tables["examples"].append(table)
        mem = _floats(table["memorization"])[:N]
        y = np.nan_to_num(_floats(self.index["label"]), nan=-1).astype(np.int64)
        pairs = influence_pairs(outcomes, mem, y[:N], y[N:], self.rule)
        tables["influence"].append(pairs_table(pairs, self.index, mem, epsilon))
        return _summary(epsilon, rows, table, sampled, pairs), rows

    def _kept(
        self, epsilon: float, folds: Iterable[TrialSums], sampled: list[FoldColumns]
    ) -> Iterator[TrialSums]:
        """Pass the folds on; keep them for their table, and a sample for split halves."""
        N = self.plan.n
        train = slice(0, N, math.ceil(N / EXAMPLES_FOR_RELIABILITY))
        for number, sums in enumerate(folds):
            stored = sums.columns()
            self.folds.add(epsilon, number, stored)
            sampled.append({name: stored[name][train].copy() for name in FOR_RELIABILITY})
            yield sums


def _example_table(
    index: pa.Table,
    epsilon: float,
    sums: TrialSums,
    N: int,
    copies: Copies,
    outcomes: Outcomes,
    canaries: Sequence[int],
) -> pa.Table:
    """scores/examples.parquet at one epsilon: train, then test, in the order of `index`.

    Canaries have no memorization there: they would lead every list of memorized examples.
    """
    is_test = np.arange(index.num_rows) >= N
    is_canary = np.isin(np.arange(index.num_rows), canaries)
    of = sums.outcomes
    n_in, n_out = of.n[IN], of.n[OUT]
    right = of.total["correct"]
    counts = (right[IN], n_in, right[OUT], n_out)
    bit = difference_of_proportions(*counts)
    above = np.where(is_canary, np.nan, probability_above(MEMORIZED_ABOVE, *counts))
    total, squares = of.total["p_true"], of.squares["p_true"]
    soft = difference_of_means(total[IN], squares[IN], n_in, total[OUT], squares[OUT], n_out)
    reason = np.select(
        [is_test, is_canary, (n_in == 0) & (n_out == 0), n_in == 0, n_out == 0],
        ["test example", "canary", "no trial yet", "no in-trial", "no out-trial"],
        "",
    )
    values: dict[str, object] = {
        "n_in": pa.array(n_in.astype(np.int32), mask=is_test),
        "n_out": n_out,
        **{name: sums.history.mean(name) for name in sums.history.total},
        "learning_epoch": sums.learning.mean("learning_epoch"),
        "epsilon": np.full(len(n_in), epsilon),
        "memorized_probability": above,
        "memorized": pa.array(list_with_fdr(above, FALSE_DISCOVERIES), mask=np.isnan(above)),
        **group_columns(copies, outcomes, index.num_rows),
        "null_reason": pa.array(reason, mask=reason == ""),
    }
    means = {"accuracy": of.mean("correct"), "p_true": of.mean("p_true"), "loss": of.mean("loss")}
    for arm, row in ARMS.items():
        values |= {f"{name}_{arm}": mean[row] for name, mean in means.items()}
    for name, estimate in (("memorization", bit), ("memorization_soft", soft)):
        values[name] = np.where(is_canary, np.nan, estimate.value)
        values[f"{name}_stderr"] = np.where(is_canary, np.nan, estimate.stderr)
        values[f"{name}_low"] = np.where(is_canary, np.nan, estimate.low)
        values[f"{name}_high"] = np.where(is_canary, np.nan, estimate.high)
    schema = dict(columns.SCORES_EXAMPLES)
    if sums.curvature is not None:
        found = _curvature_columns(sums.curvature, is_test)
        schema.update({name: columns.SCORES_CURVATURE[name] for name in found})
        values.update(found)
    return _as_table(index, values, schema)


def _with_privacy(table: pa.Table, rows: Sequence[Row]) -> pa.Table:
    """The table with the columns of privacy; all trials at one epsilon share a mechanism."""
    private = [row for row in rows if "spent_epsilon" in row]
    if not private:
        return table
    for name, column in columns.SCORES_PRIVACY.items():
        values = pa.array([private[0][name]] * table.num_rows, column.type)
        table = table.append_column(column.field(name), values)
    return table


def _curvature_columns(sums: RunningSums, is_test: NDArray[np.bool_]) -> dict[str, object]:
    """Means over the trials of each arm, in the order of the columns; unmeasured ones left out."""
    found: dict[str, object] = {}
    for arm, row in ARMS.items():
        found[f"n_curvature_{arm}"] = pa.array(sums.n[row].astype(np.int32), mask=is_test)
        found |= {f"{name}_{arm}": sums.mean(name)[row] for name in sums.total}
        found |= {f"{name}_{arm}_stderr": sums.stderr(name)[row] for name in sums.squares}
    return {name: found[name] for name in columns.SCORES_CURVATURE if name in found}


def _fold_table(
    index: pa.Table, epsilon: float, fold: int, sums: FoldColumns, of: columns.Columns
) -> pa.Table:
    """A fold's rows of scores/folds.parquet; what only other folds measured is null."""
    values: dict[str, object] = {
        **sums,
        "epsilon": np.full(index.num_rows, epsilon),
        "fold": np.full(index.num_rows, fold, np.int32),
    }
    for name in columns.SUMS_CURVATURE.keys() & of.keys() - sums.keys():
        values[name] = pa.nulls(index.num_rows)
    return _as_table(index, values, of)


def _summary(
    epsilon: float,
    rows: Sequence[Row],
    table: pa.Table,
    folds: Sequence[FoldColumns],
    pairs: InfluencePairs,
) -> EpsilonSummary:
    """`folds` are the sums of some training examples."""

    def stack(name: str) -> NDArray[np.generic]:
        return np.array([sums[name] for sums in folds])

    if len(folds) > 1:
        counts = stack("n_in"), stack("n_out")
        hard = reliability(stack("correct_in"), counts[0], stack("correct_out"), counts[1])
        soft = reliability(stack("p_true_in"), counts[0], stack("p_true_out"), counts[1])
    else:
        hard = soft = math.nan
    is_test = pc.is_null(table["n_in"])
    reasons = Counter(table["null_reason"].filter(pc.invert(is_test)).drop_null().to_pylist())
    return EpsilonSummary(
        epsilon=epsilon,
        trials=len(rows),
        accuracy_in=_mean_of(rows, "accuracy_in"),
        accuracy_out=_mean_of(rows, "accuracy_out"),
        accuracy_test=_mean_of(rows, "accuracy_test"),
        reliability=hard,
        reliability_soft=soft,
        forecast={f"{t:g}": forecast_trials(len(rows), hard, t) for t in TARGETS},
        null=dict(reasons),
        memorized=int(pc.sum(table["memorized"]).as_py() or 0),
        strong_pairs=int(pairs.strong.sum()),
        pairs=len(pairs.strong),
        pairs_level=pairs.level,
        pairs_considered=pairs.considered,
        pairs_dropped=pairs.dropped,
        curvature_modes=tuple(
            sorted({row["curvature_mode"] for row in rows if "curvature_mode" in row})
        ),
    )


def _unfinished(store: Store, done: set[TrialKey]) -> list[Row]:
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


def _as_table(index: pa.Table, values: dict[str, object], of: columns.Columns) -> pa.Table:
    """The columns of `of` from `values` or the index; NaN becomes null."""
    arrays = {
        name: pa.array(values[name], from_pandas=True) if name in values else index[name]
        for name in of
    }
    return pa.Table.from_pydict(arrays).cast(columns.schema(of))


def _with_more(of: columns.Columns, more: columns.Columns, names: Set[str]) -> columns.Columns:
    """`of`, and those of `more` that are among `names`."""
    return {**of, **{name: column for name, column in more.items() if name in names}}


def _concatenate(tables: Sequence[pa.Table], of: columns.Columns) -> pa.Table:
    empty = columns.schema(of).empty_table()
    return pa.concat_tables([empty, *tables], promote_options="default").combine_chunks()


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return values


def _mean_of(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return math.fsum(values) / len(values) if values else math.nan
