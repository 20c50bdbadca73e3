"""A trial trained again: the same to the last bit, or the difference is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

from raymem import Recipe, Store, Study, import_npz
from raymem.cli import main
from raymem.errors import StoreError
from raymem.fleet import TrialOptions, repeat_trial
from raymem.links import diagnostics


@pytest.fixture
def study(digits, tmp_path):
    study = Study(
        examples=digits, recipe=Recipe(model="mlp-8", epochs=2), store=tmp_path / "s", trials=2
    )
    study.train(engine="serial")
    study.score()
    return study


def finding(study):
    (found,) = diagnostics(Store(study.store)).values()
    return next((f for f in found if f.name == "a trial trained again"), None)


def test_training_again_gives_the_same_bits(study):
    assert finding(study) is None
    found = study.repeat()
    assert (found.identical, found.changed, found.drift) == (True, 0.0, 0.0)
    assert not finding(study).red
    assert "the same, to the last bit" in finding(study).text
    assert CliRunner().invoke(main, ["verify", str(study.store)]).exit_code == 0


def test_other_training_is_a_red_finding(study):
    other = dataclasses.replace(study.recipe, learning_rate=0.05)
    store = Store(study.store)
    found = repeat_trial(study.examples, study.plan, other, store, TrialOptions(), threads=1)
    assert not found.identical
    first = store.trial(min(store.done()))["margin"].to_numpy()
    assert 0 < found.drift < 2 * np.abs(first).max() + 10
    assert found.comparable
    assert finding(study).red
    assert "margins differ" in finding(study).text
    # With other arithmetic (here: more threads) a difference is drift, no error.
    drifted = repeat_trial(study.examples, study.plan, other, store, TrialOptions(), threads=2)
    assert not drifted.identical
    assert not drifted.comparable
    assert not finding(study).red


def test_what_cannot_be_repeated(digits, tmp_path):
    empty = Study(examples=digits, recipe=Recipe(model="mlp-8", epochs=1), store=tmp_path, trials=2)
    with pytest.raises(StoreError, match="no trial to repeat"):
        empty.repeat()
    masks = np.random.default_rng(0).random((4, 5)) < 0.5
    np.savez(tmp_path / "fleet.npz", masks=masks, correct_train=masks)
    import_npz(tmp_path / "fleet.npz", tmp_path / "imported")
    with pytest.raises(StoreError, match="imported"):
        repeat_trial(
            digits,
            empty.plan,
            empty.recipe,
            Store(tmp_path / "imported"),
            TrialOptions(),
            threads=1,
        )
