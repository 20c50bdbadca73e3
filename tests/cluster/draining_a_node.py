"""A study of long trials on three nodes; one gets a notice, as spot machines do, and is gone.

What it saw goes to GATE/seen.json.

    python draining_a_node.py STORE GATE TRIALS
"""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path

import ray
from local_cluster import FAST_DETECTION, drain
from losing_a_node import wait_until
from ray.cluster_utils import Cluster
from slow_epochs import RECIPE, settings

from raymem import Store
from raymem.store import TrialKey

NOTICE_SECONDS = 25


def main(store: str, gate: Path, trials: int) -> None:
    def started() -> list[list[str]]:
        log = gate / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST_DETECTION}
    )
    cluster.connect()
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    study = settings(store, trials).study(RECIPE)
    progress = []
    fleet = threading.Thread(
        target=lambda: progress.append(study.train(checkpoint_seconds=10_000.0))
    )
    fleet.start()
    wait_until(lambda: len({node for node, _ in started()}) == 3, "a trial on each of three nodes")
    lost = others[0].node_id
    drain(cluster.address, lost, NOTICE_SECONDS)
    wait_until(lambda: Store(store).checkpointed(), "a checkpoint before the node is gone", 20)
    saved = sorted(Store(store).checkpointed())
    cluster.remove_node(others[0], allow_graceful=False)
    done_at_loss = len(Store(store).done())
    fleet.join(timeout=300)
    done = [TrialKey(math.inf, trial) for trial in range(trials)]
    seen = {
        "ended": not fleet.is_alive(),
        "progress": vars(progress[0]) if progress else None,
        "saved": [key.trial for key in saved],
        "done_at_loss": done_at_loss,
        "lost": lost,
        "starts": started(),
        "resumed": [key.trial for key in done if Store(store).provenance(key).get("resumed")],
    }
    (gate / "seen.json").write_text(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
