"""Which example is in which trial, and every seed: a pure function of the plan's parameters.

In:  the number of training examples, a subset ratio, a kind, a seed.
Out: `mask(trial)` (bool, [N]) and `seeds(trial, epsilon, attempt)`. Nothing else is stored, nothing
     depends on the order in which trials are asked for, and trial 4,000 costs what trial 0 costs.

Shapes: T trials, N training examples, B trials per block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raymem.errors import PlanError

Kind = Literal["balanced", "fixed-size", "candidate-pool", "removal", "imported", "published"]
Arm = Literal["memorized", "random", "same-classes"]
# In the order of training in a removal experiment.
ARMS: tuple[Arm, ...] = get_args(Arm)

SMALLEST_BLOCK = 20
LARGEST_BLOCK = 200
# Examples per tile when ranking keys: 65,536 x B keys of 8 bytes is 10 MB at B = 20.
TILE = 65_536
# One Philox counter range for each use; a new use takes a new number, so old masks never move.
STREAM_BALANCED, STREAM_FIXED_SIZE, STREAM_REMOVAL = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The random seeds of one trial, each below 2**63.

    `init` starts the model's weights (and dropout), `order` shuffles the subset or draws Poisson
    batches, `augment` draws crops and flips, `noise` is of private training.
    """

    init: int
    order: int
    augment: int
    noise: int = 0


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What the trials of a removal experiment leave out (Feldman & Zhang 2020, section 4, fig. 2).

    Trials come in repeats of 1 + 3 K trials, K the number of sizes: one on all training examples,
    then for each size k one without the k most memorized examples, one without k random ones, and
    one without k random ones of the same classes (as many of each class as the most memorized).
    All trials of a repeat have the same seeds; each repeat draws other random examples, and those
    of a smaller size are among those of a larger one.

    Raises PlanError if the sizes or the ranking make no sense.

    >>> removal = Removal(
    ...     sizes=(1, 2), ranking=(7, 3), memorization=(0.9, 0.8), labels=(0, 1) * 5,
    ...     scored_study="", scored_trials="0-199",
    ... )
    >>> [removal.cell(trial) for trial in (0, 1, 6, 7)]
    [(0, None, 0), (0, 'memorized', 1), (0, 'same-classes', 2), (1, None, 0)]
    """

    sizes: tuple[int, ...]
    """How many examples are left out, increasing."""
    ranking: tuple[int, ...]
    """Rows of the most memorized training examples, the most memorized first: as many as the
    largest size."""
    memorization: tuple[float, ...]
    """Their estimated memorization."""
    labels: tuple[int, ...]
    """Labels of all N training examples."""
    scored_study: str
    """Hash of the study whose trials gave the ranking."""
    scored_trials: str
    """Those trials, such as "0-199". None of them is a trial of this experiment."""

    def __post_init__(self) -> None:
        for name in ("sizes", "ranking", "labels"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        memorization = tuple(float(value) for value in self.memorization)
        object.__setattr__(self, "memorization", memorization)
        if not self.sizes or list(self.sizes) != sorted({*self.sizes}) or self.sizes[0] < 1:
            raise PlanError(
                f"sizes must be numbers of examples from 1 on, each larger than the one before, "
                f"got {', '.join(map(str, self.sizes)) or 'none'}; take for example 10,20,40,80"
            )
        check_sizes(self.sizes, len(self.labels))
        if not len(self.ranking) == len(self.memorization) == self.sizes[-1]:
            raise PlanError(
                f"a ranking of {len(self.ranking):,} examples and {len(self.memorization):,} "
                f"values of memorization do not fit the largest size, {self.sizes[-1]:,}; give "
                "that many of each"
            )
        n = len(self.labels)
        if len({*self.ranking}) != len(self.ranking) or not all(0 <= i < n for i in self.ranking):
            raise PlanError(f"the ranking must name rows in 0..{n - 1}, and none twice")

    @property
    def block(self) -> int:
        """Trials of one repeat."""
        return 1 + len(ARMS) * len(self.sizes)

    def cell(self, trial: int) -> tuple[int, Arm | None, int]:
        """Repeat, arm and size of a trial; arm None and size 0: nothing is left out."""
        repeat, slot = divmod(trial, self.block)
        if slot == 0:
            return repeat, None, 0
        size, arm = divmod(slot - 1, len(ARMS))
        return repeat, ARMS[arm], self.sizes[size]

    def left_out(self, trial: int, seed: int) -> NDArray[np.int64]:
        """Rows that `trial` does not train on, of a plan with this seed: int [k]."""
        repeat, arm, k = self.cell(trial)
        ranked = np.asarray(self.ranking[:k], np.int64)
        if arm is None or arm == "memorized":
            return ranked
        draw = len(ARMS) * repeat + ARMS.index(arm)
        keys = _philox(seed, STREAM_REMOVAL, draw).random_raw(len(self.labels))
        order = np.argsort(keys, kind="stable")
        if arm == "random":
            return order[:k]
        labels = np.asarray(self.labels)
        classes, wanted = np.unique(labels[ranked], return_counts=True)
        of_order = labels[order]
        return np.concatenate(
            [order[of_order == c][:n] for c, n in zip(classes, wanted, strict=True)]
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: all of its fields."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


def check_sizes(sizes: Sequence[int], n: int) -> None:
    """Raises PlanError if so many cannot be left out of `n` training examples."""
    if max(sizes) >= n:
        raise PlanError(
            f"{max(sizes):,} examples cannot be left out of {n:,} training examples and leave one; "
            "take smaller sizes"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The random subsets of a study (Feldman & Zhang 2020, section 2: subsets of ratio r).

    Kinds, each with expected subset size `subset_ratio * n`:

    * `balanced` (default): within each block of B trials every example is in exactly
      `subset_ratio * B` of them, by a random permutation that is independent for each example.
      One trial's subset is then exactly a Bernoulli(subset_ratio) draw over the examples, and the
      numbers of in and out trials are the same for all examples after every whole block.
    * `fixed-size`: Feldman & Zhang's own design, every subset has round(subset_ratio * n) examples,
      drawn uniformly and independently.
    * `candidate-pool`: the examples in `pool` are drawn as in `balanced`, all others are always in
      (Ravikumar et al. 2024, section 6.5).
    * `removal`: not random subsets, but all examples without those that `removal` leaves out;
      `subset_ratio` is 1.
    * `imported`: subsets drawn elsewhere; they are in the trials themselves, and have no mask here.
    * `published`: scores without their trials. Nothing is known of subsets; the ratio says nothing.

    `subset_ratio=1` puts every example in every trial: trials differ by their seeds only.

    Raises PlanError if no such plan exists.

    >>> plan = Plan(n=1000, subset_ratio=0.7, seed=1)
    >>> plan.block
    20
    >>> plan.masks(range(20)).sum(axis=0).tolist() == [14] * 1000
    True
    >>> plan.mask(4000).shape
    (1000,)
    """

    n: int
    """Number of training examples."""
    subset_ratio: float = 0.7
    """Probability r, in (0, 1], that an example is in a trial's subset."""
    kind: Kind = "balanced"
    """How subsets are drawn."""
    seed: int = 0
    """Random seed of the study, in [0, 2**63)."""
    pool: tuple[int, ...] | None = None
    """Candidate-pool plans only: indices of the examples that are drawn."""
    removal: Removal | None = None
    """Removal plans only: what their trials leave out."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PlanError(f"a plan needs at least one training example, got n={self.n}")
        if not 0 < self.subset_ratio <= 1:
            raise PlanError(
                f"subset_ratio must be above 0 and at most 1, got {self.subset_ratio}; "
                "Feldman & Zhang use 0.7"
            )
        if self.kind not in get_args(Kind):
            raise PlanError(f"unknown kind {self.kind!r}; take one of {', '.join(get_args(Kind))}")
        if not 0 <= self.seed < 2**63:
            raise PlanError(f"seed must be in [0, 2**63), got {self.seed}")
        self._check_pool()
        self._check_removal()
        if self.kind in ("balanced", "candidate-pool"):
            block_of(self.subset_ratio)
        elif self.kind == "fixed-size" and not 1 <= self.subset_size <= self.n:
            raise PlanError(f"subset_ratio={self.subset_ratio} leaves no example of n={self.n}")

    def _check_pool(self) -> None:
        if (self.pool is None) == (self.kind == "candidate-pool"):
            raise PlanError("pool goes with kind='candidate-pool', and with no other kind")
        if self.pool is None:
            return
        if len(self.pool) == 0 or len(set(self.pool)) != len(self.pool):
            raise PlanError("pool must name at least one example, and none twice")
        outside = [i for i in self.pool if not 0 <= i < self.n]
        if outside:
            raise PlanError(f"pool has indices outside 0..{self.n - 1}: {outside[:5]}")
        object.__setattr__(self, "pool", tuple(sorted(int(i) for i in self.pool)))

    def _check_removal(self) -> None:
        if (self.removal is None) == (self.kind == "removal"):
            raise PlanError("removal goes with kind='removal', and with no other kind")
        if self.removal is None:
            return
        if self.subset_ratio != 1:
            raise PlanError(
                f"a removal experiment draws no random subsets, got subset_ratio="
                f"{self.subset_ratio}; take 1"
            )
        if len(self.removal.labels) != self.n:
            raise PlanError(
                f"removal has {len(self.removal.labels):,} labels, and there are {self.n:,} "
                "training examples; give one label per example"
            )

    @property
    def is_known(self) -> bool:
        """Can this plan compute the subsets? Not if they were drawn elsewhere."""
        return self.kind not in ("imported", "published")

    def __str__(self) -> str:
        """The plan in words.

        >>> str(Plan(n=1000, subset_ratio=0.7))
        'balanced subsets of ratio 0.7'
        """
        if self.kind == "published":
            return "published scores without trials"
        if self.removal is not None:
            sizes = ", ".join(map(str, self.removal.sizes))
            return f"removal experiment, k = {sizes}"
        return f"{self.kind} subsets of ratio {self.subset_ratio:g}"

    @property
    def block(self) -> int:
        """Trials per block: balance is exact after every whole block; a repeat, for `removal`."""
        if self.removal is not None:
            return self.removal.block
        drawn_in_blocks = self.kind in ("balanced", "candidate-pool")
        return block_of(self.subset_ratio) if drawn_in_blocks else SMALLEST_BLOCK

    @property
    def subset_size(self) -> int:
        """Nominal number of examples in a subset: exact for `fixed-size`, the mean otherwise."""
        if self.pool is None:
            return round(self.subset_ratio * self.n)
        return self.n - len(self.pool) + round(self.subset_ratio * len(self.pool))

    def mask(self, trial: int) -> NDArray[np.bool_]:
        """Which training examples are in the subset of `trial`: bool [N]."""
        if trial < 0:
            raise PlanError(f"trials are numbered from 0, got {trial}")
        if not self.is_known:
            raise PlanError("subsets of an imported fleet are in its trials only; it cannot grow")
        if self.removal is not None:
            mask = np.ones(self.n, bool)
            mask[self.removal.left_out(trial, self.seed)] = False
            return mask
        if self.subset_ratio == 1:
            return np.ones(self.n, bool)
        if self.kind == "fixed-size":
            keys = _philox(self.seed, STREAM_FIXED_SIZE, trial).random_raw(self.n)
            chosen = np.argpartition(keys, self.subset_size - 1)[: self.subset_size]
            mask = np.zeros(self.n, bool)
            mask[chosen] = True
            return mask
        balanced = self._balanced(trial)
        if self.pool is None:
            return balanced
        mask = np.ones(self.n, bool)
        pool = np.asarray(self.pool)
        mask[pool] = balanced[pool]
        return mask

    def masks(self, trials: Iterable[int]) -> NDArray[np.bool_]:
        """The masks of several trials: bool [T, N]."""
        rows = [self.mask(trial) for trial in trials]
        return np.stack(rows) if rows else np.zeros((0, self.n), bool)

    def _balanced(self, trial: int) -> NDArray[np.bool_]:
        # Each example has B random keys per block, one for each trial; the r*B trials with the
        # smallest keys have the example. So one trial needs the keys of its own block only.
        B = self.block
        members = round(Fraction(self.subset_ratio).limit_denominator(LARGEST_BLOCK) * B)
        block, slot = divmod(trial, B)
        generator = _philox(self.seed, STREAM_BALANCED, block)
        mask = np.empty(self.n, bool)
        for start in range(0, self.n, TILE):
            stop = min(start + TILE, self.n)
            keys = generator.random_raw((stop - start) * B).reshape(stop - start, B)
            rank = (keys < keys[:, slot : slot + 1]).sum(axis=1)
            mask[start:stop] = rank < members
        return mask

    def seeds(self, trial: int, epsilon: float = math.inf, attempt: int = 1) -> Seeds:
        """The seeds of one trial at one epsilon (inf: not private) and attempt (from 1).

        All trials of one repeat of a removal experiment have the same, and no other study has them.
        """
        name = str(trial)
        if self.removal is not None:
            name = f"removal {self.removal.cell(trial)[0]}"

        def draw(purpose: str) -> int:
            text = f"raymem/1 {self.seed} {name} {float(epsilon)!r} {attempt} {purpose}"
            digest = hashlib.sha256(text.encode()).digest()
            return int.from_bytes(digest[:8], "big") >> 1

        return Seeds(
            init=draw("init"),
            order=draw("order"),
            augment=draw("augment"),
            noise=draw("noise"),
        )

    def worst_case_stderr(self, trials: int) -> float:
        """Standard error of memorization after `trials` trials if both accuracies were 1/2.

        sqrt(1/4 / (r t) + 1/4 / ((1-r) t)), the largest it can be; inf where there are no
        out trials.

        >>> round(Plan(n=10, subset_ratio=0.7).worst_case_stderr(477), 3)
        0.05
        """
        r = self.subset_ratio
        if r == 1 or trials == 0:
            return math.inf
        return math.sqrt(0.25 / (r * trials) + 0.25 / ((1 - r) * trials))

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data: all there is to store."""
        return {
            "n": self.n,
            "subset_ratio": self.subset_ratio,
            "kind": self.kind,
            "seed": self.seed,
            "block": self.block,
            "pool": None if self.pool is None else list(self.pool),
            # Absent in plans of other kinds.
            **({} if self.removal is None else {"removal": self.removal.as_dict()}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `as_dict`."""
        pool: Sequence[int] | None = data["pool"]
        return cls(
            n=data["n"],
            subset_ratio=data["subset_ratio"],
            kind=data["kind"],
            seed=data["seed"],
            pool=None if pool is None else tuple(pool),
            removal=Removal(**data["removal"]) if "removal" in data else None,
        )


def block_of(subset_ratio: float) -> int:
    """Trials per block: 20, or the smallest larger number B with subset_ratio * B whole.

    >>> block_of(0.7), block_of(1 / 3), block_of(0.99)
    (20, 21, 100)
    """
    exact = Fraction(subset_ratio).limit_denominator(LARGEST_BLOCK)
    if abs(float(exact) - subset_ratio) > 1e-9:
        raise PlanError(
            f"subset_ratio={subset_ratio} needs blocks of more than {LARGEST_BLOCK} trials; "
            f"take {min(max(round(subset_ratio, 2), 0.01), 0.99)}, or kind='fixed-size'"
        )
    denominator = exact.denominator
    return denominator * math.ceil(SMALLEST_BLOCK / denominator)


def _philox(seed: int, stream: int, index: int) -> np.random.Philox:
    """Philox4x64-10 (Salmon et al. 2011) keyed by (seed, stream), counting from (0, index).

    Only its raw 64-bit output is used: a published algorithm, while numpy's distributions and
    permutations may change between versions (NEP 19).
    """
    counter = np.array([0, index, 0, 0], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, stream], np.uint64))
