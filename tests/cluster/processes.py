"""Starting a job as a user does, and finding and killing its processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil

JOB = Path(__file__).parent / "small_job.py"


def start_job(store, *arguments: str, log=subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, str(JOB), "--store", str(store), *arguments]
    return subprocess.Popen(command, stdout=log, stderr=log)


def run_job(store, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(JOB), "--store", str(store), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def wait_until(condition, seconds: float = 120.0):
    """The condition's first true value; fails if it stays false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {condition}")


def workers_of(driver: int) -> list[psutil.Process]:
    """The Ray Train workers below a driver's process."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def no_survivors(*jobs: subprocess.Popen):
    """End the jobs and whatever processes they started."""
    family: set[psutil.Process] = set()
    try:
        yield family
    finally:
        for job in jobs:
            with contextlib.suppress(psutil.Error):
                family.update(psutil.Process(job.pid).children(recursive=True))
            job.kill()
            job.wait()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(list(family), timeout=10)
