"""Trial files -> scores/*.parquet: examples, trials, folds, influence.

`score(store)` is all there is to call. It can be repeated at any time, also while the fleet runs:
it takes the trials that are committed when it starts, and always writes one row per (epsilon,
example).
"""

from raymem.scoring.look import look
from raymem.scoring.score import EpsilonSummary, score

__all__ = ["EpsilonSummary", "look", "score"]
