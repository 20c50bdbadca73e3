"""Metrics of a fleet on Ray's endpoint for Prometheus, tagged with the study's hash.

`METRICS` declares them; the dashboard (deploy/board.py) and the page on operating a fleet are held
to it by tests. Ray puts `ray_` before each name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raymem.fleet.progress import Progress, by_node


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    kind: Literal["counter", "gauge"]
    meaning: str
    tag: str = ""
    """What it is told apart by, beside the study."""


METRICS: Mapping[str, Metric] = {
    "raymem_trials_wanted": Metric(kind="gauge", meaning="trials that the study is to have"),
    "raymem_trials_done": Metric(kind="gauge", meaning="trials in the store, of all runs"),
    "raymem_trials_running": Metric(kind="gauge", meaning="trials in training"),
    "raymem_trials_committed_total": Metric(kind="counter", meaning="trials committed by this run"),
    "raymem_trials_failed_total": Metric(kind="counter", meaning="trials given up"),
    "raymem_attempts_total": Metric(
        kind="counter",
        tag="outcome",
        meaning="attempts that ended: committed, error, diverged, worker-died, node-lost, ...",
    ),
    "raymem_images_total": Metric(
        kind="counter", meaning="training images seen, augmented ones counted each time"
    ),
    "raymem_trial_seconds": Metric(
        kind="gauge", meaning="mean time from lease to commit in this run"
    ),
    "raymem_device_seconds_total": Metric(
        kind="counter", meaning="device seconds of the trials committed by this run: the cost"
    ),
    "raymem_seconds_left": Metric(kind="gauge", meaning="time left at the present rate"),
    "raymem_seconds_since_commit": Metric(
        kind="gauge", meaning="time since the last commit, or since the run began"
    ),
    "raymem_workers": Metric(kind="gauge", tag="host", meaning="workers by node"),
    "raymem_workers_starting": Metric(
        kind="gauge", meaning="workers that are announced and not there yet"
    ),
    "raymem_workers_silent": Metric(
        kind="gauge", meaning="workers without a heartbeat for two minutes"
    ),
    "raymem_workers_retired": Metric(
        kind="gauge", meaning="workers that get no more trials, as they fail where others succeed"
    ),
    "raymem_workers_asked": Metric(
        kind="gauge", meaning="workers for which the autoscaler is asked for room"
    ),
    "raymem_nodes": Metric(kind="gauge", meaning="nodes of the cluster"),
    "raymem_nodes_retired": Metric(kind="gauge", meaning="nodes that get no more workers"),
}


def readings(progress: Progress) -> dict[str, dict[str, float]]:
    """What each metric of the trial queue stands at, by its tag's value ("" if it has no tag)."""
    p, capacity = progress, progress.capacity
    numbers: dict[str, float | None] = {
        "raymem_trials_wanted": p.total,
        "raymem_trials_done": p.done,
        "raymem_trials_running": p.running,
        "raymem_trials_committed_total": p.committed,
        "raymem_trials_failed_total": p.failed,
        "raymem_trial_seconds": p.trial_seconds,
        "raymem_device_seconds_total": p.device_seconds,
        "raymem_seconds_left": p.seconds_left,
        "raymem_seconds_since_commit": p.quiet_seconds,
        "raymem_workers_starting": p.starting,
        "raymem_workers_silent": p.silent,
        "raymem_workers_retired": p.workers_retired,
        "raymem_workers_asked": None if capacity is None else capacity.asked,
        "raymem_nodes": None if capacity is None else capacity.nodes,
        "raymem_nodes_retired": len(p.retired_nodes),
    }
    found = {name: {"": float(n)} for name, n in numbers.items() if n is not None}
    found["raymem_attempts_total"] = {k: float(n) for k, n in p.outcomes.items()}
    workers = {group.node or group.name: float(group.workers) for group in by_node(p.groups)}
    return {**found, "raymem_workers": workers}


class FleetMetrics:
    """The trial queue's numbers, as metrics."""

    def __init__(self, study_hash: str, make: Callable[[str], Any] | None = None) -> None:
        make = make or _ray_metric
        self._study = study_hash[:12]
        # Workers count images themselves.
        self._metrics = {name: make(name) for name in METRICS if name != "raymem_images_total"}
        self._last: dict[tuple[str, str], float] = {}

    def show(self, progress: Progress) -> None:
        """Update the metrics."""
        now = {(k, tag): n for k, found in readings(progress).items() for tag, n in found.items()}
        # A node that is gone has no workers.
        gone = {at: 0.0 for at in self._last if at[0] == "raymem_workers" and at not in now}
        for (name, value), number in {**now, **gone}.items():
            metric, tags = METRICS[name], {"study": self._study}
            if metric.tag:
                tags[metric.tag] = value
            if metric.kind == "gauge":
                self._metrics[name].set(number, tags)
            elif (more := number - self._last.get((name, value), 0.0)) > 0:
                self._metrics[name].inc(more, tags)
        self._last = {**now, **gone}


def image_counter(study_hash: str) -> Callable[[int], None]:
    """For a worker: counts images trained on."""
    counter = _ray_metric("raymem_images_total")
    tags = {"study": study_hash[:12]}

    def count(images: int) -> None:
        if images > 0:
            counter.inc(images, tags)

    return count


def _ray_metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    metric = METRICS[name]
    tags = ("study", *([metric.tag] if metric.tag else []))
    return {"counter": Counter, "gauge": Gauge}[metric.kind](name, metric.meaning, tags)
