"""The fleet on Ray: groups of Ray Train workers, a trial queue actor, a loop that watches them.

A worker group is one long-lived `TorchTrainer.fit()` inside a runner actor on the node of the
group, with one worker for each slot of that node. Workers lease trials from the trial queue and
commit them to the store by themselves. Where several workers train each model together, a worker
group is these, and the first of them leases. When a worker dies, Ray Train restarts its worker
group; a lost node costs its worker group. Worker groups share nothing but the trial queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raymem.errors import FleetError, first_line
from raymem.fleet.blame import Location
from raymem.fleet.cluster import is_private, on_head
from raymem.fleet.demand import NODE_LABEL, Demand
from raymem.fleet.metrics import FleetMetrics, image_counter
from raymem.fleet.placement import Placements
from raymem.fleet.ray_internals import RUNNER_ENVIRONMENT, GroupTrainer, draining_nodes
from raymem.fleet.remote_queue import RemoteQueue
from raymem.fleet.resources import Resources
from raymem.fleet.trial_queue import Progress, TrialQueue
from raymem.fleet.worker import Job, work
from raymem.training import ALONE, Ranks

HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 0.5
# fit() that does not come back when all is done is ended after this.
GRACE_PERIOD = 15.0
# Spot GPUs may be long in coming.
AUTOSCALER_TIMEOUT = 1800.0
RUNNER_DEATHS_ALLOWED = 3


def run_worker(config: dict[str, Any]) -> None:
    """The loop of one Ray Train worker: lives as long as its worker group, trains trial after
    trial.

    Never calls ray.train.report(): it waits for all ranks, and the ranks of a group are
    independent.
    """
    queue = RemoteQueue(config["queue"])
    rank = ray.train.get_context().get_world_rank()
    worker = f"{config['worker_group']}/{rank}/{uuid.uuid4().hex[:8]}"
    ranks = Ranks.of_process_group() if config["together"] else ALONE
    if ranks.rank == 0:
        queue.register(worker, config["worker_group"], rank, _location(config, rank))
    device = ray.train.torch.get_device() if config["gpu"] else torch.device("cpu")
    job: Job = ray.get(config["job"][0])
    # Any rank may have to say what went wrong, in the name of the first.
    worker = ranks.broadcast(worker)
    preempted = threading.Event()
    with (
        _sending_heartbeats(queue, worker, preempted)
        if ranks.rank == 0
        else contextlib.nullcontext()
    ):
        work(
            queue,
            job,
            device,
            worker,
            ranks=ranks,
            preempted=preempted,
            count_images=image_counter(job.study_hash),
        )


def _location(config: dict[str, Any], rank: int) -> Location:
    """Where this worker runs, so that the queue can blame nodes and devices."""
    devices = ray.get_gpu_ids()
    # Worker groups of several workers have no fixed slot on their node's CPUs.
    slot = config["worker_group"] if config["together"] else f"slot {rank}"
    node = ray.get_runtime_context().get_node_id()
    return Location(
        node="" if config["spans"] else node,
        host=f"{socket.gethostname()} ({node[:8]})",
        slot=f"GPU {devices[0]}" if devices else slot,
    )


@contextlib.contextmanager
def _sending_heartbeats(
    queue: RemoteQueue, worker: str, preempted: threading.Event
) -> Iterator[None]:
    """Send heartbeats of the worker; set `preempted` when its node is about to go."""
    done = threading.Event()

    def heartbeat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            if queue.heartbeat(worker):
                preempted.set()

    thread = threading.Thread(target=heartbeat, name="raymem-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class WorkerGroupRunner:
    """Hosts the fit() of one worker group, and dies with its node."""

    def run(
        self, config: dict[str, Any], selector: dict[str, str], workers: int, resources: Resources
    ) -> None:
        """Returns when all workers have exited; they are on nodes that `selector` selects."""
        # A notice that some node will go would restart worker groups on nodes that stay.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        with tempfile.TemporaryDirectory(prefix="raymem-group-") as folder:
            GroupTrainer(
                run_worker,
                train_loop_config=config,
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=bool(resources.gpus_per_trial),
                    resources_per_worker=resources.bundle,
                    label_selector=selector,
                ),
                run_config=RunConfig(
                    name=config["worker_group"],
                    storage_path=folder,
                    # Deaths are the trial queue's business: it knows which trials kill, and which
                    # worker groups restart without committing anything.
                    failure_config=FailureConfig(max_failures=-1),
                ),
            ).fit()


@dataclass
class _WorkerGroup:
    name: str
    node_id: str
    workers: int
    runner: Any
    future: Any


class WorkerGroups:
    """The worker groups of one fleet: starts them on nodes with room, and detects their end."""

    def __init__(self, queue: RemoteQueue, actor: Any, job: Job, resources: Resources) -> None:
        self._queue, self._resources = queue, resources
        # The driver owns the job's arrays; each node maps them once from its object store.
        self._config = {
            "queue": actor,
            "job": [ray.put(job)],
            "gpu": bool(resources.gpus_per_trial),
            "together": resources.workers_per_trial > 1,
        }
        self._demand = None if is_private() else Demand(resources.bundle)
        self._placements = Placements()
        self._worker_groups: list[_WorkerGroup] = []
        self._deaths = Counter[str]()
        """Worker groups that died in a row on each node, since one there committed a trial."""
        self._started = 0
        self._waiting_since = time.monotonic()

    def tend(self, progress: Progress) -> None:
        """Drop worker groups that ended, start worker groups where there is room and work, ask for
        nodes.

        Raises FleetError if no worker group can run.
        """
        self._drop_ended(progress)
        self._placements.free([worker_group.name for worker_group in self._worker_groups])
        going = _draining_nodes()
        for worker_group in self._worker_groups:
            if worker_group.node_id in going or (going and not worker_group.node_id):
                self._queue.drain(worker_group.name)
        wanted = self._wanted(progress)
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = {
            node["NodeID"]: self._resources.fit(node["Resources"])
            for node in alive
            if node["NodeID"] not in {*going, *progress.retired_nodes}
        }
        for node_id, fit in nodes.items():
            dead_too_often = self._deaths[node_id] >= RUNNER_DEATHS_ALLOWED
            left = wanted - sum(worker_group.workers for worker_group in self._worker_groups)
            if not dead_too_often and left > 0:
                self._fill(node_id, fit, left)
        self._span(nodes, wanted)
        if self._demand is not None:
            at_work = self._room(nodes)
            known = [node["NodeID"] for node in alive]
            self._demand.ask(max(0, wanted - at_work), known=known, at_work=at_work)
        self._check_autoscaler_timeout(progress)

    def _wanted(self, progress: Progress) -> int:
        """Workers that could be at work now."""
        left = (
            progress.total - progress.done - progress.failed
        ) * self._resources.workers_per_trial
        return min(left, self._resources.max_workers or left)

    def _fill(self, node_id: str, fit: int, left: int) -> None:
        """Worker groups on a node that has room for `fit` workers."""
        each = self._resources.workers_per_trial
        here = [
            worker_group for worker_group in self._worker_groups if worker_group.node_id == node_id
        ]
        if each == 1:
            if not here and fit > 0:
                self._start(node_id, min(fit, left))
            return
        for _ in range(min(fit, left + len(here) * each) // each - len(here)):
            self._start(node_id, each)

    def _span(self, nodes: dict[str, int], wanted: int) -> None:
        """Worker groups over several nodes, where no node has room for all workers of a trial."""
        each = self._resources.workers_per_trial
        if each == 1 or not nodes or max(nodes.values()) >= each:
            return
        if self._deaths[""] >= RUNNER_DEATHS_ALLOWED:
            return
        fit = min(sum(nodes.values()), wanted) // each
        for _ in range(fit - len(self._worker_groups)):
            self._start("", each)

    def _room(self, nodes: dict[str, int]) -> int:
        """Workers that worker groups have room for, or will have together with nodes that are to
        come."""
        at_work = sum(worker_group.workers for worker_group in self._worker_groups)
        each = self._resources.workers_per_trial
        if each > 1 and nodes and max(nodes.values()) < each:
            return max(at_work, sum(nodes.values()))
        return at_work

    def _check_autoscaler_timeout(self, progress: Progress) -> None:
        if self._worker_groups or progress.complete:
            self._waiting_since = time.monotonic()
        elif self._deaths and max(self._deaths.values()) >= RUNNER_DEATHS_ALLOWED:
            raise FleetError(
                "worker groups restart again and again without finishing a trial; run one trial "
                "with --engine serial to see why"
            )
        elif time.monotonic() - self._waiting_since > self._autoscaler_timeout():
            if progress.retired_nodes:
                raise FleetError(
                    f"{len(progress.retired_nodes)} nodes are retired, and no other has room: "
                    f"{progress.notices[-1]}; then run the same command again"
                )
            needs = self._resources
            need = f"{needs.cpus_per_trial} CPUs and {needs.gpus_per_trial or 0:g} GPUs"
            if needs.workers_per_trial > 1:
                need = f"{needs.workers_per_trial} times {need}"
            raise FleetError(f"no node has {need} for a trial; ask for less, or add nodes")

    def _autoscaler_timeout(self) -> float:
        # A laptop's only node does not grow; a cluster's autoscaler may be bringing one.
        return 5.0 if is_private() else AUTOSCALER_TIMEOUT

    def _start(self, node_id: str, workers: int) -> None:
        name = f"group-{self._started:03d}"
        self._started += 1
        where = {"env_vars": RUNNER_ENVIRONMENT}
        place = {"label_selector": {NODE_LABEL: node_id}} if node_id else on_head()
        runner = (
            ray.remote(WorkerGroupRunner).options(num_cpus=0, runtime_env=where, **place).remote()
        )
        config = {**self._config, "worker_group": name, "spans": not node_id}
        selector = self._placements.selector(name, node_id)
        self._queue.expect(name, 1 if config["together"] else workers)
        future = runner.run.remote(config, selector, workers, self._resources)
        self._worker_groups.append(_WorkerGroup(name, node_id, workers, runner, future))

    def _drop_ended(self, progress: Progress) -> None:
        if not self._worker_groups:
            return
        committed = {group.name for group in progress.groups if group.committed}
        ended, _ = ray.wait(
            [worker_group.future for worker_group in self._worker_groups], num_returns=1, timeout=0
        )
        for worker_group in [
            worker_group for worker_group in self._worker_groups if worker_group.future in ended
        ]:
            self._worker_groups.remove(worker_group)
            died = False
            try:
                ray.get(worker_group.future)
            except ray.exceptions.RayError:
                died = True
            if died or self._queue.is_broken(worker_group.name):
                # In a row: whatever a node lives through in a week, it is not given up for.
                before = 0 if worker_group.name in committed else self._deaths[worker_group.node_id]
                self._deaths[worker_group.node_id] = before + 1
            self._queue.release_worker_group(worker_group.name)
            ray.kill(worker_group.runner)

    def close(self, patience: float) -> None:
        """Wait `patience` seconds for worker groups to end by themselves, then end them.

        Controller and workers die with their runner: fit() never hangs a finished fleet.
        """
        if self._worker_groups and patience > 0:
            futures = [worker_group.future for worker_group in self._worker_groups]
            ray.wait(futures, num_returns=len(futures), timeout=patience)
        for worker_group in self._worker_groups:
            ray.kill(worker_group.runner)
        self._worker_groups = []
        if self._demand is not None:
            self._demand.ask(0, known=())
            self._placements.close()


def _draining_nodes() -> set[str]:
    try:
        return draining_nodes()
    except Exception:  # a later Ray: lost nodes are noticed anyway, checkpoints are older then
        return set()


def run_on_ray(
    queue: TrialQueue,
    job: Job,
    resources: Resources,
    *,
    watch: Callable[[RemoteQueue, Progress], None],
) -> Progress:
    """Run a fleet on the connected Ray cluster until the trial queue is complete.

    `watch` is called every half second with the trial queue and where it is; it may raise to end
    the fleet at once.
    """
    # On the head node: a trial queue on a node that is lost would take the fleet with it.
    actor = ray.remote(_QueueActor).options(num_cpus=0, **on_head()).remote(queue, job.study_hash)
    remote = RemoteQueue(actor)
    worker_groups = WorkerGroups(remote, actor, job, resources)
    patience = 0.0
    try:
        if not queue.progress().complete:
            # Worker groups start beside the trial queue's actor, not after it.
            worker_groups.tend(queue.progress())
        while not (progress := remote.progress()).complete:
            watch(remote, progress)
            worker_groups.tend(progress)
            time.sleep(POLL_SECONDS)
        watch(remote, progress)
        patience = GRACE_PERIOD
    except ray.exceptions.RayActorError as error:
        raise FleetError(
            f"the trial queue on the head node is lost ({first_line(error)}); run the same command "
            "again: what is committed is kept"
        ) from error
    finally:
        worker_groups.close(patience)
        ray.kill(actor)
    return progress


class _QueueActor(TrialQueue):
    """A trial queue made elsewhere, as an actor."""

    def __init__(self, queue: TrialQueue, study_hash: str) -> None:
        vars(self).update(vars(queue))
        self._metrics = FleetMetrics(study_hash)

    def progress(self) -> Progress:
        """See TrialQueue.progress."""
        progress = super().progress()
        self._metrics.show(progress)
        return progress
