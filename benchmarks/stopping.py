"""What a stopping rule does to the coverage of 95% intervals: simulated fleets.

    python benchmarks/stopping.py            # simulated fleets: coverage
    python benchmarks/stopping.py STORE      # a real one: when targets were reached, and forecasts

Each fleet has 2,000 examples whose accuracies without them are drawn from Beta(0.8, 0.6), with them
near 1, in blocks of 20 at ratio 0.7. It grows as `Study.train_until` does. Compared with fleets of
the same number of trials that nobody looked at.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np

from raymem import Store
from raymem.scores import (
    InterimResult,
    Until,
    difference_of_proportions,
    interim_result,
    reliability,
)

FLEETS, N, BLOCK, R, MOST = 60, 2000, 20, 0.7, 1000


def grow(rng: np.random.Generator, until: Until | None, trials: int = 0) -> tuple[int, float]:
    """Trials at the end, and the share of intervals that cover."""
    p_out, p_in = rng.beta(0.8, 0.6, N), 1 - rng.beta(0.3, 20, N)
    n_in, n_out = round(R * BLOCK), BLOCK - round(R * BLOCK)
    right_in = rng.binomial(n_in, p_in, (MOST // BLOCK, N)).astype(float)
    right_out = rng.binomial(n_out, p_out, (MOST // BLOCK, N)).astype(float)
    t = trials or 2 * BLOCK
    while True:
        b = t // BLOCK
        folds = np.arange(b) % min(20, b)
        sums = [np.stack([right[:b][folds == f].sum(0) for f in range(folds.max() + 1)])
                for right in (right_in, right_out)]  # fmt: skip
        counts = np.bincount(folds)[:, None] * np.ones(N)
        found = difference_of_proportions(
            right_in[:b].sum(0), np.full(N, b * n_in), right_out[:b].sum(0), np.full(N, b * n_out)
        )
        covered = float(np.mean((found.low <= p_in - p_out) & (p_in - p_out <= found.high)))
        if until is None:
            return t, covered
        known = float(reliability(sums[0], counts * n_in, sums[1], counts * n_out))
        n = np.outer([b * n_in, b * n_out], np.ones(N))
        right = np.stack([right_in[:b].sum(0), right_out[:b].sum(0)])
        seen = InterimResult(trials=t, reliability=known, right=right, n=n)
        if until.reached(until.value(seen)) or t >= MOST:
            return t, covered
        t = until.next_interim(seen, BLOCK, MOST)


def main() -> None:
    """Print a table."""
    print("target            trials (min, median, max)  coverage stopped  coverage fixed")
    for text in ("reliability=0.95", "reliability=0.98", "ci-width=0.25", "ci-width=0.15"):
        until = Until.parse(text)
        stopped = [grow(np.random.default_rng(k), until) for k in range(FLEETS)]
        fixed = [grow(np.random.default_rng(1000 + k), None, t)[1]
                 for k, (t, _) in enumerate(stopped)]  # fmt: skip
        t = np.array([t for t, _ in stopped])
        cover = np.array([c for _, c in stopped])
        print(
            f"{text:17} {t.min():4} {np.median(t):5.0f} {t.max():5}            "
            f"{cover.mean():.4f} +- {cover.std() / FLEETS**0.5:.4f}  "
            f"{np.mean(fixed):.4f} +- {np.std(fixed) / FLEETS**0.5:.4f}"
        )


def on_a_fleet(store: Store) -> None:
    """Print when a finished fleet reached targets, and what was forecast on the way.

    Targets are what the fleet had at a half and at three quarters of its trials; forecasts are from
    its first two blocks on.
    """
    block = store.plan().block
    keys = sorted(key for key in store.done() if math.isinf(key.epsilon))
    interim = [interim_result(store, keys[:n]) for n in range(2 * block, len(keys) + 1, block)]
    print("target                reached  forecast / reached, by trials at the interim result")
    for quantity in ("reliability", "ci-width"):
        for share in (0.5, 0.75):
            at = interim[round(share * (len(interim) - 1))]
            rule = Until(quantity=quantity, target=0.5)  # type: ignore[arg-type]
            until = dataclasses.replace(rule, target=round(rule.value(at), 3))
            reached = next(one.trials for one in interim if until.reached(until.value(one)))
            ratios = [
                f"{one.trials}: {(until.forecast(one) or math.nan) / reached:.2f}"
                for one in interim
                if one.trials < reached
            ]
            print(f"{until!s:20}  {reached:7}  {', '.join(ratios)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        on_a_fleet(Store(sys.argv[1]))
    else:
        main()
