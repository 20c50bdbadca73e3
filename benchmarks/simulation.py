"""The real trial queue, under simulated workers: up to 1,000, over days, with everything that dies.

A discrete-event simulation. Nodes come, carry a worker group, and are lost; workers train, send
heartbeats, crash and fall silent; trials diverge, or kill their worker; the driver is killed, and
its trial queue is made again from the store. Only the trial queue is real, and it is asked as the
fleet asks it: all it has to hold to is checked at every lease and every poll, and a `Violation`
ends the simulation.

    python -m benchmarks --only simulation          some minutes
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measured import keep
from benchmarks.rows import Row
from raymem.fleet.blame import DIVERGENCES_ALLOWED, Location
from raymem.fleet.progress import Progress
from raymem.fleet.trial_queue import DEATHS_ALLOWED, LEASE_SECONDS, TrialQueue
from raymem.store import Failure, TrialKey

# As the fleet has them: a heartbeat, a poll of the driver, a worker group's start and restart.
HEARTBEAT_SECONDS, POLL_SECONDS, START_SECONDS, RESTART_SECONDS = 10.0, 0.5, 20.0, 15.0
DETECT_SECONDS, NOTICE_SECONDS = 20.0, 120.0
RUNNER_DEATHS_ALLOWED = 3
HOUR = 3600.0


class Violation(AssertionError):
    """The trial queue did what it must not do."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens in one simulation."""

    name: str
    workers: int
    trials: int
    worker_group: int = 8
    """Workers of a node, which share a worker group."""
    hours: float = 0.5
    """Mean of a trial."""
    spread: float = 0.2
    """Standard deviation of the logarithm of a trial's time."""
    node_hours: float = math.inf
    """Mean life of a node; lives are exponential."""
    replacement_seconds: float = 300.0
    """Mean time until another node comes for a lost one."""
    checkpoint_minutes: float = math.inf
    """How often a trial saves its state."""
    notice: bool = False
    """Nodes say two minutes before that they go: their worker group drains, its trials save their
    state."""
    crash_hours: float = math.inf
    """Mean time between crashes of one worker, each of which restarts its worker group."""
    diverging: float = 0.0
    """Share of trials that diverge with their first seeds; a tenth of them always does."""
    poison: int = 0
    """Trials that kill their worker each time."""
    silent: float = 0.0
    """Share of trials whose worker is not heard for some minutes, and trains on."""
    orphans: float = 0.0
    """Share of the workers of a lost worker group that finish their trial after they are given
    up."""
    bad_nodes: int = 0
    """Nodes on which every trial fails at once."""
    bad_devices: int = 0
    """Workers on which every trial does, one on each of the first good nodes."""
    driver_kills: tuple[float, ...] = ()
    """Hours at which the driver is killed."""
    seed: int = 0


@dataclass(eq=False)
class _Worker:
    """One process; `key` is the lease that the trial queue should think it has."""

    name: str
    worker_group: _WorkerGroup
    rank: int
    last_heartbeat: float
    alive: bool = True
    key: TrialKey | None = None
    training: TrialKey | None = None
    since: float = 0.0
    silent_until: float = 0.0


@dataclass(eq=False)
class _WorkerGroup:
    name: str
    node: _Node
    size: int
    generation: int = 0
    lost_at: float | None = None
    drained: bool = False
    workers: list[_Worker] = field(default_factory=list)
    at_home: int = 0


@dataclass(eq=False)
class _Node:
    name: str
    bad_ranks: frozenset[int]
    worker_group: _WorkerGroup | None = None
    alive: bool = True
    going: bool = False
    deaths: int = 0


class Simulation:
    """Runs one scenario with a trial queue class; `report` says what came of it."""

    def __init__(self, scenario: Scenario, queue: type[TrialQueue] = TrialQueue) -> None:
        self.scenario, self.queue_class = scenario, queue
        self.draw, self.now = random.Random(scenario.seed), 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self.wanted = [TrialKey(math.inf, t) for t in range(scenario.trials)]
        mu = math.log(scenario.hours * HOUR) - scenario.spread**2 / 2
        self.length = {k: self.draw.lognormvariate(mu, scenario.spread) for k in self.wanted}
        shuffled = self.draw.sample(self.wanted, len(self.wanted))
        n = round(scenario.diverging * len(shuffled))
        self.diverging, self.hopeless = set(shuffled[:n]), set(shuffled[: -(-n // 10)])
        self.poison = set(shuffled[n : n + scenario.poison])
        self.store: set[TrialKey] = set()
        self.failures: list[Failure] = []
        self.saved: dict[TrialKey, float] = {}
        # Of this trial queue's life: what it was told, and what really happened.
        self.told: set[TrialKey] = set()
        self.deaths: Counter[TrialKey] = Counter()
        self.calls: Counter[str] = Counter()
        self.busiest = Counter[int]()
        self.seconds_in_queue = self.busy = self.diverged_busy = 0.0
        self.worker_groups: list[_WorkerGroup] = []
        self.workers: dict[str, _Worker] = {}
        self.silent: set[_Worker] = set()
        nodes = -(-scenario.workers // scenario.worker_group)
        self.nodes: list[_Node] = []
        for number in range(nodes):
            bad, device = scenario.bad_nodes, number - scenario.bad_nodes
            ranks = range(scenario.worker_group if number < bad else device < scenario.bad_devices)
            self._node_comes(frozenset(ranks))
        for hour in scenario.driver_kills:
            self.at(hour * HOUR, self._driver_is_killed)
        self.end: Progress | None = None
        self._driver_starts()

    def run(self, most_hours: float = 24 * 365) -> Progress:
        """Until the trial queue is complete. Raises Violation."""
        while self.end is None:
            self.now, _, what, arguments = heapq.heappop(self._events)
            if self.now > most_hours * HOUR:
                raise Violation(f"not at its end after {most_hours} hours")
            what(*arguments)
        self._check_end(self.end)
        return self.end

    def at(self, moment: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (moment, next(self._number), what, arguments))

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """A call of the trial queue, counted and timed."""
        self.calls[name] += 1
        self.busiest[int(self.now)] += 1
        start = time.perf_counter()
        answer = getattr(self.queue, name)(*arguments, **named)
        self.seconds_in_queue += time.perf_counter() - start
        return answer

    def demand(self, holds: bool, message: str) -> None:
        if not holds:
            raise Violation(f"at {self.now:.1f} s: {message}")

    # The driver

    def _driver_starts(self) -> None:
        pending = [key for key in self.wanted if key not in self.store]
        self.done_before = len(self.wanted) - len(pending)
        self.told, self.deaths = set(), Counter()
        self.queue = self.queue_class(
            pending,
            failures=list(self.failures),
            done_before=self.done_before,
            clock=lambda: self.now,
        )
        self._poll(self.queue)

    def _driver_is_killed(self) -> None:
        self.queue = self.queue_class([])  # nobody asks it any more
        for worker_group in self.worker_groups:
            for worker in self._stop_workers(worker_group):
                if self.draw.random() < self.scenario.orphans:
                    self.store.add(worker)
            worker_group.node.worker_group, worker_group.node.deaths = None, 0
        self.worker_groups, self.workers, self.silent = [], {}, set()
        self.at(self.now + 60, self._driver_starts)

    def _poll(self, queue: TrialQueue) -> None:
        if queue is not self.queue:
            return
        progress: Progress = self.call("progress")
        self._expire()
        self._take_lost()
        self._check(progress)
        if progress.complete or progress.fatal:
            self.end = progress
            return
        self._tend(progress)
        self.at(self.now + POLL_SECONDS, self._poll, queue)

    def _take_lost(self) -> None:
        for lost in self.call("take_lost"):
            failure = Failure(key=lost.key, attempt=lost.attempt, cause=lost.cause)
            self.failures.append(failure)

    def _tend(self, progress: Progress) -> None:
        """As `WorkerGroups.tend`: drop worker groups that ended, start worker groups where there is
        room and work."""
        for worker_group in list(self.worker_groups):
            is_lost = (
                worker_group.lost_at is not None
                and self.now >= worker_group.lost_at + DETECT_SECONDS
            )
            if is_lost or worker_group.at_home == worker_group.size:
                self.worker_groups.remove(worker_group)
                worker_group.node.worker_group = None
                worker_group.node.deaths += bool(self.call("is_broken", worker_group.name))
                self.call("release_worker_group", worker_group.name)
                for worker in list(self.workers.values()):
                    if worker.worker_group is worker_group:
                        worker.key = None
                        del self.workers[worker.name]
        left = progress.total - progress.done - progress.failed
        for node in self.nodes:
            running = sum(worker_group.size for worker_group in self.worker_groups)
            size = min(self.scenario.worker_group, left - running, self.scenario.workers - running)
            if size <= 0:
                break
            can = node.alive and not node.going and node.deaths < RUNNER_DEATHS_ALLOWED
            can = can and node.name not in progress.retired_nodes
            if can and node.worker_group is None:
                worker_group = _WorkerGroup(f"group-{next(self._number)}", node, size)
                node.worker_group = worker_group
                self.worker_groups.append(worker_group)
                self.call("expect", worker_group.name, size)
                self.at(self.now + START_SECONDS, self._worker_group_starts, worker_group, 0)
        if not self.worker_groups and left <= 0:
            ends = self.call("progress").complete
            self.demand(ends, "no trial is left, and the fleet does not end")

    # Nodes and worker groups

    def _node_comes(self, bad_ranks: frozenset[int]) -> None:
        node = _Node(f"node-{next(self._number)}", bad_ranks)
        self.nodes.append(node)
        if math.isfinite(self.scenario.node_hours):
            life = self.draw.expovariate(1 / (self.scenario.node_hours * HOUR))
            self.at(self.now + life, self._node_is_lost, node)
            if self.scenario.notice:
                self.at(self.now + max(0.0, life - NOTICE_SECONDS), self._node_will_go, node)

    def _node_will_go(self, node: _Node) -> None:
        node.going = True
        # Only a worker group that has registered is known, as in the fleet; the driver tells it
        # again.
        if node.worker_group is not None and node.worker_group.workers:
            self.call("drain", node.worker_group.name)
            node.worker_group.drained = True

    def _node_is_lost(self, node: _Node) -> None:
        node.alive = False
        self.nodes.remove(node)
        wait = self.draw.expovariate(1 / self.scenario.replacement_seconds)
        self.at(self.now + wait, self._node_comes, node.bad_ranks)
        if node.worker_group is not None:
            worker_group, workers = node.worker_group, list(node.worker_group.workers)
            worker_group.lost_at = self.now
            held = {w: w.training for w in workers if w.training is not None}
            self._stop_workers(worker_group, notice=self.scenario.notice)
            for worker, key in held.items():
                if self.draw.random() < self.scenario.orphans:
                    late = self.now + DETECT_SECONDS + 10 * self.draw.random()
                    self.at(late, self._orphan_finishes, self.queue, worker, key)

    def _orphan_finishes(self, queue: TrialQueue, worker: _Worker, key: TrialKey) -> None:
        outcome = "duplicate" if key in self.store else "committed"
        self.store.add(key)
        if queue is self.queue:
            self._finish(worker, key, outcome)

    def _worker_group_starts(self, worker_group: _WorkerGroup, generation: int) -> None:
        if (
            worker_group.lost_at is not None
            or worker_group not in self.worker_groups
            or generation != worker_group.generation
        ):
            return
        worker_group.workers, worker_group.at_home = [], 0
        for rank in range(worker_group.size):
            for old in [
                w
                for w in self.workers.values()
                if w.worker_group is worker_group and w.rank == rank
            ]:
                self._blame(old)
                del self.workers[old.name]
            worker = _Worker(
                f"{worker_group.name}/{rank}/{generation}", worker_group, rank, self.now
            )
            home = Location(node=worker_group.node.name, slot=f"GPU {rank}")
            self.call("register", worker.name, worker_group.name, rank, home)
            self.workers[worker.name] = worker
            worker_group.workers.append(worker)
            self._ask(worker)
            if math.isfinite(self.scenario.crash_hours):
                life = self.draw.expovariate(1 / (self.scenario.crash_hours * HOUR))
                self.at(self.now + life, self._crash, worker)
        self.at(self.now + HEARTBEAT_SECONDS, self._heartbeat, worker_group, generation)

    def _blame(self, worker: _Worker) -> None:
        """Its place in the worker group is taken: its trial, if it had one, saw a death."""
        if worker.key is not None and worker.key not in self.told:
            self.deaths[worker.key] += 1
        worker.key = None

    def _crash(self, worker: _Worker) -> None:
        """A worker dies, and Ray Train restarts its worker group."""
        if not worker.alive or worker.worker_group.lost_at is not None:
            return
        worker_group = worker.worker_group
        self._stop_workers(worker_group)
        worker_group.generation += 1
        self.at(
            self.now + RESTART_SECONDS,
            self._worker_group_starts,
            worker_group,
            worker_group.generation,
        )

    def _stop_workers(self, worker_group: _WorkerGroup, notice: bool = False) -> list[TrialKey]:
        """All of them; what they had in hand, of which checkpoints keep a part."""
        held = []
        for worker in worker_group.workers:
            if worker.alive and worker.training is not None:
                held.append(worker.training)
                self._account(worker, notice=notice)
            worker.alive, worker.training = False, None
        return held

    def _account(self, worker: _Worker, notice: bool) -> None:
        key, worked = worker.training, self.now - worker.since
        assert key is not None
        self.busy += worked
        every = self.scenario.checkpoint_minutes * 60
        if math.isfinite(every):
            before = self.saved.get(key, 0.0)
            self.saved[key] = before + (worked if notice else worked // every * every)

    # Workers

    def _heartbeat(self, worker_group: _WorkerGroup, generation: int) -> None:
        if (
            generation != worker_group.generation
            or worker_group.lost_at is not None
            or worker_group not in self.worker_groups
        ):
            return
        for worker in worker_group.workers:
            if worker.alive and self.now >= worker.silent_until:
                self.call("heartbeat", worker.name)
                worker.last_heartbeat = self.now
                self.silent.discard(worker)
        self.at(self.now + HEARTBEAT_SECONDS, self._heartbeat, worker_group, generation)

    def _ask(self, worker: _Worker) -> None:
        if not worker.alive:
            return
        lease = self.call("lease", worker.name)
        worker.last_heartbeat = self.now
        self._expire()
        if lease is None:
            worker.alive = False
            worker.worker_group.at_home += 1
        elif lease.key is None:
            self.at(self.now + lease.wait, self._ask, worker)
        else:
            self._check_lease(worker, lease.key)
            worker.key = worker.training = lease.key
            worker.since = self.now
            self._train(worker, lease.key, lease.seed_attempt)

    def _train(self, worker: _Worker, key: TrialKey, seed_attempt: int) -> None:
        left = max(1.0, self.length[key] - self.saved.get(key, 0.0))
        part = left * self.draw.random()
        if worker.rank in worker.worker_group.node.bad_ranks:
            self.at(self.now + 1, self._trained, worker, key, "error")
        elif key in self.poison:
            self.at(self.now + part, self._crash, worker)
        elif key in self.hopeless or (key in self.diverging and seed_attempt == 1):
            self.at(self.now + part, self._trained, worker, key, "diverged")
        else:
            if self.draw.random() < self.scenario.silent:
                self.at(self.now + part, self._falls_silent, worker)
            self.at(self.now + left, self._trained, worker, key, "committed")

    def _falls_silent(self, worker: _Worker) -> None:
        if worker.alive:
            worker.silent_until = self.now + self.draw.expovariate(1 / 300)
            self.silent.add(worker)

    def _trained(self, worker: _Worker, key: TrialKey, outcome: str) -> None:
        if not worker.alive or worker.training != key:
            return
        if self.now < worker.silent_until:
            self.at(worker.silent_until, self._trained, worker, key, outcome)
            return
        worked = self.now - worker.since
        self.busy += worked
        worker.training = None
        if outcome == "committed":
            outcome = "duplicate" if key in self.store else "committed"
            self.store.add(key)
        elif outcome == "diverged":
            self.diverged_busy += worked
            attempt = 1 + sum(f.key == key for f in self.failures)
            self.failures.append(Failure(key=key, attempt=attempt, cause="diverged"))
            self.saved.pop(key, None)
        self._finish(worker, key, outcome)
        self._ask(worker)

    def _finish(self, worker: _Worker, key: TrialKey, outcome: str) -> None:
        self.call("finish", worker.name, key, outcome, "as simulated")
        self._expire_one(worker)
        if worker.key == key:
            worker.key = None
        worker.last_heartbeat = self.now
        if outcome in ("committed", "duplicate"):
            self.told.add(key)

    def _expire(self) -> None:
        for worker in list(self.silent):
            self._expire_one(worker)

    def _expire_one(self, worker: _Worker) -> None:
        if worker in self.silent and self.now - worker.last_heartbeat > LEASE_SECONDS:
            worker.key = None

    # What must hold

    def _check_lease(self, worker: _Worker, key: TrialKey) -> None:
        self.demand(worker.name in self.workers, f"{key} is leased to nobody's worker")
        self.demand(
            not worker.worker_group.drained, f"{key} is leased to a worker group that drains"
        )
        self.demand(key in self.length, f"{key} is not wanted")
        self.demand(key not in self.told, f"{key} is leased though it is done")
        self.demand(self.deaths[key] < DEATHS_ALLOWED, f"{key} is leased though given up")
        if self.scenario.workers <= 64:
            live = [w.name for w in self.workers.values() if w.key == key and w is not worker]
            self.demand(not live, f"{key} is leased to {worker.name} and to {live}")

    def _check(self, progress: Progress) -> None:
        self.demand(progress.total == len(self.wanted), "trials appeared or were lost")
        self.demand(progress.committed == len(self.told), "a commit is not counted once")
        self.demand(progress.done == self.done_before + len(self.told), "done is miscounted")
        blamed = sum(self.deaths.values())
        self.demand(progress.deaths == blamed, f"{progress.deaths} deaths, {blamed} were real")
        holders = [w.key for w in self.workers.values() if w.key is not None]
        self.demand(len(set(holders)) == len(holders), "a trial has two live leases")
        self.demand(progress.running == len(holders), "running is not the number of live leases")

    def _check_end(self, progress: Progress) -> None:
        self._take_lost()
        missing = [key for key in self.wanted if key not in self.store]
        if progress.fatal is not None:
            return
        self.demand(progress.failed == len(missing), f"{len(missing)} trials have no result")
        diverged = Counter(f.key for f in self.failures if f.cause == "diverged")
        recorded = {failure.key for failure in self.failures}
        for key in missing:
            deserved = diverged[key] >= DIVERGENCES_ALLOWED or self.deaths[key] >= DEATHS_ALLOWED
            self.demand(deserved and key in recorded, f"{key} was given up for nothing")

    def report(self) -> dict[str, Any]:
        """Of a simulation that ran: time, waste, and what the trial queue had to do."""
        assert self.end is not None
        useful = sum(self.length[key] for key in self.store)
        calls = sum(self.calls.values())
        innocent = [k for k in self.wanted if k not in self.store | self.poison | self.hopeless]
        return {
            "hours": self.now / HOUR,
            "ideal_hours": useful / self.scenario.workers / HOUR,
            "lost_share": max(0.0, 1 - (useful + self.diverged_busy) / self.busy),
            "diverged_share": self.diverged_busy / self.busy,
            "calls": calls,
            "calls_a_second": calls / self.now,
            "busiest_second": max(self.busiest.values()),
            "queue_ms_per_trial": 1e3 * self.seconds_in_queue / len(self.wanted),
            "queue_share": self.seconds_in_queue / self.now,
            "done": len(self.store),
            "given_up": len(self.wanted) - len(self.store),
            "innocent": len(innocent),
            "workers_retired": self.end.workers_retired,
            "nodes_retired": len(self.end.retired_nodes),
            "fatal": self.end.fatal,
        }


def scenarios(quick: bool) -> list[Scenario]:
    workers = 40 if quick else 1000
    spot = {"workers": workers, "trials": 2 * workers, "hours": 4.0, "node_hours": 12.0}
    return [
        Scenario(name="64 workers, nothing happens", workers=64, trials=1280),
        Scenario(name="nothing happens", workers=workers, trials=10 * workers),
        Scenario(name="worker groups of one", workers=workers, trials=5 * workers, worker_group=1),
        Scenario(name="trials of a minute", workers=workers, trials=20 * workers, hours=1 / 60),
        Scenario(name="nodes live 12 h, trials take 4 h", **spot),
        Scenario(name="the same, checkpoints every 10 min", checkpoint_minutes=10, **spot),
        Scenario(name="the same, and a notice", checkpoint_minutes=10, notice=True, **spot),
        Scenario(name="workers crash once in 10 days", crash_hours=240.0, **spot),
        Scenario(
            name="everything: nodes live 12 h, crashes, 2% diverge, 2% silent, two kills",
            checkpoint_minutes=10,
            crash_hours=240.0,
            diverging=0.02,
            silent=0.02,
            orphans=0.1,
            driver_kills=(1.0, 5.0),
            **spot,
        ),
        Scenario(
            name="one node fails every trial at once", workers=workers, trials=2000, bad_nodes=1
        ),
        Scenario(
            name="8 workers, one of them fails every trial",
            workers=8,
            trials=160,
            worker_group=1,
            bad_nodes=1,
        ),
        Scenario(name="8 nodes, every trial fails on one", workers=64, trials=1280, bad_nodes=1),
        Scenario(name="8 nodes, one GPU of one fails", workers=64, trials=1280, bad_devices=1),
        Scenario(name="8 nodes, one GPU of three fails", workers=64, trials=1280, bad_devices=3),
        Scenario(name="every trial fails everywhere", workers=64, trials=1280, bad_nodes=8),
    ]


def measure(quick: bool) -> Iterator[Row]:
    found = []
    for scenario in scenarios(quick):
        simulation = Simulation(scenario)
        simulation.run()
        report = simulation.report()
        found.append({"name": scenario.name, "workers": scenario.workers, **report})
        given_up = f", {report['given_up']} given up" if report["given_up"] else ""
        retired = (
            f", {report['workers_retired']} workers and {report['nodes_retired']} nodes retired"
            if report["workers_retired"]
            else ""
        )
        ended = f", ENDED: {report['fatal']}" if report["fatal"] else ""
        yield Row(
            what=f"{scenario.name} ({scenario.workers:,} workers, {scenario.trials:,} trials of "
            f"{60 * scenario.hours:.0f} min)",
            result=f"{report['hours']:.1f} h against {report['ideal_hours']:.1f} h of work, "
            f"{100 * report['lost_share']:.1f}% lost{given_up}{retired}{ended}; trial queue "
            f"{100 * report['queue_share']:.2f}% of a core, {report['calls_a_second']:,.0f} "
            f"calls a second, {report['busiest_second']:,} in the busiest",
            goal="trial queue below 5% of a core",
            met=report["queue_share"] < 0.05,
        )
    keep("simulation", {"scenarios": found})
