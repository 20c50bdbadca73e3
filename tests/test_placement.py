"""What a worker group held of a cluster is free as soon as it is dead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from autoscaling_head import RAY
from local_cluster import looking
from processes import no_survivors, wait_until

ray = pytest.importorskip("ray")

from ray.util import placement_group_table  # noqa: E402

from raymem.fleet.cluster import connected  # noqa: E402
from raymem.fleet.placement import Placements  # noqa: E402

pytestmark = pytest.mark.alone
FOLDER = Path(__file__).parent / "cluster"
PORT = 27_579


def state(group: str) -> str:
    return placement_group_table()[group]["state"]


def test_a_dead_group_is_freed_and_no_other(monkeypatch):
    @ray.remote(num_cpus=0)
    class Controller:
        """Makes placement groups, as Ray Train's controller does."""

        def make(self, selector):
            made = ray.util.placement_group([{"CPU": 1}], bundle_label_selector=[selector])
            return made.id.hex()

    with connected(num_cpus=3):
        node = ray.nodes()[0]["NodeID"]
        ours, theirs = Placements(), Placements()
        controller = Controller.remote()
        groups = [
            ray.get(controller.make.remote(selector))
            for selector in (
                ours.selector("group-000", node),
                ours.selector("group-001", ""),
                theirs.selector("group-000", node),
                ours.selector("group-002", "0" * 56),  # its node is gone
            )
        ]
        created = ["CREATED"] * 3 + ["PENDING"]
        wait_until(lambda: [state(group) for group in groups] == created, 20)
        ray.kill(controller)
        time.sleep(1)
        # All are said to be alive; and by itself Ray frees none before the driver ends.
        assert ours.free(["group-000", "group-001", "group-002"]) == 0
        assert [state(group) for group in groups] == created

        with monkeypatch.context() as patch:
            # A later Ray may not say whose a group is.
            patch.setattr("raymem.fleet.ray_internals.PlacementGroupTableData", None)
            assert ours.free(["group-001"]) == 0
        assert ours.free(["group-001"]) == 2
        freed = ["REMOVED", "CREATED", "CREATED", "REMOVED"]
        wait_until(lambda: [state(group) for group in groups] == freed, 5)
        wait_until(lambda: ray.available_resources().get("CPU") == 1, 5)
        ours.close()
        assert [state(group) for group in groups[1:3]] == ["REMOVED", "CREATED"]


@pytest.fixture
def gate(tmp_path, monkeypatch):
    folder = tmp_path / "gate"
    folder.mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return folder


@pytest.mark.slow
def test_a_killed_runner_and_a_lost_node_leave_nothing(tmp_path, gate):
    script = [sys.executable, str(FOLDER / "dying_groups.py"), str(tmp_path / "store"), str(gate)]
    ran = subprocess.run([*script, "4"], capture_output=True, text=True, timeout=540)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = json.loads((gate / "seen.json").read_text())
    assert seen["before"] == {"CREATED": 2}
    assert seen["actors"].count("TrainController") == 2
    assert "PlacementGroupCleaner" not in seen["actors"]
    # The next group of that node has its CPU, and nobody else.
    assert seen["after_kill"] == {"CREATED": 2}
    assert seen["after_loss"] == {"CREATED": 1}
    assert seen["seconds_after_loss"] < 30
    assert seen["ended"]
    assert seen["done"] == 8
    assert seen["seconds_after_end"] < 5
    assert seen["actors_after_end"] == []
    assert seen["cpus_after_end"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "ctrl-c", "done"])
def test_a_driver_that_ends_leaves_nothing(tmp_path, gate, end):
    folder = tempfile.mkdtemp(prefix="ray")  # its sockets want a short path
    log = gate / "log"
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={PORT}", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
            f"--ray-client-server-port={PORT + 1}", f"--temp-dir={folder}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with no_survivors(head):
        time.sleep(8)
        job = subprocess.Popen(
            [sys.executable, FOLDER / "gated.py", "train", "--store", tmp_path / "store",
             "--gpus-per-trial", "0", "--trials", "2"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with no_survivors(job), looking(environment["RAY_ADDRESS"]) as look:
            wait_until(lambda: log.exists() and len(log.read_text().split()) == 4, 300)
            assert look().groups == ["CREATED"]
            if end == "killed":
                os.kill(job.pid, signal.SIGKILL)
            elif end == "ctrl-c":
                job.send_signal(signal.SIGTERM)
            else:
                (gate / "open").touch()
            code = {"killed": -signal.SIGKILL, "ctrl-c": 5, "done": 0}[end]
            assert job.wait(timeout=120) == code
            wait_until(lambda: look()[:3] == ([], [], 2.0), 20)
    shutil.rmtree(folder, ignore_errors=True)
