"""Margins and subsets of the trials of one epsilon, read one trial at a time.

In:  a scored store with margins. Out: `TrialMargins`, for attacks: trials in groups whose subsets
     depend on each other, and sums over trials.

Shapes: N training examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raymem.encoding import epsilon_name
from raymem.errors import DamagedObjectError, StoreError
from raymem.plan import Plan
from raymem.scores.estimates import Floats
from raymem.scores.lira import add_margins, margin_sums
from raymem.scores.running_sums import RunningSums
from raymem.store import Store, TrialKey, read_ahead

Truths = NDArray[np.bool_]
AHEAD = 4
CACHE_BYTES = 128 * 2**20
BYTES_PER_EXAMPLE = 9


class TrialMargins:
    """The scored trials at one epsilon, and sums over all of them: the first pass."""

    def __init__(self, store: Store, plan: Plan, epsilon: float) -> None:
        self.store, self.plan, self.epsilon = store, plan, epsilon
        self.keys = store.scored(epsilon)
        # Small studies are read once, whatever the number of passes.
        self.one = lru_cache(CACHE_BYTES // (plan.n * BYTES_PER_EXAMPLE))(self._one)
        if plan.kind == "published":
            raise StoreError(
                f"{store.url} has published scores without trials, and membership inference needs "
                "trials with margins"
            )
        if plan.subset_ratio == 1:
            raise StoreError(
                f"every trial of {store.url} trains on all examples (subset ratio 1), so there are "
                "no out-models; train a study with --subset-ratio 0.5"
            )
        blocks = {self.group(key) for key in self.keys}
        if len(blocks) < 2:
            single = "a single trial" if len(self.keys) == 1 else "a single block of trials"
            more = f"train {2 * plan.block} trials or more, and score them"
            if not plan.is_known:
                more = "import a fleet of more trials, into another store"
            raise StoreError(
                f"{store.url} has {single if self.keys else 'no trial'} scored at epsilon "
                f"{epsilon_name(epsilon)}, whose subsets depend on each other, so none can be "
                f"attacked with the others; {more}"
            )
        self.sums = self.sum(self.keys)

    def group(self, key: TrialKey) -> int:
        """Trials of one group have dependent subsets; groups are independent of each other."""
        in_blocks = self.plan.kind in ("balanced", "candidate-pool")
        return key.trial // self.plan.block if in_blocks else key.trial

    def sum(self, keys: Iterable[TrialKey]) -> RunningSums:
        """Sums over some trials, about the first trial of all that was read."""
        sums = None
        for _, margins, inside in self.read(keys):
            if sums is None:
                known = hasattr(self, "sums")
                sums = margin_sums(self.sums.origin["margin"] if known else margins)
            add_margins(sums, margins, inside)
        assert sums is not None
        return sums

    def read(self, keys: Iterable[TrialKey]) -> Iterator[tuple[TrialKey, Floats, Truths]]:
        """Margins and subsets, [N] each, in order; the next few are read ahead."""
        for key, (margins, inside) in read_ahead(keys, self.one, AHEAD):
            yield key, margins, inside

    def _one(self, key: TrialKey) -> tuple[Floats, Truths]:
        """Margins and subset of one trial. Raises StoreError if it has no margins."""
        table = self.store.train_rows(key, ["in_subset", "margin"])
        if table.num_rows != self.plan.n:
            raise DamagedObjectError(
                f"{key.object_key} has {table.num_rows:,} training examples instead of "
                f"{self.plan.n:,}; run `raymem verify STORE --repair`"
            )
        if table["margin"].null_count:
            raise StoreError(
                f"{self.store.url} has no margins, which membership inference needs; import the "
                "fleet again, into another store, with margins_train and margins_test"
            )
        margins = table["margin"].to_numpy().astype(np.float64)
        if not np.isfinite(margins).all():
            raise DamagedObjectError(
                f"{key.object_key} has margins that are not finite; run `raymem verify STORE "
                "--repair`, then the job"
            )
        return margins, table["in_subset"].to_numpy()
