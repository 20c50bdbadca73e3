from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import optimize, stats

from raymem import CurvatureRule, Recipe, Store, Study
from raymem.links import (
    by_memorization,
    correlations,
    correlations_across,
    costs,
    find_links,
    joined,
    paper_bins,
    verdicts_on_link1,
)
from raymem.links.binned import crossed
from raymem.links.correlation import Coefficient, correlate
from raymem.links.folds import FixedScores, Folds
from raymem.show import correlations_text, links_text
from raymem.store.measures import MEASURES


@pytest.fixture(scope="module")
def study(digits, tmp_path_factory):
    study = Study(
        examples=digits,
        recipe=Recipe(model="mlp-32", epochs=6, learning_rate=0.1),
        store=tmp_path_factory.mktemp("links"),
        trials=60,
        curvature=CurvatureRule(every_epochs=3),
    )
    study.train(engine="serial")
    study.score()
    return study


def of(row, measure):
    """A measure in a row of the scores."""
    if measure.startswith("p_wrong"):
        return 1 - row[measure.replace("p_wrong", "p_true")]
    if measure == "wrong_out":
        return 1 - row["accuracy_out"]
    return row[measure]


def pairs_of(study, measure):
    """Memorization, a measure, and the loss of the training examples that have it, [n] each."""
    rows = [row for row in study.scores().to_pylist() if row["split"] == "train"]
    # An example that no trial learned has no learning epoch.
    has = [row for row in rows if of(row, measure) is not None]
    assert len(has) == 1200 or measure == "learning_epoch"
    return (
        np.array([of(row, name) for row in has]) for name in ("memorization", measure, "loss_out")
    )


def test_correlations_are_scipys_over_the_training_examples(study):
    ((epsilon, found),) = correlations(Store(study.store)).items()
    assert epsilon == math.inf
    assert [c.measure for c in found] == list(MEASURES)
    for c in found:
        mem, values, _ = pairs_of(study, c.measure)
        assert c.spearman.value == pytest.approx(stats.spearmanr(mem, values)[0], abs=1e-9)
        assert c.pearson.value == pytest.approx(stats.pearsonr(mem, values)[0], abs=1e-9)
        for coefficient in (c.spearman, c.pearson):
            assert coefficient.low < coefficient.value < coefficient.high
        assert (c.examples, c.folds) == (len(mem), 3)


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
            values = [of(r, name) for r in inside if of(r, name) is not None]
            assert bin_[name] == pytest.approx(np.mean(values))


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
    from raymem.links import correlation as links

    monkeypatch.setattr(links, "MOST_EXAMPLES", 700)
    ((_, found),) = correlations(Store(study.store)).items()
    assert {c.examples for c in found if c.measure != "learning_epoch"} == {700}


def test_the_same_seed_gives_the_same_intervals(study):
    store = Store(study.store)
    found = correlations(store)
    assert correlations(store) == found
    assert correlations(store, seed=1) != found


def test_a_study_without_curvature_compares_what_it_has(digits, tmp_path):
    study = Study(examples=digits, recipe=Recipe(model="mlp-8", epochs=3), store=tmp_path, trials=6)
    study.train(engine="serial")
    study.score()
    ((_, found),) = correlations(Store(tmp_path)).items()
    by_name = {c.measure: c for c in found}
    assert set(by_name) == {
        "loss_out", "loss_in", "p_wrong_out", "p_wrong_in", "cumulative_loss", "learning_epoch",
        "forgetting_count", "wrong_out",
    }  # fmt: skip
    # No trial learned some of them: those have no learning epoch, and count for all else.
    rows = [r for r in study.scores().to_pylist() if r["split"] == "train"]
    learned = [r for r in rows if r["learning_epoch"] is not None and r["n_out"]]
    known = [r for r in rows if r["memorization"] is not None]
    assert len(learned) < len(known)
    assert by_name["forgetting_count"].examples == len(known)
    both = [r for r in learned if r["memorization"] is not None]
    assert by_name["learning_epoch"].examples == len(both)
    expected = stats.spearmanr(*([r[n] for r in both] for n in ("memorization", "learning_epoch")))
    assert by_name["learning_epoch"].spearman.value == pytest.approx(expected[0], abs=1e-9)
    links = find_links(Store(tmp_path))
    assert str(links.verdicts[0]) == "link 1: not known, curvature was not measured"
    assert (links.bins, links.costs) == ({}, {})
    text = links_text(links)
    assert "\n".join(map(str, links.verdicts)) in text
    assert "Memorization and what a fleet gives beside it" in text
    assert "curvature_" not in text


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


@pytest.mark.slow
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
        (found,) = correlate(
            mem, {"curvature_out": values}, Folds(table, ["curvature_out"]),
            np.random.default_rng(k),
        )  # fmt: skip
        covered += [
            c.low <= t <= c.high
            for c, t in zip((found.spearman, found.pearson), truth, strict=True)
        ]
    # 95% nominal; below 87% of 120 has a chance of 2e-4 then. Above is allowed: it is safe.
    assert (covered >= 0.87 * repeats).all(), covered


def test_cosines_are_those_of_their_definitions(study):
    ((_, found),) = correlations(Store(study.store)).items()
    for c in found:
        mem, x, _ = pairs_of(study, c.measure)
        cosine = mem @ x / np.linalg.norm(mem) / np.linalg.norm(x)
        assert c.cosine.value == pytest.approx(cosine)
        # The mean over all shuffles has a closed form.
        null = len(x) * mem.mean() * x.mean() / np.linalg.norm(mem) / np.linalg.norm(x)
        assert c.cosine_null == pytest.approx(null, abs=0.02)


def test_curvature_is_compared_at_equal_loss_and_nothing_else_is(study):
    ((_, found),) = correlations(Store(study.store)).items()
    for c in found:
        if not c.measure.startswith("curvature"):
            assert c.at_equal_loss is None
            continue
        mem, x, loss = pairs_of(study, c.measure)
        # By residuals of ranks on the ranks of the loss.
        design = np.stack([stats.rankdata(loss), np.ones(len(loss))], 1)
        residuals = [
            r - design @ np.linalg.lstsq(design, r, rcond=None)[0]
            for r in (stats.rankdata(mem), stats.rankdata(x))
        ]
        expected = np.corrcoef(residuals)[0, 1]
        assert c.at_equal_loss.given_loss_out == pytest.approx(expected, abs=1e-6)
    text = correlations_text({math.inf: found})
    assert "None of these is a test" in text
    assert "beyond" not in text


def test_the_least_c1_makes_the_line_a_bound_and_no_smaller_does(study):
    ((_, found),) = correlations(Store(study.store)).items()
    for c in found:
        mem, x, _ = pairs_of(study, c.measure)
        slope, intercept = np.polyfit(mem, x, 1)
        assert c.slope == pytest.approx(max(slope, 0))
        assert c.violating == pytest.approx(np.mean(x < slope * mem + intercept))
        slack = x / c.slope + c.c1 - mem
        assert slack.min() == pytest.approx(0, abs=1e-9)


def related(rng, F, N, block=20):
    """A fleet whose measure is 3 memorization + 1, with noise in both."""
    truth = rng.beta(0.5, 1.0, N)
    n_in = np.full((F, N), block // 2)
    right = rng.binomial(block // 2, 1 - truth, (F, N))
    noise = rng.standard_normal((F, N)) * 2 / np.sqrt(block // 2)
    sums = {
        "n_in": n_in, "n_out": n_in, "correct_in": n_in, "correct_out": right,
        "n_curvature_out": n_in, "curvature_out": n_in * (3 * truth + 1 + noise),
    }  # fmt: skip
    return truth, sums


def test_instruments_and_reliabilities_undo_what_noise_does():
    """Over 30 fleets of two blocks: the plain slope is too flat, the instrumented one is right."""
    plain, instrumented, attenuated, restored = [], [], [], []
    for k in range(30):
        _truth, sums = related(np.random.default_rng(k), F=2, N=300)
        mem, values = estimate(sums)
        fold = np.repeat(np.arange(2), 300)
        table = pa.table({"fold": fold, **{n: v.reshape(-1) for n, v in sums.items()}})
        (found,) = correlate(
            mem, {"curvature_out": values}, Folds(table, ["curvature_out"]),
            np.random.default_rng(k), replicates=2,
        )  # fmt: skip
        plain.append(found.slope)
        instrumented.append(found.slope_instrumented)
        attenuated.append(found.pearson.value)
        restored.append(found.pearson_disattenuated)
    error = np.std(instrumented) / np.sqrt(30)
    assert np.mean(plain) < 3 - 5 * error
    assert abs(np.mean(instrumented) - 3) < 4 * error
    # The true measure is a line in memorization: without noise the correlation is 1.
    error = np.std(restored) / np.sqrt(30)
    assert np.mean(attenuated) < 0.95
    assert abs(np.mean(restored) - 1) < 4 * error + 0.005


def test_paper_bins_are_fifty_with_all_of_its_fits():
    rng = np.random.default_rng(0)
    mem = np.concatenate([rng.uniform(0, 0.1, 5000), rng.uniform(0, 1, 1000), [-0.2, 1.0]])
    x = 2 * mem + 0.5 + rng.normal(0, 0.3, len(mem))
    bins = paper_bins("curvature_out", mem, x)
    assert bins.examples.sum() == 6001  # not the negative one
    assert len(bins.low) == 50
    inside = (mem >= 0.04) & (mem < 0.06)
    assert bins.mean[2] == pytest.approx(x[inside].mean())
    slope, intercept = np.polyfit(bins.memorization, bins.mean, 1)
    assert (bins.straight.slope, bins.straight.intercept) == pytest.approx((slope, intercept))
    root = np.sqrt(bins.examples)
    for found, regressor in (
        (bins.equation_15, bins.memorization / root),
        (bins.imagenet_notebook, bins.memorization * root),
    ):
        direct = optimize.lsq_linear(
            np.stack([regressor, np.ones(50)], 1), bins.mean, ([0, -np.inf], np.inf)
        )
        assert (found.slope, found.intercept) == pytest.approx(tuple(direct.x), abs=1e-6)
    direct = optimize.lsq_linear(
        np.stack([bins.memorization * root, bins.examples, np.ones(50)], 1), bins.mean,
        ([0, 0, -np.inf], np.inf),
    )  # fmt: skip
    plane = bins.cifar100_notebook
    assert (plane.slope, plane.per_example, plane.intercept) == pytest.approx(
        tuple(direct.x), abs=1e-6
    )
    residual = np.var(
        bins.mean - np.stack([bins.memorization * root, bins.examples, np.ones(50)], 1) @ direct.x
    )
    assert plane.r_squared == pytest.approx(1 - residual / np.var(bins.mean), abs=1e-6)
    large = bins.examples >= 20
    weighted = np.polyfit(
        bins.memorization[large], bins.mean[large], 1, w=np.sqrt(bins.examples[large])
    )
    assert (bins.weighted.slope, bins.weighted.intercept) == pytest.approx(tuple(weighted))
    assert bins.straight.r_squared > 0.9
    # Bins fit far better than examples do.
    assert np.corrcoef(mem, x)[0, 1] ** 2 < bins.straight.r_squared


def test_falling_measures_have_a_flat_line():
    mem = np.linspace(0, 1, 500)
    bins = paper_bins("curvature_out", mem, 1 - mem)
    assert bins.straight.slope == 0
    assert bins.straight.intercept == pytest.approx(0.5)
    assert paper_bins("curvature_out", np.full(30, 0.01), np.ones(30)).straight is None


def test_costs_are_those_of_the_trials(study):
    store = Store(study.store)
    compared = correlations(store)
    (found,) = costs(store, compared).values()
    rows = store.scores("trials").to_pylist()
    training = sum(row["seconds"] for row in rows)
    measuring = sum(row["curvature_seconds"] for row in rows)
    assert (found.trials, found.models_measured) == (60, 60)
    assert found.training_seconds == pytest.approx(training)
    assert found.ratio == pytest.approx(training / (training + measuring))
    assert found.ratio_without_training == pytest.approx(training / measuring)
    assert found.ratio_at_target > 0
    in_epochs = sum(row["curvature_epochs_seconds"] for row in rows)
    assert {row["curvature_epochs"] for row in rows} == {2}
    assert in_epochs > 0
    assert found.epochs_seconds == pytest.approx(in_epochs)
    assert found.epochs_ratio == pytest.approx(training / (training + measuring + in_epochs))
    assert found.epochs_ratio_at_target > 0


def test_one_models_measures_against_memorization_of_the_others(study):
    """By hand, from the trial files: memorization of the folds that the model is not in."""
    from raymem.links import of_one_model
    from raymem.store import TrialKey

    store = Store(study.store)
    rows = {row.measure: row for row in of_one_model(store, [math.inf])[math.inf]}
    assert list(rows) == [
        "curvature", "curvature_over_training", "curvature_paper", "gradient_norm", "loss",
        "cumulative_loss",
    ]  # fmt: skip
    tables = [store.trial(TrialKey(math.inf, t)).slice(0, 1200) for t in range(60)]
    inside, right, value = (
        np.array([t[name].to_numpy(zero_copy_only=False) for t in tables])
        for name in ("in_subset", "correct", "curvature_over_training")
    )
    inside = inside.astype(bool)
    others, rho = np.arange(60) >= 20, []  # the first 20 trials are one block, and one fold
    for t in range(20):
        n_in, n_out = inside[others].sum(0), (~inside)[others].sum(0)
        mem = (right & inside)[others].sum(0) / n_in - (right & ~inside)[others].sum(0) / n_out
        rho.append(stats.spearmanr(mem[inside[t]], value[t][inside[t]])[0])
    found = rows["curvature_over_training"]
    assert found.models == 20
    assert found.spearman == pytest.approx(np.mean(rho))
    assert (found.spearman_low, found.spearman_high) == pytest.approx((min(rho), max(rho)))
    trial = store.scores("trials").to_pylist()[:20]
    seconds = [r["seconds"] + r["curvature_seconds"] + r["curvature_epochs_seconds"] for r in trial]
    assert found.seconds == pytest.approx(np.mean(seconds))
    assert rows["loss"].seconds == pytest.approx(np.mean([r["seconds"] for r in trial]))
    assert 0 < rows["curvature"].agreement < 1
    text = links_text(find_links(store))
    assert "measure of one model" in text
    assert "averaged over training" in text
    assert "three orders of magnitude" in text


def test_two_stores_are_joined_by_what_they_hold(study, digits, tmp_path):
    """Memorization of one study against curvature of another, whose examples are in other order."""
    from raymem import Examples

    order = np.random.default_rng(0).permutation(1200)
    shuffled = Examples(
        x_train=digits.x_train[order], y_train=digits.y_train[order],
        train_ids=tuple(digits.train_ids[i] for i in order), x_test=digits.x_test,
        y_test=digits.y_test, test_ids=digits.test_ids,
    )  # fmt: skip
    other = Study(
        examples=shuffled, recipe=study.recipe, store=tmp_path / "other", trials=40,
        curvature=CurvatureRule(paper=None), seed=5,
    )  # fmt: skip
    other.train(engine="serial")
    other.score()
    first, second = Store(study.store), Store(other.store)
    ((epsilon, found),) = correlations_across(first, second).items()
    assert epsilon == math.inf
    mine = {r["example_id"]: r for r in study.scores().to_pylist() if r["split"] == "train"}
    others = {r["example_id"]: r for r in other.scores().to_pylist()}
    for c in found:
        has = [i for i in mine if of(others[i], c.measure) is not None]
        mem, x = [mine[i]["memorization"] for i in has], [of(others[i], c.measure) for i in has]
        assert c.spearman.value == pytest.approx(stats.spearmanr(mem, x)[0], abs=1e-9)
        assert c.folds == 2
        assert c.spearman.low < c.spearman.value < c.spearman.high
    # Other models, the same examples: nearly as in one study, and far from 0.
    ((_, own),) = correlations(first).items()
    by_name = {c.measure: c.spearman.value for c in own}
    # The other study has neither the paper's score nor curvature over training.
    assert len(found) == len(MEASURES) - 4 + 1
    assert found[-1].measure == "memorization"
    for c in found[:-1]:
        # wrong_out is memorization itself in one study, with the noise of both.
        limit = 0.3 if c.measure == "wrong_out" else 0.1
        assert abs(c.spearman.value - by_name[c.measure]) < limit


def test_a_wrong_join_is_refused(study, digits, tmp_path):
    from raymem import flip_labels
    from raymem.errors import StoreError

    for name, change, says in (
        (
            "labels",
            {"examples": flip_labels(digits, 0.02)},
            "24 training examples have other labels",
        ),
        ("set", {"examples": numbered(digits)}, "1,200 training examples of .* are not in"),
    ):
        other = Study(recipe=study.recipe, store=tmp_path / name, trials=2, **change)
        other.train(engine="serial")
        other.score()
        with pytest.raises(StoreError, match=says):
            joined(Store(study.store), Store(other.store))


def numbered(digits):
    from raymem import Examples

    return Examples(
        x_train=digits.x_train, y_train=digits.y_train, x_test=digits.x_test, y_test=digits.y_test
    )


def test_noise_that_both_share_is_undone_too():
    """The measure is computed from the same outcomes as memorization, as out-losses are."""
    restored = []
    for k in range(20):
        rng = np.random.default_rng(k)
        _, sums = related(rng, F=2, N=300)
        n = sums["n_out"]
        other = rng.standard_normal((2, 300))
        sums["curvature_out"] = n * (2 * (1 - sums["correct_out"] / n) + other)
        mem, values = estimate(sums)
        table = pa.table(
            {"fold": np.repeat(np.arange(2), 300), **{m: v.reshape(-1) for m, v in sums.items()}}
        )
        (found,) = correlate(
            mem, {"curvature_out": values}, Folds(table, ["curvature_out"]),
            np.random.default_rng(k), replicates=2,
        )  # fmt: skip
        restored.append(found.pearson_disattenuated)
    # Without noise the measure is twice the memorization: a correlation of 1.
    error = np.std(restored) / np.sqrt(20)
    assert abs(np.mean(restored) - 1) < 4 * error + 0.01


def test_intervals_of_the_slope_cover_what_fleets_vary_around():
    """60 fleets of eight blocks, nominal 95%: the slope's mean over fleets is covered 86% of the
    time or more (three standard errors of a coverage below 95%)."""
    slopes, ends = [], []
    for k in range(60):
        _truth, sums = related(np.random.default_rng(100 + k), F=8, N=200)
        mem, values = estimate(sums)
        fold = np.repeat(np.arange(8), 200)
        table = pa.table({"fold": fold, **{n: v.reshape(-1) for n, v in sums.items()}})
        (found,) = correlate(
            mem, {"curvature_out": values}, Folds(table, ["curvature_out"]),
            np.random.default_rng(k), replicates=80,
        )  # fmt: skip
        slopes.append(found.slope)
        ends.append((found.slope_low, found.slope_high))
    low, high = np.array(ends).T
    covered = np.mean((low <= np.mean(slopes)) & (np.mean(slopes) <= high))
    assert covered >= 0.86
    # Nor are they wider than what they are to cover.
    assert np.median(high - low) < 2 * 2 * 1.96 * np.std(slopes)


def test_bins_of_other_trials_have_the_true_slope():
    """Over 30 fleets of two blocks; the paper's bins of the same trials are too flat."""
    plain, crossed_ones = [], []
    for k in range(30):
        _truth, sums = related(np.random.default_rng(k), F=2, N=2000)
        table = pa.table(
            {"fold": np.repeat(np.arange(2), 2000), **{n: v.reshape(-1) for n, v in sums.items()}}
        )
        folds = Folds(table, ["curvature_out"])
        halves = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
        rows = np.arange(2000)
        first, second = (folds.memorization(h, rows) for h in halves)
        values = folds.mean("curvature_out", halves[1], rows)
        crossed_ones.append(crossed(first, second, values).line.slope)
        plain.append(crossed(second, second, values).line.slope)
    assert abs(np.mean(crossed_ones) - 3) < 4 * np.std(crossed_ones) / np.sqrt(30) + 0.02
    assert np.mean(plain) < 2.7


@pytest.mark.parametrize(
    ("rho", "says"),
    [((0.3, 0.1, 0.5), "is positively correlated with"),
     ((0.1, -0.1, 0.3), "has no significant correlation with"),
     ((-0.3, -0.5, -0.1), "is negatively correlated with")],
)  # fmt: skip
def test_the_verdict_on_link_1_says_which_way(study, rho, says):
    (found,) = correlations(Store(study.store)).values()
    value, low, high = rho
    rows = [
        dataclasses.replace(row, spearman=Coefficient(value=value, low=low, high=high))
        if row.measure == "curvature_out" else row
        for row in found
    ]  # fmt: skip
    (verdict,) = verdicts_on_link1({math.inf: rows})
    assert f"curvature of out-models {says} memorization" in verdict.text
    assert f"Spearman {value:.2f} [{low:.2f}, {high:.2f}]" in verdict.text


def test_the_interval_of_an_auc_near_one_is_narrow():
    """Replicates of exactly 1 have an infinite Fisher z, which said [0, 1] of an AUC of 0.999."""
    rng = np.random.default_rng(0)
    mem = np.concatenate([np.zeros(370), rng.uniform(0.3, 1, 30)])
    measure = mem + 0.1 * rng.standard_normal(400)
    (found,) = correlate(
        mem, {"loss_out": measure}, FixedScores(mem, {"loss_out": measure}),
        np.random.default_rng(1),
    )  # fmt: skip
    assert found.auc.value > 0.98
    assert 0.9 < found.auc.low < found.auc.value < found.auc.high <= 1
