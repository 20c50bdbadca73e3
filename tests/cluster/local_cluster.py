"""Clusters of this machine: nodes that go, and what a cluster still holds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from processes import no_survivors

RAY = Path(sys.executable).parent / "ray"
FAST_DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
}
# Prints placement groups that are not removed, classes of actors, free CPUs, and nodes, on request.
LOOKING = """
import json, ray, sys
from ray.util import placement_group_table
ray.init(log_to_driver=False)
for line in sys.stdin:
    groups = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
    free = ray.available_resources().get("CPU", 0)
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    print(json.dumps([groups, sorted(a["ActorClassName"] for a in alive), free, nodes]), flush=True)
"""


def drain(address: str, node: str, seconds: int) -> None:
    """Tell Ray what a machine's metadata service says: that a node goes in so many seconds."""
    subprocess.run(
        [
            RAY, "drain-node", "--address", address,
            "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "spot notice", "--deadline-remaining-seconds", str(seconds),
        ],
        check=True, capture_output=True,
    )  # fmt: skip


class Held(NamedTuple):
    """What is held of a cluster."""

    groups: list[str]
    """States of the placement groups that are not removed; PENDING ones ask for nodes."""
    actors: list[str]
    """Classes of the actors that are alive."""
    free_cpus: float
    nodes: list[str]
    """Ids of the nodes that are alive."""


class Looking:
    """Asks a cluster what is held of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self) -> Held:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Held(*json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def looking(address: str) -> Iterator[Looking]:
    """A process that looks at the cluster at `address`."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOKING], env={**os.environ, "RAY_ADDRESS": address}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process, no_survivors(process):
        yield Looking(process)
        process.stdin.close()
