"""Influence of every training example on every test example: the pairs worth keeping.

    infl(i, j) = Pr[correct on j | i in the subset] - Pr[correct on j | i out]

(Feldman & Zhang 2020, eq. 2), from the same models as memorization. With S = correct^T masks, one
matrix product, both averages follow: S / n_in and (right - S) / n_out. All N x M values are looked
at, tile by tile, and never exist at once. Where only pairs of one class count, no others are
formed.

Shapes: T trials, N training examples i, M test examples j, k pairs per test example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymem.scores.bits import Bits, Ints
from raymem.scores.estimates import Floats, _booleans, ratio

# 512 x 4096 products of 4 bytes are 8 MB: what a core's cache and bandwidth like.
TEST_TILE, TRAIN_TILE = 512, 4096
CLASSES_FOR_SAME_CLASS_ONLY = 1000
# Tiles are float32: values this near to a limit are decided exactly afterwards, or count as zero.
ROUNDING = 1e-5
# A bit gathered for its class takes as long as this many multiplications (measured: 12 ns).
WORK_PER_GATHERED_BIT = 500


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """Which pairs are kept.

    *Strong* pairs: influence >= min_influence, memorization of the training example >=
    min_memorization (Feldman & Zhang's rule is 0.15 and 0.25), and a p-value of at most `level`:
    the hypergeometric probability of as many right trials with the training example, or more, if
    its presence made no difference. *Top* pairs: the `top` most influential training examples of
    each test example, as far as their influence is positive, however noisy.
    """

    min_influence: float = 0.15
    """Least influence of a strong pair."""
    min_memorization: float = 0.25
    """Least memorization of the training example of a strong pair."""
    level: float | None = None
    """Largest p-value of a strong pair; None: so small that one pair is expected by chance."""
    top: int = 5
    """Pairs kept for each test example in any case."""
    max_pairs: int = 1_000_000
    """At most so many in all; the most influential stay, strong ones first."""
    same_class: bool | None = None
    """Only pairs of one class; None: from 1,000 classes up."""

    def __post_init__(self) -> None:
        if self.top < 0 or self.max_pairs < 1:
            raise ValueError(
                f"top must be 0 or more and max_pairs 1 or more, got {self.top}, {self.max_pairs}"
            )


@dataclass(frozen=True, kw_only=True)
class InfluencePairs:
    """Kept pairs, most influential first within each kind; arrays have one entry per pair."""

    train_index: Ints
    test_index: Ints
    influence: Floats
    stderr: Floats
    """Standard error of influence, from both arms' own variances."""
    strong: NDArray[np.bool_]
    """Kept by the rule for strong pairs, not only among a test example's top."""
    level: float
    """Largest p-value that strong pairs could have."""
    considered: int
    """Pairs that the rule for strong pairs was applied to."""
    dropped: int
    """Pairs that max_pairs left no room for."""


def influence(masks: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Influence of N training on M test examples and its standard error, each float64 [N, M].

    masks: bool [T, N], is example i in trial t's subset. correct: bool [T, M], does trial t's model
    get test example j right. Feldman & Zhang 2020, eq. 2; standard error sqrt(sum over both arms of
    p(1-p)/(n-1)). NaN where an arm has no trial (for the error, fewer than two). For sets whose
    N x M values do not fit in memory use `find_pairs`.

    Raises ValueError if shapes differ or values are not true and false.

    >>> masks = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    >>> correct = np.array([[1], [1], [0], [0]], bool)
    >>> influence(masks, correct)[0].tolist()
    [[1.0], [0.0]]
    """
    inside, right = _booleans("masks", masks), _booleans("correct", correct)
    if len(inside) != len(right):
        raise ValueError(f"masks are of {len(inside)} trials but correct is of {len(right)}")
    right_in = inside.T.astype(np.float32) @ right.astype(np.float32)
    n_in, total = inside.sum(axis=0)[:, None], right.sum(axis=0)[None, :]
    return _influence_and_error(right_in.astype(np.float64), n_in, total, len(right))


def _influence_and_error(
    right_in: Floats, n_in: ArrayLike, right: ArrayLike, trials: int
) -> tuple[Floats, Floats]:
    n_in = np.asarray(n_in, np.float64)
    n_out = trials - n_in
    p_in, p_out = ratio(right_in, n_in), ratio(np.asarray(right) - right_in, n_out)
    variance = ratio(p_in * (1 - p_in), n_in - 1) + ratio(p_out * (1 - p_out), n_out - 1)
    return p_in - p_out, np.sqrt(variance)


def hypergeometric_tail(
    right_in: Ints, n_in: Ints, right: Ints, trials: ArrayLike, *, below: float = 1.0
) -> Floats:
    """P(X >= right_in), X the number of `right` trials of `trials` among n_in drawn ones; all [k].

    The exact one-sided p-value (Fisher's) of "right more often when the example was in", given how
    often it was in and how often models were right. Where the first term alone is above `below` the
    tail is not summed, and 1 is returned. A normal approximation is far too small where few trials
    are out: at ratio 0.9 it let tens to hundreds of false pairs pass where one was expected.

    >>> tail = hypergeometric_tail(np.array([7]), np.array([10]), np.array([8]), 20)
    >>> float(tail[0].round(6))
    0.009883
    """
    k, n, m, T = np.broadcast_arrays(right_in, n_in, right, np.asarray(trials))
    if k.size == 0:
        return np.zeros(k.shape)
    logs = np.concatenate([[0.0], np.log(np.arange(1, int(T.max()) + 1)).cumsum()])
    possible = (k <= np.minimum(n, m)) & (k >= np.maximum(0, n + m - T))
    k = np.clip(k, np.maximum(0, n + m - T), np.minimum(n, m))
    others = T - n
    log_first = (
        logs[n] - logs[k] - logs[n - k] + logs[others] - logs[m - k] - logs[others - m + k]
        - logs[T] + logs[m] + logs[T - m]
    )  # fmt: skip
    first = np.exp(log_first)
    tail = np.where(possible, first, np.where(right_in > k, 0.0, 1.0))
    at = np.flatnonzero(possible & (first <= below * (1 + 1e-9)))
    tail[possible & (first > below * (1 + 1e-9))] = 1.0
    term, j = first[at], k[at].astype(np.float64)
    while len(at):
        # P(X = j + 1) / P(X = j); 0 where no more can be.
        term = term * (n[at] - j) * (m[at] - j) / ((j + 1) * (others[at] - m[at] + j + 1))
        tail[at] += term
        going = term > tail[at] * 1e-16
        at, term, j = at[going], term[going], j[going] + 1
    return np.minimum(tail, 1.0)


def find_pairs(
    masks: Bits | ArrayLike,
    correct: Bits | ArrayLike,
    mem: ArrayLike,
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    rule: PairRule | None = None,
    *,
    tests: slice | Ints | None = None,
) -> InfluencePairs:
    """The pairs that `rule` keeps, of all N x M.

    masks: bool [T, N]; correct: bool [T, M], of the test examples. mem: [N], memorization of the
    training examples, NaN where undefined. `tests` restricts the work to some test examples, a
    slice or indices: parts can be found apart and joined with `join_pairs`. Ties at a test
    example's top go to the lower index; values that differ by float32's rounding only may change
    places there.

    Memory is the packed bits, the pairs, and tiles of at most 512 x 4,096: about 80 MB at 2,000
    trials. Where only pairs of one class count, the columns of one class are unpacked at a time.
    """
    rule = rule or PairRule()
    masks = masks if isinstance(masks, Bits) else Bits.of(_booleans("masks", masks))
    correct = correct if isinstance(correct, Bits) else Bits.of(_booleans("correct", correct))
    if len(masks) != len(correct):
        raise ValueError(f"masks are of {len(masks)} trials but correct is of {len(correct)}")
    search = _Search(masks, correct, mem, train_labels, test_labels, rule)
    every = np.arange(correct.width)
    chosen = every if tests is None else np.unique(every[tests])
    return search.finish([search.of_tests(*block) for block in search.blocks(chosen)])


def pairs_work(
    trials: int, train_labels: ArrayLike, test_labels: ArrayLike, rule: PairRule
) -> float:
    """What `find_pairs` has to do, in multiplications.

    >>> labels = np.arange(10) % 2
    >>> all_pairs, one_class = PairRule(), PairRule(same_class=True)
    >>> pairs_work(20, labels, labels, all_pairs), pairs_work(20, labels, labels, one_class)
    (2000.0, 101000.0)
    """
    y_train, y_test = np.asarray(train_labels), np.asarray(test_labels)
    if not of_one_class(rule, y_train, y_test):
        return float(trials) * len(y_train) * len(y_test)
    gathered = float(trials) * len(y_train)
    return trials * float(pairs_per_class(y_train, y_test)) + gathered * WORK_PER_GATHERED_BIT


def of_one_class(rule: PairRule, y_train: NDArray[np.generic], y_test: NDArray[np.generic]) -> bool:
    """Does `rule` leave pairs of two classes out, for these labels?"""
    if rule.same_class is not None:
        return rule.same_class
    return len(np.union1d(y_train, y_test)) >= CLASSES_FOR_SAME_CLASS_ONLY


def pairs_per_class(y_train: NDArray[np.generic], y_test: NDArray[np.generic]) -> int:
    """Pairs of one class, summed over classes."""
    labels, counts = np.unique(y_train, return_counts=True)
    tests = dict(zip(*np.unique(y_test, return_counts=True), strict=True))
    return sum(int(n) * int(tests.get(y, 0)) for y, n in zip(labels, counts, strict=True))


def join_pairs(parts: list[InfluencePairs], rule: PairRule) -> InfluencePairs:
    """Pairs found for different test examples, as if found together."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("train_index", "test_index", "influence", "stderr", "strong")
    }
    order = np.lexsort(
        (joined["train_index"], joined["test_index"], -joined["influence"], ~joined["strong"])
    )
    kept = {name: values[order[: rule.max_pairs]] for name, values in joined.items()}
    return InfluencePairs(
        **kept,
        level=parts[0].level,
        considered=parts[0].considered,
        dropped=sum(part.dropped for part in parts) + max(0, len(order) - rule.max_pairs),
    )


@dataclass
class _Found:
    """Candidate pairs of one tile: train and test index, S."""

    train: Ints
    test: Ints
    right_in: Floats


class _Search:
    def __init__(
        self,
        masks: Bits,
        correct: Bits,
        mem: ArrayLike,
        train_labels: ArrayLike,
        test_labels: ArrayLike,
        rule: PairRule,
    ) -> None:
        self.masks, self.correct, self.rule = masks, correct, rule
        self.T = len(masks)
        self.mem = np.asarray(mem, np.float64)
        self.y_train, self.y_test = np.asarray(train_labels), np.asarray(test_labels)
        for name, array, n in (
            ("mem", self.mem, masks.width),
            ("train_labels", self.y_train, masks.width),
            ("test_labels", self.y_test, correct.width),
        ):
            if array.shape != (n,):
                raise ValueError(f"{name} must have {n} entries, got shape {array.shape}")
        self.n_in, self.right = masks.counts(), correct.counts()
        # infl = S (1/n_in + 1/n_out) - right / n_out; NaN for examples that are always in or out.
        one = np.ones(masks.width)
        self.per_right = (ratio(one, self.n_in) + ratio(one, self.T - self.n_in)).astype(np.float32)
        self.per_out = ratio(one, self.T - self.n_in).astype(np.float32)
        self.same_class = of_one_class(rule, self.y_train, self.y_test)
        self.is_strong = np.isfinite(self.per_right) & (self.mem >= rule.min_memorization)
        self.considered = self._count_considered()
        self.level = 1 / max(self.considered, 1) if rule.level is None else rule.level

    def _count_considered(self) -> int:
        if not self.same_class:
            return int(self.is_strong.sum()) * len(self.y_test)
        return pairs_per_class(self.y_train[self.is_strong], self.y_test)

    def blocks(self, tests: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Test examples, a tile at most, and all training examples that make pairs with them."""
        if not self.same_class:
            everyone = np.arange(len(self.y_train))
            yield from ((part, everyone) for part in _cut(tests, TEST_TILE))
            return
        # Sorted by class once: a look at all labels for each class would grow with their product.
        by_class = np.argsort(self.y_train, kind="stable")
        y_sorted = self.y_train[by_class]
        for label in np.unique(self.y_test[tests]):
            first, last = (
                np.searchsorted(y_sorted, label),
                np.searchsorted(y_sorted, label, "right"),
            )
            members = tests[self.y_test[tests] == label]
            yield from ((part, by_class[first:last]) for part in _cut(members, TEST_TILE))

    def of_tests(self, tests: Ints, trains: Ints) -> InfluencePairs:
        """The kept pairs of `tests`, at most TEST_TILE, and `trains`; both ascending."""
        right = np.ascontiguousarray(self.correct.take(tests).T)
        total = self.right[tests, None].astype(np.float32)
        top, strong = _Top(len(tests), self.rule.top), []
        for tile in _cut(trains, TRAIN_TILE):
            S = right @ self.masks.take(tile)
            value = S * self.per_right[tile]
            value -= total * self.per_out[tile]
            top.see(value, S, tile)
            strong.append(self._strong(value, S, tests, tile))
        return self._evaluate(strong, top.found(tests))

    def _strong(
        self, value: NDArray[np.float32], S: NDArray[np.float32], tests: Ints, tile: Ints
    ) -> _Found:
        at = np.flatnonzero(self.is_strong[tile])
        # Rounding of the tile's float32 must not decide: exact values do, in _evaluate.
        row, column = np.nonzero(value[:, at] >= self.rule.min_influence - ROUNDING)
        column = at[column]
        return _Found(tile[column], tests[row], S[row, column].astype(np.float64))

    def _evaluate(self, strong: list[_Found], top: _Found) -> InfluencePairs:
        found = [*strong, top]
        train = np.concatenate([f.train for f in found])
        test = np.concatenate([f.test for f in found])
        right_in = np.concatenate([f.right_in for f in found])
        by_rule = np.arange(len(train)) < len(train) - len(top.train)
        n_in, right = self.n_in[train], self.right[test]
        value, stderr = _influence_and_error(right_in, n_in, right, self.T)
        # 7/20 - 4/20 is 0.15 on paper, and a little less in float64.
        passes = by_rule & (value >= self.rule.min_influence - 1e-12)
        at = np.flatnonzero(passes)
        k, n, m = (np.rint(v[at]).astype(np.int64) for v in (right_in, n_in, right))
        passes[at] = hypergeometric_tail(k, n, m, self.T, below=self.level) <= self.level
        keep = np.where(by_rule, passes, value > 0)
        # A pair found both ways is strong: it comes first, and np.unique keeps the first.
        pair = test * self.masks.width + train
        kept = np.flatnonzero(keep)
        kept = kept[np.sort(np.unique(pair[kept], return_index=True)[1])]
        return InfluencePairs(
            train_index=train[kept],
            test_index=test[kept],
            influence=value[kept],
            stderr=stderr[kept],
            strong=by_rule[kept],
            level=self.level,
            considered=self.considered,
            dropped=0,
        )

    def finish(self, parts: list[InfluencePairs]) -> InfluencePairs:
        empty = self._evaluate([], _Found(*(np.zeros(0, np.int64),) * 2, np.zeros(0)))
        return join_pairs([empty, *parts], self.rule)


def _cut(indices: Ints, size: int) -> Iterator[Ints]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


class _Top:
    """The k largest positive values of each row over tiles of columns, ties to the lower column.

    Tiles come in ascending order of their columns.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.k, self.seen = k, 0
        self.value = np.full((rows, k), ROUNDING, np.float32)
        self.right_in = np.zeros((rows, k), np.float32)
        self.column = np.full((rows, k), -1, np.int64)

    def see(self, value: NDArray[np.float32], S: NDArray[np.float32], tile: Ints) -> None:
        """Take the columns of one tile, numbered `tile`, into account."""
        if self.k == 0:
            return
        floor = self.value[:, -1]
        is_first, self.seen = self.seen == 0, self.seen + 1
        if is_first and value.shape[1] > self.k:
            floor = self._first_floor(value)
        row, column = np.nonzero(value > floor[:, None])
        if is_first and value.shape[1] > self.k:
            more = self._ties(value, floor)
            row, column = np.concatenate([row, more[0]]), np.concatenate([column, more[1]])
        if len(row):
            self._merge(row, tile[column], value[row, column], S[row, column])

    def _first_floor(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        kth = np.partition(np.where(np.isfinite(value), value, -1), -self.k, axis=1)[:, -self.k]
        floor: NDArray[np.float32] = np.maximum(kth, ROUNDING)
        return floor

    def _ties(self, value: NDArray[np.float32], floor: NDArray[np.float32]) -> tuple[Ints, Ints]:
        """The first columns at the floor itself, as many as the k places can hold."""
        at_floor = (value == floor[:, None]) & (floor > ROUNDING)[:, None]
        first = at_floor & (np.cumsum(at_floor, axis=1, dtype=np.int32) <= self.k)
        row, column = np.nonzero(first)
        return row, column

    def _merge(
        self, row: Ints, column: Ints, value: NDArray[np.float32], right_in: NDArray[np.float32]
    ) -> None:
        rows = np.unique(row)
        held = self.column[rows] >= 0
        old_row = np.broadcast_to(rows[:, None], held.shape)[held]
        row = np.concatenate([old_row, row])
        column = np.concatenate([self.column[rows][held], column])
        value = np.concatenate([self.value[rows][held], value])
        right_in = np.concatenate([self.right_in[rows][held], right_in])
        order = np.lexsort((column, -value, row))
        row = row[order]
        starts = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
        place = np.arange(len(row)) - np.repeat(starts, np.diff(np.append(starts, len(row))))
        keep = place < self.k
        at = (row[keep], place[keep])
        self.column[at], self.value[at] = column[order][keep], value[order][keep]
        self.right_in[at] = right_in[order][keep]

    def found(self, tests: Ints) -> _Found:
        """What is held, the rows being the test examples `tests`."""
        row, place = np.nonzero(self.column >= 0)
        return _Found(
            self.column[row, place], tests[row], self.right_in[row, place].astype(np.float64)
        )
