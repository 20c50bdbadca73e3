"""Is training deterministic here? One committed trial trained again, and compared.

Shapes: N training and M test examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymem.errors import StoreError
from raymem.examples import Examples
from raymem.fleet.work import Extras
from raymem.plan import Plan, Seeds
from raymem.store import Store, trial_table
from raymem.store.trials import digest
from raymem.training import Images, Recipe, default_device, run_trial


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One trial trained twice with the same seeds."""

    epsilon: float
    trial: int
    identical: bool
    """Are all data columns the same, to the last bit?"""
    changed: float
    """Share of the N + M examples that are right once and wrong once."""
    drift: float
    """Largest difference of a margin, in nats of log odds."""
    device: str
    """Where it was trained again."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Repeat:
        """What `as_dict` gave."""
        return cls(**{**body, "epsilon": float(body["epsilon"])})


def repeat_trial(
    examples: Examples, plan: Plan, recipe: Recipe, store: Store, extras: Extras, *, threads: int
) -> Repeat:
    """Train the first committed trial that is not private (or the first at the largest epsilon)
    again, here, without committing it; write the comparison to the store.

    Raises StoreError if no trial is committed, and what training raises.
    """
    done = store.done()
    if not done:
        raise StoreError(f"{store.url} has no trial to repeat; train first")
    key = min(done, key=lambda k: (-k.epsilon, k.trial))
    if not store.provenance(key)["seeds"]:
        raise StoreError(f"{store.url} was imported: its trials cannot be trained again")
    e, mask = examples, plan.mask(key.trial)
    device = default_device()
    images = Images.from_arrays(e.x_train, e.y_train, e.x_test, e.y_test, e.n_classes, device)
    seeds = Seeds(**store.provenance(key)["seeds"])
    result = run_trial(images, mask, recipe, seeds, threads=threads, **extras.of(key))
    again, first = trial_table(key, mask, result), store.trial(key)
    margins = (t["margin"].to_numpy().astype(np.float64) for t in (first, again))
    right = (t["correct"].to_numpy() for t in (first, again))
    found = Repeat(
        epsilon=key.epsilon,
        trial=key.trial,
        identical=digest(first) == digest(again),
        changed=float(np.mean(np.not_equal(*right))),
        drift=float(np.abs(np.subtract(*margins)).max(initial=0)),
        device=device.type,
    )
    store.write_note("repeat", found.as_dict())
    return found
