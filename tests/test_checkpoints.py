"""Trials that go on where their worker was lost."""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from test_training import same

from raymem import Plan, Recipe, Store, Study
from raymem.fleet.store_checkpoints import PREEMPTED_SECONDS, StoreCheckpoints
from raymem.store import TrialKey
from raymem.training import Images, run_trial

KEY = TrialKey(math.inf, 3)


def dropping(n_classes, image_shape):
    """Normalized batches, dropout, and weights that momentum moves: all that there is to save."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(int(np.prod(image_shape)), 24),
        torch.nn.BatchNorm1d(24),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(24, n_classes),
    )


MLP = Recipe(model=dropping, epochs=4, batch_size=50, crop_padding=1, flip=True)
RECIPES = {
    "sgd": MLP,
    "adam": dataclasses.replace(MLP, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01),
    "rmsprop": dataclasses.replace(MLP, optimizer="rmsprop", learning_rate=1e-3),
    "bfloat16": dataclasses.replace(MLP, precision="bfloat16"),
    "crops": dataclasses.replace(MLP, crop_padding=0, crop_scale=(0.3, 1.0)),
}


@pytest.fixture(scope="module")
def images(digits):
    e = digits
    return Images.from_arrays(e.x_train[:300], e.y_train[:300], e.x_test[:100], e.y_test[:100], 10)


class Kept:
    """Checkpoints in this process, one after so many batches; the worker is lost right then."""

    class Lost(BaseException):
        pass

    def __init__(self, after):
        self.left, self.data = after, None

    def load(self):
        return self.data

    def due(self):
        self.left -= 1
        return self.left == 0

    def save(self, data):
        self.data = data
        raise self.Lost


def trial(images, recipe, checkpoints=None):
    plan = Plan(n=300, subset_ratio=0.7, seed=4)
    return run_trial(images, plan.mask(3), recipe, plan.seeds(3), checkpoints=checkpoints)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("after", [1, 4, 5, 13])  # 4 or 5 steps an epoch: within, at the end, later
def test_a_resumed_trial_ends_as_the_undisturbed_one(images, recipe, after):
    kept = Kept(after)
    with pytest.raises(Kept.Lost):
        trial(images, recipe, kept)
    assert same(trial(images, recipe, kept), trial(images, recipe))


def test_a_trial_can_be_lost_again_and_again(images):
    kept = Kept(2)
    for _ in range(8):  # 17 steps in all
        with pytest.raises(Kept.Lost):
            trial(images, MLP, kept)
        kept.left = 2
    kept.left = 99
    assert same(trial(images, MLP, kept), trial(images, MLP))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def in_store(store, preempted=None, seconds=100.0, identity="a", clock=None):
    return StoreCheckpoints(
        store,
        KEY,
        {"of": identity},
        seconds,
        preempted or threading.Event(),
        clock or (lambda: 0.0),
    )


def test_checkpoints_are_read_back_by_the_same_attempt_only(store):
    now = [5.0]
    first = in_store(store, clock=lambda: now[0])
    assert first.load() is None
    now[0] = 47.0
    first.save(b"some\nstate")
    assert first.written
    again = in_store(store)
    assert (again.load(), again.seconds_before, again.resumed) == (b"some\nstate", 42.0, True)
    other = in_store(store, identity="b")
    assert (other.load(), other.resumed) == (None, False)


@pytest.mark.parametrize("at", [0, 3, -1])
def test_a_damaged_checkpoint_is_left_aside(store, at):
    in_store(store).save(b"some state")
    data = bytearray(store.read_checkpoint(KEY))
    data[at] ^= 0x40
    store.write_checkpoint(KEY, bytes(data))
    assert in_store(store).load() is None


def test_when_checkpoints_are_due(store):
    now, preempted = [0.0], threading.Event()
    checkpoints = in_store(store, preempted, clock=lambda: now[0])
    assert not checkpoints.due()
    now[0] = 99.0
    assert not checkpoints.due()
    now[0] = 100.0
    assert checkpoints.due()
    checkpoints.save(b"")
    assert not checkpoints.due()
    # The node is about to go: at once, and then more often.
    preempted.set()
    assert checkpoints.due()
    checkpoints.save(b"")
    assert not checkpoints.due()
    now[0] += PREEMPTED_SECONDS
    assert checkpoints.due()


def test_a_fleet_goes_on_from_a_checkpoint_and_clears_it_up(tmp_path, digits, monkeypatch):
    """The driver dies in mid-trial; the next one trains the rest of that trial only."""
    examples = dataclasses.replace(
        digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200],
        x_test=digits.x_test[:50], y_test=digits.y_test[:50],
        train_ids=digits.train_ids[:200], test_ids=digits.test_ids[:50],
    )  # fmt: skip
    recipe = Recipe(model="mlp-16", epochs=6, batch_size=50)

    def study(name):
        return Study(examples=examples, recipe=recipe, store=tmp_path / name, trials=2)

    epochs = []
    end_epoch = training_state().end_epoch

    def dying(self):
        end_epoch(self)
        epochs.append(self.epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_state(), "end_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            study("lost").train(engine="serial", checkpoint_seconds=0.0)
        lost = Store(tmp_path / "lost")
        assert lost.checkpointed() == {TrialKey(math.inf, 0)}
        # What a checkpoint is of: six epochs are left out by the next driver, not trained again.
        study("lost").train(engine="serial")
    study("calm").train(engine="serial")
    calm = Store(tmp_path / "calm")
    assert epochs == [1, 2, 3, 4, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    for number in (0, 1):
        key = TrialKey(math.inf, number)
        assert lost.provenance(key)["digest"] == calm.provenance(key)["digest"]
    assert lost.provenance(TrialKey(math.inf, 0))["resumed"]
    assert "resumed" not in lost.provenance(TrialKey(math.inf, 1))
    assert lost.checkpointed() == set()


def training_state():
    from raymem.training.checkpoint import Training

    return Training
