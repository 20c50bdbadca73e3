"""A study on three nodes; one is lost in the middle, another joins. What it saw goes to
GATE/seen.json.

python losing_a_node.py STORE GATE TRIALS REPLACE
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

import ray
from gated import RECIPE, SETTINGS
from local_cluster import FAST_DETECTION
from ray.cluster_utils import Cluster

from raymem import Store


def wait_until(condition, what: str, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def main(store: str, gate: Path, trials: int, replace: bool) -> None:
    def started() -> list[list[str]]:
        log = gate / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def committed() -> int:
        return len(Store(store).done())

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_DETECTION}
    )
    cluster.connect()
    head = ray.get_runtime_context().get_node_id()
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    study = dataclasses.replace(SETTINGS, store=store, trials=trials).study(RECIPE)
    progress = []
    fleet = threading.Thread(target=lambda: progress.append(study.train()))
    fleet.start()
    wait_until(lambda: len({node for node, _ in started()}) == 3, "a trial on each of three nodes")
    (gate / "open").touch()
    wait_until(lambda: committed() >= 9, "nine trials committed")
    lost = others[0].node_id
    cluster.remove_node(others[0], allow_graceful=False)
    at_loss = committed()
    joined = cluster.add_node(num_cpus=1).node_id if replace else ""
    if replace:
        # Trials wait again, so that there is work left for the worker group of the node that
        # joined.
        (gate / "open").unlink()
        wait_until(lambda: joined in {node for node, _ in started()}, "a trial on the new node")
        (gate / "open").touch()
    fleet.join(timeout=400)
    seen = {
        "ended": not fleet.is_alive(),
        "progress": vars(progress[0]) if progress else None,
        "at_loss": at_loss,
        "head": head,
        "lost": lost,
        "kept": others[1].node_id,
        "joined": joined,
        "workers": sorted({tuple(line) for line in started()}),
        "starts": len(started()),
    }
    (gate / "seen.json").write_text(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "replace")
