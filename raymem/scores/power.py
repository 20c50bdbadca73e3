"""What a number of trials can tell, before any is trained: errors, interval widths, power.

An example is two accuracies here, p_in and p_out, and its counts those of a plan: trials are taken
for independent, as Feldman & Zhang's are. Balanced plans do a little better.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from raymem.scores.estimates import difference_of_proportions
from raymem.scores.lists import probability_above

# A list at 5% false discoveries takes examples of about this posterior probability and more.
LISTED = 0.85
DRAWS = 400
MOST_TRIALS = 1_000_000


def expected_stderr(p_in: float, p_out: float, trials: int, ratio: float) -> float:
    """Standard error of memorization: sqrt(p_in(1 - p_in)/(r t) + p_out(1 - p_out)/((1 - r) t)).

    inf where nothing is ever in or out.

    >>> [round(expected_stderr(p, 0.5, t, 0.7), 3) for p, t in ((0.5, 477), (0.99, 339))]
    [0.05, 0.05]
    """
    if not 0 < ratio < 1 or trials < 1:
        return math.inf
    inside, outside = p_in * (1 - p_in) / ratio, p_out * (1 - p_out) / (1 - ratio)
    return math.sqrt((inside + outside) / trials)


def expected_width(p_in: float, p_out: float, trials: int, ratio: float) -> float:
    """Width of the 95% interval (Newcombe's) of an example whose counts are those expected.

    >>> 0.2 < expected_width(0.99, 0.5, 100, 0.7) < 0.5
    True
    """
    n_in, n_out = round(ratio * trials), trials - round(ratio * trials)
    if n_in == 0 or n_out == 0:
        return math.inf
    found = difference_of_proportions([p_in * n_in], [n_in], [p_out * n_out], [n_out])
    return float(found.high[0] - found.low[0])


def power_to_list(p_in: float, p_out: float, trials: int, ratio: float, *, seed: int = 0) -> float:
    """Probability that an example is put on the list of those memorized above 0.25.

    By 400 simulated fleets, and taking the list to begin at a posterior probability of 0.85: where
    it does begin depends on the whole set. 0 where nothing is ever in or out.

    >>> power_to_list(0.99, 0.3, 400, 0.7) > power_to_list(0.99, 0.3, 40, 0.7) > 0.5
    True
    """
    n_in, n_out = round(ratio * trials), trials - round(ratio * trials)
    if n_in == 0 or n_out == 0:
        return 0.0
    generator = np.random.default_rng(seed)
    right_in, right_out = (
        generator.binomial(n, p, DRAWS) for n, p in ((n_in, p_in), (n_out, p_out))
    )
    above = probability_above(
        0.25, right_in, np.full(DRAWS, n_in), right_out, np.full(DRAWS, n_out)
    )
    return float((above >= LISTED).mean())


def power_of_pairs(influence: float, p_out: float, trials: int, ratio: float, pairs: int) -> float:
    """Probability that a pair of this influence is strong among `pairs`: its estimate is 0.15 or
    more, and its p-value so small that chance makes one pair in all.

    `p_out` is the test example's accuracy without the training example. Normal approximation, which
    promises too much where few trials are out (from ratio 0.8 on): strong pairs are decided by the
    exact p-value.

    >>> [round(power_of_pairs(0.4, 0.3, t, 0.7, 10**6), 1) for t in (4000, 40)]
    [1.0, 0.0]
    """
    if not 0 < ratio < 1 or trials < 1:
        return 0.0
    p = p_out + ratio * influence
    null = math.sqrt(p * (1 - p) / (ratio * (1 - ratio) * trials))
    needed = max(0.15, -float(special.ndtri(1 / max(2, pairs))) * null)
    p_in = min(1.0, p_out + influence)
    return float(special.ndtr((influence - needed) / expected_stderr(p_in, p_out, trials, ratio)))


def trials_for(reached: Callable[[int], bool], block: int) -> int | None:
    """The fewest trials, whole blocks, from which `reached` is true; None above a million.

    >>> trials_for(lambda t: expected_stderr(0.5, 0.5, t, 0.5) <= 0.05, 20)
    400
    """
    low, high = 0, block
    while not reached(high):
        low, high = high, high * 2
        if high > MOST_TRIALS:
            return None
    while high - low > block:
        middle = (low + high) // (2 * block) * block
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
