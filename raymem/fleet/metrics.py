"""Metrics of a fleet on Ray's endpoint for Prometheus, tagged with the study's hash.

ray_raymem_trials_committed_total, ray_raymem_trials_failed_total   of this run
ray_raymem_trials_running                                           now
ray_raymem_images_total                                             trained on, in this run
"""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from raymem.fleet.progress import Progress

TAG = ("study",)


class FleetMetrics:
    """The trial queue's numbers, as metrics."""

    def __init__(self, study_hash: str) -> None:
        self._tags = {"study": study_hash[:12]}
        self._committed = Counter("raymem_trials_committed_total", "Trials committed.", TAG)
        self._failed = Counter("raymem_trials_failed_total", "Trials given up.", TAG)
        self._running = Gauge("raymem_trials_running", "Trials being trained.", TAG)
        self._last = (0, 0)

    def show(self, progress: Progress) -> None:
        """Update the metrics."""
        committed, failed = self._last
        self._last = (progress.committed, progress.failed)
        for counter, more in (
            (self._committed, progress.committed - committed),
            (self._failed, progress.failed - failed),
        ):
            if more > 0:
                counter.inc(more, self._tags)
        self._running.set(progress.running, self._tags)


def image_counter(study_hash: str) -> Callable[[int], None]:
    """For a worker: counts images trained on."""
    counter = Counter("raymem_images_total", "Images trained on.", TAG)
    tags = {"study": study_hash[:12]}

    def count(images: int) -> None:
        if images > 0:
            counter.inc(images, tags)

    return count
