"""Fleets on several nodes, on a machine with several Rays, and in a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from processes import no_survivors, wait_until, workers_of

from raymem import Store, verify

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parent / "cluster"
TRIALS = 60


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """The folder of tests/cluster/gated.py; trials wait until it has a file `open`."""
    folder = tmp_path / "gate"
    folder.mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(folder))
    return folder


def gated(store, *arguments):
    return [sys.executable, str(FOLDER / "gated.py"), "--store", str(store), *map(str, arguments)]


def starts(gate) -> list[str]:
    log = gate / "log"
    return log.read_text().splitlines() if log.exists() else []


def score_bytes(store):
    return {
        name: Store(store).files.read(f"scores/{name}.parquet") for name in ("examples", "folds")
    }


@pytest.mark.slow
@pytest.mark.parametrize("joins", [True, False])
def test_a_lost_node_costs_its_own_worker_group_only(tmp_path, gate, monkeypatch, joins):
    """Three nodes, one is killed in mid-trial: the other worker groups never notice, the study
    ends."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    store = tmp_path / "store"
    script = [sys.executable, str(FOLDER / "losing_a_node.py"), str(store), str(gate), str(TRIALS)]
    ran = subprocess.run(
        [*script, "replace" if joins else "-"], capture_output=True, text=True, timeout=540
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = json.loads((gate / "seen.json").read_text())
    assert seen["ended"]
    assert seen["progress"]["done"] == TRIALS
    assert seen["at_loss"] < TRIALS
    by_node: dict[str, set[str]] = {}
    for node, pid in seen["workers"]:
        by_node.setdefault(node, set()).add(pid)
    assert len(by_node[seen["kept"]]) == len(by_node[seen["head"]]) == 1
    assert len(by_node[seen["lost"]]) == 1
    # The trial in flight on the lost node is all that was trained again.
    assert TRIALS <= seen["starts"] <= TRIALS + 1
    if joins:
        assert len(by_node[seen["joined"]]) == 1
    assert verify(Store(store)) == []

    alone = tmp_path / "alone"
    serial = subprocess.run(
        gated(alone, "--engine", "serial", "--trials", TRIALS), capture_output=True, text=True
    )
    assert serial.returncode == 0, serial.stderr
    again = subprocess.run(
        gated(store, "score", "--trials", TRIALS), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert score_bytes(store) == score_bytes(alone)


@pytest.mark.slow
def test_another_ray_on_the_machine_leaves_a_fleet_alone(tmp_path, gate):
    """Ray Train's watchdog once looked for its controller in the newest Ray, and ended the worker
    group."""
    job = subprocess.Popen(
        gated(tmp_path / "store", "train", "--trials", 4), stdout=subprocess.DEVNULL
    )
    other = None
    with no_survivors(job):
        try:
            wait_until(lambda: starts(gate))
            before = {process.pid for process in workers_of(job.pid)}
            # With a dashboard: the watchdog asked it about an actor it had never heard of.
            program = (
                "import ray, sys\nray.init(address='local', num_cpus=1, include_dashboard=True)\n"
                "print('up', flush=True)\nsys.stdin.read()\n"
            )
            other = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            )  # fmt: skip
            assert b"up\n" in iter(other.stdout.readline, b"")
            # The watchdog looks every second or so.
            time.sleep(12)
            assert {process.pid for process in workers_of(job.pid)} == before
            (gate / "open").touch()
            assert job.wait(timeout=120) == 0
        finally:
            if other is not None:
                other.communicate()
    assert len(starts(gate)) == 4


@pytest.mark.slow
def test_the_second_ctrl_c_in_a_terminal_stops_at_once(tmp_path, gate):
    """In a terminal Ctrl-C reaches all processes of the job, Ray's too."""
    store = tmp_path / "store"
    ours, theirs = os.openpty()
    job = subprocess.Popen(
        gated(store, "--trials", 4),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    said = ""

    def read_until(text: str) -> None:
        nonlocal said
        while text not in said:
            said += os.read(ours, 4096).decode(errors="replace")

    with no_survivors(job) as family:
        wait_until(lambda: starts(gate))
        family.update(psutil.Process(job.pid).children(recursive=True))
        os.write(ours, b"\x03")
        read_until("press Ctrl-C again to stop now")
        time.sleep(1)
        assert job.poll() is None
        os.write(ours, b"\x03")
        read_until("stopped at once; run the same command again to go on")
        assert job.wait(timeout=30) == 5
        _, alive = psutil.wait_procs(list(family), timeout=30)
        assert alive == []
    os.close(ours)
    assert "Traceback" not in said
    assert Store(store).done() == set()
    assert not Store(store).files.exists("driver.json")
    (gate / "open").touch()
    again = subprocess.run(gated(store, "--trials", 4), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert len(Store(store).done()) == 4


def test_sigterm_stops_at_once_and_lets_go_of_the_store(tmp_path, gate):
    """What `ray job stop` and batch systems send first."""
    store = tmp_path / "store"
    job = subprocess.Popen(
        gated(store, "--trials", 4, "--engine", "serial"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with no_survivors(job):
        wait_until(lambda: starts(gate))
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=30)
    assert job.returncode == 5
    assert "run the same command again" in said
    assert not Store(store).files.exists("driver.json")
