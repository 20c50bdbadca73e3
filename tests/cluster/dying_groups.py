"""A study on two nodes of one CPU; a worker group's runner is killed, then a node is lost.

What the cluster held afterwards goes to GATE/seen.json. Trials wait at the gate, so that what a
dead group holds is seen: the next group of that node cannot start without it.

    python dying_groups.py STORE GATE TRIALS
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import ray
from gated import RECIPE, SETTINGS
from local_cluster import FAST_DETECTION
from losing_a_node import wait_until
from ray.cluster_utils import Cluster
from ray.util import placement_group_table


def groups() -> dict[str, int]:
    """How many placement groups there are in each state, but for those that ask for more nodes."""
    states = [group["state"] for group in placement_group_table().values()]
    return dict(Counter(state for state in states if state not in ("REMOVED", "PENDING")))


def actors() -> list[str]:
    """The classes of the actors that are alive."""
    alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
    return sorted(actor["ActorClassName"] for actor in alive)


def settled(expected: dict[str, int], seconds: float) -> float:
    """Seconds until the placement groups are as expected, infinite if they do not become so."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if groups() == expected:
            return time.monotonic() - start
        time.sleep(0.2)
    return float("inf")


def main(store: str, gate: Path, trials: int) -> None:
    def started() -> list[list[str]]:
        log = gate / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_DETECTION}
    )
    cluster.connect()
    other = cluster.add_node(num_cpus=1)
    study = dataclasses.replace(SETTINGS, store=store, trials=trials).study(RECIPE)
    progress = []
    fleet = threading.Thread(target=lambda: progress.append(study.train()), daemon=True)
    fleet.start()
    wait_until(lambda: len(started()) == 2, "a trial on each of two nodes")
    seen: dict[str, object] = {"before": groups(), "actors": actors()}
    runner = next(
        process
        for process in psutil.Process().children(recursive=True)
        if "WorkerGroupRunner" in " ".join(process.cmdline())
    )
    os.kill(runner.pid, signal.SIGKILL)
    wait_until(lambda: len(started()) == 3, "a trial on the node of the killed runner")
    seen["after_kill"] = groups()
    cluster.remove_node(other, allow_graceful=False)
    seen["seconds_after_loss"] = settled({"CREATED": 1}, 60)
    seen["after_loss"] = groups()
    (gate / "open").touch()
    fleet.join(timeout=300)
    seen["ended"] = not fleet.is_alive()
    seen["done"] = progress[0].done if progress else 0
    seen["seconds_after_end"] = settled({}, 5)
    seen["actors_after_end"] = actors()
    seen["cpus_after_end"] = ray.available_resources().get("CPU", 0)
    (gate / "seen.json").write_text(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
