"""The machine with Ray's head and the job's driver is lost in mid-study, and another takes its
place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from local_cluster import RAY, looking
from processes import no_survivors, wait_until

from raymem import Store, verify

pytestmark = [pytest.mark.alone, pytest.mark.slow]

GATED = Path(__file__).parent / "cluster" / "gated.py"
PORT, DASHBOARD, CLIENT, AGENT = 27_679, 27_665, 27_601, 27_666
TRIALS = 16


@pytest.fixture
def folder(monkeypatch):
    """Of this cluster: Ray's sockets live there, and their paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    (folder / "gate").mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(folder / "gate"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    # As in an activated environment: the job's `python` is this one.
    monkeypatch.setenv("PATH", os.pathsep.join([str(RAY.parent), os.environ["PATH"]]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(*options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def start_head() -> subprocess.Popen:
    """As in cluster.yaml: no trial runs on it."""
    head = start(
        "--head", f"--port={PORT}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={DASHBOARD}", f"--ray-client-server-port={CLIENT}",
        f"--dashboard-agent-listen-port={AGENT}",
    )  # fmt: skip
    wait_until(answers)
    return head


def answers() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def start_node(number: int) -> subprocess.Popen:
    agent = f"--dashboard-agent-listen-port={AGENT + number}"
    return start(f"--address=127.0.0.1:{PORT}", "--num-cpus=1", agent)


def family(*starts: subprocess.Popen) -> list[psutil.Process]:
    """All processes of machines."""
    return [
        process
        for one in starts
        for process in (psutil.Process(one.pid), *psutil.Process(one.pid).children(recursive=True))
    ]


def is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "Agent" in " ".join(process.cmdline())
    return False


def end_at_once(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def digests(store: Store) -> dict:
    return {key: store.provenance(key)["digest"] for key in store.done()}


def scores(store) -> bytes:
    return Store(store).files.read("scores/examples.parquet")


def test_the_command_that_is_run_again_goes_on_with_another_head(folder):
    """`until ray job submit ...` outlives the head; its nodes end by themselves."""
    gate, store = folder / "gate", folder / "store"
    head = start_head()
    nodes = [start_node(1), start_node(2)]
    job = f"python {GATED} --store {store} --trials {TRIALS} --gpus-per-trial 0"
    # So that what the lost driver had asked for is told from what the next one asks for.
    hold = folder / "hold"
    waiting = f"while [ -e {hold} ]; do sleep 1; done"
    again = subprocess.Popen(
        ["bash", "-c", f"until ray job submit -- {job}; do {waiting}; sleep 3; done"],
        env={**os.environ, "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with no_survivors(head, *nodes, again), contextlib.ExitStack() as later:
        log = gate / "log"
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 2, 400)
        (gate / "open").touch()
        wait_until(lambda: len(Store(store).done()) >= 4)
        (gate / "open").unlink()
        time.sleep(1)
        orphans = family(*nodes)
        hold.touch()
        end_at_once(family(head))
        (gate / "open").touch()
        committed = digests(Store(store))
        assert 4 <= len(committed) < TRIALS
        # Workers and nodes that have lost their head end by themselves, Ray's agents after them.
        _, alive = psutil.wait_procs([p for p in orphans if not is_agent(p)], timeout=120)
        assert alive == []
        _, alive = psutil.wait_procs(orphans, timeout=180)
        assert alive == []
        assert again.poll() is None

        later.enter_context(no_survivors(start_head()))
        look = later.enter_context(looking(f"127.0.0.1:{PORT}"))
        # Nothing that the lost driver asked for is known to the new head.
        assert look().groups == []
        hold.unlink()
        later.enter_context(no_survivors(start_node(3), start_node(4)))
        assert again.wait(timeout=400) == 0
        wait_until(lambda: look()[:3] == ([], [], 2.0), 30)
    finished = Store(store)
    assert len(finished.done()) == TRIALS
    assert committed.items() <= digests(finished).items()
    assert verify(finished) == []
    assert not finished.files.exists("driver.json")
    alone = folder / "alone"
    serial = [sys.executable, GATED, "--store", alone, "--trials", TRIALS, "--engine", "serial"]
    subprocess.run([str(word) for word in serial], check=True, capture_output=True)
    assert scores(store) == scores(alone)
