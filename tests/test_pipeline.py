"""The whole way, examples to scores, with learners whose answers are known."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import reference
from learners import (
    errs_at_known_odds,
    look_up_table,
    memorizes_everything,
    memorizes_nothing,
    numbered_examples,
    recipe,
)

from raymem import Examples, Recipe, Store, Study, memorization
from raymem.store import Target, TrialKey
from raymem.store.trials import metadata_of


def run(store, model, *, trials=40, examples=None, **settings):
    study = Study(
        examples=examples or numbered_examples(),
        recipe=recipe(model),
        store=store,
        trials=trials,
        **settings,
    )
    study.train(engine="serial")
    return study, study.score()


def train_rows(study):
    table = study.scores()
    return table.filter(np.array(table["split"].to_pylist()) == "train")


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


@pytest.mark.parametrize("kind", ["balanced", "fixed-size"])
def test_a_learner_that_memorizes_everything_scores_one(tmp_path, kind):
    study, (summary,) = run(tmp_path, memorizes_everything, kind=kind)
    rows = train_rows(study)
    assert rows["memorization"].to_pylist() == [1.0] * 60
    assert (summary.accuracy_in, summary.accuracy_out, summary.accuracy_test) == (1, 0, 0)
    soft = 1 / (1 + math.exp(-2)) - 1 / (1 + math.exp(2))
    assert column(rows, "memorization_soft") == pytest.approx(soft, abs=1e-6)


def test_a_learner_that_memorizes_nothing_scores_zero(tmp_path):
    study, (summary,) = run(tmp_path, memorizes_nothing)
    rows = train_rows(study)
    assert rows["memorization"].to_pylist() == [0.0] * 60
    assert column(rows, "memorization_soft") == pytest.approx(0, abs=1e-12)
    assert math.isnan(summary.reliability)


def test_a_table_that_must_be_taught_scores_one(tmp_path):
    """The same through gradients: rows of logits that only their own example moves."""
    base = numbered_examples()
    named = dataclasses.replace(base, classes=(*base.classes, "nobody"))
    study, _ = run(tmp_path, look_up_table, examples=named, trials=20)
    assert train_rows(study)["memorization"].to_pylist() == [1.0] * 60


def test_known_odds_are_inside_their_intervals_at_the_stated_rate(tmp_path):
    examples = numbered_examples(n_train=1500, n_test=10)
    study, (summary,) = run(tmp_path, errs_at_known_odds, examples=examples, trials=60)
    rows = train_rows(study)
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    truth = {"memorization": 0.9 - 0.4, "memorization_soft": (0.9 - 0.4) * (high - low)}
    for name, true in truth.items():
        covered = (column(rows, f"{name}_low") <= true) & (true <= column(rows, f"{name}_high"))
        # Newcombe's and Welch's intervals cover 93% or more; alpha = 1e-6 for 1,500 examples.
        assert covered.mean() > 0.93 - 4.75 * math.sqrt(0.93 * 0.07 / 1500), name
        z = (column(rows, name) - true) / column(rows, f"{name}_stderr")
        assert abs(z[np.isfinite(z)].mean()) < 0.3, name
        estimates = column(rows, name)
        mean_error = (estimates.mean() - true) / (estimates.std() / math.sqrt(1500))
        assert abs(mean_error) < 4.9, name
    assert summary.accuracy_in == pytest.approx(0.9, abs=0.01)
    # Nothing differs between examples but noise.
    assert abs(summary.reliability) < 0.2


@pytest.fixture(scope="module")
def odds(tmp_path_factory):
    """A partial fleet, so that counts differ: 33 of two blocks."""
    return run(tmp_path_factory.mktemp("odds"), errs_at_known_odds, trials=33)


def test_scores_agree_with_the_double_loop(odds):
    study, (summary,) = odds
    store = Store(study.store)
    tables = [store.trial(TrialKey(math.inf, t)) for t in range(33)]
    train = [t.slice(0, 60) for t in tables]
    masks = [t["in_subset"].to_pylist() for t in train]
    rows = train_rows(study)

    def close(name, expected):
        assert column(rows, name) == pytest.approx(expected, abs=1e-6), name

    correct = [t["correct"].to_pylist() for t in train]
    p_true = [[1 / (1 + math.exp(-m)) for m in t["margin"].to_pylist()] for t in train]
    loss = [[math.log1p(math.exp(-m)) for m in t["margin"].to_pylist()] for t in train]
    close("memorization", reference.memorization(masks, correct))
    close("memorization_soft", reference.memorization(masks, p_true))

    def arm(values, i, inside):
        chosen = [values[t][i] for t in range(33) if masks[t][i] == inside]
        return sum(chosen) / len(chosen)

    for values, name in ((correct, "accuracy"), (p_true, "p_true"), (loss, "loss")):
        for inside, suffix in ((True, "in"), (False, "out")):
            close(f"{name}_{suffix}", [arm(values, i, inside) for i in range(60)])
    for name in ("cumulative_loss", "forgetting_count"):
        values = [t[name].to_pylist() for t in train]
        close(name, [arm(values, i, True) for i in range(60)])
    counts = [sum(mask[i] for mask in masks) for i in range(60)]
    assert rows["n_in"].to_pylist() == counts
    assert rows["n_out"].to_pylist() == [33 - n for n in counts]

    test = study.scores().slice(60)
    right = [t.slice(60)["correct"].to_pylist() for t in tables]
    assert column(test, "accuracy_out") == pytest.approx(np.mean(right, axis=0))
    assert test["memorization"].null_count == test["n_in"].null_count == 20
    assert summary.accuracy_test == pytest.approx(np.mean(right))


def test_folds_add_up_to_the_scores(odds):
    study, _ = odds
    folds, rows = study.scores("folds").to_pandas(), study.scores().to_pandas()
    assert sorted(folds["fold"].unique()) == [0, 1]
    total = folds.groupby(["epsilon", "split", "index"]).sum(numeric_only=True)
    train = rows[rows["split"] == "train"]
    sums = total.loc[(math.inf, "train")]
    found = sums["correct_in"] / sums["n_in"] - sums["correct_out"] / sums["n_out"]
    assert np.allclose(found, train["memorization"])


def test_the_table_of_trials_says_what_each_trial_did(odds):
    study, (summary,) = odds
    trials = study.scores("trials").to_pandas()
    assert trials["trial"].tolist() == list(range(33))
    assert set(trials["status"]) == {"done"}
    assert trials["subset_size"].tolist() == study.plan.masks(range(33)).sum(axis=1).tolist()
    assert trials["accuracy_in"].mean() == pytest.approx(summary.accuracy_in)
    seeds = study.plan.seeds(5)
    assert trials.loc[5, ["seed_init", "seed_order"]].tolist() == [seeds.init, seeds.order]
    assert (trials["seconds"] > 0).all()


def test_scoring_again_changes_nothing_and_scoring_early_has_all_rows(tmp_path):
    study, _ = run(tmp_path, errs_at_known_odds, trials=5)
    store = Store(tmp_path)
    first = {name: store.files.read(f"scores/{name}.parquet") for name in ("examples", "folds")}
    study.score()
    assert {name: store.files.read(f"scores/{name}.parquet") for name in first} == first
    more = dataclasses.replace(study, trials=45)
    assert more.train(engine="serial").committed == 40
    more.score()
    assert store.scores().num_rows == 80
    assert set(store.scores()["n_in"].drop_null().to_pylist()) <= set(range(28, 36))


def test_before_any_trial_everything_is_null_with_its_reason(tmp_path):
    study = Study(
        examples=numbered_examples(), recipe=recipe(memorizes_nothing), store=tmp_path, trials=20
    )
    store = study.open_store()
    store.target = Target(trials=20)
    (summary,) = study.score()
    assert (summary.trials, summary.null) == (0, {"no trial yet": 60})
    table = study.scores()
    assert table.num_rows == 80
    assert table["memorization"].null_count == 80
    json.dumps(metadata_of(table, "scores"), allow_nan=False)


def test_ratio_one_has_no_out_arm_and_says_so(tmp_path):
    study, (summary,) = run(tmp_path, memorizes_everything, trials=3, subset_ratio=1)
    rows = train_rows(study)
    assert rows["memorization"].null_count == rows["accuracy_out"].null_count == 60
    assert set(rows["null_reason"].to_pylist()) == {"no out-trial"}
    assert summary.null == {"no out-trial": 60}
    assert rows["accuracy_in"].to_pylist() == [1.0] * 60


def test_a_candidate_pool_scores_its_pool_only(tmp_path):
    study, (summary,) = run(
        tmp_path, memorizes_everything, trials=20, kind="candidate-pool", subset_ratio=0.5,
        pool=(1, 2, 50),
    )  # fmt: skip
    values = train_rows(study)["memorization"].to_pylist()
    assert [i for i, value in enumerate(values) if value is not None] == [1, 2, 50]
    assert summary.null == {"no out-trial": 57}


def test_examples_outside_a_pool_that_are_drawn_are_scored_too(tmp_path):
    study, (summary,) = run(
        tmp_path, memorizes_everything, trials=20, kind="candidate-pool", subset_ratio=0.5,
        pool=(1, 2, 50), rest_ratio=0.7,
    )  # fmt: skip
    rows = train_rows(study)
    assert set(rows["memorization"].to_pylist()) == {1.0}
    n_in = [14] * 60
    n_in[1] = n_in[2] = n_in[50] = 10
    assert rows["n_in"].to_pylist() == n_in
    assert not summary.null


@pytest.mark.slow
def test_flipped_labels_are_what_is_memorized(tmp_path, digits):
    """5% of the labels of 600 digits are wrong: they are the top of the ranking."""
    generator = np.random.default_rng(5)
    flipped = generator.choice(600, 30, replace=False)
    y = digits.y_train[:600].copy()
    y[flipped] = (y[flipped] + generator.integers(1, 10, 30)) % 10
    examples = Examples(
        x_train=digits.x_train[:600], y_train=y, x_test=digits.x_test, y_test=digits.y_test
    )
    study = Study(
        examples=examples,
        recipe=Recipe(model="mlp-512-256", epochs=40, batch_size=32),
        store=tmp_path,
        trials=40,
    )
    study.train(engine="serial")
    study.score()
    values = column(train_rows(study), "memorization")
    is_flipped = np.isin(np.arange(600), flipped)
    assert values[is_flipped].mean() > 0.8
    assert values[is_flipped].mean() - values[~is_flipped].mean() >= 0.5
    assert is_flipped[np.argsort(-values, kind="stable")[:30]].mean() >= 0.8


def test_under_permuted_masks_nothing_is_memorized(tmp_path):
    """Placebo: with masks that have nothing to do with the models, z scores are standard normal."""
    study, _ = run(tmp_path, errs_at_known_odds, trials=160)
    store = Store(study.store)
    correct = np.array(
        [
            store.trial(TrialKey(math.inf, t))["correct"].to_numpy(zero_copy_only=False)[:60]
            for t in range(160)
        ]
    )
    generator = np.random.default_rng(0)
    z = []
    for _ in range(50):
        masks = generator.permuted(study.plan.masks(range(160)), axis=0)
        result = memorization(masks, correct)
        z.append(result.value / result.stderr)
    z = np.concatenate(z)
    assert 0.9 < z.std() < 1.1
    assert abs((np.abs(z) > 1.96).mean() - 0.05) < 0.02
    assert abs(z.mean()) < 4.9 / math.sqrt(60)
