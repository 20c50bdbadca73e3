"""Reads trials one by one into sums of folds, and into packed bits where sums do not suffice.

`interim_result` reads no more than a stopping rule needs, without scoring.

Shapes: N training and M test examples, F folds. Rows of a trial are N train, then M test.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from raymem.errors import DamagedObjectError, StudyMismatchError
from raymem.plan import Plan
from raymem.privacy import Mechanism
from raymem.scores.bits import Bits
from raymem.scores.estimates import Floats, reliability
from raymem.scores.running_sums import IN, OUT, RunningSums, by_arm
from raymem.scores.stopping import InterimResult
from raymem.scores.streamed_curvature import StreamedCurvature
from raymem.store import Store, TrialKey, columns, read_ahead
from raymem.store.columns import Row
from raymem.store.trials import CurvatureOverTraining, Provenance, metadata_of, train_part

LARGEST_NUMBER_OF_FOLDS = 20
NEEDED = (
    "in_subset", "correct", "margin", "cumulative_loss", "learning_epoch", "forgetting_count",
    *columns.TRIAL_CURVATURE,
)  # fmt: skip

STORED = {
    name: column.type.to_pandas_dtype()
    for name, column in {**columns.SUMS, **columns.SUMS_CURVATURE}.items()
}
ARMS = {"out": OUT, "in": IN}
HISTORY = ("cumulative_loss", "forgetting_count")


@dataclass(eq=False)
class TrialSums:
    """Sums over some trials, of N training and M test examples; for these all trials are out."""

    outcomes: RunningSums
    """correct, p_true and loss, by arm."""
    history: RunningSums
    """cumulative_loss and forgetting_count of in-trials."""
    learning: RunningSums
    """learning_epoch of the in-trials that learned the example."""
    curvature: RunningSums | None = None
    """The measures of curvature, by arm; None until a trial has them."""

    @classmethod
    def zeros(cls, n_rows: int) -> TrialSums:
        """Of no trial; `n_rows` is N + M."""
        names = ("correct", "p_true", "loss")
        return cls(
            outcomes=RunningSums.zeros((2, n_rows), names, squares=["p_true"]),
            history=RunningSums.zeros((n_rows,), HISTORY),
            learning=RunningSums.zeros((n_rows,), ["learning_epoch"]),
        )

    def __add__(self, other: TrialSums) -> TrialSums:
        """Sums over the trials of both."""
        measured = [of for of in (self.curvature, other.curvature) if of is not None]
        return TrialSums(
            outcomes=self.outcomes + other.outcomes,
            history=self.history + other.history,
            learning=self.learning + other.learning,
            curvature=functools.reduce(operator.add, measured) if measured else None,
        )

    def columns(self) -> dict[str, np.ndarray]:
        """As scores/folds.parquet has them; those of curvature only if it was measured."""
        found: dict[str, np.ndarray] = {}
        for arm, row in ARMS.items():
            found[f"n_{arm}"] = self.outcomes.n[row]
            found |= {f"{name}_{arm}": of[row] for name, of in self.outcomes.total.items()}
            found[f"p_true_squared_{arm}"] = self.outcomes.squares["p_true"][row]
            if self.curvature is not None:
                found[f"n_curvature_{arm}"] = self.curvature.n[row]
                found |= {f"{name}_{arm}": of[row] for name, of in self.curvature.total.items()}
                squares = self.curvature.squares.items()
                found |= {f"{name}_{arm}_squares": of[row] for name, of in squares}
        found |= self.history.total | self.learning.total | {"learned": self.learning.n}
        return {name: of.astype(STORED[name], copy=False) for name, of in found.items()}

    def add_trial(
        self, table: pa.Table, inside: NDArray[np.bool_], right: NDArray[np.bool_], margin: Floats
    ) -> None:
        """Add what one trial measured, [N + M] each; NaN margins and null histories (of imported
        fleets) make the sums NaN."""
        arms = by_arm(inside)
        self.outcomes.add(arms, correct=right, p_true=expit(margin), loss=loss_of(margin))
        history = {name: table[name].cast(pa.float64()).to_numpy() for name in HISTORY}
        unknown = np.where(inside & np.isnan(history["cumulative_loss"]), np.nan, 0.0)
        self.history.add(inside, **history)
        epoch = _numpy(table, "learning_epoch", 0)
        self.learning.add(epoch > 0, learning_epoch=epoch)
        self.learning.total["learning_epoch"] += unknown
        measured = [name for name in columns.TRIAL_CURVATURE if name in table.column_names]
        if measured:
            values = {name: _numpy(table, name, np.nan) for name in measured}
            self._add_curvature(arms, values)

    def _add_curvature(
        self, arms: NDArray[np.bool_], values: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Add curvature; examples that lack a value of any measure are not counted."""
        if self.curvature is None:
            squares = [name for name in values if f"{name}_in_squares" in columns.SUMS_CURVATURE]
            self.curvature = RunningSums.zeros(arms.shape, values, squares=squares)
        finite = np.logical_and.reduce([np.isfinite(of) for of in values.values()])
        self.curvature.add(arms & finite, **values)


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
    rows: list[Row],
    outcomes: Outcomes,
    streamed: StreamedCurvature,
) -> Iterator[TrialSums]:
    """Sums over the trials of each fold, in order; `rows` and `outcomes` gain each trial's.

    Curvature is the trial's own, or else what is `streamed`.

    A fold is every F-th block: a block is never cut, so folds have the plan's balance.
    """
    n_rows = outcomes.masks.width + outcomes.correct.width
    fold_of = trial_folds(keys, plan)
    sums = TrialSums.zeros(n_rows)
    before: int | None = None
    ordered = sorted(keys, key=lambda k: (fold_of(k), k.trial))
    for key, (table, about) in _read_ahead(store, ordered, streamed):
        if before is not None and fold_of(key) != before:
            yield sums
            sums = TrialSums.zeros(n_rows)
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


def _add(
    sums: TrialSums,
    key: TrialKey,
    table: pa.Table,
    about: Provenance,
    study_hash: str,
    outcomes: Outcomes,
) -> Row:
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
    margin = _numpy(table, "margin", np.nan).astype(np.float64)
    sums.add_trial(table, inside, right, margin)
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
        "loss_in": _mean(loss_of(margin[inside])),
        "loss_out": _mean(loss_of(margin[out])),
        **_curvature_row(table, about, inside, out),
        **privacy_row(about.get("privacy")),
        "seconds": about["seconds"],
        "device": about["device"],
        "host": about["host"],
        "digest": about["digest"],
    }


def _curvature_row(
    table: pa.Table, about: Provenance, inside: NDArray[np.bool_], out: NDArray[np.bool_]
) -> Row:
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


def _over_training_row(about: CurvatureOverTraining | None) -> Row:
    if about is None:
        return {}
    return {"curvature_epochs": about["epochs"], "curvature_epochs_seconds": about["seconds"]}


def privacy_row(about: Mapping[str, object] | None) -> Row:
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


def loss_of(margin: Floats) -> Floats:
    """The cross entropy of a margin, softplus(-margin), nats; NaN goes through."""
    with np.errstate(invalid="ignore"):
        return np.logaddexp(0, -margin)


def _numpy(table: pa.Table, name: str, missing: float) -> np.ndarray:
    column = table[name].combine_chunks().fill_null(missing)
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    return values


def _mean(values: np.ndarray) -> float | None:
    mean = float(values.mean()) if len(values) else np.nan
    return mean if np.isfinite(mean) else None


def interim_result(store: Store, keys: Sequence[TrialKey]) -> InterimResult:
    """Reliability and interval widths of memorization from the trials `keys` of one epsilon.

    Folds are the same as in scores/folds.parquet.
    """
    plan = store.plan()
    fold_of = trial_folds(keys, plan)
    n_folds = len({fold_of(key) for key in keys})
    folds = [RunningSums.zeros((2, plan.n), ["correct"]) for _ in range(n_folds)]
    for key, table in read_ahead(keys, partial(store.train_rows, names=["in_subset", "correct"])):
        inside, correct = (table[name].to_numpy().astype(bool) for name in table.column_names)
        folds[fold_of(key)].add(by_arm(inside), correct=correct)
    # [F, 2, N], in before out.
    right, n = (
        np.stack([of[[IN, OUT]] for of in every])
        for every in zip(*((fold.total["correct"], fold.n) for fold in folds), strict=True)
    )
    known = math.nan
    if n_folds > 1:
        known = reliability(right[:, 0], n[:, 0], right[:, 1], n[:, 1])
    return InterimResult(trials=len(keys), reliability=float(known), right=right.sum(0), n=n.sum(0))
