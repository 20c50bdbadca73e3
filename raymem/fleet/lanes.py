"""The fleet on Ray: lanes of Ray Train workers, a ledger actor, and the loop that watches them.

A lane is one long-lived `TorchTrainer.fit()` inside a runner actor that sits on the lane's node,
with one worker for each slot of that node. Workers lease trials from the ledger and commit them
to the store by themselves. Where several workers train each model together, a lane is these, and
the first of them leases. When a worker dies, Ray Train restarts its lane; a lost node costs its
lane. Lanes share nothing but the ledger.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raymem.errors import FleetError
from raymem.fleet.blame import Home
from raymem.fleet.cluster import draining_nodes, is_private, on_head
from raymem.fleet.demand import NODE_LABEL, Demand
from raymem.fleet.ledger import Ledger, Progress
from raymem.fleet.metrics import FleetMetrics, image_counter
from raymem.fleet.placement import RUNNER_ENVIRONMENT, GroupTrainer, Placements
from raymem.fleet.remote import RemoteLedger
from raymem.fleet.resources import Resources
from raymem.fleet.work import Job, work
from raymem.training import ALONE, Ranks

BEAT_SECONDS = 5.0
POLL_SECONDS = 0.5
# fit() that does not come back when all is done is ended after this.
GRACE_SECONDS = 15.0
# Spot GPUs may be long in coming.
PATIENCE_SECONDS = 1800.0
RUNNER_DEATHS_ALLOWED = 3


def lane_worker(config: dict[str, Any]) -> None:
    """The loop of one Ray Train worker: lives as long as its lane, trains trial after trial.

    Never calls ray.train.report(): it waits for all ranks, and the ranks of a lane are independent.
    """
    ledger = RemoteLedger(config["ledger"])
    rank = ray.train.get_context().get_world_rank()
    worker = f"{config['lane']}/{rank}/{uuid.uuid4().hex[:8]}"
    ranks = Ranks.of_process_group() if config["together"] else ALONE
    if ranks.rank == 0:
        ledger.register(worker, config["lane"], rank, _home(config, rank))
    device = ray.train.torch.get_device() if config["gpu"] else torch.device("cpu")
    job: Job = ray.get(config["job"][0])
    # Any rank may have to say what went wrong, in the name of the first.
    worker = ranks.share(worker)
    hurry = threading.Event()
    with _beating(ledger, worker, hurry) if ranks.rank == 0 else contextlib.nullcontext():
        work(
            ledger,
            job,
            device,
            worker,
            ranks=ranks,
            hurry=hurry,
            count_images=image_counter(job.study_hash),
        )


def _home(config: dict[str, Any], rank: int) -> Home:
    """Where this worker runs, as the ledger blames nodes and devices."""
    devices = ray.get_gpu_ids()
    # Lanes of several workers have no fixed slot on their node's CPUs.
    slot = config["lane"] if config["together"] else f"slot {rank}"
    node = ray.get_runtime_context().get_node_id()
    return Home(
        node="" if config["spans"] else node,
        host=f"{socket.gethostname()} ({node[:8]})",
        seat=f"GPU {devices[0]}" if devices else slot,
    )


@contextlib.contextmanager
def _beating(ledger: RemoteLedger, worker: str, hurry: threading.Event) -> Iterator[None]:
    """Says that the worker lives, and hears that its node is about to go."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            if ledger.beat(worker):
                hurry.set()

    thread = threading.Thread(target=beat, name="raymem-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class LaneRunner:
    """Hosts one lane's fit(); its node's death is the lane's."""

    def run(
        self, config: dict[str, Any], selector: dict[str, str], workers: int, resources: Resources
    ) -> None:
        """Returns when all workers have exited; they are on nodes that `selector` selects."""
        # A notice that some node will go would restart lanes on nodes that stay.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        with tempfile.TemporaryDirectory(prefix="raymem-lane-") as folder:
            GroupTrainer(
                lane_worker,
                train_loop_config=config,
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=bool(resources.gpus_per_trial),
                    resources_per_worker=resources.bundle,
                    label_selector=selector,
                ),
                run_config=RunConfig(
                    name=config["lane"],
                    storage_path=folder,
                    # Deaths are the ledger's business: it knows which trials kill, and which lanes
                    # restart without committing anything.
                    failure_config=FailureConfig(max_failures=-1),
                ),
            ).fit()


@dataclass
class _Lane:
    name: str
    node_id: str
    workers: int
    runner: Any
    future: Any


class Lanes:
    """The lanes of one fleet: starts them on nodes that have room, and notices those that end."""

    def __init__(self, ledger: RemoteLedger, actor: Any, job: Job, resources: Resources) -> None:
        self._ledger, self._resources = ledger, resources
        # The driver owns the job's arrays; each node maps them once from its object store.
        self._config = {
            "ledger": actor,
            "job": [ray.put(job)],
            "gpu": bool(resources.gpus_per_trial),
            "together": resources.workers_per_trial > 1,
        }
        self._demand = None if is_private() else Demand(resources.bundle)
        self._placements = Placements()
        self._lanes: list[_Lane] = []
        self._deaths: dict[str, int] = {}
        self._started = 0
        self._waiting_since = time.monotonic()

    def tend(self, progress: Progress) -> None:
        """Drop lanes that ended, start lanes where there is room and work, ask for nodes.

        Raises FleetError if no lane can run.
        """
        self._drop_ended()
        self._placements.free([lane.name for lane in self._lanes])
        going = draining_nodes()
        for lane in self._lanes:
            if lane.node_id in going or (going and not lane.node_id):
                self._ledger.drain(lane.name)
        wanted = self._wanted(progress)
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = {
            node["NodeID"]: self._resources.fit(node["Resources"])
            for node in alive
            if node["NodeID"] not in {*going, *progress.retired_nodes}
        }
        for node_id, fit in nodes.items():
            dead_too_often = self._deaths.get(node_id, 0) >= RUNNER_DEATHS_ALLOWED
            left = wanted - sum(lane.workers for lane in self._lanes)
            if not dead_too_often and left > 0:
                self._fill(node_id, fit, left)
        self._span(nodes, wanted)
        if self._demand is not None:
            at_work = self._room(nodes)
            known = [node["NodeID"] for node in alive]
            self._demand.ask(max(0, wanted - at_work), known=known, at_work=at_work)
        self._check_patience(progress)

    def _wanted(self, progress: Progress) -> int:
        """Workers that could be at work now."""
        left = (
            progress.total - progress.done - progress.failed
        ) * self._resources.workers_per_trial
        return min(left, self._resources.max_workers or left)

    def _fill(self, node_id: str, fit: int, left: int) -> None:
        """Lanes on a node that has room for `fit` workers."""
        each = self._resources.workers_per_trial
        here = [lane for lane in self._lanes if lane.node_id == node_id]
        if each == 1:
            if not here and fit > 0:
                self._start(node_id, min(fit, left))
            return
        for _ in range(min(fit, left + len(here) * each) // each - len(here)):
            self._start(node_id, each)

    def _span(self, nodes: dict[str, int], wanted: int) -> None:
        """Lanes over several nodes, where no node has room for all workers of a trial."""
        each = self._resources.workers_per_trial
        if each == 1 or not nodes or max(nodes.values()) >= each:
            return
        if self._deaths.get("", 0) >= RUNNER_DEATHS_ALLOWED:
            return
        fit = min(sum(nodes.values()), wanted) // each
        for _ in range(fit - len(self._lanes)):
            self._start("", each)

    def _room(self, nodes: dict[str, int]) -> int:
        """Workers that lanes have room for, or will have together with nodes that are to come."""
        at_work = sum(lane.workers for lane in self._lanes)
        each = self._resources.workers_per_trial
        if each > 1 and nodes and max(nodes.values()) < each:
            return max(at_work, sum(nodes.values()))
        return at_work

    def _check_patience(self, progress: Progress) -> None:
        if self._lanes or progress.complete:
            self._waiting_since = time.monotonic()
        elif self._deaths and max(self._deaths.values()) >= RUNNER_DEATHS_ALLOWED:
            raise FleetError(
                "lanes restart again and again without finishing a trial; run one trial with "
                "--engine serial to see why"
            )
        elif time.monotonic() - self._waiting_since > self._patience():
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

    def _patience(self) -> float:
        # A laptop's only node does not grow; a cluster's autoscaler may be bringing one.
        return 5.0 if is_private() else PATIENCE_SECONDS

    def _start(self, node_id: str, workers: int) -> None:
        name = f"lane-{self._started:03d}"
        self._started += 1
        where = {"env_vars": RUNNER_ENVIRONMENT}
        place = {"label_selector": {NODE_LABEL: node_id}} if node_id else on_head()
        runner = ray.remote(LaneRunner).options(num_cpus=0, runtime_env=where, **place).remote()
        config = {**self._config, "lane": name, "spans": not node_id}
        selector = self._placements.selector(name, node_id)
        self._ledger.expect(name, 1 if config["together"] else workers)
        future = runner.run.remote(config, selector, workers, self._resources)
        self._lanes.append(_Lane(name, node_id, workers, runner, future))

    def _drop_ended(self) -> None:
        if not self._lanes:
            return
        ended, _ = ray.wait([lane.future for lane in self._lanes], num_returns=1, timeout=0)
        for lane in [lane for lane in self._lanes if lane.future in ended]:
            self._lanes.remove(lane)
            died = False
            try:
                ray.get(lane.future)
            except ray.exceptions.RayError:
                died = True
            if died or self._ledger.is_broken(lane.name):
                self._deaths[lane.node_id] = self._deaths.get(lane.node_id, 0) + 1
            self._ledger.release_lane(lane.name)
            ray.kill(lane.runner)

    def close(self, patience: float) -> None:
        """Wait `patience` seconds for lanes to end by themselves, then end them.

        Controller and workers die with their runner: fit() never hangs a finished fleet.
        """
        if self._lanes and patience > 0:
            futures = [lane.future for lane in self._lanes]
            ray.wait(futures, num_returns=len(futures), timeout=patience)
        for lane in self._lanes:
            ray.kill(lane.runner)
        self._lanes = []
        if self._demand is not None:
            self._demand.ask(0, known=())
            self._placements.close()


def run_on_ray(
    ledger: Ledger,
    job: Job,
    resources: Resources,
    *,
    watch: Callable[[RemoteLedger, Progress], None],
) -> Progress:
    """Run a fleet on the connected Ray cluster until the ledger is complete.

    `watch` is called every half second with the ledger and where it is; it may raise to end the
    fleet at once.
    """
    # On the head node: a ledger on a node that is lost would take the fleet with it.
    actor = ray.remote(_LedgerActor).options(num_cpus=0, **on_head()).remote(ledger, job.study_hash)
    remote = RemoteLedger(actor)
    lanes = Lanes(remote, actor, job, resources)
    patience = 0.0
    try:
        if not ledger.progress().complete:
            # Lanes start beside the ledger's actor, not after it.
            lanes.tend(ledger.progress())
        while not (progress := remote.progress()).complete:
            watch(remote, progress)
            lanes.tend(progress)
            time.sleep(POLL_SECONDS)
        watch(remote, progress)
        patience = GRACE_SECONDS
    finally:
        lanes.close(patience)
        ray.kill(actor)
    return progress


class _LedgerActor(Ledger):
    """A ledger made elsewhere, as an actor."""

    def __init__(self, ledger: Ledger, study_hash: str) -> None:
        vars(self).update(vars(ledger))
        self._metrics = FleetMetrics(study_hash)

    def progress(self) -> Progress:
        """See Ledger.progress."""
        progress = super().progress()
        self._metrics.show(progress)
        return progress
