from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from raymem import CurvatureRule, Recipe, Store, Study, correlations
from raymem.links.curvature import MEASURES, _correlate, _Sums, by_memorization


@pytest.fixture(scope="module")
def study(digits, tmp_path_factory):
    study = Study(
        examples=digits,
        recipe=Recipe(model="mlp-32", epochs=6, learning_rate=0.1),
        store=tmp_path_factory.mktemp("links"),
        trials=60,
        curvature=CurvatureRule(),
    )
    study.train(engine="serial")
    study.score()
    return study


def test_correlations_are_scipys_over_the_training_examples(study):
    ((epsilon, found),) = correlations(Store(study.store)).items()
    assert epsilon == math.inf
    assert [c.measure for c in found] == list(MEASURES)
    rows = [row for row in study.scores().to_pylist() if row["split"] == "train"]
    mem = [row["memorization"] for row in rows]
    for c in found:
        values = [row[c.measure] for row in rows]
        assert c.spearman.value == pytest.approx(stats.spearmanr(mem, values)[0], abs=1e-9)
        assert c.pearson.value == pytest.approx(stats.pearsonr(mem, values)[0], abs=1e-9)
        for coefficient in (c.spearman, c.pearson):
            assert coefficient.low < coefficient.value < coefficient.high
        assert (c.examples, c.folds) == (1200, 3)


def test_bins_are_means_over_their_examples(study):
    (table,) = by_memorization(Store(study.store)).values()
    rows = [row for row in study.scores().to_pylist() if row["split"] == "train"]
    assert sum(table["examples"].to_pylist()) == 1200
    for bin_ in table.to_pylist():
        inside = [
            r
            for r in rows
            if bin_["from"] <= r["memorization"] < bin_["to"]
            or r["memorization"] == bin_["to"] == 1
        ]
        assert len(inside) == bin_["examples"]
        for name in MEASURES:
            assert bin_[name] == pytest.approx(np.mean([r[name] for r in inside]))


def test_a_bin_holds_its_lower_end_however_it_was_computed(tmp_path, monkeypatch):
    mem = [1 - 48 / 60, 1 - 54 / 60, 140 / 140 - 42 / 60, 1.0, 0.0, -0.05]
    table = pa.table(
        {
            "split": ["train"] * 6, "epsilon": [math.inf] * 6, "memorization": mem,
            "curvature_out": [1.0] * 6,
        }
    )  # fmt: skip
    monkeypatch.setattr(Store, "scores", lambda self, name="examples": table)
    (bins,) = by_memorization(Store(tmp_path)).values()
    assert bins["from"].to_pylist() == pytest.approx([-0.1, 0.0, 0.1, 0.2, 0.3, 0.9])
    assert bins["examples"].to_pylist() == [1] * 6


def test_more_examples_than_are_needed_are_drawn_once(study, monkeypatch):
    from raymem.links import curvature as links

    monkeypatch.setattr(links, "MOST_EXAMPLES", 700)
    ((_, found),) = correlations(Store(study.store)).items()
    assert {c.examples for c in found} == {700}


def test_the_same_seed_gives_the_same_intervals(study):
    store = Store(study.store)
    assert correlations(store) == correlations(store)
    assert correlations(store) != correlations(store, seed=1)


def test_a_study_without_curvature_has_no_correlations(digits, tmp_path):
    study = Study(examples=digits, recipe=Recipe(model="mlp-8", epochs=1), store=tmp_path, trials=2)
    study.train(engine="serial")
    study.score()
    assert correlations(Store(tmp_path)) == {}


def simulated(rng, F, N, block=20, ratio=0.7):
    """Sums of a fleet whose examples have their own odds, and a measure that goes with them."""
    hard = rng.beta(0.4, 1.5, N)
    level = hard + 0.3 * rng.standard_normal(N)
    n_in = np.full((F, N), round(block * ratio))
    n_out = block - n_in
    noise = rng.standard_normal((F, N)) / np.sqrt(n_out)
    # Trials of a block share something: blocks, not trials, are independent.
    shared = 0.1 * rng.standard_normal((F, 1))
    sums = {
        "n_in": n_in, "n_out": n_out, "correct_in": n_in,
        "correct_out": rng.binomial(n_out, 1 - hard), "n_curvature_out": n_out,
        "curvature_out": n_out * (level + noise + shared),
    }  # fmt: skip
    return hard, sums


def estimate(sums):
    total = {name: values.sum(0) for name, values in sums.items()}
    mem = 1 - total["correct_out"] / total["n_out"]
    return mem, total["curvature_out"] / total["n_curvature_out"]


def test_intervals_cover_the_expected_coefficient_at_their_rate():
    F, N, repeats = 10, 150, 120
    truth = np.mean(
        [
            [stats.spearmanr(a, b)[0], stats.pearsonr(a, b)[0]]
            for a, b in (
                estimate(simulated(np.random.default_rng(10_000 + k), F, N)[1]) for k in range(400)
            )
        ],
        axis=0,
    )
    covered = np.zeros(2)
    for k in range(repeats):
        _, sums = simulated(np.random.default_rng(k), F, N)
        mem, values = estimate(sums)
        fold = np.repeat(np.arange(F), N)
        table = pa.table({"fold": fold, **{n: v.reshape(-1) for n, v in sums.items()}})
        (found,) = _correlate(
            mem, {"curvature_out": values}, _Sums(table, ["curvature_out"]),
            np.random.default_rng(k),
        )  # fmt: skip
        covered += [
            c.low <= t <= c.high
            for c, t in zip((found.spearman, found.pearson), truth, strict=True)
        ]
    # 95% nominal; below 87% of 120 has a chance of 2e-4 then. Above is allowed: it is safe.
    assert (covered >= 0.87 * repeats).all(), covered
