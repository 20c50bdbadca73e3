"""deploy/sky.yaml: what SkyPilot would run on two nodes, run as two processes here."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raymem.store import Store

ROOT = Path(__file__).parent.parent
TASK = yaml.safe_load((ROOT / "deploy" / "sky.yaml").read_text())


def test_a_spot_node_that_is_lost_starts_the_job_anew_and_a_failing_job_does_not():
    assert TASK["resources"]["use_spot"] is True
    assert TASK["resources"]["job_recovery"] == {"max_restarts_on_errors": 0}


def test_what_only_the_user_knows_must_be_given():
    assert TASK["envs"]["STORE"] is None
    assert TASK["secrets"] == {"RAY_AUTH_TOKEN": None}


@pytest.mark.slow
def test_skypilot_accepts_the_file_and_asks_for_the_store():
    """Where SkyPilot is installed: it is no dependency, and has many of its own."""
    task = pytest.importorskip("sky.task").Task
    ours = {"STORE": "s3://bucket/study"}
    read = task.from_yaml_config(copy.deepcopy(TASK), env_overrides=ours)
    assert {tuple(one.accelerators.values()) for one in read.resources} == {(1,)}
    assert len(read.resources) == len(TASK["resources"]["accelerators"])
    with pytest.raises(ValueError, match="STORE"):
        task.from_yaml_config(copy.deepcopy(TASK))


def test_the_job_file_and_the_recipe_exist():
    job, *options = TASK["envs"]["JOB"].split()
    help_text = subprocess.run(
        [sys.executable, job, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = [option for option in options if option.startswith("--")]
    assert [option for option in named if option not in help_text] == []
    assert options[options.index("--recipe") + 1] in help_text


@pytest.mark.alone
@pytest.mark.slow
def test_two_nodes_train_one_study_and_leave_nothing(tmp_path):
    def node(rank: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "RAY_AUTH_TOKEN": "0" * 64, "RAYMEM_PYTHON": sys.executable, "STORE": str(tmp_path),
            "JOB": "jobs/feldman_digits.py --trials 20 --private-trials 0 --no-curvature train",
        }  # fmt: skip
        return subprocess.Popen(["bash", "-c", TASK["run"]], cwd=ROOT, env=environment)

    nodes = [node(0), node(1)]
    assert [one.wait(300) for one in nodes] == [0, 0]
    store = Store(str(tmp_path))
    assert len(store.done()) == 20
