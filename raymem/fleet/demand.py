"""Asking an autoscaling cluster for nodes, and no longer than they are needed.

Worker groups that do not exist create no demand, so the driver says how many more workers could be
at work: by one placement group for each, which no node that is there may hold. An autoscaler takes
each of them by itself, so that of more than the cluster may grow to, as many nodes come as may come
(a request for the whole cluster, `request_resources`, is met whole or not at all by Ray's second
autoscaler). They go with the driver, however it ends.
"""

from __future__ import annotations

from collections.abc import Collection

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

NODE_LABEL = "ray.io/node-id"
# Asked for at once, at least; large fleets double. What a full cluster cannot give waits for ever,
# and Ray's autoscalers look at all of it in every round.
AHEAD = 32


class Demand:
    """What one fleet asks of an autoscaling cluster, beside what its worker groups hold."""

    def __init__(self, bundle: dict[str, float]) -> None:
        """`bundle` is what one worker takes."""
        self._bundle = bundle
        self._asked: list[PlacementGroup] = []
        self._known: set[str] = set()

    @property
    def asked(self) -> int:
        """Workers for which room is asked now."""
        return len(self._asked)

    def ask(self, workers: int, *, known: Collection[str], at_work: int = 0) -> None:
        """Room for `workers` more on nodes that are not `known` by their ids.

        Nodes that have just come are known, and have room until their worker group is up: what is
        asked for must not take it, so it is asked for anew. `at_work` workers have room already.
        """
        if not self._known.issuperset(known):
            self._withdraw(len(self._asked))
        self._known = set(known)
        wanted = min(workers, max(AHEAD, at_work))
        self._withdraw(len(self._asked) - wanted)
        elsewhere = {NODE_LABEL: f"!in({','.join(sorted(self._known))})"} if self._known else {}
        while len(self._asked) < wanted:
            group = placement_group([self._bundle], bundle_label_selector=[elsewhere])
            self._asked.append(group)

    def _withdraw(self, n: int) -> None:
        for _ in range(n):
            remove_placement_group(self._asked.pop())
