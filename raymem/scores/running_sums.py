"""Reads trials one by one into running sums, and into packed bits where sums do not suffice.

`interim_result` reads no more than a stopping rule needs, without scoring.

Shapes: N training and M test examples, F folds. Rows of a trial are N train, then M test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from raymem.errors import DamagedObjectError, StudyMismatchError
from raymem.plan import Plan
from raymem.privacy import Mechanism
from raymem.scores.bits import Bits
from raymem.scores.estimates import reliability
from raymem.scores.stopping import InterimResult
from raymem.scores.streamed_curvature import StreamedCurvature
from raymem.store import Store, TrialKey, columns, read_ahead
from raymem.store.trials import CurvatureOverTraining, Provenance, metadata_of, train_part

LARGEST_NUMBER_OF_FOLDS = 20
NEEDED = (
    "in_subset", "correct", "margin", "cumulative_loss", "learning_epoch", "forgetting_count",
    *columns.TRIAL_CURVATURE,
)  # fmt: skip

Sums = dict[str, NDArray[Any]]


class Outcomes:
    """The mask of each trial, and which test examples it gets right, as packed bits.

    Also, unpacked, masks and outcomes of the training examples in `members`: those with copies.
    """

    def __init__(self, n_train: int, n_test: int, members: NDArray[np.int64]) -> None:
        self.masks, self.correct = Bits(n_train), Bits(n_test)
        self.members = members
        self._inside: list[NDArray[np.bool_]] = []
        self._right: list[NDArray[np.bool_]] = []

    def append(self, inside: NDArray[np.bool_], right: NDArray[np.bool_]) -> None:
        """Add one trial; both [N + M]."""
        N = self.masks.width
        self.masks.append(inside[:N])
        self.correct.append(right[N:])
        self._inside.append(inside[self.members])
        self._right.append(right[self.members])

    def of_members(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """In the subset, right: each [T, members]."""
        shape = (len(self._inside), len(self.members))
        return np.array(self._inside, bool).reshape(shape), np.array(self._right, bool).reshape(
            shape
        )


def fold_sums(
    store: Store,
    keys: Sequence[TrialKey],
    plan: Plan,
    study_hash: str,
    rows: list[dict[str, Any]],
    outcomes: Outcomes,
    streamed: StreamedCurvature,
) -> Iterator[Sums]:
    """Sums over the trials of each fold, in order; `rows` and `outcomes` gain each trial's.

    Curvature is the trial's own, or else what is `streamed`.

    A fold is every F-th block: a block is never cut, so folds have the plan's balance.
    """
    n_rows = outcomes.masks.width + outcomes.correct.width
    fold_of = trial_folds(keys, plan)
    sums = zeros(n_rows)
    before: int | None = None
    ordered = sorted(keys, key=lambda k: (fold_of(k), k.trial))
    for key, (table, about) in _read_ahead(store, ordered, streamed):
        if before is not None and fold_of(key) != before:
            yield sums
            sums = zeros(n_rows)
        before = fold_of(key)
        rows.append(_add(sums, key, table, about, study_hash, outcomes))
    if before is not None:
        yield sums


def trial_folds(keys: Sequence[TrialKey], plan: Plan) -> Callable[[TrialKey], int]:
    """The fold of each of these trials: every F-th block, whole."""
    n_folds = min(LARGEST_NUMBER_OF_FOLDS, len({key.trial // plan.block for key in keys}))
    return lambda key: (key.trial // plan.block) % n_folds


def _read_ahead(
    store: Store, keys: Sequence[TrialKey], streamed: StreamedCurvature
) -> Iterator[tuple[TrialKey, tuple[pa.Table, Provenance]]]:
    """Tables and metadata of trials in order, the next few being read while one is used."""

    def read(key: TrialKey) -> tuple[pa.Table, Provenance]:
        table = store.trial(key, NEEDED)
        return streamed.beside(key, table, metadata_of(table, key.object_key))

    return read_ahead(keys, read)


def zeros(n_rows: int) -> Sums:
    """Empty sums; those of curvature are added with the first trial that has it."""
    return _zeros(n_rows, columns.SUMS)


def _zeros(n_rows: int, of: columns.Columns) -> Sums:
    return {name: np.zeros(n_rows, c.type.to_pandas_dtype()) for name, c in of.items()}


def total(folds: Iterable[Sums], n_rows: int) -> Sums:
    """The sums over all folds."""
    whole = zeros(n_rows)
    for sums in folds:
        for name, values in sums.items():
            whole[name] = whole[name] + values if name in whole else values.copy()
    return whole


def _add(
    sums: Sums,
    key: TrialKey,
    table: pa.Table,
    about: Provenance,
    study_hash: str,
    outcomes: Outcomes,
) -> dict[str, Any]:
    """Add one trial to the sums and outcomes; returns its row of scores/trials.parquet."""
    if about["study_hash"] != study_hash:
        raise StudyMismatchError(
            f"{key.object_key} belongs to another study; run `raymem verify STORE --repair`"
        )
    N, M = outcomes.masks.width, outcomes.correct.width
    n_train = train_part(table, key).num_rows
    if (n_train, table.num_rows) != (N, N + M):
        raise DamagedObjectError(
            f"{key.object_key} has {n_train} train and {table.num_rows - n_train} test rows, the "
            f"study {N} and {M}; run `raymem verify STORE --repair`"
        )
    inside = _numpy(table, "in_subset", False)
    right = _numpy(table, "correct", False)
    # Imported fleets may have no margins and no history: NaN then, and null in the tables.
    margin = _numpy(table, "margin", np.nan).astype(np.float64)
    with np.errstate(invalid="ignore"):
        p_true, loss = expit(margin), np.logaddexp(0, -margin)
    for arm, member in (("in", inside), ("out", ~inside)):
        sums[f"n_{arm}"] += member
        sums[f"correct_{arm}"] += right & member
        sums[f"p_true_{arm}"] += np.where(member, p_true, 0)
        sums[f"p_true_squared_{arm}"] += np.where(member, p_true**2, 0)
        sums[f"loss_{arm}"] += np.where(member, loss, 0)
    _add_history(sums, table, inside)
    if "curvature" in table.column_names:
        _add_curvature(sums, table, inside)
    outcomes.append(inside, right)
    out = ~inside
    out[N:] = False
    return {
        "trial": key.trial,
        "epsilon": key.epsilon,
        "status": "done",
        "attempt": about["attempt"],
        **{f"seed_{name}": seed for name, seed in about["seeds"].items()},
        "subset_size": int(inside.sum()),
        "accuracy_in": _mean(right[inside]),
        "accuracy_out": _mean(right[out]),
        "accuracy_test": _mean(right[N:]),
        "loss_in": _mean(loss[inside]),
        "loss_out": _mean(loss[out]),
        **_curvature_row(table, about, inside, out),
        **privacy_row(about.get("privacy")),
        "seconds": about["seconds"],
        "device": about["device"],
        "host": about["host"],
        "digest": about["digest"],
    }


def _add_history(sums: Sums, table: pa.Table, inside: NDArray[np.bool_]) -> None:
    cumulative_loss = _numpy(table, "cumulative_loss", np.nan)
    unknown = np.where(inside & np.isnan(cumulative_loss), np.nan, 0.0)
    epoch = _numpy(table, "learning_epoch", 0)
    sums["cumulative_loss"] += np.where(inside, cumulative_loss, 0)
    sums["forgetting_count"] += _numpy(table, "forgetting_count", 0) + unknown
    sums["learning_epoch"] += epoch + unknown
    sums["learned"] += epoch > 0


def _add_curvature(sums: Sums, table: pa.Table, inside: NDArray[np.bool_]) -> None:
    """Add curvature to the sums of each arm; missing values are neither added nor counted."""
    found = {
        name: _numpy(table, name, np.nan).astype(np.float64)
        for name in columns.TRIAL_CURVATURE
        if name in table.column_names
    }
    for name, zero in _zeros(table.num_rows, columns.sums_of_curvature(found)).items():
        sums.setdefault(name, zero)
    # One count for all measures: an example counts if all of them are finite.
    has = np.logical_and.reduce([np.isfinite(values) for values in found.values()])
    for arm, member in (("in", inside & has), ("out", ~inside & has)):
        sums[f"n_curvature_{arm}"] += member
        for name, values in found.items():
            sums[f"{name}_{arm}"] += np.where(member, values, 0)
            if f"{name}_{arm}_squares" in sums:
                sums[f"{name}_{arm}_squares"] += np.where(member, values**2, 0)


def _curvature_row(
    table: pa.Table, about: Provenance, inside: NDArray[np.bool_], out: NDArray[np.bool_]
) -> dict[str, Any]:
    if "curvature" not in table.column_names:
        return {}
    values = _numpy(table, "curvature", np.nan).astype(np.float64)
    return {
        "curvature_in": _mean(values[inside]),
        "curvature_out": _mean(values[out]),
        "curvature_mode": about["curvature"]["mode"],
        "curvature_seconds": about["curvature"]["seconds"],
        **_over_training_row(about["curvature"].get("over_training")),
    }


def _over_training_row(about: CurvatureOverTraining | None) -> dict[str, Any]:
    if about is None:
        return {}
    return {"curvature_epochs": about["epochs"], "curvature_epochs_seconds": about["seconds"]}


def privacy_row(about: dict[str, Any] | None) -> dict[str, Any]:
    """Columns of TRIALS_PRIVACY from a trial's metadata; empty if its study is not private."""
    if about is None:
        return {}
    mechanism = Mechanism.from_dict(about)
    private = mechanism.accountant != "none"
    return {
        "spent_epsilon": mechanism.spent_epsilon,
        "delta": mechanism.delta if private else None,
        "accountant": mechanism.accountant if private else None,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": mechanism.steps,
        "max_grad_norm": mechanism.max_grad_norm,
    }


def _numpy(table: pa.Table, name: str, missing: float) -> NDArray[Any]:
    column = table[name].combine_chunks().fill_null(missing)
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _mean(values: NDArray[Any]) -> float | None:
    mean = float(values.mean()) if len(values) else np.nan
    return mean if np.isfinite(mean) else None


def interim_result(store: Store, keys: Sequence[TrialKey]) -> InterimResult:
    """How well memorization is known from the trials `keys` of one epsilon.

    Its folds are those of the scores.
    """
    plan = store.plan()
    fold_of = trial_folds(keys, plan)
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
    return InterimResult(trials=len(keys), reliability=float(known), right=right.sum(1), n=n.sum(1))
