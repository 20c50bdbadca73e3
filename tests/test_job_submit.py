"""`ray job submit` of a job file to a local head, as a user of a cluster does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from raymem import Store, verify

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
# Ports of our own, so that a cluster somebody else started is not the one we find and stop.
PORT, DASHBOARD, CLIENT, AGENT = 27_379, 27_265, 27_001, 27_365


@pytest.fixture
def head():
    # Ray's sockets live in its folder, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
    # As in an activated environment: the job's `python` is this one.
    environment["PATH"] = os.pathsep.join([str(RAY.parent), environment["PATH"]])
    environment.pop("RAY_ADDRESS", None)
    start = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={PORT}", "--num-cpus=2",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}",
            f"--ray-client-server-port={CLIENT}", f"--dashboard-agent-listen-port={AGENT}",
            "--node-ip-address=127.0.0.1",
            "--disable-usage-stats",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}
    start.terminate()
    start.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(environment, *arguments):
    command = [str(RAY), "job", "submit", "--working-dir", ".", "--", "python"]
    return subprocess.run(
        [*command, "jobs/feldman_digits.py", "--private-trials", "0", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
def test_a_submitted_job_runs_whole_and_refuses_relative_stores(head, tmp_path):
    for _ in range(120):
        try:
            urllib.request.urlopen(head["RAY_ADDRESS"] + "/api/version", timeout=2).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    store = tmp_path / "store"
    done = submit(head, "--store", store, "--trials", "4")
    for _ in range(6):
        if "No available agent" not in done.stderr:  # the head answers before it can take jobs
            break
        time.sleep(10)
        done = submit(head, "--store", store, "--trials", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The ten most memorized" in done.stdout
    assert len(Store(store).done()) == 4
    assert verify(Store(store)) == []
    refused = submit(head, "--store", "runs/relative", "--trials", "4")
    assert refused.returncode == 1
    assert "submitted job runs in a temporary folder" in refused.stdout + refused.stderr
