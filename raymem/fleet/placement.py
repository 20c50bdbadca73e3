"""What worker groups hold of a Ray cluster: how it is told whose it is, and given back at once.

A worker group's CPUs and GPUs are a placement group that Ray Train's controller makes. When that
controller dies with its runner or its node, Ray frees them only when the driver ends; of a lost
node, it asks the autoscaler for another one until then. So the driver removes them, knowing them by
a mark in their label selectors.

What this needs of Ray's internals is in `ray_internals`. Without it, fleets run as Ray Train runs
by itself: what dead groups held is free when the driver ends.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raymem.fleet.demand import NODE_LABEL
from raymem.fleet.ray_internals import marked_placement_groups

# A selector that every node meets: none has such a label.
MARK = "raymem/group"
# A killed controller may be starting its group again.
QUIET_SECONDS, LONGEST_SECONDS, POLL_SECONDS = 1.0, 10.0, 0.1


class Placements:
    """What the worker groups of one fleet hold."""

    def __init__(self) -> None:
        self._fleet = uuid.uuid4().hex
        self._living: set[str] = set()
        self._sweep_until = 0.0

    def selector(self, group: str, node_id: str) -> dict[str, str]:
        """The label selector of a worker group on a node, or with "" on any."""
        mark = {MARK: f"!in({self._fleet}.{group})"}
        return {**mark, NODE_LABEL: node_id} if node_id else mark

    def free(self, living: Collection[str]) -> int:
        """Remove the placement groups of worker groups that are not `living`; how many there were.

        To be called now and then: it looks for a while after a worker group has ended.
        """
        now = time.monotonic()
        if self._living.difference(living):
            self._sweep_until = now + LONGEST_SECONDS
        self._living = set(living)
        if now > self._sweep_until:
            return 0
        dead = [held for group, held in self._held() if group not in self._living]
        for group in dead:
            remove_placement_group(group)
        return len(dead)

    def close(self) -> None:
        """Remove all, and wait until no more come."""
        end = time.monotonic() + LONGEST_SECONDS
        quiet_from = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < min(end, quiet_from):
            if self.free(()):
                quiet_from = time.monotonic() + QUIET_SECONDS
            time.sleep(POLL_SECONDS)

    def _held(self) -> list[tuple[str, PlacementGroup]]:
        """The placement groups of this fleet that are not removed, and the worker groups' names."""
        start = f"!in({self._fleet}."
        held = []
        for mark, group_id in _marked():
            if mark.startswith(start):
                group = PlacementGroup(ray.PlacementGroupID(group_id))
                held.append((mark.removeprefix(start).removesuffix(")"), group))
        return held


def _marked() -> list[tuple[str, bytes]]:
    """The marks and ids of all placement groups that have a mark and are not removed."""
    try:
        return list(marked_placement_groups(MARK))
    except (AttributeError, TypeError):  # a later Ray: they are free when the driver ends
        return []
