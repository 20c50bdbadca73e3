"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
HELPERS = [str(HERE), str(HERE / "cluster")]
sys.path[:0] = HELPERS
# Workers and job drivers started by tests must find the learners too.
os.environ["PYTHONPATH"] = os.pathsep.join([*HELPERS, os.environ.get("PYTHONPATH", "")])


# Files whose tests start Ray, servers, browsers or drivers of their own: never two at a time.
WHOLE_MACHINE = (
    "cache", "cli", "cluster", "cluster_aws", "cluster_files", "cluster_page", "demand", "fleet",
    "ingest", "job_submit", "losing_machines", "object_stores", "report", "shards", "smoke",
    "store",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        name = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.xdist_group("machine" if name in WHOLE_MACHINE else name))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    from raymem import load_examples

    return load_examples("digits")
