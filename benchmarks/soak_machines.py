"""What a soak disturbs: four nodes of a local Ray, a driver that is run again, and an S3 server."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psutil
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

ROOT = Path(__file__).parents[1]
# Machines that go and servers with faults are the tests' own.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]

import s3_server  # noqa: E402
from local_cluster import Held, drain, looking  # noqa: E402
from processes import wait_until  # noqa: E402

from benchmarks.soak_job import BATCH_SECONDS, CLOCK_SECONDS, FOLDER  # noqa: E402

MARK = "RAYMEM_SOAK"
URL = "s3://soak/study"
NODES = 4
# More than a soak can train: its trials are never all done before time is up.
MOST_TRIALS = 30_000
# A lost node is found within seconds, and one whose machine is busy is not taken for lost.
DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 6,
    "health_check_timeout_ms": 5000,
}
# What a driver exits with that was stopped.
STOPPED = 5
# Of actors and their processes.
WORKER, RUNNER, CONTROLLER, QUEUE = (
    "RayTrainWorker", "WorkerGroupRunner", "TrainController", "_QueueActor",
)  # fmt: skip


class Nodes:
    """A head without CPUs, and nodes of one CPU each."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self._going = set[Any]()
        """Nodes that were told that they go: who told them ends them."""
        self.start()

    def start(self) -> None:
        """A new cluster. Nodes are added from the main thread only."""
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "_system_config": DETECTION, "include_dashboard": False,
            },
        )  # fmt: skip
        for _ in range(NODES):
            self._cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        """Of the head."""
        return str(self._cluster.address)

    @property
    def all(self) -> list[Any]:
        """The nodes, but for the head, in the order of their ids."""
        return sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id))

    def node_of(self, process: psutil.Process) -> str:
        """The id of the node whose worker this is; "" if there is no such node."""
        with contextlib.suppress(psutil.Error):
            for node in self.all:
                if process.ppid() == node.all_processes["raylet"][0].process.pid:
                    return str(node.node_id)
        return ""

    def drain(self, node: Any, seconds: int) -> None:
        """Say that a node goes in so many seconds."""
        self._going.add(node)
        drain(self.address, node.node_id, seconds)

    def replace(self, node: Any) -> str:
        """End a node at once; the id of the one that joins in its place."""
        self._cluster.remove_node(node, allow_graceful=False)
        return str(self._cluster.add_node(num_cpus=1).node_id)

    def mend(self) -> None:
        """Replace nodes that ended by themselves, as an autoscaler does."""
        for node in self.all:
            ended = node.all_processes["raylet"][0].process.poll() is not None
            if ended and node not in self._going:
                self.replace(node)

    def lose_head(self) -> list[Any]:
        """End the head and start another with nodes of its own; the nodes that lost theirs."""
        orphans = self.all
        self._cluster.head_node.kill_all_processes(
            check_alive=False, allow_graceful=False, wait=True
        )
        self.start()
        return orphans

    def close(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


@dataclass(frozen=True)
class Exit:
    """A driver has ended by itself, or was ended."""

    code: int
    log: str
    excused: bool


class Driver:
    """The driver of the study, run again whenever it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = itertools.count()
        self._excused: dict[int, float] = {}
        self.exits: list[Exit] = []

    def start(self, address: str, stage: str = "train", trials: int = MOST_TRIALS) -> None:
        """Run the job's stage."""
        self._log = self._folder / f"driver-{next(self._number):03d}.log"
        command = [sys.executable, "-m", "benchmarks.soak_job", stage, "--store", URL]
        command += ["--trials", str(trials), "--gpus-per-trial", "0", "--checkpoint-minutes", "0.1"]
        with self._log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address},
                stdout=file, stderr=file,
            )  # fmt: skip
        self.started = time.monotonic()

    @property
    def log(self) -> str:
        """What it says."""
        return self._log.read_text()

    def excuse(self, *codes: int, seconds: float = 60.0) -> None:
        """A fault may end the driver with one of these exit codes within the next seconds."""
        for code in codes:
            self._excused[code] = max(self._excused.get(code, 0.0), time.monotonic() + seconds)

    def ended(self, seconds: float = 0.0) -> bool:
        """Has it ended, or does it within some seconds?"""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def tend(self, address: str) -> None:
        """Run it again if it has ended."""
        if self.ended():
            self._take_down()
            self.start(address)

    def end(self) -> None:
        """End it as Ctrl-C does."""
        self.excuse(STOPPED, seconds=300)
        self.signal(signal.SIGINT)
        assert self.ended(120), f"the driver does not end: {self.log}"
        self._take_down()

    def run(self, address: str, stage: str, trials: int) -> int:
        """Run the job's stage to its end; the exit code."""
        self.start(address, stage, trials)
        return self.process.wait(timeout=900)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def _take_down(self) -> None:
        code = self.process.returncode
        excused = self._excused.get(code, 0.0) > time.monotonic()
        self.exits.append(Exit(code, self.log, excused))


class Machines:
    """All that a soak has, and when each trial was committed."""

    def __init__(self, folder: Path, s3: s3_server.S3) -> None:
        self.folder, self.s3 = folder, s3
        self.nodes = Nodes()
        self.driver = Driver(folder)
        self.commits: dict[str, float] = {}
        """When the object of each trial was first there."""
        self.changed: set[str] = set()
        """Trials that were committed, and are not there any more, or are others."""
        self.wrong: list[str] = []
        """What must not be, and was."""
        # In the server's memory: asking it would be in the way of the study, and meet its faults.
        self._objects = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["soak"].keys
        self._etags: dict[str, str] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._watch_commits, daemon=True)
        self._watch.start()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later, in `tend`."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._number), do))

    def tend(self) -> None:
        """Do what is due; replace nodes and run the driver again where they have ended."""
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        self.nodes.mend()
        self.driver.tend(self.nodes.address)

    def flush(self) -> None:
        """Do now what was to be done later: faults that last are over."""
        self.s3.fault = lambda request: None
        while self._timers:
            heapq.heappop(self._timers)[2]()

    def start_driver(self) -> None:
        """Run the driver, until it has committed a trial."""
        self.driver.start(self.nodes.address)
        wait_until(lambda: self.commits, 300)

    def end_driver(self) -> None:
        """Let its running trials finish, and end it."""
        wait_until(lambda: self.driver_holds() or self.driver.ended())
        self.driver.end()

    def processes(self, actor: str) -> list[psutil.Process]:
        """The processes of actors of this class, by their pids."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if actor in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def workers(self) -> dict[int, str]:
        """The node of each worker, by its pid."""
        return {process.pid: self.nodes.node_of(process) for process in self.processes(WORKER)}

    def driver_holds(self) -> bool:
        """Does the driver hold the store, so that it obeys signals and refuses others?"""
        lock = self._objects.get("study/driver.json")
        holder = json.loads(lock.value) if lock is not None else {"pid": None}
        return not self.driver.ended() and holder["pid"] == self.driver.process.pid

    def fault(self, fault: s3_server.Faults, seconds: float) -> None:
        """The server has this fault for some seconds, in place of what it had."""
        end = time.monotonic() + seconds
        self.s3.fault = lambda request: fault(request) if time.monotonic() < end else None

    def set_clock(self, seconds: float) -> None:
        """Set the wall clock of drivers and workers, and of this process, by as many seconds."""
        (self.folder / "clock.new").write_text(str(seconds))
        os.replace(self.folder / "clock.new", self.folder / "clock")
        time.sleep(2 * CLOCK_SECONDS)  # nothing is measured while it moves

    def held(self, seconds: float) -> Held | None:
        """What the cluster still holds after some seconds; None as soon as all is free."""
        end = time.monotonic() + seconds
        self.nodes.mend()
        with looking(self.nodes.address) as look:
            while (held := look()).groups or held.actors or held.free_cpus < NODES:
                if time.monotonic() > end:
                    return held
                time.sleep(0.5)
        return None

    def _watch_commits(self) -> None:
        while not self._stop.wait(0.25):
            now = time.monotonic()
            try:
                there = {
                    name: str(found.etag)
                    for name, found in self._objects.items()
                    if name.startswith("study/trials/")
                }
            except RuntimeError:  # it changed meanwhile
                continue
            for name, etag in there.items():
                self.commits.setdefault(name, now)
                if self._etags.setdefault(name, etag) != etag:
                    self.changed.add(name)
            self.changed |= self.commits.keys() - there.keys()
            self.s3.forget()

    def close(self) -> None:
        """End the cluster; `machines` ends what is left."""
        self._stop.set()
        self._watch.join()
        self.driver.process.kill()
        self.driver.process.wait()
        self.nodes.close()


@contextlib.contextmanager
def machines(folder: Path, batch_seconds: float) -> Iterator[Machines]:
    """All that a soak needs, while the block runs. Raises AssertionError if processes are left."""
    mark, before = uuid.uuid4().hex, dict(os.environ)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server.running() as s3:
        os.environ.pop("RAY_ADDRESS", None)
        os.environ |= {
            "AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "RAY_AUTH_MODE": "disabled", MARK: mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_TMPDIR": str(folder), FOLDER: str(folder), BATCH_SECONDS: str(batch_seconds),
        }  # fmt: skip
        fsspec.filesystem("s3").mkdir("soak")
        try:
            all_of_it = Machines(folder, s3)
            yield all_of_it
            all_of_it.close()
        finally:
            left = end_all(mark)
            os.environ.clear()
            os.environ |= before
    assert not left, f"left of the soak: {left}"


def marked(mark: str) -> list[psutil.Process]:
    """All processes that were started by this soak, its own children or not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
    return found


def end_all(mark: str) -> list[str]:
    """End what is left of a soak some seconds after its end; what that was."""
    end = time.monotonic() + 15
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.5)
    names = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:100])
            process.kill()
    return names
