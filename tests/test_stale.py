"""Scores older than their trials, lost trials, damaged notes, and joins that nobody can check."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from raymem import Examples, JobSettings, Recipe, Store, Study, import_npz, score
from raymem.cli import main, run_job
from raymem.errors import DamagedObjectError, ExamplesError, StoreError
from raymem.links import correlations_across, costs, diagnostics, find_links, link3
from raymem.show import write_report
from raymem.show.tables import TableError, where
from raymem.store import TrialKey, verify
from raymem.store.derived import THUMBNAILS


def small(store, trials, **more):
    rng = np.random.default_rng(0)
    examples = Examples(
        x_train=rng.integers(0, 256, (40, 4, 4, 1), np.uint8), y_train=np.arange(40) % 2,
        x_test=rng.integers(0, 256, (10, 4, 4, 1), np.uint8), y_test=np.arange(10) % 2,
    )  # fmt: skip
    recipe = Recipe(model="mlp-16", epochs=8, batch_size=10, learning_rate=0.2)
    return Study(examples=examples, recipe=recipe, store=store, trials=trials, **more)


@pytest.fixture
def study(tmp_path):
    study = small(tmp_path / "s", 20)
    study.train(engine="serial")
    study.score()
    return study


def command(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_trials_that_are_not_scored_change_nothing_and_are_told(study):
    (before,) = link3(Store(study.store))
    small(study.store, 40).train(engine="serial")
    (after,) = link3(Store(study.store))
    assert (after.trials, after.pool) == (20, before.pool)
    (findings,) = diagnostics(Store(study.store)).values()
    (late,) = [f for f in findings if f.name == "trials that are not scored yet"]
    assert (late.value, late.red) == (20, True)
    study.score()
    (fresh,) = link3(Store(study.store))
    assert fresh.trials == 40
    assert fresh.pool != before.pool
    (findings,) = diagnostics(Store(study.store)).values()
    assert not [f for f in findings if f.name == "trials that are not scored yet"]


def test_a_scored_trial_that_is_gone_is_named(study):
    store = Store(study.store)
    store.files.delete(TrialKey(math.inf, 3).object_key)
    with pytest.raises(StoreError, match=r"trial 3 is not in .*; run the study's job"):
        find_links(store)
    assert command("links", study.store).output.startswith("error: trial 3 is not in")


def test_damaged_thumbnails_are_made_again(study):
    write_report(study.store, study.examples)
    whole = Store(study.store).files.read(THUMBNAILS)
    for damage in (b"", whole[:100]):
        Store(study.store).files.replace(THUMBNAILS, damage)
        write_report(study.store, study.examples)
        assert Store(study.store).files.read(THUMBNAILS) == whole


def test_a_failure_note_without_its_parts_is_damage_that_repair_moves(study):
    store = Store(study.store)
    store.files.create(TrialKey(math.inf, 1).failed_key(1), b"{}")
    assert command("status", study.store).exit_code == 1
    (problem,) = verify(store)
    assert (problem.kind, problem.key) == ("damaged", "failed/eps-inf/000001.1.json")
    verify(store, repair=True)
    assert command("status", study.store).exit_code == 0


@pytest.mark.parametrize("key", ["trials/eps-2.0/000001.parquet", "trials/eps-inf/1.parquet"])
def test_trials_under_other_names_are_foreign(study, key):
    store = Store(study.store)
    store.files.create(key, store.files.read(TrialKey(math.inf, 1).object_key))
    assert len(store.done()) == 20
    assert [(p.kind, p.key) for p in verify(store)] == [("foreign", key)]


@pytest.mark.parametrize("body", [[], None, 1, {"format": 1}, {"format": 1, "study": {}}])
def test_a_study_that_is_none_is_damaged(study, body):
    Store(study.store).files.replace("study.json", json.dumps(body).encode())
    with pytest.raises(DamagedObjectError, match=r"study\.json .* is damaged"):
        Store(study.store).study()
    assert command("status", study.store).output.startswith("error: study.json")


def test_scores_without_their_columns_are_damaged(study):
    store = Store(study.store)
    store.write_scores("examples", store.scores().drop_columns(["memorization_low"]), {})
    with pytest.raises(DamagedObjectError, match=r"lacks memorization_low; run the study's job"):
        store.scores()


def imported(tmp_path, name, **more):
    rng = np.random.default_rng(len(name))
    masks = rng.random((40, 30)) < 0.7
    np.savez(tmp_path / f"{name}.npz", masks=masks, correct_train=masks, **more)
    store = import_npz(tmp_path / f"{name}.npz", tmp_path / name)
    score(store)
    return store


def test_fleets_that_share_only_numbers_are_not_joined(tmp_path):
    with pytest.raises(StoreError, match="only ids, which two sets can share by accident"):
        correlations_across(imported(tmp_path, "a"), imported(tmp_path, "bb"))
    y = np.arange(30) % 3
    one, two = imported(tmp_path, "ccc", y_train=y), imported(tmp_path, "dddd", y_train=y)
    assert set(correlations_across(one, two)) == {math.inf}
    both = command("links", one.url, two.url).output
    assert both.endswith("link 1: not known, curvature was not measured\n")
    as_json = json.loads(command("links", one.url, two.url, "--json").output)
    (verdict,) = as_json["verdicts_against"][two.url]
    assert verdict["text"] == "link 1: not known, curvature was not measured"
    assert verdict["estimate"] is None
    twice = command("links", one.url, one.url)
    assert twice.exit_code == 1
    assert "given twice" in twice.output


def test_prices_at_a_reliability_that_nobody_knows_are_not_told(tmp_path):
    from raymem import CurvatureRule

    study = small(tmp_path / "c", 20, curvature=CurvatureRule(paper=None))
    study.train(engine="serial")
    study.score()
    links = find_links(Store(study.store))
    (found,) = costs(Store(study.store), links.correlations).values()
    assert math.isnan(found.memorization_reliability)  # one block
    assert math.isnan(found.ratio_at_target)


def test_a_plan_for_another_study_is_refused(study, capsys):
    other = JobSettings(data=study.examples, store=str(study.store), trials=20, seed=7)
    with pytest.raises(SystemExit) as end:
        run_job(other, study.recipe, arguments=["plan"])
    assert end.value.code == 1
    assert "plan.seed: store has 0, this run has 7" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["id == cat and", "id == cat or id == dog"])
def test_conditions_have_no_loose_words(text):
    import pyarrow as pa

    with pytest.raises(TableError, match="there is no 'or'"):
        where(pa.table({"id": ["cat", "dog"]}), text)
    assert where(pa.table({"id": ["cat or dog"]}), "id == 'cat or dog'").num_rows == 1


def test_ids_that_are_no_text_are_refused():
    x, y = np.zeros((2, 4, 4, 1), np.uint8), np.arange(2)
    with pytest.raises(ExamplesError, match="ids must be text"):
        Examples(x_train=x, y_train=y, x_test=x, y_test=y, train_ids=["a", "b\udcff"])
