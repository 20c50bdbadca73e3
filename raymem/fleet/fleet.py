"""`run_fleet`: bring a store to its target, on Ray or in this process, from wherever it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from raymem.data import Examples
from raymem.errors import (
    FleetError,
    RaymemError,
    ResultMismatchError,
    StoreError,
    StoreFullError,
)
from raymem.fleet.long_stage import LongStage, Stopped
from raymem.fleet.progress import Progress
from raymem.fleet.resources import Resources
from raymem.fleet.trackers import TrackedRun
from raymem.fleet.trial_log import json_logs
from raymem.fleet.trial_queue import TrialQueue
from raymem.fleet.watch import FleetWatch, Watched
from raymem.fleet.worker import Job, TrialOptions, work
from raymem.models import build_model
from raymem.plan import Plan
from raymem.privacy import check_private
from raymem.store import DriverLock, Store
from raymem.training import Recipe, check_private_recipe, default_device

FATAL: dict[str, type[RaymemError]] = {
    "full": StoreFullError,
    "mismatch": ResultMismatchError,
    "store": StoreError,
    "error": FleetError,
}


def run_fleet(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    store: Store,
    options: TrialOptions | None = None,
    resources: Resources | None = None,
) -> Progress:
    """Train what `store.target` wants and the store does not have yet.

    Each trial is committed to the store by itself, once; whatever is killed, calling this again
    goes on where it was. `options` say which trials measure curvature, which keep their weights,
    and how private ones are trained.

    The store must have been opened with the study (`Store.open_study`). Raises StoreHeldError if
    another live driver has it, StoreFullError without space, StoreError if it does not answer,
    FleetError if trials cannot run, Stopped after Ctrl-C.
    """
    # A model that does not fit the images is an error here, not one in every worker.
    with torch.random.fork_rng():
        model = build_model(
            recipe.model,
            n_classes=examples.n_classes,
            image_shape=examples.image_shape,
            mean=recipe.mean,
            std=recipe.std,
        )
    options, resources = options or TrialOptions(), resources or Resources()
    if options.mechanisms:
        check_private(model, examples.image_shape)
        check_private_recipe(recipe, resources.workers_per_trial)
    latest: dict[str, object] = {}
    with (
        json_logs(resources.log_format == "json") as log,
        DriverLock(store.files, progress=lambda: latest) as lock,
        LongStage(lock, log) as stage,
    ):
        target = store.target
        wanted, done = target.wanted(), store.done()
        for key in store.checkpointed() & done:  # their worker died between commit and clearing up
            store.delete_checkpoint(key)
        pending = [key for key in wanted if key not in done]
        queue = TrialQueue(
            pending, failures=store.failures(), done_before=len(wanted) - len(pending)
        )
        progress, stopping = queue.progress(), None
        if not progress.complete:
            job = Job.of(examples, plan, recipe, store, options, resources)
            run = _run_serial if resources.engine == "serial" else _run_ray
            with _tracked(resources, store, stage) as tracked:
                watch = FleetWatch(
                    store, stage, latest, stalled_seconds=resources.stalled_seconds, tracked=tracked
                )
                progress = run(queue, job, watch, resources, stage.preempted)
            stopping = watch.stopping
    if progress.fatal is not None:
        raise FATAL[progress.fatal_kind or "error"](progress.fatal)
    if stopping is not None and progress.done + progress.failed < progress.total:
        raise Stopped(
            f"stopped after {progress.done:,} of {progress.total:,} trials; run the same command "
            "again to go on"
        )
    return progress


@contextlib.contextmanager
def _tracked(resources: Resources, store: Store, stage: LongStage) -> Iterator[TrackedRun | None]:
    """The fleet's run in the tracker that is asked for, or None."""
    if resources.tracker is None:
        yield None
        return
    tracked = TrackedRun(resources.tracker, resources.tracker_url, store, stage.line.say)
    try:
        yield tracked
    finally:
        tracked.close()


def _run_serial(
    queue: TrialQueue,
    job: Job,
    watch: Callable[[Watched, Progress], None],
    resources: Resources,
    preempted: threading.Event,
) -> Progress:
    if resources.workers_per_trial > 1:
        raise FleetError("several workers per trial need engine='ray'")
    queue.register("serial", "serial", 0)
    work(
        queue,
        job,
        torch.device("cpu") if resources.gpus_per_trial == 0 else default_device(),
        "serial",
        preempted=preempted,
        after_trial=lambda: watch(queue, queue.progress()),
    )
    return queue.progress()


def _run_ray(
    queue: TrialQueue,
    job: Job,
    watch: Callable[[Watched, Progress], None],
    resources: Resources,
    preempted: threading.Event,
) -> Progress:
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import connected

    if job.store_url.startswith("memory:"):
        raise FleetError(
            f"{job.store_url} is in this process only, and workers are others; take "
            "engine='serial' or another store"
        )
    with connected(data_bytes=job.data_bytes, verbose=resources.verbose):
        import ray

        from raymem.fleet.worker_groups import run_on_ray

        if resources.gpus_per_trial is None:
            resources = replace(resources, gpus_per_trial=_gpus_there(ray.cluster_resources()))
        return run_on_ray(queue, job, resources, watch=watch)


def _gpus_there(resources: Mapping[str, float]) -> float:
    if not resources.get("GPU") and not resources.get("CPU"):
        raise FleetError(
            "the cluster has no CPUs or GPUs yet; say what nodes to ask for with --gpus-per-trial, "
            "1 or 0"
        )
    return 1.0 if resources.get("GPU") else 0.0
