"""Studies through a stream of faults: what benchmarks/soak.py says of them, and a short one."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.alone
@pytest.mark.slow
def test_five_minutes_of_faults_change_no_score_and_leave_nothing():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "5", "--seed", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-4000:]
    faults, kinds = re.search(r"(\d+) faults of (\d+) kinds", ran.stdout).groups()
    assert int(faults) >= 40
    assert int(kinds) >= 8


def test_lost_trials_are_charged_to_what_ended_them():
    from benchmarks import soak
    from benchmarks.soak_faults import Happened, Hit
    from benchmarks.soak_job import Start
    from raymem.store import TrialKey

    plan = soak.found_study("memory://soak", 1).plan
    seeds = [plan.seeds(trial).init for trial in range(3)]
    begun = [
        Start(10.0, 1, "a", seeds[0]),  # worker 1 is killed at 10.5
        Start(10.2, 2, "b", seeds[1]),
        Start(11.0, 2, "b", seeds[2]),  # the store does not take it
        Start(20.0, 3, "a", seeds[0]),
        Start(21.0, 2, "b", seeds[2]),
    ]
    commits = dict(zip([TrialKey(math.inf, t) for t in range(3)], [20.6, 10.9, 21.6], strict=True))
    happened = [
        Happened("killed", 10.5, Hit(frozenset([1]), "a")),
        Happened("store", 11.2, Hit()),
        Happened("late", 30.0, Hit()),
    ]
    assert list(soak.lost_starts(begun, commits)) == [begun[0], begun[2]]
    found = {cost.kind: cost for cost in soak.costs(happened, begun, commits)}
    assert {kind: cost.trials_lost for kind, cost in found.items()} == {
        "killed": 1, "store": 1, "late": 0,
    }  # fmt: skip
    # The next worker of node a trains at 20; after the store's fault the next commit is at 20.6.
    assert found["killed"].seconds == pytest.approx([9.5])
    assert found["store"].seconds == pytest.approx([9.4])
    assert found["late"].seconds == []
