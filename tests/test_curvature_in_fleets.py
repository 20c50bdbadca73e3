"""Curvature in every trial: what trial files hold, and what the scores make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raymem import CurvatureRule, Recipe, Store, Study, input_curvature, paper_score, score, verify
from raymem.curvature import PaperRule
from raymem.errors import CurvatureError, PlanError, StudyMismatchError
from raymem.models import build_model
from raymem.store import TrialKey, columns

MEASURED = tuple(columns.TRIAL_CURVATURE)
RECIPE = Recipe(model="mlp-16", epochs=3, learning_rate=0.1)
M, N = 597, 1200


def study_of(digits, store, **settings):
    defaults = {"trials": 40, "curvature": CurvatureRule(every_epochs=2), "recipe": RECIPE}
    return Study(examples=digits, store=store, **{**defaults, **settings})


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    study = study_of(digits, tmp_path_factory.mktemp("fleet"), keep_models=1)
    study.train(engine="serial")
    study.score()
    return study


def trial_columns(study, trial):
    table = Store(study.store).trial(TrialKey(math.inf, trial))
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def test_a_trial_holds_what_its_model_gives(done, digits):
    """From the kept weights, in this test's own way: one example at a time."""
    found = trial_columns(done, 0)
    for name in MEASURED:
        assert np.isnan(found[name][N:]).all()
        assert np.isfinite(found[name][:N]).all()
    model = build_model("mlp-16", n_classes=10, image_shape=(8, 8, 1)).eval()
    model.load_state_dict(Store(done.store).weights(TrialKey(math.inf, 0)))
    seed = done.plan.seeds(0).init
    for i in (0, 5, 700, 1199):
        x = torch.from_numpy(digits.x_train[i : i + 1].copy()).permute(0, 3, 1, 2) / 255
        y = torch.tensor(digits.y_train[i : i + 1])
        c = input_curvature(model, x, y)
        expected = {
            "curvature": c.trace, "curvature_squared": c.squared,
            "gradient_norm": c.gradient_norm,
            "curvature_paper": paper_score(model, x, y, seed=seed),
        }  # fmt: skip
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(float(value), rel=2e-3, abs=1e-12), name
        loss = np.logaddexp(0, -found["margin"][i])
        assert loss == pytest.approx(float(c.loss), rel=1e-3, abs=1e-7)


def test_scores_are_means_over_out_and_over_in_models_apart(done):
    trials = [trial_columns(done, t) for t in range(40)]
    inside = np.array([t["in_subset"][:N] for t in trials], bool)
    rows = done.scores().slice(0, N)
    for name in MEASURED:
        values = np.array([t[name][:N] for t in trials], np.float64)
        for arm, member in (("in", inside), ("out", ~inside)):
            got = rows[f"{name}_{arm}"].to_numpy()
            for i in range(0, N, 97):
                mine = values[member[:, i], i]
                assert got[i] == pytest.approx(mine.mean(), rel=1e-9)
                assert (
                    rows[f"n_curvature_{arm}"][i].as_py() == len(mine) == {"in": 28, "out": 12}[arm]
                )
                if f"{name}_{arm}_stderr" in rows.column_names:
                    stderr = mine.std(ddof=1) / len(mine) ** 0.5
                    assert rows[f"{name}_{arm}_stderr"][i].as_py() == pytest.approx(
                        stderr, rel=1e-6
                    )
    test_rows = done.scores().slice(N)
    for name in columns.SCORES_CURVATURE:
        assert test_rows[name].null_count == M
    table = done.scores("trials")
    assert set(table["curvature_mode"].to_pylist()) == {"gauss-newton"}
    means = [np.nanmean(t["curvature"][:N][~mask]) for t, mask in zip(trials, inside, strict=True)]
    np.testing.assert_allclose(table["curvature_out"].to_numpy(), means, rtol=1e-6)
    assert (table["curvature_seconds"].to_numpy() > 0).all()


def test_the_words_of_curvature_are_in_the_tables(done):
    schema = done.scores().schema
    for name, column in columns.SCORES_CURVATURE.items():
        assert schema.field(name).metadata[b"meaning"].decode() == column.meaning
    about = Store(done.store).provenance(TrialKey(math.inf, 3))["curvature"]
    assert about["mode"] == "gauss-newton"
    assert about["rule"]["paper"]["step"] == 1e-3
    assert about["over_training"]["epochs"] == 2
    assert about["over_training"]["seconds"] > 0
    assert verify(Store(done.store)) == []


def test_the_probes_of_trials_are_their_own(done):
    seeds = {done.plan.seeds(t).init for t in range(40)}
    assert len(seeds) == 40


def test_a_trial_with_curvature_is_the_same_to_the_bit_again(done, digits, tmp_path):
    again = study_of(digits, tmp_path, trials=2)
    again.train(engine="serial")
    for t in range(2):
        digest = Store(tmp_path).provenance(TrialKey(math.inf, t))["digest"]
        assert digest == Store(done.store).provenance(TrialKey(math.inf, t))["digest"]


def test_measuring_does_not_change_the_training(done, digits, tmp_path):
    plain = study_of(digits, tmp_path, trials=2, curvature=None)
    plain.train(engine="serial")
    for t in range(2):
        a, b = trial_columns(plain, t), trial_columns(done, t)
        assert set(b) - set(a) == set(MEASURED)
        for name, values in a.items():
            np.testing.assert_array_equal(values, b[name])


def test_a_study_without_curvature_has_no_such_columns(digits, tmp_path):
    plain = study_of(digits, tmp_path, trials=2, curvature=None)
    plain.train(engine="serial")
    plain.score()
    assert "curvature" not in plain.as_dict()
    for name in ("examples", "folds"):
        assert not [n for n in plain.scores(name).column_names if "curvature" in n]
    assert set(plain.scores("trials")["curvature_mode"].to_pylist()) == {None}


def test_without_the_papers_score_its_columns_are_absent(digits, tmp_path):
    study = study_of(digits, tmp_path, trials=2, curvature=CurvatureRule(paper=None))
    study.train(engine="serial")
    study.score()
    names = study.scores().column_names
    assert "curvature_out" in names
    assert not [name for name in names if "paper" in name]
    assert "curvature_paper" not in trial_columns(study, 0)


def test_only_the_first_blocks_measure_if_asked(digits, tmp_path):
    study = study_of(digits, tmp_path, curvature_trials=20)
    study.train(engine="serial")
    study.score()
    has = ["curvature" in trial_columns(study, t) for t in range(40)]
    assert has == [True] * 20 + [False] * 20
    rows = study.scores().slice(0, N)
    assert set(rows["n_curvature_in"].to_pylist()) == {14}
    assert set(rows["n_curvature_out"].to_pylist()) == {6}
    assert set(rows["n_out"].to_pylist()) == {12}
    values = np.array([trial_columns(study, t)["curvature"][9] for t in range(20)])
    out = ~np.array([study.plan.mask(t)[9] for t in range(20)])
    assert rows["curvature_out"][9].as_py() == pytest.approx(values[out].mean())
    # More trials with curvature can be asked for later; what is trained stays as it is.
    more = study_of(digits, tmp_path, trials=60, curvature_trials=60)
    more.train(engine="serial")
    (summary,) = score(Store(tmp_path))
    assert summary.trials == 60
    rows = more.scores().slice(0, N)
    assert set(rows["n_curvature_in"].to_pylist()) == {28}


def test_an_example_counts_where_all_of_its_measures_are_numbers(digits, tmp_path):
    """As where tr H^2 overflows float32."""
    import pyarrow as pa

    study = study_of(digits, tmp_path, trials=20)
    study.train(engine="serial")
    key = TrialKey(math.inf, 0)
    store = Store(tmp_path)
    table, about = store.trial(key), store.provenance(key)
    at = table.column_names.index("curvature_squared")
    values = table["curvature_squared"].to_pylist()
    values[0] = None
    spoiled = table.set_column(at, table.schema.field(at), pa.array(values, pa.float32()))
    (tmp_path / key.object_key).unlink()
    store.commit(key, spoiled, about)
    study.score()
    row = study.scores().slice(0, 1).to_pylist()[0]
    assert row["n_curvature_in"] + row["n_curvature_out"] == 19
    for name in MEASURED:
        for arm in ("in", "out"):
            assert math.isfinite(row[f"{name}_{arm}"])


def test_modes_are_not_mixed_without_a_word(digits, tmp_path):
    from raymem.show import summary_text

    study = study_of(digits, tmp_path, trials=20)
    study.train(engine="serial")
    key, store = TrialKey(math.inf, 0), Store(tmp_path)
    table, about = store.trial(key), store.provenance(key)
    (tmp_path / key.object_key).unlink()
    store.commit(key, table, {**about, "curvature": {**about["curvature"], "mode": "hessian"}})
    (summary,) = study.score()
    assert summary.curvature_modes == ("gauss-newton", "hessian")
    assert "2 MODES" in summary_text([summary])


def test_weights_of_another_run_of_a_trial_are_found(digits, tmp_path):
    for name in ("a", "b"):
        recipe = RECIPE if name == "a" else Recipe(**{**vars(RECIPE), "learning_rate": 0.05})
        study = study_of(digits, tmp_path / name, trials=1, keep_models=1, recipe=recipe)
        study.train(engine="serial")
    key = TrialKey(math.inf, 0)
    one, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    assert verify(one) == []
    one.keep_weights(key, other.weights(key), {"study_hash": one.study().hash})
    (problem,) = verify(one)
    assert (problem.kind, problem.key) == ("damaged", key.weights_key)
    assert "another run" in problem.detail


@pytest.mark.parametrize("limit", [1, 19, 30])
def test_parts_of_blocks_are_refused(digits, tmp_path, limit):
    with pytest.raises(PlanError, match="whole blocks of 20 trials"):
        study_of(digits, tmp_path, curvature_trials=limit)


def test_curvature_trials_need_curvature(digits, tmp_path):
    with pytest.raises(PlanError, match="needs curvature"):
        study_of(digits, tmp_path, curvature=None, curvature_trials=20)


def test_other_settings_of_curvature_are_another_study(digits, tmp_path):
    study_of(digits, tmp_path, trials=1).train(engine="serial")
    for rule in (CurvatureRule(paper=PaperRule(step=1e-4)), CurvatureRule(mode="hessian"), None):
        with pytest.raises(StudyMismatchError, match="curvature"):
            study_of(digits, tmp_path, trials=1, curvature=rule).train(engine="serial")


def test_a_model_that_cannot_be_measured_is_an_error_with_its_cause(digits, tmp_path):
    from raymem.errors import FleetError

    recipe = Recipe(model="learners:no_second_derivative", epochs=1)
    study = study_of(digits, tmp_path, trials=1, recipe=recipe, curvature=CurvatureRule())
    with pytest.raises((FleetError, CurvatureError), match="gauss-newton"):
        study.train(engine="serial")
