"""The faults of a soak: what each kind does, and in which order they come.

A fault is a function of the machines and a source of chance; it returns what it hit, or None where
there is nothing to hit now.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import psutil

from benchmarks.soak_machines import (
    CONTROLLER,
    QUEUE,
    RUNNER,
    STOPPED,
    URL,
    Machines,
    s3_server,
)
from raymem.errors import StoreError, StoreHeldError
from raymem.store import DriverLock, Files

CutAnswer, CutRequest, Delay, Refuse = (
    s3_server.CutAnswer, s3_server.CutRequest, s3_server.Delay, s3_server.Refuse,
)  # fmt: skip
KILLED = -signal.SIGKILL
# What a driver exits with that failed, that found another one, or no space.
FAILED, HELD, FULL = 1, 3, 4
NOTICE_SECONDS = 5
HOUR = 3600.0


@dataclass(frozen=True)
class Hit:
    """What a fault hit, and where trials are to start again after it."""

    ended: frozenset[int] = frozenset()
    """Pids of the workers that it ended."""
    node: str | None = None
    """A worker starts trials here again; "": on any node; None: no worker was ended."""


Kind = Callable[[Machines, Random], Hit | None]


@dataclass(frozen=True)
class Happened:
    """One fault."""

    kind: str
    at: float
    hit: Hit


# Workers and nodes


def worker_killed(on: Machines, draw: Random) -> Hit | None:
    workers = on.workers()
    if not workers:
        return None
    pid = draw.choice(sorted(workers))
    return Hit(frozenset([pid]), workers[pid]) if _end(pid) else None


def worker_frozen(on: Machines, draw: Random) -> Hit | None:
    workers = on.workers()
    return _freeze(on, draw.choice(sorted(workers)), draw.uniform(2, 8)) if workers else None


def _actor_killed(actor: str) -> Kind:
    """An actor that is a worker group's: its workers end with it."""

    def kill(on: Machines, draw: Random) -> Hit | None:
        found = on.processes(actor)
        if not found:
            return None
        victim = draw.choice(found)
        node = on.nodes.node_of(victim)
        hit = Hit(frozenset(pid for pid, where in on.workers().items() if where == node), node)
        return hit if _end(victim.pid) else None

    return kill


def node_lost(on: Machines, draw: Random) -> Hit:
    return _replace(on, draw.choice(on.nodes.all))


def node_drained(on: Machines, draw: Random) -> Hit | None:
    """A notice, the machine's end when its time is up, and another machine."""
    node = draw.choice(on.nodes.all)
    ended = frozenset(pid for pid, where in on.workers().items() if where == node.node_id)
    on.nodes.drain(node, NOTICE_SECONDS)
    end = time.monotonic() + NOTICE_SECONDS
    while time.monotonic() < end:
        on.tend()
        time.sleep(0.1)
    return Hit(ended, _replace(on, node).node)


def _replace(on: Machines, node: Any) -> Hit:
    ended = frozenset(pid for pid, where in on.workers().items() if where == node.node_id)
    return Hit(ended, on.nodes.replace(node))


# The driver and the head


def _driver_gets(number: int, *codes: int) -> Kind:
    def give(on: Machines, draw: Random) -> Hit | None:
        if not on.driver_holds():
            return None
        # Trials that are running may finish first.
        on.driver.excuse(*codes, seconds=300)
        hit = Hit(frozenset(on.workers()), "")
        on.driver.signal(number)
        return hit

    return give


def driver_frozen(on: Machines, draw: Random) -> Hit | None:
    if not on.driver_holds():
        return None
    return _freeze(on, on.driver.process.pid, draw.uniform(3, 12))


def second_driver(on: Machines, draw: Random) -> Hit | None:
    """Somebody runs the same command: it is refused."""
    if not on.driver_holds():
        return None
    try:
        with DriverLock(Files(URL)):
            on.driver.excuse(HELD)
            if not on.driver.ended(20):  # it was about to end by itself
                on.wrong.append(f"a second driver took the store over: {on.driver.log}")
    except StoreHeldError:
        return Hit()
    except StoreError:  # the store itself is out of order
        pass
    return None


def queue_killed(on: Machines, draw: Random) -> Hit | None:
    found = on.processes(QUEUE)
    if not found:
        return None
    on.driver.excuse(FAILED)
    hit = Hit(frozenset(on.workers()), "")
    return hit if _end(found[0].pid) else None


def head_lost(on: Machines, draw: Random) -> Hit | None:
    """The machine with the head and the driver; its nodes are ended a while after it."""
    if not on.driver_holds():
        return None
    hit = Hit(frozenset(on.workers()), "")
    on.driver.excuse(KILLED)
    on.driver.signal(signal.SIGKILL)
    for orphan in on.nodes.lose_head():
        on.after(
            draw.uniform(2, 10),
            lambda node=orphan: node.kill_all_processes(  # type: ignore[misc]
                check_alive=False, allow_graceful=False
            ),
        )
    return hit


def clock_set(on: Machines, draw: Random) -> Hit:
    on.set_clock(draw.uniform(-HOUR, HOUR))
    return Hit()


# The store


def _server_has(
    share: float, *faults: s3_server.Fault, seconds: float, codes: tuple[int, ...] = ()
) -> Kind:
    """Some seconds in which a share of all requests meets one of these faults."""

    def disturb(on: Machines, draw: Random) -> Hit:
        on.driver.excuse(*codes)
        on.fault(
            s3_server.some(share, *faults, seed=draw.getrandbits(32)),
            draw.uniform(0.5, 1.5) * seconds,
        )
        return Hit()

    return disturb


def _commits_meet(fault: Callable[[Random], s3_server.Fault]) -> Kind:
    """The next few commits of trials meet this fault."""

    def disturb(on: Machines, draw: Random) -> Hit:
        faults: s3_server.Faults = s3_server.first(draw.randint(1, 4), fault(draw), _is_commit)
        on.fault(faults, 5.0)
        return Hit()

    return disturb


def _is_commit(request: s3_server.Request) -> bool:
    return request.what == "put" and "/trials/" in request.key


def disk_full(on: Machines, draw: Random) -> Hit:
    on.driver.excuse(FULL)
    full = Refuse("XMinioStorageFull", 507)
    on.fault(lambda request: full if _is_commit(request) else None, draw.uniform(1, 3))
    return Hit()


# How often each kind comes, relative to the others. Those that cost a driver, some twenty seconds
# of all workers or more, are rare, so that trials are committed in between.
KINDS: dict[str, tuple[float, Kind]] = {
    "worker killed": (10, worker_killed),
    "worker stopped for seconds": (6, worker_frozen),
    "worker group's runner killed": (2, _actor_killed(RUNNER)),
    "worker group's controller killed": (2, _actor_killed(CONTROLLER)),
    "node lost, another joins": (4, node_lost),
    "node drained, then lost, another joins": (3, node_drained),
    "driver killed": (1, _driver_gets(signal.SIGKILL, KILLED)),
    "driver told to end (SIGTERM)": (0.5, _driver_gets(signal.SIGTERM, STOPPED)),
    "driver interrupted (Ctrl-C)": (0.5, _driver_gets(signal.SIGINT, STOPPED)),
    "driver preempted (SIGUSR1)": (0.5, _driver_gets(signal.SIGUSR1, STOPPED)),
    "driver stopped for seconds": (3, driver_frozen),
    "second driver": (8, second_driver),
    "trial queue killed": (0.5, queue_killed),
    "head lost, another starts": (0.5, head_lost),
    "clock set": (8, clock_set),
    "store throttled": (8, _server_has(0.6, Refuse(), seconds=3)),
    "store fails inside": (6, _server_has(0.7, Refuse("InternalError", 500), seconds=3)),
    "store late": (5, _server_has(0.5, Delay(1.0), seconds=3)),
    "store's answers cut": (6, _server_has(0.3, CutAnswer(), CutAnswer(200), seconds=3)),
    "commit torn": (9, _commits_meet(lambda draw: CutRequest(draw.randint(0, 3000)))),
    "commit's answer lost": (9, _commits_meet(lambda draw: CutAnswer())),
    "store denies access": (
        0.5, _server_has(1.0, Refuse("AccessDenied", 403), seconds=2, codes=(FAILED,)),
    ),
    "store full": (0.5, disk_full),
}  # fmt: skip


def stream(on: Machines, seed: int) -> Iterator[Happened]:
    """Faults one after the other, as often as they are asked for."""
    draw = Random(seed)
    names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    while True:
        kind = draw.choices(names, weights)[0]
        at = time.monotonic()
        hit = KINDS[kind][1](on, draw)
        if hit is not None:
            yield Happened(kind, at, hit)


def _end(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).kill()
        return True
    return False


def _freeze(on: Machines, pid: int, seconds: float) -> Hit | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        process.suspend()

        def go_on() -> None:
            with contextlib.suppress(psutil.Error):
                process.resume()

        on.after(seconds, go_on)
        return Hit()
    return None
