"""Asking an autoscaling cluster for nodes, and no longer than they are needed.

Lanes that do not exist create no demand, so the driver says how many more workers could be at work.
A request to Ray's autoscaler outlives the driver that made it, and so would the bill; and there is
one request for the whole cluster. Ray Train and Ray Data therefore go through an actor, the
autoscaling coordinator, that adds up what each asks for and forgets who is silent. So do we. Ray
makes that actor on the node of whoever needs it first, for good: a lane's node would never be idle
again. We need it first, on the head node.
"""

from __future__ import annotations

import time
import uuid

import ray

from raymem.fleet.cluster import on_head

# Asked again this often, and forgotten by the coordinator after being silent for so long. What
# lanes hold is asked for by Ray Train, which is forgotten after 180 s.
ASK_SECONDS, SILENT_SECONDS = 15.0, 60.0


class Demand:
    """What one fleet asks of an autoscaling cluster, beside what its lanes hold."""

    def __init__(self, bundle: dict[str, float]) -> None:
        """`bundle` is what one worker takes."""
        self._bundle, self._requester = bundle, f"raymem-{uuid.uuid4().hex}"
        self._asked, self._last = 0, 0.0
        make = ray.remote(_make_coordinator).options(num_cpus=0, **on_head())
        self._coordinator = ray.get(make.remote())

    def ask(self, workers: int) -> None:
        """Room for so many more workers; repeated now and then while it is wanted."""
        now = time.monotonic()
        if workers == self._asked and (not workers or now - self._last < ASK_SECONDS):
            return
        self._asked, self._last = workers, now
        if workers:
            request = self._coordinator.request_resources.remote(
                requester_id=self._requester,
                resources=[self._bundle] * workers,
                expire_after_s=SILENT_SECONDS,
            )
        else:
            request = self._coordinator.cancel_request.remote(requester_id=self._requester)
        ray.get(request)


def _make_coordinator() -> ray.actor.ActorHandle:
    # Ray's own libraries have no other door to it.
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as ours

    return ours.get_or_create_autoscaling_coordinator()
