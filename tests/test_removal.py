"""The removal experiment: masks, the statistics on known learners, the store, the job."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from learners import memorizes_everything, numbered_examples, recipe

from raymem import Examples, Plan, Privacy, Recipe, Store, Study, find_removal, load_examples, merge
from raymem.cli import RemovalSettings, main, run_removal_job
from raymem.errors import PlanError, StoreError, StudyMismatchError
from raymem.experiments import Removal
from raymem.links import removal_by_scores, removal_effect
from raymem.show import merge_text, removal_text
from raymem.store import TrialKey, verify

JOB = Path(__file__).parents[1] / "jobs" / "removal_digits.py"
SIZES = (5, 10, 20, 40)


def removal(n=60, sizes=(3, 7), **changed):
    ranking = tuple(range(n - 1, n - 1 - max(sizes), -1))
    memorization = tuple(1 - i / n for i in range(len(ranking)))
    settings = {
        "sizes": sizes, "ranking": ranking, "memorization": memorization,
        "labels": tuple(i % 4 for i in range(n)), "scored_study": "abc", "scored_trials": "0-19",
    }  # fmt: skip
    return Removal(**{**settings, **changed})


def plan(seed=0, **settings):
    experiment = removal(**settings)
    n = len(experiment.labels)
    return Plan(n=n, subset_ratio=1, kind="removal", seed=seed, removal=experiment)


# Masks


@pytest.mark.parametrize("seed", [0, 1])
def test_each_trial_leaves_out_what_its_arm_says(seed):
    of = plan(seed)
    labels = np.array(of.removal.labels)
    assert of.block == 7
    for trial in range(3 * of.block):
        repeat, arm, k = of.removal.cell(trial)
        assert repeat == trial // of.block
        out = np.flatnonzero(~of.mask(trial))
        assert len(out) == k
        if arm == "memorized":
            assert set(out) == set(of.removal.ranking[:k])
        if arm == "same-classes":
            ranked = labels[list(of.removal.ranking[:k])]
            assert sorted(labels[out]) == sorted(ranked)
    cells = [of.removal.cell(trial)[1:] for trial in range(of.block)]
    assert len(set(cells)) == of.block


def test_random_examples_are_nested_in_a_repeat_and_others_in_the_next():
    of = plan()
    out = {of.removal.cell(t): set(np.flatnonzero(~of.mask(t))) for t in range(2 * of.block)}
    for arm in ("random", "same-classes"):
        assert out[0, arm, 3] < out[0, arm, 7]
        assert out[0, arm, 7] != out[1, arm, 7]
        assert out[0, arm, 7] != set(np.flatnonzero(~plan(1).mask(of.block - 2)))
    assert out[0, "random", 7] != out[0, "same-classes", 7]


def test_the_same_plan_leaves_out_the_same_examples_for_ever():
    of = plan(5)
    out = {trial: sorted(of.removal.left_out(trial, 5).tolist()) for trial in (2, 3, 12, 13)}
    assert out == {
        2: [17, 18, 50],
        3: [22, 27, 41],
        12: [0, 19, 29, 31, 34, 41, 52],
        13: [10, 19, 29, 44, 50, 57, 59],
    }
    assert of.seeds(3).init == 304917987875786570


def test_random_examples_are_drawn_evenly():
    """3,000 draws of 7 of 60: each example 350 times, standard deviation 17.6."""
    of = plan(sizes=(7,))
    rows = range(1, 3000 * of.block, of.block)
    times = sum(~of.mask(trial + 1) for trial in rows)
    assert np.abs(times - 350).max() < 5 * 17.6


def test_a_repeat_has_one_set_of_seeds_that_no_other_study_has():
    of = plan()
    assert len({of.seeds(trial) for trial in range(of.block)}) == 1
    assert of.seeds(0) != of.seeds(of.block)
    others = Plan(n=60)
    assert not {of.seeds(t) for t in range(70)} & {others.seeds(t) for t in range(200)}


def test_a_plan_survives_json_and_other_plans_have_the_hash_they_had():
    of = plan()
    again = Plan.from_dict(json.loads(json.dumps(of.as_dict())))
    assert again == of
    assert np.array_equal(again.masks(range(14)), of.masks(range(14)))
    assert "removal" not in Plan(n=60).as_dict()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": (60,), "ranking": tuple(range(60)), "memorization": (0.5,) * 60}, "leave one"),
        ({"sizes": (3, 100)}, "100 examples cannot be left out of 60"),
        ({"sizes": (7, 3)}, "larger than the one before"),
        ({"sizes": (0, 7)}, "from 1 on"),
        ({"ranking": (1, 1, 2, 3, 4, 5, 6)}, "none twice"),
        ({"ranking": (60, 1, 2, 3, 4, 5, 6)}, r"rows in 0\.\.59"),
        ({"memorization": (0.5,)}, "do not fit"),
    ],
)
def test_experiments_that_do_not_exist_are_refused(changed, message):
    settings = {"ranking": tuple(range(100))[: max(changed.get("sizes", (7,)))]} | changed
    with pytest.raises(PlanError, match=message):
        removal(**settings)


def test_plans_without_their_removal_are_refused():
    with pytest.raises(PlanError, match="goes with kind='removal'"):
        Plan(n=60, subset_ratio=1, kind="removal")
    with pytest.raises(PlanError, match="goes with kind='removal'"):
        Plan(n=60, removal=removal())
    with pytest.raises(PlanError, match="no random subsets"):
        Plan(n=60, kind="removal", removal=removal())
    with pytest.raises(PlanError, match="one label per example"):
        Plan(n=61, subset_ratio=1, kind="removal", removal=removal())


# Statistics, on learners whose answer is known


def experiment(rng, *, worth=0.0, spread=0.0, repeats=10, N=400, M=200):
    """bool [R, A, K + 1, M]: accuracy is 0.9, less what the removed examples were worth.

    Each example is worth a random amount (`spread`) whatever its memorization; the 40 most
    memorized ones, the first rows, `worth` more. Seeds move all trials of a repeat and each one.
    """
    value = rng.normal(0, spread, N)
    value[:40] += worth
    right = np.empty((repeats, 3, len(SIZES) + 1, M), bool)
    for r in range(repeats):
        shared = rng.normal(0, 0.01)
        orders = (np.arange(N), rng.permutation(N), rng.permutation(N))
        for a, order in enumerate(orders):
            for i, k in enumerate((0, *SIZES)):
                p = 0.9 + shared + rng.normal(0, 0.005) - value[order[:k]].sum()
                right[r, a, i] = rng.random(M) < np.clip(p, 0, 1)
        right[r, 1:, 0] = right[r, 0, 0]
    return right


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.005])
def test_a_learner_that_does_not_need_memorized_examples_shows_nothing(spread):
    """400 experiments at level 5%: more than 37 rejections have probability 1e-4."""
    rng = np.random.default_rng(20)
    p = [removal_effect(SIZES, experiment(rng, spread=spread)).p_value for _ in range(400)]
    assert np.sum(np.array(p) < 0.05) <= 37


def test_a_test_of_the_mean_alone_would_reject_too_often():
    """Why the test has the variance between random sets: one set differs from the mean of many."""
    rng = np.random.default_rng(21)
    found = [removal_effect(SIZES, experiment(rng, spread=0.005)) for _ in range(200)]
    slopes = [effect.contrasts[0].slope for effect in found]
    assert np.mean([mean.low > 0 or mean.high < 0 for mean in slopes]) > 0.2


def test_a_learner_that_needs_memorized_examples_shows_it_and_how_much():
    rng = np.random.default_rng(22)
    found = [removal_effect(SIZES, experiment(rng, worth=0.004)) for _ in range(100)]
    assert np.mean([effect.p_value < 0.05 for effect in found]) > 0.9
    # A random set has its share of the memorized: 40 of 400.
    slopes = np.array([effect.contrasts[0].slope.value for effect in found])
    assert abs(slopes.mean() - 0.004 * 0.9) < 5 * slopes.std() / 10
    covered = [e.contrasts[0].slope.low < 0.0036 < e.contrasts[0].slope.high for e in found]
    assert np.mean(covered) > 0.85


def test_slopes_and_differences_are_those_of_the_definition():
    rng = np.random.default_rng(23)
    right = experiment(rng, worth=0.002, repeats=7)
    effect = removal_effect(SIZES, right)
    accuracy = right.mean(axis=3)
    for control, a in (("random", 1), ("same-classes", 2)):
        contrast = next(c for c in effect.contrasts if c.control == control)
        per_repeat = []
        for r in range(7):
            d = [accuracy[r, a, 1 + i] - accuracy[r, 0, 1 + i] for i in range(4)]
            per_repeat.append(
                sum(k * x for k, x in zip(SIZES, d, strict=True)) / sum(k * k for k in SIZES)
            )
        assert contrast.slope.value == pytest.approx(np.mean(per_repeat))
        for i in range(4):
            d = accuracy[:, a, 1 + i] - accuracy[:, 0, 1 + i]
            assert contrast.at_size[i].value == pytest.approx(d.mean())


def test_few_repeats_give_no_verdict():
    from raymem.links.removal import verdict_on_removal

    effect = removal_effect([1], np.ones((5, 3, 2, 10), bool))
    assert math.isnan(effect.p_value)
    assert "a test needs 6 repeats" in verdict_on_removal(effect).text


# Studies and stores


def scored(tmp_path, trials=20, examples=None):
    study = Study(
        examples=examples or numbered_examples(),
        recipe=recipe(memorizes_everything),
        store=str(tmp_path / "scores"),
        trials=trials,
    )
    study.train(engine="serial")
    study.score()
    return study


def experiment_on(study, tmp_path, repeats=6, sizes=(3, 7), **changed):
    of = removal_by_scores(study.examples, study.store, sizes)
    settings = {
        "examples": study.examples, "recipe": study.recipe, "store": str(tmp_path / "removal"),
        "trials": repeats * of.block, "kind": "removal", "subset_ratio": 1, "removal": of,
    }  # fmt: skip
    return Study(**{**settings, **changed})


def test_the_ranking_is_that_of_the_scores(tmp_path):
    study = scored(tmp_path)
    of = removal_by_scores(study.examples, study.store, (3, 7))
    rows = [r for r in study.scores().to_pylist() if r["split"] == "train"]
    order = sorted(rows, key=lambda r: (-r["memorization"], r["example_id"]))[:7]
    assert list(of.ranking) == [row["index"] for row in order]
    assert list(of.memorization) == [row["memorization"] for row in order]
    assert of.scored_trials == "0-19"
    assert of.scored_study == Store(study.store).study().hash


def test_stopped_experiments_go_on_and_read_back(tmp_path):
    study = experiment_on(scored(tmp_path), tmp_path)
    study.train(engine="serial")
    store = Store(study.store)
    before = find_removal(store).as_dict()
    assert not verify(store)
    # This learner's test accuracy is the same whatever it trained on.
    assert "does not fall significantly" in before["verdict"]["text"]
    assert before["all_test_examples"]["p_value"] == 1
    for trial in (8, 20):
        store.files.delete(TrialKey(math.inf, trial).object_key)
    assert find_removal(store).incomplete == 2
    progress = study.train(engine="serial")
    assert (progress.committed, progress.done) == (2, 42)
    assert find_removal(store).as_dict() == before


def test_parts_of_whole_repeats_become_one_experiment(tmp_path):
    first = scored(tmp_path)
    places = [str(tmp_path / name) for name in ("east", "west", "both")]
    for k in (0, 1):
        experiment_on(first, tmp_path, store=places[k], part=(k + 1, 2)).train(engine="serial")
        assert find_removal(Store(places[k])).all_test.repeats == 3
    text = merge_text(merge(*places))
    assert f"next, raymem removal {places[2]}" in text
    study = experiment_on(first, tmp_path)
    study.train(engine="serial")
    found = find_removal(Store(places[2])).as_dict()
    assert found == find_removal(Store(study.store)).as_dict()


def test_another_ranking_is_refused_shortly(tmp_path):
    first = scored(tmp_path)
    study = experiment_on(first, tmp_path, repeats=1, sizes=(12,))
    study.train(engine="serial")
    ranking = (*study.removal.ranking[1:], study.removal.ranking[0])
    other = Removal(**{**study.removal.as_dict(), "ranking": ranking})
    with pytest.raises(StudyMismatchError, match=r"removal.ranking: store has .*\(12\)") as error:
        experiment_on(first, tmp_path, repeats=1, sizes=(12,), removal=other).train(engine="serial")
    assert len(str(error.value)) < 500


def test_what_cannot_be_is_refused(tmp_path):
    study = scored(tmp_path)
    with pytest.raises(PlanError, match="epsilons 2, inf or privacy"):
        experiment_on(study, tmp_path, epsilons=(2.0, math.inf), privacy=Privacy())
    with pytest.raises(PlanError, match="60 examples cannot be left out of 60"):
        removal_by_scores(study.examples, study.store, (60,))
    with pytest.raises(StoreError, match="no removal experiment"):
        find_removal(Store(study.store))
    with pytest.raises(StoreError, match="there is no study"):
        removal_by_scores(study.examples, tmp_path / "nowhere", (3,))
    other = experiment_on(study, tmp_path, repeats=1)
    other.open_store()
    with pytest.raises(StoreError, match="no whole repeat"):
        find_removal(Store(other.store))
    with pytest.raises(StoreError, match=r"no scores/examples\.parquet yet"):
        removal_by_scores(study.examples, other.store, (3,))
    with pytest.raises(StoreError, match="no random subsets to score"):
        other.score()
    of = study.examples
    y = (of.y_train + 1) % 4
    changed = Examples(x_train=of.x_train, y_train=y, x_test=of.x_test, y_test=of.y_test)
    with pytest.raises(PlanError, match="are not those of"):
        experiment_on(study, tmp_path, examples=changed)


def test_copies_of_training_images_are_left_out_of_the_verdict(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
    y = np.arange(60) % 4
    x_test = np.concatenate([x[:5], rng.integers(0, 256, (11, 8, 8, 1), np.uint8)])
    x_test[:5, 0, 0] ^= 1  # near, not equal
    examples = Examples(x_train=x, y_train=y, x_test=x_test, y_test=np.arange(16) % 4)
    first = Study(
        examples=examples, recipe=Recipe(model="mlp-8", epochs=1), store=str(tmp_path / "scores"),
        trials=20,
    )  # fmt: skip
    first.train(engine="serial")
    first.score()
    study = experiment_on(first, tmp_path)
    study.train(engine="serial")
    store = Store(study.store)
    found = find_removal(store)
    assert found.copies == 5
    assert (found.apart.test_examples, found.all_test.test_examples) == (11, 16)
    assert found.headline is found.apart
    assert "11 test examples; 5 more have a near duplicate" in removal_text(found)
    # By hand: the mean over repeats of trial 0 of each, on the eleven.
    right = [
        store.trial(TrialKey(math.inf, r * 7), ["correct"])["correct"].to_numpy()[65:].mean()
        for r in range(6)
    ]
    assert found.apart.accuracy_all.value == pytest.approx(np.mean(right))


# The job


RECIPES = {"small": Recipe(model="mlp-8", epochs=1, batch_size=200)}


def run(capsys, *arguments):
    code = 0
    try:
        run_removal_job(
            RemovalSettings(
                data="digits", store="memory://removal-job", trials=20, sizes=(10, 20), repeats=6
            ),
            RECIPES,
            arguments=[*arguments, "--engine", "serial"],
        )
    except SystemExit as stopped:
        code = stopped.code
    streams = capsys.readouterr()
    return streams.out + streams.err, code


def test_the_job_runs_from_nothing_to_the_verdict_and_again(capsys, tmp_path):
    place = str(tmp_path / "digits")
    out, code = run(capsys, "plan", "--store", place)
    assert code == 0, out
    assert "First, the trials that memorization is measured with" in out
    out, code = run(capsys, "--store", place)
    assert code == 0, out
    assert "removal: test accuracy" in out
    assert "Not shown: that the examples are needed because they are memorized" in out
    body = json.loads(Path(place, "removal.json").read_text())
    assert (body["scored_trials"], body["sizes"]) == ("0-19", [10, 20])
    assert body["all_test_examples"]["repeats"] == 6
    for name in ("removal.png", "removal-dark.png", "removal.pdf"):
        assert len(Path(place, "figures", name).read_bytes()) > 5000
    before = Store(place).done()
    again, code = run(capsys, "--store", place)
    assert code == 0
    assert Store(place).done() == before
    assert again.split("removal:")[1] == out.split("removal:")[1]
    shown = CliRunner().invoke(main, ["removal", place])
    assert shown.exit_code == 0
    assert " ".join(shown.output.split()) in " ".join(again.split())
    status = CliRunner().invoke(main, ["status", place])
    assert "removal experiment, k = 10, 20" in status.output
    # Another store's scores, more repeats, other sizes.
    out, code = run(capsys, "plan", "--store", place, "--repeats", "8")
    assert "8 repeats of 7 trials" in out
    out, code = run(capsys, "--store", place, "--sizes", "10,30")
    assert code == 1
    assert "belongs to another study" in out
    other = str(tmp_path / "other")
    out, code = run(capsys, "train", "--store", other, "--scores-from", f"{place}_scores",
                    "--repeats", "1")  # fmt: skip
    assert code == 0, out
    assert len(Store(other).done()) == 7
    assert not Path(f"{other}_scores").exists()
    out, code = run(capsys, "removal", "--store", other)
    assert code == 0
    assert "not known, a test needs 6 repeats" in out


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_trials(tmp_path):
    first = Study(
        examples=load_examples("digits"), recipe=RECIPES["small"], store=str(tmp_path / "scores"),
        trials=20,
    )  # fmt: skip
    first.train(engine="serial")
    first.score()

    def command(store):
        options = ["--sizes", "5,10", "--repeats", "1", "--engine", "serial", "--scores-from"]
        return [sys.executable, str(JOB), "train", *options, str(first.store), "--store", store]

    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    job = subprocess.Popen(command(killed))
    deadline = time.monotonic() + 300
    while len(Store(killed).done()) < 2 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    assert job.wait() != 0
    assert 2 <= len(Store(killed).done()) < 7
    for store in (killed, whole):
        subprocess.run(command(store), check=True, timeout=300)
    stores = Store(killed), Store(whole)
    assert stores[0].done() == stores[1].done()
    for key in stores[0].done():
        assert stores[0].provenance(key)["digest"] == stores[1].provenance(key)["digest"]


def test_the_job_refuses_what_cannot_be(capsys, tmp_path):
    place = str(tmp_path / "digits")
    out, code = run(capsys, "--store", place, "--scores-from", str(tmp_path / "nowhere"))
    assert code == 1
    assert "there is no study" in out
    out, code = run(capsys, "--store", place, "--epsilons", "8")
    assert code == 2
    assert "--epsilons" in out
    out, code = run(capsys, "--store", place, "--sizes", "ten")
    assert code == 2
    assert "invalid list 'ten'; give numbers such as" in out


def test_the_job_file_has_help_with_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(JOB), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOB), run_name="__main__")
    text = capsys.readouterr().out
    for part in ("python jobs/removal_digits.py --data", "--scores-from", "--sizes", "--repeats"):
        assert part in text
