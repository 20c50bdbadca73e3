"""The fleet on Ray: lanes of Ray Train workers, a ledger actor, and the loop that watches them.

A lane is one long-lived `TorchTrainer.fit()` inside a runner actor that sits on the lane's node,
with one worker for each slot of that node. Workers lease trials from the ledger and commit them
to the store by themselves. When a worker dies, Ray Train restarts its lane; a lost node costs its
lane. Lanes share nothing but the ledger.
"""

from __future__ import annotations

import contextlib
import math
import os
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
from ray.train.torch import TorchTrainer

from raymem.errors import FleetError
from raymem.fleet.ledger import Lease, Ledger, Lost, Outcome, Progress
from raymem.fleet.work import Job, work
from raymem.store import TrialKey

NODE_LABEL = "ray.io/node-id"
HEAD_RESOURCE = "node:__internal_head__"
BEAT_SECONDS = 10.0
POLL_SECONDS = 0.5
# fit() that does not come back when all is done is ended after this.
GRACE_SECONDS = 15.0
PATIENCE_SECONDS = 300.0
RUNNER_DEATHS_ALLOWED = 3


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What one trial takes, and how much of the cluster the fleet may use."""

    cpus_per_trial: int = 1
    """CPUs, and threads, of one trial."""
    gpus_per_trial: float = 0.0
    """GPUs of one trial; a fraction packs several on one GPU."""
    max_workers: int | None = None
    """Most trials at once, over all nodes; None is as many as fit."""

    def __post_init__(self) -> None:
        if self.cpus_per_trial < 1:
            raise FleetError(f"cpus_per_trial must be 1 or more, got {self.cpus_per_trial}")
        g = self.gpus_per_trial
        if g < 0 or (g > 0 and g != 1 and not g < 1):
            raise FleetError(f"gpus_per_trial must be 0, 1 or a fraction of 1, got {g}")
        if self.max_workers is not None and self.max_workers < 1:
            raise FleetError(f"max_workers must be 1 or more, got {self.max_workers}")

    def on(self, resources: dict[str, float]) -> int:
        """How many trials fit a node with these Ray resources at once."""
        slots = resources.get("CPU", 0) // self.cpus_per_trial
        if self.gpus_per_trial:
            per_gpu = math.floor(1 / self.gpus_per_trial + 1e-9)
            slots = min(slots, resources.get("GPU", 0) * per_gpu)
        return int(slots)


class RemoteLedger:
    """The ledger actor, called like the ledger itself."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def register(self, worker: str, lane: str, rank: int) -> None:
        """See Ledger.register."""
        ray.get(self._actor.register.remote(worker, lane, rank))

    def lease(self, worker: str) -> Lease | None:
        """See Ledger.lease."""
        lease: Lease | None = ray.get(self._actor.lease.remote(worker))
        return lease

    def beat(self, worker: str) -> None:
        """See Ledger.beat; does not wait."""
        self._actor.beat.remote(worker)

    def finish(self, worker: str, key: TrialKey, outcome: Outcome, message: str = "") -> None:
        """See Ledger.finish."""
        ray.get(self._actor.finish.remote(worker, key, outcome, message))

    def progress(self) -> Progress:
        """See Ledger.progress."""
        progress: Progress = ray.get(self._actor.progress.remote())
        return progress

    def take_lost(self) -> list[Lost]:
        """See Ledger.take_lost."""
        lost: list[Lost] = ray.get(self._actor.take_lost.remote())
        return lost

    def is_broken(self, lane: str) -> bool:
        """See Ledger.is_broken."""
        return bool(ray.get(self._actor.is_broken.remote(lane)))

    def release_lane(self, lane: str) -> None:
        """See Ledger.release_lane."""
        ray.get(self._actor.release_lane.remote(lane))

    def stop(self) -> None:
        """See Ledger.stop."""
        ray.get(self._actor.stop.remote())


def lane_worker(config: dict[str, Any]) -> None:
    """The loop of one Ray Train worker: lives as long as its lane, trains trial after trial.

    Never calls ray.train.report(): it waits for all ranks, and the ranks of a lane are independent.
    """
    ledger = RemoteLedger(config["ledger"])
    rank = ray.train.get_context().get_world_rank()
    worker = f"{config['lane']}/{rank}/{uuid.uuid4().hex[:8]}"
    ledger.register(worker, config["lane"], rank)
    device = ray.train.torch.get_device() if config["gpu"] else torch.device("cpu")
    job: Job = ray.get(config["job"][0])
    with _beating(ledger, worker):
        work(ledger, job, device, worker)


@contextlib.contextmanager
def _beating(ledger: RemoteLedger, worker: str) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            ledger.beat(worker)

    thread = threading.Thread(target=beat, name="raymem-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class LaneRunner:
    """Hosts one lane's fit(); its node's death is the lane's."""

    def run(self, config: dict[str, Any], node_id: str, workers: int, slots: Slots) -> None:
        """Returns when all workers of the lane have gone home."""
        # A notice that some node will go would restart lanes on nodes that stay.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        resources: dict[str, float] = {"CPU": slots.cpus_per_trial}
        if slots.gpus_per_trial:
            resources["GPU"] = slots.gpus_per_trial
        with tempfile.TemporaryDirectory(prefix="raymem-lane-") as folder:
            TorchTrainer(
                lane_worker,
                train_loop_config=config,
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=slots.gpus_per_trial > 0,
                    resources_per_worker=resources,
                    label_selector={NODE_LABEL: node_id},
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

    def __init__(self, ledger: RemoteLedger, actor: Any, job: Job, slots: Slots) -> None:
        self._ledger, self._slots = ledger, slots
        # The driver owns the job's arrays; each node maps them once from its object store.
        self._config = {"ledger": actor, "job": [ray.put(job)], "gpu": slots.gpus_per_trial > 0}
        self._lanes: list[_Lane] = []
        self._deaths: dict[str, int] = {}
        self._started = 0
        self._waiting_since = time.monotonic()

    def tend(self, progress: Progress) -> None:
        """Drop lanes that ended, start lanes where there is room and work.

        Raises FleetError if no lane can run.
        """
        self._drop_ended()
        left = progress.total - progress.done - progress.failed
        room = self._slots.max_workers or left
        for node in ray.nodes():
            running = sum(lane.workers for lane in self._lanes)
            workers = min(self._slots.on(node["Resources"]), left - running, room - running)
            taken = any(lane.node_id == node["NodeID"] for lane in self._lanes)
            dead_too_often = self._deaths.get(node["NodeID"], 0) >= RUNNER_DEATHS_ALLOWED
            if node["Alive"] and not taken and not dead_too_often and workers > 0:
                self._start(node["NodeID"], workers)
        if self._lanes or progress.complete:
            self._waiting_since = time.monotonic()
        elif self._deaths and max(self._deaths.values()) >= RUNNER_DEATHS_ALLOWED:
            raise FleetError(
                "lanes restart again and again without finishing a trial; run one trial with "
                "--engine serial to see why"
            )
        elif time.monotonic() - self._waiting_since > self._patience():
            need = f"{self._slots.cpus_per_trial} CPUs and {self._slots.gpus_per_trial:g} GPUs"
            raise FleetError(f"no node has {need} for a trial; ask for less, or add nodes")

    def _patience(self) -> float:
        # A laptop's only node does not grow; a cluster's autoscaler may be bringing one.
        return PATIENCE_SECONDS if len(ray.nodes()) > 1 or os.environ.get("RAY_ADDRESS") else 5.0

    def _start(self, node_id: str, workers: int) -> None:
        name = f"lane-{self._started:03d}"
        self._started += 1
        # Ray Train's watchdog asks the newest Ray of the machine whether its controller lives, and
        # ends the lane if that is another Ray. Nobody answers here: then it leaves the lane alone,
        # and a lane's placement group goes with its runner anyway. Children inherit this.
        where = {"env_vars": {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}}
        runner = (
            ray.remote(LaneRunner)
            .options(num_cpus=0, label_selector={NODE_LABEL: node_id}, runtime_env=where)
            .remote()
        )
        config = {**self._config, "lane": name}
        future = runner.run.remote(config, node_id, workers, self._slots)
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


def run_on_ray(
    ledger: Ledger,
    job: Job,
    slots: Slots,
    *,
    watch: Callable[[RemoteLedger, Progress], None],
) -> Progress:
    """Run a fleet on the connected Ray cluster until the ledger is complete.

    `watch` is called every half second with the ledger and where it is; it may raise to end the
    fleet at once.
    """
    # On the head node: a ledger on a node that is lost would take the fleet with it.
    head = {HEAD_RESOURCE: 0.001} if _has_head_resource() else {}
    actor = ray.remote(_LedgerActor).options(num_cpus=0, resources=head).remote(ledger)
    remote = RemoteLedger(actor)
    lanes = Lanes(remote, actor, job, slots)
    patience = 0.0
    try:
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


def _has_head_resource() -> bool:
    return any(HEAD_RESOURCE in node["Resources"] for node in ray.nodes() if node["Alive"])


class _LedgerActor(Ledger):
    """A ledger made elsewhere, as an actor."""

    def __init__(self, ledger: Ledger) -> None:
        vars(self).update(vars(ledger))
