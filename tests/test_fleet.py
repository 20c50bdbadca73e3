"""The fleet through kills, refusals and full disks: nothing lost, nothing twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import psutil
import pytest
from learners import KnownOdds, memorizes_everything, numbered_examples, recipe
from processes import no_survivors, run_job, start_job, wait_until, workers_of

from raymem import Store, Study, verify
from raymem.errors import FleetError, RecipeError, StoreFullError
from raymem.store import TrialKey

pytestmark = pytest.mark.alone

TRIALS = 16


def done(store) -> int:
    return len(Store(store).done())


def score_bytes(store) -> dict[str, bytes]:
    files = Store(store).files
    return {name: files.read(f"scores/{name}.parquet") for name in ("examples", "folds")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same study, trained in one process without Ray."""
    store = tmp_path_factory.mktemp("undisturbed")
    finished = run_job(store, "--engine", "serial", "--trials", str(TRIALS))
    assert finished.returncode == 0, finished.stderr
    return score_bytes(store)


def test_killing_a_worker_and_then_the_driver_changes_nothing(tmp_path, undisturbed):
    store = tmp_path / "store"
    log = (tmp_path / "log").open("w+")
    job = start_job(store, "--trials", str(TRIALS), log=log)
    with log, no_survivors(job) as family:
        wait_until(lambda: done(store) >= 2)
        family.update(psutil.Process(job.pid).children(recursive=True))
        victim = workers_of(job.pid)[0]
        os.kill(victim.pid, signal.SIGKILL)
        before = done(store)
        # The worker group comes back by itself and goes on.
        wait_until(lambda: victim.pid not in {p.pid for p in workers_of(job.pid)})
        wait_until(lambda: done(store) > before + 2)
        assert job.poll() is None
        family.update(psutil.Process(job.pid).children(recursive=True))
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    left = TRIALS - done(store)
    assert left > 0
    assert Store(store).files.exists("driver.json")

    again = run_job(store, "--trials", str(TRIALS))
    assert again.returncode == 0, again.stderr
    assert f"{left} trials trained" in again.stdout
    assert done(store) == TRIALS
    assert verify(Store(store)) == []
    assert score_bytes(store) == undisturbed
    assert not Store(store).files.exists("driver.json")
    assert Store(store).failures() == []


def test_a_second_driver_is_refused_and_ctrl_c_lets_running_trials_finish(tmp_path, undisturbed):
    store = tmp_path / "store"
    job = start_job(store, "--trials", str(TRIALS), "--engine", "serial")
    with no_survivors(job):
        wait_until(lambda: done(store) >= 2)
        second = run_job(store, "--trials", str(TRIALS), "--engine", "serial")
        assert second.returncode == 3
        assert f"held by process {job.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        assert done(store) < TRIALS
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 5
    stopped = done(store)
    assert 2 <= stopped < TRIALS
    assert not Store(store).files.exists("driver.json")
    again = run_job(store, "--trials", str(TRIALS), "--engine", "serial")
    assert again.returncode == 0
    assert f"{TRIALS - stopped} trials trained" in again.stdout
    assert score_bytes(store) == undisturbed
    third = run_job(store, "--trials", str(TRIALS), "--engine", "serial")
    assert third.returncode == 0
    assert "trials trained" not in third.stdout


def study_of(model, store, **settings):
    return Study(
        examples=numbered_examples(),
        recipe=recipe(model),
        store=store,
        **{"trials": 6, **settings},
    )


def test_a_full_disk_ends_the_fleet_and_loses_nothing(tmp_path, monkeypatch):
    study = study_of(memorizes_everything, tmp_path)
    study.open_store()
    sync, calls = os.fsync, []

    def full_after_a_while(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_a_while)
    with pytest.raises(StoreFullError, match="run the same command again"):
        study.train(engine="serial")
    monkeypatch.undo()
    kept = done(tmp_path)
    assert 0 < kept < 6
    assert study.train(engine="serial").committed == 6 - kept
    assert verify(Store(tmp_path)) == []


def test_a_model_that_does_not_run_is_refused_before_the_fleet_starts(tmp_path):
    with pytest.raises(RecipeError, match="no model"):
        study_of("resnet-imaginary", tmp_path).train(engine="serial")


def fails_in_training(n_classes, image_shape):
    class Failing(KnownOdds):
        def forward(self, x):
            if self.training:
                raise ZeroDivisionError("my own mistake")
            return super().forward(x)

    return Failing(1.0, 0.0)


def test_an_error_in_the_users_model_is_shown_with_its_place(tmp_path):
    with pytest.raises(FleetError, match=r"ZeroDivisionError: my own mistake .*test_fleet.py:\d+"):
        study_of(fails_in_training, tmp_path).train(engine="serial")
    assert Store(tmp_path).failures() == []
    assert done(tmp_path) == 0


class Diverging(KnownOdds):
    """Diverges where its first draw is small; which trials that is, their seeds say."""

    def __init__(self):
        super().__init__(1.0, 0.0)
        self.diverges = bool(self.right_if_out.numel() and __import__("torch").rand(()) < 0.3)

    def forward(self, x):
        logits = super().forward(x)
        return logits * math.nan if self.diverges and self.training else logits


def sometimes_diverges(n_classes, image_shape):
    return Diverging()


def test_diverged_trials_are_recorded_and_tried_with_a_new_seed(tmp_path):
    study = study_of(sometimes_diverges, tmp_path, trials=40)
    progress = study.train(engine="serial")
    store = Store(tmp_path)
    failures = store.failures()
    by_trial: dict[int, list[int]] = {}
    for failure in failures:
        assert failure.cause == "diverged"
        by_trial.setdefault(failure.key.trial, []).append(failure.attempt)
    assert 3 <= len(by_trial) <= 25
    gave_up = {trial for trial, attempts in by_trial.items() if attempts == [1, 2, 3]}
    saved = {trial for trial, attempts in by_trial.items() if attempts == [1, 2]}
    assert gave_up | saved == set(by_trial)
    assert saved
    assert progress.failed == len(gave_up)
    assert done(tmp_path) == 40 - len(gave_up)
    one = min(saved)
    about = store.provenance(TrialKey(math.inf, one))
    assert about["attempt"] == 3
    assert about["seeds"] == vars(study.plan.seeds(one, attempt=2))
    study.score()
    trials = study.scores("trials").to_pylist()
    assert {t["trial"] for t in trials if t["status"] == "diverged"} == gave_up
    kept = [trial for trial in range(40) if trial not in gave_up]
    counted = study.scores()["n_in"].drop_null().to_pylist()
    assert counted == sum(study.plan.mask(trial).astype(int) for trial in kept).tolist()
    # A rerun does not try again what diverged for good.
    assert study.train(engine="serial").committed == 0


def test_stores_in_this_process_only_are_refused_on_ray(tmp_path):
    with pytest.raises(FleetError, match="memory://"):
        study_of(memorizes_everything, "memory://not-for-ray").train(engine="ray")


def test_importing_raymem_does_not_import_ray():
    program = (
        "import sys, raymem; everything = [getattr(raymem, name) for name in raymem.__all__]; "
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_fleet_leaves_no_token_behind(tmp_path):
    """On a clean machine, a local fleet must not switch authentication on for later clusters."""
    program = (
        "from raymem.fleet.cluster import connected\n"
        "import os\n"
        "with connected():\n"
        "    import ray\n"
        "    assert ray.get(ray.remote(lambda: 1).remote()) == 1\n"
        "assert not {'RAY_AUTH_MODE', 'RAY_AUTH_TOKEN'} & set(os.environ)\n"
        "with connected():\n"
        "    assert ray.get(ray.remote(lambda: 2).remote()) == 2\n"
    )
    home = {**os.environ, "HOME": str(tmp_path)}
    home = {k: v for k, v in home.items() if not k.startswith("RAY_")}
    ran = subprocess.run([sys.executable, "-c", program], env=home, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout, ran.stderr) == ("", "")
    assert not (tmp_path / ".ray" / "auth_token").exists()


def test_progress_is_in_the_lock_while_the_fleet_runs(tmp_path, undisturbed):
    from raymem.show import describe_store

    job = start_job(tmp_path, "--trials", str(TRIALS), "--engine", "serial")
    with no_survivors(job):
        wait_until(lambda: done(tmp_path) >= 3)
        text = describe_store(Store(tmp_path))
        assert f"of {TRIALS} done" in text
        assert f"driver: process {job.pid}" in text
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert "rerun the job" in describe_store(Store(tmp_path))
        json.loads(Store(tmp_path).files.read("driver.json"))
