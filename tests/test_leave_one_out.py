"""Leaving one out, and extrapolation to it, on learners whose memorization is known exactly."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from learners import (
    covered_by_others,
    errs_at_known_odds,
    group_of,
    memorizes_everything,
    numbered_examples,
    recipe,
)

from raymem import Plan, Privacy, Store, Study
from raymem.cli import LeaveOneOutSettings, main, run_leave_one_out_job
from raymem.errors import PlanError, StoreError
from raymem.experiments import COUNTS, GROUPS, LeaveOneOut
from raymem.links import extrapolate, find_leave_one_out, leave_one_out_by_scores
from raymem.links import leave_one_out as module
from raymem.links.leave_one_out import compare
from raymem.scores import trial_folds
from raymem.show import extrapolated_text, leave_one_out_text, write_leave_one_out, write_report
from raymem.store import TrialKey, verify

SIZES = group_of(torch.arange(60))[0].numpy()


def experiment(K=3, F=2, N=10, **changed):
    settings = {
        "rows": tuple(range(K)), "groups": tuple(GROUPS[i % 3] for i in range(K)),
        "labels": tuple(i % 4 for i in range(N)), "n_in": ((14,) * K,) * F,
        "correct_in": ((14,) * K,) * F, "n_out": ((6,) * K,) * F, "correct_out": ((3,) * K,) * F,
        "scored_ratio": 0.7, "scored_study": "abc", "scored_trials": "20-39", "chosen_by": "0-19",
    }  # fmt: skip
    return LeaveOneOut(**{**settings, **changed})


# Plans


def test_each_trial_leaves_out_its_example_and_shares_the_seeds_of_its_repeat():
    of = experiment(rows=(7, 2, 5))
    plan = Plan(n=10, subset_ratio=1, kind="leave-one-out", leave_one_out=of, seed=3)
    assert plan.block == 4
    out = [np.flatnonzero(~plan.mask(trial)).tolist() for trial in range(8)]
    assert out == [[], [7], [2], [5]] * 2
    assert len({plan.seeds(trial) for trial in range(4)}) == 1
    assert plan.seeds(0) != plan.seeds(4)
    others = Plan(n=10, seed=3)
    assert not {plan.seeds(t) for t in range(8)} & {others.seeds(t) for t in range(8)}
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert "leave_one_out" not in others.as_dict()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": (1, 1, 2)}, "none twice"),
        ({"rows": (1, 10, 2)}, r"row in 0\.\.9"),
        ({"groups": ("random", "lucky", "random")}, "one of the groups"),
        ({"n_out": ((6, 6),) * 2}, r"n_out must have a number for each"),
        ({"correct_in": ((6,) * 3,)}, r"correct_in must have a number for each"),
    ],
)
def test_experiments_that_do_not_exist_are_refused(changed, message):
    with pytest.raises(PlanError, match=message):
        experiment(**changed)


def test_plans_without_their_experiment_are_refused():
    with pytest.raises(PlanError, match="goes with kind='leave-one-out'"):
        Plan(n=10, subset_ratio=1, kind="leave-one-out")
    with pytest.raises(PlanError, match="draws no random subsets"):
        Plan(n=10, kind="leave-one-out", leave_one_out=experiment())
    with pytest.raises(PlanError, match="one label per example"):
        Plan(n=11, subset_ratio=1, kind="leave-one-out", leave_one_out=experiment())


# Whole studies


def scored(place, model, *, trials=80, ratio=0.7, n=60):
    study = Study(
        examples=numbered_examples(n), recipe=recipe(model), store=str(place), trials=trials,
        subset_ratio=ratio,
    )  # fmt: skip
    study.train(engine="serial")
    study.score()
    return study


def left_out(study, place, *, k=9, repeats=3, **changed):
    of = leave_one_out_by_scores(study.examples, study.store, k)
    settings = {
        "examples": study.examples, "recipe": study.recipe, "store": str(place),
        "trials": repeats * of.block, "kind": "leave-one-out", "subset_ratio": 1,
        "leave_one_out": of,
    }  # fmt: skip
    return Study(**{**settings, **changed})


@pytest.fixture(scope="module")
def covered(tmp_path_factory):
    """Scores of a learner whose memorization depends on r, at r = 0.7 and 0.9."""
    folder = tmp_path_factory.mktemp("covered")
    return [
        scored(folder / f"{ratio}", covered_by_others, trials=trials, ratio=ratio)
        for ratio, trials in ((0.7, 80), (0.9, 100))
    ]


def test_a_learner_whose_memorization_depends_on_r_has_the_bias_it_has(covered, tmp_path):
    """Pairs have memorization 1 - r, by leaving one out 0; examples that are alone 1 and 1."""
    study = left_out(covered[0], tmp_path / "loo", k=24, repeats=2)
    study.train(engine="serial")
    found = find_leave_one_out(Store(study.store))
    rows = np.array(study.leave_one_out.rows)
    assert found.examples["leave_one_out"].to_pylist() == (SIZES[rows] == 1).astype(float).tolist()
    truth = np.where(SIZES == 1, 0, 0.3 ** (SIZES - 1.0))
    for bias in found.biases:
        chosen = [r for r, g in zip(rows, study.leave_one_out.groups, strict=True)
                  if g == bias.group or bias.group == "all of these"]  # fmt: skip
        assert bias.examples == len(chosen)
        assert bias.bias.value == pytest.approx(bias.scored - bias.left_out)
        assert bias.bias.low <= truth[chosen].mean() <= bias.bias.high, bias
    near = next(b for b in found.biases if b.group == "near 0.25")
    assert near.bias.low > 0
    assert found.accuracy_train == 1
    assert found.spearman.value > 0.7


def test_leaving_one_out_is_the_definition_and_its_intervals_cover_it(tmp_path):
    """Right with probability 0.9 in and 0.4 out, whatever the subset: memorization is 0.5.

    24 intervals of 95%: more than 6 that miss have probability below 1e-3.
    """
    study = left_out(scored(tmp_path / "s", errs_at_known_odds), tmp_path / "loo", k=24, repeats=12)
    study.train(engine="serial")
    store = Store(study.store)
    found = find_leave_one_out(store)
    table = found.examples.to_pydict()
    missed = [not low <= 0.5 <= high for low, high in zip(
        table["leave_one_out_low"], table["leave_one_out_high"], strict=True)]  # fmt: skip
    assert sum(missed) <= 6
    assert abs(np.mean(table["leave_one_out"]) - 0.5) < 0.1
    # The trials themselves: of the first example, with and without it.
    row = study.leave_one_out.rows[0]
    right = [
        store.trial(TrialKey(math.inf, trial), ["correct"])["correct"][row].as_py()
        for repeat in range(12)
        for trial in (repeat * 25, repeat * 25 + 1)
    ]
    assert table["leave_one_out"][0] == pytest.approx(np.mean(right[::2]) - np.mean(right[1::2]))
    # Scores that are high by chance are no bias: of the trials that chose them they would be.
    top = next(bias for bias in found.biases if bias.group == "most memorized")
    assert top.bias.low < 0 < top.bias.high
    folds = Store(str(tmp_path / "s")).scores("folds")
    mine = [r for r in folds.to_pylist() if r["split"] == "train" and r["fold"] % 2 == 0]
    chosen_by = {i: [sum(r[name] for r in mine if r["index"] == i) for name in COUNTS]
                 for i in study.leave_one_out.rows}  # fmt: skip
    same = [c[1] / c[0] - c[3] / c[2] for c in chosen_by.values()]
    groups = np.array(study.leave_one_out.groups)
    assert np.mean(np.array(same)[groups == "most memorized"]) > 0.6


def test_examples_are_chosen_by_some_folds_and_scored_by_others(covered):
    study = covered[0]
    of = leave_one_out_by_scores(study.examples, study.store, 24)
    assert (of.chosen_by, of.scored_trials) == (
        "0-19, 40-59", "20-39, 60-79",
    )  # fmt: skip
    fold_of = trial_folds([TrialKey(math.inf, t) for t in range(80)], study.plan)
    store = Store(study.store)
    counts = np.zeros((2, 4, 60))
    right = counts.copy()
    for trial in range(80):
        table = store.trial(TrialKey(math.inf, trial), ["in_subset", "correct"])
        inside = study.plan.mask(trial)
        correct = table["correct"].to_numpy()[:60]
        for arm, mask in enumerate((inside, ~inside)):
            counts[arm, fold_of(TrialKey(math.inf, trial))] += mask
            right[arm, fold_of(TrialKey(math.inf, trial))] += mask & correct
    expected = {"n_in": counts[0], "correct_in": right[0], "n_out": counts[1],
                "correct_out": right[1]}  # fmt: skip
    for name in COUNTS:
        assert np.array_equal(of.counts(name), expected[name][1::2][:, of.rows]), name
    mem = (right[0, ::2].sum(0) / counts[0, ::2].sum(0)
           - right[1, ::2].sum(0) / counts[1, ::2].sum(0))  # fmt: skip
    rows, groups = np.array(of.rows), np.array(of.groups)
    assert [sum(groups == name) for name in GROUPS] == [8, 8, 8]
    rest = np.setdiff1d(np.arange(60), rows[groups != "near 0.25"])
    assert mem[rows[groups == "most memorized"]].min() >= mem[rest].max()
    far = np.abs(mem[np.setdiff1d(np.arange(60), rows)] - 0.25)
    assert np.abs(mem[rows[groups == "near 0.25"]] - 0.25).max() <= far.min()
    again = leave_one_out_by_scores(study.examples, study.store, 24, seed=1)
    assert again.rows[:8] != of.rows[:8]


@pytest.mark.parametrize("true_bias", [0.0, 0.2])
def test_intervals_of_the_bias_cover_it(true_bias, monkeypatch):
    """200 experiments of 30 examples: fewer than 180 intervals of 95% that cover have probability
    below 1e-3 (expected 190 or more)."""
    monkeypatch.setattr(module, "REPLICATES", 2)
    rng = np.random.default_rng(3)
    K, R, F, covered = 30, 10, 4, 0
    for _ in range(200):
        out = rng.beta(1, 2, K)
        shared = rng.normal(0, 0.03, R)[:, None]
        without = rng.random((R, K)) < np.clip(out + true_bias + shared, 0, 1)
        n_out, n_in = np.full((F, K), 6), np.full((F, K), 14)
        moved = np.clip(out + rng.normal(0, 0.03, F)[:, None], 0, 1)
        correct_out = rng.binomial(n_out, moved)
        of = experiment(
            K, F, N=100, groups=("random",) * K, n_in=n_in.tolist(), correct_in=n_in.tolist(),
            n_out=n_out.tolist(), correct_out=correct_out.tolist(),
        )  # fmt: skip
        found = compare(of, np.ones((R, K), bool), without, ids=[str(i) for i in range(K)])
        truth = np.mean(np.clip(out + true_bias, 0, 1) - np.clip(out, 0, 1))
        covered += found.biases[0].bias.low <= truth <= found.biases[0].bias.high
    assert covered >= 180


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Scores of a learner that memorizes everything: 1 at any r, and by leaving one out."""
    return scored(tmp_path_factory.mktemp("everything") / "s", memorizes_everything)


def test_a_stopped_experiment_goes_on_and_reads_back(everything, tmp_path):
    study = left_out(everything, tmp_path / "loo")
    study.train(engine="serial")
    store = Store(study.store)
    assert not verify(store)
    before = find_leave_one_out(store)
    assert (before.repeats, before.incomplete) == (3, 0)
    assert before.examples["leave_one_out"].to_pylist() == [1.0] * 9
    assert before.verdict.estimate == 0
    store.files.delete(TrialKey(math.inf, 13).object_key)
    assert find_leave_one_out(store).incomplete == 1
    progress = study.train(engine="serial")
    assert (progress.committed, progress.done) == (1, 30)
    assert find_leave_one_out(store).as_dict() == before.as_dict()
    store.files.delete(TrialKey(math.inf, 3).object_key)
    store.files.delete(TrialKey(math.inf, 13).object_key)
    with pytest.raises(StoreError, match="has 1 whole repeats of 10 trials, and 2 are needed"):
        find_leave_one_out(store)
    with pytest.raises(StoreError, match="`raymem leave-one-out"):
        study.score()


def test_what_it_found_is_told_on_the_terminal_in_json_and_in_the_report(everything, tmp_path):
    first = everything
    study = left_out(first, tmp_path / "loo", repeats=2)
    study.train(engine="serial")
    found = find_leave_one_out(Store(study.store))
    text = leave_one_out_text(found)
    assert "Scores are of trials 20-39, 60-79 of study" in text
    assert "chosen by its trials 0-19, 40-59" in text
    write_leave_one_out(found)
    body = json.loads((tmp_path / "loo" / "leave_one_out.json").read_text())
    assert body == json.loads(json.dumps(found.as_dict()))
    assert body["bias"][0]["bias"]["value"] == 0
    assert len(body["examples"]) == 9
    for name in ("leave-one-out.png", "leave-one-out-dark.png", "leave-one-out.pdf"):
        assert len((tmp_path / "loo" / "figures" / name).read_bytes()) > 5000
    write_report(first.store, leave_one_out=study.store)
    page = Path(first.store, "report.html").read_text()
    assert 'id="leave-one-out"' in page
    assert "How far the scores are from leaving one out" in page
    other = scored(tmp_path / "other", memorizes_everything, ratio=0.5, trials=20)
    with pytest.raises(StoreError, match="is on the scores of study"):
        write_report(other.store, leave_one_out=study.store)


def test_what_cannot_be_is_refused(tmp_path, covered):
    study = covered[0]
    with pytest.raises(PlanError, match="take 3 to 59"):
        leave_one_out_by_scores(study.examples, study.store, 60)
    with pytest.raises(PlanError, match="are not in"):
        leave_one_out_by_scores(numbered_examples(20), study.store, 6)
    few = scored(tmp_path / "few", memorizes_everything, trials=40)
    with pytest.raises(PlanError, match=r"has 2 blocks .*train 4 blocks or more \(80 trials\)"):
        leave_one_out_by_scores(few.examples, few.store, 6)
    with pytest.raises(StoreError, match="no leave-one-out experiment"):
        find_leave_one_out(Store(few.store))
    with pytest.raises(PlanError, match="not private"):
        left_out(study, tmp_path / "p", epsilons=(2.0,), privacy=Privacy())


# Two ratios


def test_extrapolation_is_exact_where_one_other_covers(covered):
    """Pairs: 0.3 at r = 0.7 and 0.1 at 0.9, on a line to 0. Alone: 1. Three: 0.09, 0.01, and the
    line goes to -0.03."""
    found = extrapolate(Store(covered[1].store), Store(covered[0].store))
    assert found.urls == (Store(covered[0].store).url, Store(covered[1].store).url)
    w = (1 - 1 / 60 - 0.7) / 0.2
    rows = found.examples.to_pylist()
    value = np.array([row["extrapolated"] for row in rows])
    stderr = np.array([row["extrapolated_stderr"] for row in rows])
    by_size = {size: (1 - w) * 0.3 ** (size - 1) + w * 0.1 ** (size - 1) for size in (1, 2, 3)}
    truth = np.array([by_size[size] for size in SIZES])
    assert (value[SIZES == 1] == 1).all()
    for size in (2, 3):
        error = value[size == SIZES] - by_size[size]
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(error))
    low = np.array([row["extrapolated_low"] for row in rows])
    high = np.array([row["extrapolated_high"] for row in rows])
    assert np.mean((low <= truth) & (truth <= high)) >= 0.9
    # Standard errors are those of the two estimates, which are of different trials.
    a, b = (np.array([row[f"memorization_{r}_stderr"] for row in rows]) for r in ("0.7", "0.9"))
    assert np.allclose(stderr, np.sqrt(((1 - w) * a) ** 2 + (w * b) ** 2))


def test_bias_of_each_ratio_is_known(covered):
    found = extrapolate(Store(covered[0].store), Store(covered[1].store))
    w = (1 - 1 / 60 - 0.7) / 0.2
    truth = {r: (1.0 - r) ** (SIZES - 1) for r in (0.7, 0.9)}
    line = (1 - w) * truth[0.7] + w * truth[0.9]
    for at in found.ratios:
        expected = (truth[at.ratio] - line).mean()
        assert at.bias.low <= expected <= at.bias.high
        assert at.mean == pytest.approx(truth[at.ratio].mean(), abs=0.03)
        assert at.spearman.low < at.spearman.value < at.spearman.high
    assert found.ratios[0].bias.value > found.ratios[1].bias.value > 0
    assert found.mean == pytest.approx(line.mean(), abs=0.05)
    text = extrapolated_text(found)
    assert "1 - 1/N, extrapolated" in text
    assert "is above its extrapolation to leaving one out by" in text
    json.dumps(found.as_dict(), allow_nan=False)


def test_stores_that_do_not_belong_together_are_not_extrapolated(covered, tmp_path):
    first = Store(covered[0].store)
    with pytest.raises(StoreError, match=r"both have subset ratio 0\.7"):
        extrapolate(first, Store(scored(tmp_path / "a", covered_by_others, trials=20).store))
    other = scored(tmp_path / "b", memorizes_everything, trials=20, ratio=0.5)
    with pytest.raises(StoreError, match=r"other recipes \(model\)"):
        extrapolate(first, Store(other.store))
    short = scored(tmp_path / "c", covered_by_others, trials=20, ratio=0.5)
    with pytest.raises(StoreError, match="need two blocks"):
        extrapolate(first, Store(short.store))


def test_links_prints_the_extrapolation(covered):
    stores = [study.store for study in covered]
    shown = CliRunner().invoke(main, ["links", *stores, "--extrapolate"])
    assert shown.exit_code == 0, shown.output
    assert "Memorization at two subset ratios" in shown.output
    as_json = CliRunner().invoke(main, ["links", *stores, "--extrapolate", "--json"])
    assert json.loads(as_json.output)["ratios"][0]["ratio"] == 0.7
    as_csv = CliRunner().invoke(main, ["links", *stores, "--extrapolate", "--csv"])
    assert len(as_csv.output.splitlines()) == 61
    alone = CliRunner().invoke(main, ["links", stores[0], "--extrapolate"])
    assert alone.exit_code == 1
    assert "two stores" in alone.output


# The job


def job(capsys, *arguments):
    code = 0
    try:
        run_leave_one_out_job(
            LeaveOneOutSettings(
                data=numbered_examples(),
                store="memory://leave-one-out-job",
                trials=80,
                examples=3,
                repeats=2,
            ),
            recipe(memorizes_everything),
            arguments=[*arguments, "--engine", "serial"],
        )
    except SystemExit as stopped:
        code = stopped.code
    streams = capsys.readouterr()
    return streams.out + streams.err, code


def test_the_job_runs_from_nothing_to_the_report_and_again(capsys, tmp_path):
    place = str(tmp_path / "loo")
    out, code = job(capsys, "plan", "--store", place)
    assert code == 0, out
    assert "First, the trials that memorization is measured with" in out
    out, code = job(capsys, "--store", place)
    assert code == 0, out
    assert "leave one out: memorization at subset ratio 0.7 minus" in out
    assert 'id="leave-one-out"' in Path(f"{place}_scores", "report.html").read_text()
    before = Store(place).done()
    assert len(before) == 8
    shown = CliRunner().invoke(main, ["leave-one-out", place])
    assert shown.exit_code == 0
    assert " ".join(shown.output.split()) in " ".join(out.split())
    assert (
        "leave-one-out experiment, 3 examples" in CliRunner().invoke(main, ["status", place]).output
    )
    out, code = job(capsys, "plan", "--store", place, "--repeats", "3")
    assert "3 repeats of 4 trials" in out
    out, code = job(capsys, "train", "--store", place, "--repeats", "3")
    assert code == 0, out
    assert Store(place).done() > before
    out, code = job(capsys, "--store", place, "--leave-one-out", "6")
    assert code == 1
    assert "belongs to another study" in out


def test_the_job_file_has_help_with_an_example(monkeypatch, capsys):
    path = Path(__file__).parents[1] / "jobs" / "leave_one_out_digits.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    for part in ("python jobs/leave_one_out_digits.py", "--scores-from", "--leave-one-out K"):
        assert part in text
