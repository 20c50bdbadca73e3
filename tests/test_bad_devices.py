"""Real workers of Ray Train: one whose device fails, and a model that fails everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymem import Store, verify

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).parent / "cluster" / "bad_device.py"
TRIALS = 20


@pytest.fixture
def gate(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_TEST_GATE", str(tmp_path))
    return tmp_path


def train(store, *arguments):
    command = [sys.executable, str(SCRIPT), "train", "--store", str(store), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_worker_whose_device_fails_is_retired_and_the_others_do_all_trials(tmp_path, gate):
    store = tmp_path / "store"
    ran = train(store, "--trials", TRIALS, "--max-workers", os.cpu_count())
    assert ran.returncode == 0, ran.stderr
    finished = Store(store)
    assert len(finished.done()) == TRIALS
    assert verify(finished) == []
    assert finished.failures() == []
    (said,) = [line for line in ran.stderr.splitlines() if "is retired" in line]
    assert said.startswith("worker group-000/")
    assert "it failed 3 times in a row where other workers succeed; last cause: " in said
    assert "RuntimeError: CUDA error: uncorrectable ECC error encountered" in said


@pytest.mark.slow
def test_a_model_that_fails_everywhere_ends_the_fleet_at_once(tmp_path, gate, monkeypatch):
    monkeypatch.setenv("RAYMEM_TEST_ALL_BAD", "1")
    ran = train(tmp_path / "store", "--trials", TRIALS)
    assert ran.returncode == 1
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    assert "RuntimeError: CUDA error: uncorrectable ECC error encountered" in errors[0]
    assert "is retired" not in ran.stderr
    assert Store(tmp_path / "store").done() == set()


@pytest.mark.slow
def test_an_error_of_one_of_two_workers_of_a_trial_is_told(tmp_path, gate, monkeypatch):
    """The other one only loses its peer: what is said is the cause."""
    monkeypatch.setenv("RAYMEM_TEST_ALL_BAD", "1")
    ran = train(tmp_path / "store", "--trials", 2, "--workers-per-trial", 2)
    assert ran.returncode == 1
    assert "error: trial 0 failed: RuntimeError: CUDA error: uncorrectable" in ran.stderr
