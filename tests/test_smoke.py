"""jobs/feldman_imagenet.py --smoke: shards, cache, plan, fleet, curvature, scores, on Ray."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raymem import Store, verify
from raymem.data import Cache

JOB = Path(__file__).parents[1] / "jobs" / "feldman_imagenet.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(JOB), *map(str, arguments)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.mark.parametrize(
    "engine", ["serial", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.alone])]
)
def test_the_whole_chain_gives_one_joined_row_per_example(tmp_path, engine):
    done = run("--smoke", "--engine", engine, "--store", tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed: 160 examples, one row each" in done.stdout
    store, cache = Store(tmp_path / "store"), Cache(cache_of(done.stdout))
    assert (cache.about["n_train"], cache.about["n_test"]) == (120, 40)
    assert len(store.done()) == len(store.kept()) == 20
    assert verify(store) == []
    page = (tmp_path / "store" / "report.html").read_text()
    assert page.count("data:image/") > 20  # pictures came from the cache
    rows = store.scores().to_pylist()
    index = cache.index().to_pylist()
    assert [row["example_id"] for row in rows] == [row["example_id"] for row in index]
    for row in rows[:120]:
        assert row["n_in"] == row["n_curvature_in"] == 14
        assert row["n_out"] == row["n_curvature_out"] == 6
        assert row["curvature_out"] >= 0  # convolutions, ReLU: positive semidefinite
        assert row["curvature_paper_out"] > 0
    shutil.rmtree(Path(cache.url).parent)


@pytest.mark.slow
@pytest.mark.alone
def test_a_dry_run_of_a_cache_reads_no_pixels_and_trains_nothing(tmp_path):
    done = run("--smoke", "--store", tmp_path / "store")
    cache = Cache(cache_of(done.stdout))
    plan = run("plan", "--data", cache.url, "--store", tmp_path / "other")
    assert plan.returncode == 0, plan.stderr
    assert "a trial would take" in plan.stdout
    assert not (tmp_path / "other").exists()
    shutil.rmtree(Path(cache.url).parent)


def cache_of(said: str) -> str:
    return re.search(r"^cache: (.*), fingerprint", said, re.MULTILINE)[1]


@pytest.mark.slow
@pytest.mark.alone
def test_the_same_chain_at_two_epsilons(tmp_path):
    done = run("--smoke", "--epsilons", "8,inf", "--store", tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed: 160 examples, one row each at each of 2 epsilons" in done.stdout
    store = Store(tmp_path / "store")
    assert {key.epsilon for key in store.done()} == {8.0, math.inf}
    assert len(store.done()) == len(store.kept()) == 40
    assert store.scores().num_rows == 320
    assert (tmp_path / "store" / "report.html").exists()
    assert "-gn" in store.study().model
    shutil.rmtree(Path(cache_of(done.stdout)).parent)


def test_what_is_no_cache_says_how_to_make_one(tmp_path):
    (tmp_path / "images").mkdir()
    ran = run("--data", tmp_path / "images", "--store", tmp_path / "store")
    assert ran.returncode == 1
    assert "is no cache; give --cache" in ran.stderr
    assert not (tmp_path / "store").exists()
