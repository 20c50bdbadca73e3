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
from raymem.experiments import (
    STREAM_BALANCED,
    STREAM_FIXED_SIZE,
    Experiment,
    LeaveOneOut,
    Removal,
    philox,
)

Kind = Literal[
    "balanced", "fixed-size", "candidate-pool", "removal", "leave-one-out", "imported", "published"
]  # fmt: skip

SMALLEST_BLOCK = 20
LARGEST_BLOCK = 200
# Examples per tile when ranking keys: 65,536 x B keys of 8 bytes is 10 MB at B = 20.
TILE = 65_536


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
class Plan:
    """The random subsets of a study (Feldman & Zhang 2020, section 2: subsets of ratio r).

    Kinds, each with expected subset size `subset_ratio * n`:

    * `balanced` (default): within each block of B trials every example is in exactly
      `subset_ratio * B` of them, by a random permutation that is independent for each example.
      One trial's subset is then exactly a Bernoulli(subset_ratio) draw over the examples, and the
      numbers of in and out trials are the same for all examples after every whole block.
    * `fixed-size`: Feldman & Zhang's own design, every subset has round(subset_ratio * n) examples,
      drawn uniformly and independently.
    * `candidate-pool`: the examples in `pool` are drawn as in `balanced`; all others are always in
      (Ravikumar et al. 2024, section 6.5), or are drawn so too, at `rest_ratio` (0.7 in the paper's
      published scripts).
    * `removal`: not random subsets, but all examples without those that `removal` leaves out;
      `subset_ratio` is 1.
    * `leave-one-out`: all examples, or all but the one that `leave_one_out` says.
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
    """Candidate-pool plans only: indices of the candidates."""
    rest_ratio: float = 1.0
    """Candidate-pool plans only: probability that an example outside the pool is in a subset."""
    removal: Removal | None = None
    """Removal plans only: what their trials leave out."""
    leave_one_out: LeaveOneOut | None = None
    """Leave-one-out plans only: the examples."""

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
        self._check_experiments()
        if self.kind in ("balanced", "candidate-pool"):
            block_of(self.subset_ratio, self.rest_ratio)
        elif self.kind == "fixed-size" and not 1 <= self.subset_size <= self.n:
            raise PlanError(f"subset_ratio={self.subset_ratio} leaves no example of n={self.n}")

    def _check_pool(self) -> None:
        if (self.pool is None) == (self.kind == "candidate-pool"):
            raise PlanError("pool goes with kind='candidate-pool', and with no other kind")
        if self.pool is None:
            if self.rest_ratio != 1:
                raise PlanError(
                    f"rest_ratio={self.rest_ratio} is of the examples outside a candidate pool; "
                    "give a pool, or leave it out"
                )
            return
        if not 0 < self.rest_ratio <= 1:
            raise PlanError(f"rest_ratio must be above 0 and at most 1, got {self.rest_ratio}")
        if len(self.pool) == 0 or len(set(self.pool)) != len(self.pool):
            raise PlanError("pool must name at least one example, and none twice")
        outside = [i for i in self.pool if not 0 <= i < self.n]
        if outside:
            raise PlanError(f"pool has indices outside 0..{self.n - 1}: {outside[:5]}")
        object.__setattr__(self, "pool", tuple(sorted(int(i) for i in self.pool)))

    def _check_experiments(self) -> None:
        for kind, given in (("removal", self.removal), ("leave-one-out", self.leave_one_out)):
            if (given is None) == (self.kind == kind):
                name = kind.replace("-", "_")
                raise PlanError(f"{name} goes with kind='{kind}', and with no other kind")
        experiment = self.experiment
        if experiment is None:
            return
        if self.subset_ratio != 1:
            raise PlanError(
                f"a {self.kind} experiment draws no random subsets, got subset_ratio="
                f"{self.subset_ratio}; take 1"
            )
        if len(experiment.labels) != self.n:
            raise PlanError(
                f"the experiment has {len(experiment.labels):,} labels, and there are {self.n:,} "
                "training examples; give one label per example"
            )

    @property
    def experiment(self) -> Experiment | None:
        """What trials leave out on purpose; None if subsets are random."""
        return self.removal or self.leave_one_out

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
        if self.experiment is not None:
            return str(self.experiment)
        rest = f", {self.rest_ratio:g} of the others" if self.rest_ratio < 1 else ""
        return f"{self.kind} subsets of ratio {self.subset_ratio:g}{rest}"

    @property
    def block(self) -> int:
        """Trials per block: balance is exact after every whole block; a repeat of an experiment."""
        if self.experiment is not None:
            return self.experiment.block
        drawn_in_blocks = self.kind in ("balanced", "candidate-pool")
        return block_of(self.subset_ratio, self.rest_ratio) if drawn_in_blocks else SMALLEST_BLOCK

    @property
    def subset_size(self) -> int:
        """Nominal number of examples in a subset: exact for `fixed-size`, the mean otherwise."""
        if self.pool is None:
            return round(self.subset_ratio * self.n)
        rest = round(self.rest_ratio * (self.n - len(self.pool)))
        return rest + round(self.subset_ratio * len(self.pool))

    def mask(self, trial: int) -> NDArray[np.bool_]:
        """Which training examples are in the subset of `trial`: bool [N]."""
        if trial < 0:
            raise PlanError(f"trials are numbered from 0, got {trial}")
        if not self.is_known:
            raise PlanError("subsets of an imported fleet are in its trials only; it cannot grow")
        if self.experiment is not None:
            mask = np.ones(self.n, bool)
            mask[self.experiment.left_out(trial, self.seed)] = False
            return mask
        if self.subset_ratio == self.rest_ratio == 1:
            return np.ones(self.n, bool)
        if self.kind == "fixed-size":
            keys = philox(self.seed, STREAM_FIXED_SIZE, trial).random_raw(self.n)
            chosen = np.argpartition(keys, self.subset_size - 1)[: self.subset_size]
            mask = np.zeros(self.n, bool)
            mask[chosen] = True
            return mask
        return self._balanced(trial)

    def masks(self, trials: Iterable[int]) -> NDArray[np.bool_]:
        """The masks of several trials: bool [T, N]."""
        rows = [self.mask(trial) for trial in trials]
        return np.stack(rows) if rows else np.zeros((0, self.n), bool)

    def _members(self) -> NDArray[np.int64]:
        """In how many trials of a block each example is: [N]."""
        drawn, rest = (
            round(Fraction(ratio).limit_denominator(LARGEST_BLOCK) * self.block)
            for ratio in (self.subset_ratio, self.rest_ratio)
        )
        if self.pool is None:
            return np.full(self.n, drawn)
        members = np.full(self.n, rest)
        members[list(self.pool)] = drawn
        return members

    def _balanced(self, trial: int) -> NDArray[np.bool_]:
        # Each example has B random keys per block, one for each trial; the r*B trials with the
        # smallest keys have the example. So one trial needs the keys of its own block only.
        B, members = self.block, self._members()
        block, slot = divmod(trial, B)
        generator = philox(self.seed, STREAM_BALANCED, block)
        mask = np.empty(self.n, bool)
        for start in range(0, self.n, TILE):
            stop = min(start + TILE, self.n)
            keys = generator.random_raw((stop - start) * B).reshape(stop - start, B)
            rank = (keys < keys[:, slot : slot + 1]).sum(axis=1)
            mask[start:stop] = rank < members[start:stop]
        return mask

    def seeds(self, trial: int, epsilon: float = math.inf, attempt: int = 1) -> Seeds:
        """The seeds of one trial at one epsilon (inf: not private) and attempt (from 1).

        All trials of one repeat of an experiment have the same, and no other study has them.
        """
        name = str(trial)
        if self.experiment is not None:
            name = f"{self.kind} {trial // self.block}"

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

    def as_dict(self) -> dict[str, object]:
        """The plan as JSON-ready data: all there is to store."""
        return {
            "n": self.n,
            "subset_ratio": self.subset_ratio,
            "kind": self.kind,
            "seed": self.seed,
            "block": self.block,
            "pool": None if self.pool is None else list(self.pool),
            # Absent in plans of other kinds.
            **({} if self.rest_ratio == 1 else {"rest_ratio": self.rest_ratio}),
            **({} if self.removal is None else {"removal": self.removal.as_dict()}),
            **(
                {}
                if self.leave_one_out is None
                else {"leave_one_out": self.leave_one_out.as_dict()}
            ),
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
            rest_ratio=data.get("rest_ratio", 1.0),
            removal=Removal(**data["removal"]) if "removal" in data else None,
            leave_one_out=LeaveOneOut(**data["leave_one_out"]) if "leave_one_out" in data else None,
        )


def block_of(*ratios: float) -> int:
    """Trials per block: 20, or the smallest larger number B with ratio * B whole for all ratios.

    >>> block_of(0.7), block_of(1 / 3), block_of(0.99), block_of(0.5, 0.7)
    (20, 21, 100, 20)
    """
    exact = [Fraction(ratio).limit_denominator(LARGEST_BLOCK) for ratio in ratios]
    together = math.lcm(*(fraction.denominator for fraction in exact))
    for ratio, fraction in zip(ratios, exact, strict=True):
        if abs(float(fraction) - ratio) > 1e-9:
            raise PlanError(
                f"the ratio {ratio} needs blocks of more than {LARGEST_BLOCK} trials; take "
                f"{min(max(round(ratio, 2), 0.01), 0.99)}, or kind='fixed-size'"
            )
    if together > LARGEST_BLOCK:
        raise PlanError(
            f"the ratios {' and '.join(map(str, ratios))} need blocks of {together:,} trials "
            f"together, more than {LARGEST_BLOCK}; take ratios such as 0.5 and 0.7"
        )
    return together * math.ceil(SMALLEST_BLOCK / together)
