"""Probable label errors, and how well rankings find those that were planted."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import average_precision_score

from raymem import Recipe, Store, Study, flip_labels, load_examples
from raymem.cli import main
from raymem.errors import StoreError
from raymem.links import label_errors
from raymem.links.cleaning import rank


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(
        examples=flip_labels(load_examples("digits"), 0.05),
        recipe=Recipe(model="mlp-64", epochs=25, batch_size=32, learning_rate=0.1),
        store=tmp_path_factory.mktemp("cleaning"),
        trials=20,
        subset_ratio=0.5,
    )
    study.train(engine="serial")
    study.score()
    return study


def test_planted_errors_are_on_the_list(study):
    found = label_errors(Store(study.store))
    planted = {study.examples.train_ids[k] for k in study.examples.planted}
    assert found.planted == len(planted) == 60
    listed = [row["example_id"] for row in found.rows]
    hits = sum(name in planted for name in listed)
    assert found.precision == pytest.approx(hits / len(listed))
    assert found.recall == pytest.approx(hits / 60)
    assert found.precision > 0.7
    assert found.recall > 0.7
    losses = [row["loss_out"] for row in found.rows]
    assert losses == sorted(losses, reverse=True)
    assert found.rankings[0].average_precision > 0.8
    assert {"loss_out", "memorization", "cumulative_loss"} <= {r.column for r in found.rankings}


def test_the_command(study):
    run = CliRunner().invoke(main, ["errors", str(study.store), "--top", "3"])
    assert run.exit_code == 0
    assert "60 labels were flipped on purpose" in run.output
    rows = CliRunner().invoke(main, ["errors", str(study.store), "--csv"]).output
    assert len(list(csv.DictReader(io.StringIO(rows)))) == len(
        label_errors(Store(study.store)).rows
    )


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=200), rng.integers(0, 5, 200).astype(float)):
        flipped = rng.random(200) < 0.2
        found = rank("x", values, flipped)
        assert found.average_precision == pytest.approx(average_precision_score(flipped, values))
    # All alike: chance.
    assert rank("x", np.zeros(200), flipped).precision == pytest.approx(flipped.mean())


def test_an_epsilon_that_was_not_trained_is_no_clean_data_set(study):
    with pytest.raises(StoreError, match="no scores at epsilon 3; there are inf"):
        label_errors(Store(study.store), 3.0)
    asked = CliRunner().invoke(main, ["errors", str(study.store), "--epsilon", "3"])
    assert asked.exit_code == 1
    assert "there are inf" in asked.output
