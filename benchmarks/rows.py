"""A line of the results: what was measured, the goal, and whether it was met."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    result: str
    goal: str = ""
    met: bool | None = None
    why: str = ""

    def cells(self) -> tuple[str, ...]:
        met = {None: "", True: "met", False: "not met"}[self.met]
        return self.what, self.result, self.goal, f"{met}: {self.why}" if self.why else met


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def side_by_side(
    ours: Callable[[], object], usual: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Medians over repeats: usual / ours, seconds of ours, seconds of the usual way."""
    ours(), usual()  # kernels are loaded, memory is there
    pairs = [(seconds(ours), seconds(usual)) for _ in range(repeats)]
    return (
        statistics.median(b / a for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )
