"""What a fleet asks of an autoscaling cluster: what it can use, and nothing once it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from autoscaling_head import MOST_NODES, autoscaling_head
from processes import no_survivors, wait_until

from raymem import Store

FOLDER = Path(__file__).parent / "cluster"
RAY = Path(sys.executable).parent / "ray"
PORT = 27_479
pytestmark = pytest.mark.alone

# Prints the number of nodes that are alive beside the head, on request.
COUNTING = """
import ray, sys
ray.init(log_to_driver=False)
for line in sys.stdin:
    print(sum(node["Alive"] for node in ray.nodes()) - 1, flush=True)
"""


class Counter:
    """Counts the nodes of the cluster."""

    def __init__(self, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNTING], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.most = 0

    def __call__(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        n = int(self.process.stdout.readline())
        self.most = max(self.most, n)
        return n

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nodes_are_asked_for_and_let_go(tmp_path, monkeypatch, version):
    gate = tmp_path / "gate"
    gate.mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(gate))  # nodes have the environment of the head
    store = tmp_path / "store"

    said = tmp_path / "said"

    def job(environment, trials, *arguments):
        command = [sys.executable, str(FOLDER / "gated.py"), "train", "--store", str(store)]
        with said.open("w") as file:
            return subprocess.Popen(
                [*command, "--trials", str(trials), *arguments],
                env=environment, stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip

    with autoscaling_head(PORT, version) as environment:
        time.sleep(8)
        nodes = Counter(environment)
        with no_survivors(nodes.process):
            # Nobody knows yet what nodes there will be.
            unsure = job(environment, 4)
            assert unsure.wait(timeout=120) == 1
            assert "--gpus-per-trial" in said.read_text()

            first = job(environment, 4, "--gpus-per-trial", "0", "--max-workers", "2")
            with no_survivors(first):
                wait_until(lambda: nodes() == 2, 120)
                time.sleep(5)
                assert nodes() == 2  # not the three that there could be
                (gate / "open").touch()
                assert first.wait(timeout=200) == 0, said.read_text()
            assert len(Store(store).done()) == 4
            # Asked for nothing more at the end: idle nodes go.
            wait_until(lambda: nodes() == 0, 120)

            (gate / "open").unlink()
            (gate / "log").unlink()
            second = job(environment, 6, "--gpus-per-trial", "0")
            with no_survivors(second):
                # Two trials are left: no more nodes than these can use.
                wait_until(lambda: nodes() == 2, 120)
                wait_until(lambda: (gate / "log").exists(), 120)
                os.kill(second.pid, signal.SIGKILL)
                second.wait()
            # What the driver asked for goes with it; its nodes, after the idle time.
            wait_until(lambda: nodes() == 0, 120)
            assert nodes.most == 2

            # More than the cluster may ever hold: as many nodes come as may come.
            third = job(environment, 40, "--gpus-per-trial", "0")
            with no_survivors(third):
                wait_until(lambda: nodes() == MOST_NODES, 120)
                os.kill(third.pid, signal.SIGKILL)
                third.wait()
            nodes.close()
