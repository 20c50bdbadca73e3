"""Curvature averaged over the epochs of a trial: the mean of what their weights give."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from test_checkpoints import Kept
from test_group import Doomed

from raymem import CurvatureRule, Plan, Recipe, Study
from raymem.errors import CurvatureError, DivergedError, PlanError
from raymem.models import build_model
from raymem.privacy import Privacy, mechanism_for
from raymem.training import Images, Member, measure, run_group, run_trial
from raymem.training.epoch_curvature import EpochCurvature

N = 240
PLAN = Plan(n=N, subset_ratio=0.7, seed=4)
MLP = Recipe(model="mlp-24", epochs=5, batch_size=40, learning_rate=0.05)
NORMED = dataclasses.replace(MLP, model="tiny-resnet", epochs=3, flip=True)
RULE = CurvatureRule(paper=None, every_epochs=1)
NAME = "curvature_over_training"


@pytest.fixture(scope="module")
def images(digits):
    e = digits
    return Images.from_arrays(e.x_train[:N], e.y_train[:N], e.x_test[:50], e.y_test[:50], 10)


def alone(images, recipe, rule=RULE, trial=1, **more):
    return run_trial(
        images, PLAN.mask(trial), recipe, PLAN.seeds(trial), subset_size=PLAN.subset_size,
        curvature=rule, keep_weights=True, **more,
    )  # fmt: skip


def member(trial, rule=RULE, **more):
    mask, seeds = PLAN.mask(trial), PLAN.seeds(trial)
    return Member(mask=mask, seeds=seeds, curvature=rule, keep_weights=True, **more)


def weights_of_each_epoch(monkeypatch):
    """What a trial's weights are at the end of each epoch but the last, noted as it trains."""
    seen = {}
    due = EpochCurvature.measure

    def note(self, model, epoch):
        seen[epoch] = copy.deepcopy(model.state_dict())
        due(self, model, epoch)

    monkeypatch.setattr(EpochCurvature, "measure", note)
    return seen


@pytest.mark.parametrize("recipe", [MLP, NORMED], ids=["mlp", "BatchNorm"])
@pytest.mark.parametrize("every", [1, 2])
def test_it_is_the_mean_over_the_weights_of_the_epochs(images, recipe, every, monkeypatch):
    saved = weights_of_each_epoch(monkeypatch)
    result = alone(images, recipe, dataclasses.replace(RULE, every_epochs=every))
    saved[recipe.epochs] = result.weights
    assert sorted(saved) == list(range(recipe.epochs, 0, -every))[::-1]
    model = build_model(recipe.model, n_classes=10, image_shape=(8, 8, 1))
    traces = []
    for weights in saved.values():
        model.load_state_dict(weights)
        found = measure(model, images.x_train, images.y_train, CurvatureRule(paper=None))
        traces.append(found.values["curvature"].astype(np.float64))
    assert np.corrcoef(traces[0], traces[-1])[0, 1] < 0.9  # the epochs differ
    np.testing.assert_allclose(result.curvature.values[NAME], np.mean(traces, 0), rtol=1e-3)
    assert result.curvature.epochs == len(saved)
    assert result.curvature.epochs_seconds > 0


def test_training_and_the_trained_models_curvature_are_not_touched(images):
    with_epochs, without = alone(images, NORMED), alone(images, NORMED, CurvatureRule(paper=None))
    for name, value in without.weights.items():
        assert torch.equal(value, with_epochs.weights[name]), name
    np.testing.assert_array_equal(with_epochs.train.margin, without.train.margin)
    np.testing.assert_array_equal(
        with_epochs.history.cumulative_loss, without.history.cumulative_loss
    )
    for name, value in without.curvature.values.items():
        np.testing.assert_array_equal(with_epochs.curvature.values[name], value)
    assert NAME not in without.curvature.values


@pytest.mark.parametrize("after", [1, 4, 5, 13])  # 4 or 5 steps an epoch: within, at the end, later
def test_a_resumed_trial_has_the_same_mean(images, after):
    kept = Kept(after)
    with pytest.raises(Kept.Lost):
        alone(images, MLP, checkpoints=kept)
    resumed, undisturbed = alone(images, MLP, checkpoints=kept), alone(images, MLP)
    for result in (resumed, undisturbed):
        assert result.curvature.epochs == MLP.epochs
    np.testing.assert_array_equal(
        resumed.curvature.values[NAME], undisturbed.curvature.values[NAME]
    )


def test_groups_have_it_for_each_member(images):
    members = [member(0), member(1), member(2, rule=None), member(3)]
    results = run_group(images, members, MLP, subset_size=PLAN.subset_size)
    assert {result.how for result in results} == {"group of 4"}
    assert results[2].curvature is None
    for trial in (0, 1, 3):
        found, expected = (r.curvature for r in (results[trial], alone(images, MLP, trial=trial)))
        np.testing.assert_allclose(found.values[NAME], expected.values[NAME], rtol=5e-3)
        assert found.epochs == MLP.epochs


def test_a_resumed_group_has_the_same_means(images):
    kept = [Kept(10**9) for _ in range(2)]
    kept[0].left = 9
    kept[0].save = lambda data: setattr(kept[0], "data", data)

    def run():
        members = [member(t, checkpoints=kept[t]) for t in range(2)]
        return run_group(images, members, MLP, subset_size=PLAN.subset_size)

    with pytest.raises(Kept.Lost):
        run()
    undisturbed = run_group(
        images, [member(t) for t in range(2)], MLP, subset_size=PLAN.subset_size
    )
    for a, b in zip(run(), undisturbed, strict=True):
        np.testing.assert_array_equal(a.curvature.values[NAME], b.curvature.values[NAME])


def bursting(n_classes, image_shape):
    """Its weights are not finite after the first step, if it is trial 1's: its losses are."""
    net = Doomed(int(np.prod(image_shape)), n_classes)
    if torch.initial_seed() == PLAN.seeds(1).init:
        net.register_parameter("unused", torch.nn.Parameter(torch.full((1,), torch.inf)))
    else:
        net.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    return net


def test_a_member_that_cannot_be_measured_leaves_the_others(images):
    recipe = dataclasses.replace(MLP, model=bursting)
    results = run_group(images, [member(t) for t in range(3)], recipe, subset_size=PLAN.subset_size)
    assert isinstance(results[1], DivergedError)
    assert "epoch 1 of 5" in str(results[1])
    assert [r.how for r in (results[0], results[2])] == ["group of 3"] * 2


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_private_trials_have_it(images, epsilon, monkeypatch):
    recipe = Recipe(model="mlp-16", epochs=4, batch_size=60, learning_rate=0.1)
    saved = weights_of_each_epoch(monkeypatch)
    mechanism = mechanism_for(
        Privacy(), epsilon, subset_size=PLAN.subset_size, batch_size=60, epochs=4
    )
    result = alone(images, recipe, mechanism=mechanism)
    plain = alone(images, recipe, CurvatureRule(paper=None), mechanism=mechanism)
    for name, value in plain.weights.items():
        assert torch.equal(value, result.weights[name]), name
    saved[4] = result.weights
    assert sorted(saved) == [1, 2, 3, 4]
    model = build_model("mlp-16", n_classes=10, image_shape=(8, 8, 1))
    traces = []
    for weights in saved.values():
        model.load_state_dict(weights)
        traces.append(measure(model, images.x_train, images.y_train, RULE).values["curvature"])
    np.testing.assert_allclose(result.curvature.values[NAME], np.mean(traces, 0), rtol=1e-3)
    kept = Kept(mechanism.steps // 2)  # a step at which an epoch ends
    with pytest.raises(Kept.Lost):
        alone(images, recipe, mechanism=mechanism, checkpoints=kept)
    resumed = alone(images, recipe, mechanism=mechanism, checkpoints=kept)
    np.testing.assert_array_equal(resumed.curvature.values[NAME], result.curvature.values[NAME])


def test_what_makes_no_sense_is_refused(digits, tmp_path):
    with pytest.raises(CurvatureError, match="every_epochs must be 1 or more"):
        CurvatureRule(every_epochs=0)
    study = {"examples": digits, "recipe": MLP, "store": tmp_path, "trials": 20}
    with pytest.raises(PlanError, match="every_epochs is 5, but the recipe has only 5"):
        Study(**study, curvature=CurvatureRule(every_epochs=5))
    with pytest.raises(PlanError, match="while a model trains"):
        Study(
            **study, curvature=RULE, curvature_at="stage", curvature_data="shards", keep_models=20
        )


def test_it_is_part_of_the_identity_only_when_on():
    assert "every_epochs" not in CurvatureRule().as_dict()
    assert CurvatureRule(every_epochs=3).as_dict()["every_epochs"] == 3
