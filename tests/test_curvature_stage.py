"""Curvature measured after training, under kept models: the numbers that trials would have had."""

from __future__ import annotations

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from raymem import CurvatureRule, Examples, Recipe, Store, Study, verify
from raymem.curvature.streaming import measure_kept
from raymem.data.shards import list_shards
from raymem.errors import PlanError, StoreError
from raymem.store import TrialKey, columns

N, M, TRIALS = 60, 20, 40
RECIPE = Recipe(model="mlp-16", epochs=3, learning_rate=0.1)


@pytest.fixture(scope="module")
def few(digits):
    return Examples(
        x_train=digits.x_train[:N], y_train=digits.y_train[:N],
        x_test=digits.x_test[:M], y_test=digits.y_test[:M],
        train_ids=digits.train_ids[:N], test_ids=digits.test_ids[:M],
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(few, tmp_path_factory):
    """Three tars of all its images, train and test mixed, as PNG."""
    folder = tmp_path_factory.mktemp("shards")
    ids = [*few.train_ids, *few.test_ids]
    pixels = np.concatenate([few.x_train, few.x_test])
    labels = np.concatenate([few.y_train, few.y_test])
    for number, rows in enumerate(np.random.default_rng(0).permutation(N + M).reshape(4, -1)):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for row in rows:
                file = io.BytesIO()
                Image.fromarray(pixels[row, :, :, 0]).save(file, "PNG")
                for name, data in (("png", file.getvalue()), ("cls", str(labels[row]).encode())):
                    info = tarfile.TarInfo(f"{ids[row]}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder)


def study_of(few, store, **settings):
    defaults = {"trials": TRIALS, "curvature": CurvatureRule(), "curvature_trials": 20}
    return Study(examples=few, recipe=RECIPE, store=store, **{**defaults, **settings})


@pytest.fixture(scope="module")
def in_trials(few, tmp_path_factory):
    study = study_of(few, tmp_path_factory.mktemp("trials"))
    study.train(engine="serial")
    study.score()
    return study


@pytest.fixture
def after(few, shards, tmp_path):
    study = study_of(few, tmp_path / "store", curvature_at="stage", curvature_data=shards)
    study.train(engine="serial")
    return study


def test_the_stage_gives_what_trials_give(in_trials, after):
    assert len(Store(after.store).kept()) == 20
    done = after.measure_curvature(engine="serial")
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    assert tiny * 1.0 > 0  # the process computes as it did before
    assert (done.models, done.total, done.done, done.bad) == (20, 80, 80, 0)
    assert done.images == 20 * (N + M)
    after.score()
    ours, theirs = after.scores(), in_trials.scores()
    assert ours.column_names == theirs.column_names
    names = [name for name in columns.SCORES_CURVATURE if name in theirs.column_names]
    assert "curvature_out" in names
    for name in names:
        a, b = (t[name].to_numpy(zero_copy_only=False)[:N] for t in (ours, theirs))
        assert np.allclose(a, b, rtol=1e-4, atol=1e-9, equal_nan=True), name
    assert ours["n_curvature_in"].slice(0, N).to_pylist() == [14] * N
    assert ours["n_curvature_out"].slice(0, N).to_pylist() == [6] * N
    trials = after.scores("trials").slice(0, 20)
    assert set(trials["curvature_mode"].to_pylist()) == {"gauss-newton"}
    assert verify(Store(after.store)) == []
    # Again there is nothing left to do; after a loss only what was lost.
    assert after.measure_curvature(engine="serial").done == 0
    Store(after.store).files.delete("curvature/eps-inf-000007/part-2.parquet")
    assert after.measure_curvature(engine="serial").done == 1


@pytest.mark.slow
def test_on_ray_the_stage_gives_the_same(in_trials, after):
    assert after.measure_curvature().done == 80
    after.score()
    for name in ("curvature_in", "curvature_out"):
        a, b = (s.scores()[name].to_numpy()[:N] for s in (after, in_trials))
        assert np.allclose(a, b, rtol=1e-4, atol=1e-9)


def test_examples_without_a_value_are_not_counted(after):
    after.measure_curvature(engine="serial")
    store = Store(after.store)
    lost = store.curvature("eps-inf-000003")["example_id"].to_pylist()
    store.files.delete("curvature/eps-inf-000003/part-1.parquet")
    gone = set(lost) - set(store.curvature("eps-inf-000003")["example_id"].to_pylist())
    after.score()
    table = after.scores().slice(0, N)
    counts = np.array(table["n_curvature_in"]) + np.array(table["n_curvature_out"])
    assert gone
    for example, n in zip(table["example_id"].to_pylist(), counts, strict=True):
        assert n == (19 if example in gone else 20)


def test_measures_of_other_models_rules_and_images_are_not_taken_in(after, few, shards, tmp_path):
    store = Store(after.store)
    key = TrialKey(math.inf, 0)
    after.measure_curvature(engine="serial")
    about = "curvature/eps-inf-000000/_about.json"
    record = json.loads(store.files.read(about))

    def scored(**changes):
        store.files.replace(about, json.dumps({**record, **changes}).encode())
        after.score()
        return after.scores().slice(0, N)["n_curvature_in"].to_pylist()

    whole = scored()
    other_rule = scored(rule={**record["rule"], "probes": 99})
    inside = after.plan.mask(0)
    assert [n - 1 for n, member in zip(whole, inside, strict=True) if member] == [
        n for n, member in zip(other_rule, inside, strict=True) if member
    ]
    assert scored(transform={**record["transform"], "size": [9, 9]}) == other_rule
    with pytest.raises(StoreError, match="measured under another model than that of trial 0"):
        scored(weights="0" * 64)
    with pytest.raises(StoreError, match="1 models are not there"):
        measure_kept(store, [key, TrialKey(math.inf, 30)], list_shards(shards), CurvatureRule())


def test_images_in_memory_are_refused_with_the_way_out(few, tmp_path):
    with pytest.raises(PlanError, match="give curvature_data"):
        study_of(few, tmp_path, curvature_at="stage")


def test_studies_that_measure_in_trials_have_no_such_stage(in_trials):
    assert in_trials.measure_curvature() is None
