"""Long trials on machines that go away: what was trained is not trained again."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import no_survivors, wait_until, workers_of

from raymem import Store, verify
from raymem.store import TrialKey

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parent / "cluster"


@pytest.fixture
def gate(tmp_path, monkeypatch):
    folder = tmp_path / "gate"
    folder.mkdir()
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(folder))
    return folder


def slow(store, *arguments):
    script = [sys.executable, str(FOLDER / "slow_epochs.py")]
    return [*script, "--store", str(store), *map(str, arguments)]


def digests(store, trials):
    return [Store(store).provenance(TrialKey(math.inf, t))["digest"] for t in range(trials)]


def trained_alone(store, trials, *arguments):
    ran = subprocess.run(
        slow(store, "train", "--engine", "serial", "--trials", trials, *arguments),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_drained_node_gets_its_checkpoint_out(tmp_path, gate, monkeypatch):
    """Three long trials on three nodes. One node gets its notice; no other takes its place."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAYMEM_TEST_BATCH_SECONDS", "0.2")
    store, trials = tmp_path / "store", 3
    script = [sys.executable, str(FOLDER / "draining_a_node.py"), str(store), str(gate), "3"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = json.loads((gate / "seen.json").read_text())
    assert seen["ended"]
    assert seen["progress"]["done"] == trials
    assert seen["done_at_loss"] == 0
    assert len(seen["saved"]) == 1
    # The saved trial went on elsewhere; the worker groups of the other nodes never noticed.
    assert seen["resumed"] == seen["saved"]
    assert len(seen["starts"]) == trials + 1
    assert seen["starts"][-1][0] != seen["lost"]
    assert Store(store).checkpointed() == set()
    assert verify(Store(store)) == []
    monkeypatch.setenv("RAYMEM_TEST_BATCH_SECONDS", "0")
    trained_alone(tmp_path / "alone", trials)
    assert digests(store, trials) == digests(tmp_path / "alone", trials)


@pytest.mark.slow
def test_two_workers_train_a_trial_together_and_one_is_killed(tmp_path, gate, monkeypatch):
    """The worker group starts anew, and the trial goes on from its checkpoint."""
    monkeypatch.setenv("RAYMEM_TEST_BATCH_SECONDS", "0.05")
    store = tmp_path / "store"
    log = (tmp_path / "log").open("w+")
    together = ("--workers-per-trial", 2, "--checkpoint-minutes", 0.02, "--trials", 2)
    job = subprocess.Popen(slow(store, "train", *together), stdout=log, stderr=log)
    with log, no_survivors(job) as family:
        wait_until(lambda: Store(store).checkpointed())
        family.update(psutil.Process(job.pid).children(recursive=True))
        workers = workers_of(job.pid)
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        assert job.wait(timeout=150) == 0, (log.seek(0), log.read())
    finished = Store(store)
    about = finished.provenance(TrialKey(math.inf, 0))
    assert about["resumed"]
    assert about["workers"] == 2
    assert finished.checkpointed() == set()
    # Two ranks started twice, at most once more for the second trial.
    assert len((gate / "log").read_text().splitlines()) == 2 + 2 + 2
    monkeypatch.setenv("RAYMEM_TEST_BATCH_SECONDS", "0")
    trained_alone(tmp_path / "alone", 2)
    for trial in range(2):
        ours, alone = (
            Store(s).trial(TrialKey(math.inf, trial))["margin"].to_numpy()
            for s in (store, tmp_path / "alone")
        )
        assert np.allclose(ours, alone, atol=2e-2)


def test_several_workers_need_ray(tmp_path, gate):
    serial = slow(tmp_path / "a", "--engine", "serial", "--workers-per-trial", 2)
    ran = subprocess.run(serial, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "several workers per trial need engine='ray'" in ran.stderr


@pytest.mark.slow
def test_a_trial_that_no_node_can_hold_is_refused(tmp_path, gate):
    crowd = slow(tmp_path / "b", "train", "--workers-per-trial", 100)
    ran = subprocess.run(crowd, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "no node has 100 times 1 CPUs" in ran.stderr
