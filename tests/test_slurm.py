"""deploy/slurm.sbatch: a study on a real Slurm of two nodes, cut short by the time limit."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import missing, slurm_cluster

from raymem.store import Store, TrialKey

pytestmark = [pytest.mark.alone, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
JOB = Path(__file__).parent / "cluster" / "slow_epochs.py"
TRIALS = 4


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    assert not missing(), f"install Debian's slurm-wlm: it lacks {', '.join(missing())}"
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def submit(slurm: dict[str, str], *arguments: str, folder: Path, **more: str) -> str:
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={folder}/log-%a-%j"]
    environment = {**slurm, "RAYMEM_PYTHON": sys.executable, **more}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ended(slurm: dict[str, str], job: str, seconds: float) -> list[str]:
    """The states of a job's tasks, once all have ended."""
    until = time.monotonic() + seconds
    while True:
        states = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%T", f"--job={job}"],
            env=slurm, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        if states and all(s in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for s in states):
            return states
        assert time.monotonic() < until, f"still {states}"
        time.sleep(1)


def logged(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("log-*")))


def test_a_study_cut_short_by_the_time_limit_goes_on_in_the_next_allocation(slurm, tmp_path):
    options = ("--trials", str(TRIALS), "--checkpoint-minutes", "60")
    # 80 s a trial, two at a time; each allocation has between one and two minutes.
    job = submit(
        slurm, "--nodes=2", "--time=3", "--signal=B:USR1@60", "deploy/slurm.sbatch", str(JOB),
        "train", "--store", str(tmp_path / "cut"), *options,
        folder=tmp_path, RAYMEM_GRACE="35", RAYMEM_TEST_GATE=str(tmp_path),
        RAYMEM_TEST_BATCH_SECONDS="0.4",
    )  # fmt: skip
    assert ended(slurm, job, 1500) == ["COMPLETED"], logged(tmp_path)
    log = logged(tmp_path)
    assert "queued again" in log
    assert "no new trials" in log
    subprocess.run(
        [sys.executable, str(JOB), "train", "--store", str(tmp_path / "whole"), *options,
         "--engine", "serial"],
        env={**slurm, "RAYMEM_TEST_GATE": str(tmp_path)}, check=True, capture_output=True,
    )  # fmt: skip
    cut, whole = Store(str(tmp_path / "cut")), Store(str(tmp_path / "whole"))
    keys = [TrialKey(math.inf, trial) for trial in range(TRIALS)]
    about = {store: [store.provenance(key) for key in keys] for store in (cut, whole)}
    assert [one["digest"] for one in about[cut]] == [one["digest"] for one in about[whole]]
    assert any(one.get("resumed") for one in about[cut])
    nodes = {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()} - {"-"}
    assert len(nodes) >= 4, "two nodes in each of two allocations"


def test_a_failing_job_is_not_queued_again(slurm, tmp_path):
    job = submit(
        slurm, "--nodes=1", "--time=5", "deploy/slurm.sbatch", str(JOB), "--store",
        str(tmp_path / "store"), "--no-such-option",
        folder=tmp_path,
    )  # fmt: skip
    assert ended(slurm, job, 240) == ["FAILED"], logged(tmp_path)
    assert "--no-such-option" in logged(tmp_path)
    assert "queued again" not in logged(tmp_path)


def test_tasks_of_an_array_train_the_parts_of_one_study(slurm, tmp_path):
    job = submit(
        slurm, "--array=1-2", "--nodes=1", "--time=10", "deploy/slurm.sbatch",
        "jobs/feldman_digits.py", "train", "--store", str(tmp_path / "part-%a"), "--part", "%a/2",
        "--trials", "40", "--private-trials", "0", "--no-curvature",
        folder=tmp_path,
    )  # fmt: skip
    assert ended(slurm, job, 500) == ["COMPLETED"] * 2, logged(tmp_path)
    done = [{key.trial for key in Store(str(tmp_path / f"part-{k}")).done()} for k in (1, 2)]
    assert done[0] | done[1] == set(range(40))
    assert not done[0] & done[1]
