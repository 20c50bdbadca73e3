"""Canaries: made from their ids, part of the study, without memorization, audited by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

import raymem
from raymem import Examples, JobSettings, Recipe, Store, Study, add_canaries
from raymem.cli.job_settings import PoolSettings
from raymem.errors import ExamplesError
from raymem.links import link3
from raymem.show.notebook import open_store


@pytest.fixture(scope="module")
def with_canaries(digits):
    return add_canaries(digits, 40)


def test_canaries_follow_from_their_ids(digits, with_canaries):
    N = len(digits.train_ids)
    assert with_canaries.canaries == tuple(range(N, N + 40))
    assert with_canaries.train_ids[N:][:2] == ("canary-00000", "canary-00001")
    more = add_canaries(digits, 50)
    assert (more.x_train[: N + 40] == with_canaries.x_train).all()
    assert (more.y_train[: N + 40] == with_canaries.y_train).all()
    assert (with_canaries.x_train[:N] == digits.x_train).all()
    assert len({digits.fingerprint, with_canaries.fingerprint, more.fingerprint}) == 3


def test_canaries_are_noise_with_labels_of_all_classes(digits):
    many = add_canaries(digits, 1000)
    canaries = many.x_train[list(many.canaries)]
    assert set(np.unique(canaries)) == {0, 255}
    # 64,000 fair coins, and ten classes alike (chi-square at 0.1%).
    assert abs((canaries == 255).mean() - 0.5) < 4 * 0.5 / math.sqrt(64_000)
    counts = np.bincount(many.y_train[list(many.canaries)], minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 27.9
    assert not any(set(group) & set(many.canaries) for group in many.near_duplicate_groups())


def test_canaries_that_are_none(with_canaries, digits):
    with pytest.raises(ExamplesError, match="take 100 or more"):
        add_canaries(digits, 1)
    with pytest.raises(ExamplesError, match="add them once"):
        add_canaries(with_canaries, 2)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (80, 8, 8, 1), np.uint8)
    y = np.arange(80) % 4
    examples = Examples(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    study = Study(
        examples=add_canaries(examples, 30),
        recipe=Recipe(model="mlp-32", epochs=15, batch_size=15, learning_rate=0.3),
        store=tmp_path_factory.mktemp("canaries") / "store",
        trials=40,
        subset_ratio=0.5,
    )
    study.train(engine="serial")
    return study, study.score()


def test_tables_have_no_memorization_of_canaries(scored):
    study, (summary,) = scored
    rows = [row for row in study.scores().to_pylist() if row["split"] == "train"]
    canaries = [row for row in rows if row["example_id"].startswith("canary-")]
    assert len(canaries) == 30
    for row in canaries:
        assert row["null_reason"] == "canary"
        names = [name for name in row if "memoriz" in name]
        assert len(names) >= 10
        assert all(row[name] is None for name in names)
        assert row["accuracy_in"] > row["accuracy_out"]
    assert summary.null["canary"] == 30
    assert sum(row["memorization"] is not None for row in rows) == 60
    assert study.as_dict()["data"]["canaries"] == list(range(60, 90))


def test_canaries_are_audited_by_themselves(scored):
    study, _ = scored
    (audit,) = link3(Store(study.store))
    assert audit.pool.what == audit.candidates.what == audit.pairs.what == "canaries"
    assert audit.pool.examples == audit.candidates.examples == 30
    assert audit.pool.low > 0.3
    assert audit.pairs.low > 0.8
    assert audit.candidates.right > 0.9 * audit.candidates.guesses


def test_a_store_finds_its_images_again(scored, tmp_path):
    study, _ = scored
    data = study.examples
    assert open_store(study.store, data=data).data() is data
    # From where the study had them: canaries are made again.
    digits = add_canaries(raymem.flip_labels(raymem.load_examples("digits"), 0.1), 10)
    other = Study(
        examples=digits,
        recipe=Recipe(model="mlp-8", epochs=1),
        store=tmp_path / "digits",
        trials=1,
    )
    other.open_store()
    assert open_store(other.store).data().fingerprint == digits.fingerprint


def test_a_job_adds_canaries_and_they_are_candidates_of_its_pool(tmp_path):
    def settings(**more):
        return JobSettings(
            data="digits", store=str(tmp_path / "store"), flip_labels=0.1, trials=20, **more
        )

    recipe = Recipe(model="mlp-8", epochs=1)
    first = settings().study(recipe)
    first.train(engine="serial")
    first.score()
    pool = PoolSettings(pool_from=first.store, pool_size=30)
    study = settings(canaries=20, pool=pool).study(recipe)
    assert study.examples.fingerprint == add_canaries(first.examples, 20).fingerprint
    known = set(study.plan.pool) - set(study.examples.canaries)
    assert len(known) == 30
    assert set(study.examples.canaries) <= set(study.plan.pool)
