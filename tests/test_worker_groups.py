"""What the driver makes of worker groups and trial queues that die; Ray itself is a mock here."""

from __future__ import annotations

import dataclasses
import signal
from unittest.mock import MagicMock

import pytest
import ray as real
from ray.exceptions import ActorDiedError

from raymem.errors import FleetError
from raymem.fleet import remote_queue, worker_groups
from raymem.fleet.cluster import connected
from raymem.fleet.resources import Resources
from raymem.fleet.trial_queue import GroupProgress, TrialQueue
from raymem.store import TrialKey

NODE = "a" * 56


@pytest.fixture
def ray(monkeypatch):
    """A Ray of one node, on which all that is asked of actors fails."""
    mock = MagicMock(exceptions=real.exceptions)
    mock.get.side_effect = ActorDiedError()
    mock.wait.side_effect = lambda futures, **options: (futures, [])
    mock.nodes.return_value = [{"Alive": True, "NodeID": NODE, "Resources": {"CPU": 1}}]
    for module in (worker_groups, remote_queue):
        monkeypatch.setattr(module, "ray", mock)
    monkeypatch.setattr(worker_groups, "is_private", lambda: True)
    monkeypatch.setattr(worker_groups, "on_head", dict)
    monkeypatch.setattr(worker_groups, "Placements", MagicMock())
    return mock


@pytest.mark.parametrize("commits", [True, False])
def test_a_node_is_given_up_for_deaths_in_a_row(ray, commits):
    """A node that trains in between is not given up, however often its worker groups die."""
    queue = MagicMock()
    queue.is_broken.return_value = False
    progress = TrialQueue([TrialKey(float("inf"), trial) for trial in range(9)]).progress()
    groups = worker_groups.WorkerGroups(queue, None, MagicMock(), Resources(gpus_per_trial=0.0))
    for n in range(10):
        if not commits and n == worker_groups.RUNNER_DEATHS_ALLOWED:
            with pytest.raises(FleetError, match="again and again without finishing a trial"):
                groups.tend(progress)
            return
        groups.tend(progress)
        assert queue.expect.call_count == n + 1
        done = GroupProgress(name=f"group-{n:03d}", workers=1, running=0, committed=int(commits))
        progress = dataclasses.replace(progress, groups=(done,))


def test_a_lost_trial_queue_is_an_error_that_says_what_to_do(ray):
    queue = TrialQueue([TrialKey(float("inf"), 0)])
    with pytest.raises(FleetError, match=r"trial queue .* is lost .* run the same command again"):
        worker_groups.run_on_ray(
            queue, MagicMock(), Resources(gpus_per_trial=0.0), watch=lambda *_: None
        )


def test_ray_does_not_take_sigterm_over(monkeypatch):
    """`ray.init()` makes it exit with 15, without a word and with no code of ours."""
    ours, theirs = (lambda *_: None), (lambda *_: None)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(real, "init", lambda **_: signal.signal(signal.SIGTERM, theirs))
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with connected():
            assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
