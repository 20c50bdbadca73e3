"""Asking an autoscaling cluster for nodes, and no longer than they are needed.

Lanes that do not exist create no demand, so the driver says how many trials could run at once. A
request to Ray's autoscaler outlives the driver that made it, and so would the bill. It is therefore
made by a small detached actor on the head node, which withdraws it when the driver asks for nothing
more, and by itself when the driver is silent: killed, or cut off. Fleets that share a cluster share
the actor, and their requests add up.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ray

from raymem.fleet.cluster import on_head

NAME, NAMESPACE = "raymem-demand", "raymem"
# A driver asks again this often, and is taken for dead after being silent for so long.
ASK_SECONDS, SILENT_SECONDS = 10.0, 60.0
Bundle = dict[str, float]


class _Keeper:
    """The actor: who asks for what, and until when."""

    def __init__(self, silent_seconds: float) -> None:
        self._silent = silent_seconds
        self._asked: dict[str, tuple[list[Bundle], float]] = {}
        self._sent: list[Bundle] | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, fleet: str, bundles: list[Bundle]) -> int:
        """What this fleet wants now, in place of what it wanted; returns what all want."""
        with self._lock:
            self._asked[fleet] = (bundles, time.monotonic() + self._silent)
            if not bundles:
                del self._asked[fleet]
            return self._send()

    def _send(self) -> int:
        from ray.autoscaler.sdk import request_resources

        wanted = [bundle for bundles, _ in self._asked.values() for bundle in bundles]
        if wanted != self._sent:
            request_resources(bundles=wanted)
            self._sent = wanted
        return len(wanted)

    def _watch(self) -> None:
        empty_since = time.monotonic()
        while True:
            time.sleep(min(1.0, self._silent / 4))
            now = time.monotonic()
            with self._lock:
                silent = [fleet for fleet, (_, until) in self._asked.items() if until < now]
                for fleet in silent:
                    del self._asked[fleet]
                if silent or self._sent is None:
                    # The first time too: whatever a driver before us left behind is withdrawn.
                    self._send()
                if self._asked:
                    empty_since = now
                elif now - empty_since > self._silent:
                    os._exit(0)


class Demand:
    """What one fleet asks of an autoscaling cluster."""

    def __init__(self, fleet: str, bundle: Bundle, silent_seconds: float = SILENT_SECONDS) -> None:
        self._fleet, self._bundle = fleet, bundle
        self._asked, self._last = 0, 0.0
        self._silent = silent_seconds
        self._keeper = self._find()

    def _find(self) -> Any:
        return (
            ray.remote(_Keeper)
            .options(
                name=NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                **on_head(),
            )
            .remote(self._silent)
        )

    def ask(self, slots: int) -> None:
        """Room for so many bundles in all, those in use included; repeated now and then."""
        now = time.monotonic()
        if slots == self._asked and now - self._last < min(ASK_SECONDS, self._silent / 4):
            return
        self._asked, self._last = slots, now
        try:
            ray.get(self._keeper.ask.remote(self._fleet, [self._bundle] * slots))
        except ray.exceptions.RayActorError:
            # It had nothing to do and went home, or its process was killed.
            self._keeper = self._find()
            ray.get(self._keeper.ask.remote(self._fleet, [self._bundle] * slots))

    def clear(self) -> None:
        """Ask for nothing more."""
        if self._asked:
            self.ask(0)
