"""Is training deterministic here? One committed trial trained again, and compared.

Shapes: N training and M test examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raymem.data import Examples
from raymem.encoding import JsonObject
from raymem.errors import StoreError
from raymem.fleet.worker import TrialOptions, arithmetic
from raymem.plan import Plan, Seeds
from raymem.store import Store, trial_table
from raymem.store.trials import digest, may_differ
from raymem.training import Images, Recipe, default_device, run_trial


@dataclass(frozen=True, kw_only=True)
class Repeat(JsonObject):
    """One trial trained twice with the same seeds."""

    epsilon: float
    trial: int
    identical: bool
    """Are all data columns the same, to the last bit?"""
    changed: float
    """Share of the N + M examples that are right in one run and wrong in the other."""
    drift: float
    """Largest difference of a margin, in nats of log odds."""
    comparable: bool
    """Must they be the same: on a CPU, with the same arithmetic, by one worker, and with noise that
    can be repeated."""

    @property
    def text(self) -> str:
        """The result in a sentence."""
        if self.identical:
            return f"trial {self.trial} trained again: the same, to the last bit"
        return (
            f"trial {self.trial} trained again: margins differ by up to {self.drift:.2g}, "
            f"{100 * self.changed:.2f}% of the outcomes changed"
            + ("" if self.comparable else " (on other hardware, a GPU, or with secret noise)")
        )

    def json_fields(self) -> Mapping[str, object]:
        """The fields and the sentence."""
        return {**vars(self), "text": self.text}


def repeat_trial(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    store: Store,
    options: TrialOptions,
    *,
    threads: int,
) -> Repeat:
    """Train the first committed trial that is not private (or the first at the largest epsilon)
    again, here, without committing it; write the comparison to the store.

    Raises StoreError if no trial is committed, and what training raises.
    """
    done = store.done()
    if not done:
        raise StoreError(f"{store.url} has no trial to repeat; train first")
    key = min(done, key=lambda k: (-k.epsilon, k.trial))
    about = store.provenance(key)
    if not about["seeds"]:
        raise StoreError(f"{store.url} was imported: its trials cannot be trained again")
    e, mask = examples, plan.mask(key.trial)
    device = default_device()
    images = Images.from_arrays(e.x_train, e.y_train, e.x_test, e.y_test, e.n_classes, device)
    seeds = Seeds(**about["seeds"])
    result = run_trial(
        images, mask, recipe, seeds,
        subset_size=plan.subset_size, threads=threads, **options.of(key),
    )  # fmt: skip
    again, first = trial_table(key, mask, result), store.trial(key)
    margins = (t["margin"].to_numpy().astype(np.float64) for t in (first, again))
    right = (t["correct"].to_numpy() for t in (first, again))
    found = Repeat(
        epsilon=key.epsilon,
        trial=key.trial,
        identical=digest(first) == digest(again),
        changed=float(np.mean(np.not_equal(*right))),
        drift=float(np.abs(np.subtract(*margins)).max(initial=0)),
        comparable=about.get("workers", 1) == 1
        and not may_differ(
            about,
            {
                "arithmetic": arithmetic(device, threads, recipe, result.how),
                "device": device.type,
            },
        ),
    )
    store.write_note("repeat", found)
    return found
