"""Trials trained in one step: each is the trial trained alone, but for rounding."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from test_checkpoints import Kept
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raymem import CurvatureRule, Plan, Recipe
from raymem.errors import DivergedError, StoreFullError
from raymem.training import Images, Member, Steps, TrialResult, run_group, run_trial
from raymem.training.group import Group
from raymem.training.loop import start
from raymem.training.precision import fast_arithmetic
from raymem.training.replay import say_once
from raymem.training.stack import StackedStep
from raymem.training.trial import fresh_model

N = 300
PLAN = Plan(n=N, subset_ratio=0.7, seed=4)
MLP = Recipe(model="mlp-32", epochs=12, batch_size=50, learning_rate=0.05)
RESNET = Recipe(model="tiny-resnet", epochs=2, batch_size=64, learning_rate=0.05, flip=True)


@pytest.fixture(scope="module")
def images(digits):
    e = digits
    return Images.from_arrays(e.x_train[:N], e.y_train[:N], e.x_test[:100], e.y_test[:100], 10)


@pytest.fixture(autouse=True)
def _lines_again():
    say_once.cache_clear()


def member(trial, **more):
    return Member(mask=PLAN.mask(trial), seeds=PLAN.seeds(trial), keep_weights=True, **more)


def in_group(images, recipe, trials, **more):
    return run_group(
        images, [member(t) for t in trials], recipe, subset_size=PLAN.subset_size, **more
    )


def alone(images, recipe, trial, **more):
    return run_trial(
        images, PLAN.mask(trial), recipe, PLAN.seeds(trial), subset_size=PLAN.subset_size,
        keep_weights=True, **more,
    )  # fmt: skip


def bits(result):
    """All that a trial gives, as arrays."""
    parts = {"train": result.train, "test": result.test, "history": result.history}
    values = {f"{name}.{key}": v for name, part in parts.items() for key, v in vars(part).items()}
    return {**values, **{name: t.numpy() for name, t in result.weights.items()}}


def same_bits(a, b):
    first, second = bits(a), bits(b)
    assert first.keys() == second.keys()
    return all(np.array_equal(v, second[name], equal_nan=True) for name, v in first.items())


def same_but_for_rounding(found, expected, rtol=1e-4):
    """Weights to 1e-4 of each tensor's size; what was right but for ties of logits."""
    for name, value in expected.weights.items():
        other = found.weights[name]
        assert other.shape == value.shape, name
        scale = max(1e-3, float(value.float().abs().max()))
        assert float((other - value).abs().max()) <= rtol * scale, name
    for side in ("train", "test"):
        a, b = getattr(found, side), getattr(expected, side)
        # One ulp of a float32 weight is enough to move a logit this much.
        close = np.abs(b.margin) < 0.01
        assert np.array_equal(a.correct[~close], b.correct[~close])
        assert np.allclose(a.margin, b.margin, rtol=30 * rtol, atol=30 * rtol)
    a, b = found.history, expected.history
    assert np.allclose(a.cumulative_loss, b.cumulative_loss, rtol=10 * rtol, atol=10 * rtol)
    for name in ("learning_epoch", "forgetting_count"):
        assert np.mean(getattr(a, name) != getattr(b, name)) < 0.02, name


RECIPES = {
    "mlp": MLP,
    "momentum, nesterov, decay": dataclasses.replace(
        MLP, nesterov=True, weight_decay=1e-3, schedule="linear", warmup=0.1
    ),
    "plain sgd": dataclasses.replace(MLP, momentum=0.0, schedule="steps", label_smoothing=0.1),
    "adam": dataclasses.replace(MLP, optimizer="adam", learning_rate=1e-3, weight_decay=1e-3),
    "adamw": dataclasses.replace(
        MLP, optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, schedule="constant"
    ),
    "rmsprop": dataclasses.replace(MLP, optimizer="rmsprop", learning_rate=1e-3, weight_decay=1e-3),
    "crops and flips": dataclasses.replace(MLP, crop_padding=1, flip=True),
    "resized crops": dataclasses.replace(MLP, crop_scale=(0.4, 1.0), crop_size=8, flip=True),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_member_of_eight_mlps_is_the_trial_alone(images, recipe):
    sizes = {int(PLAN.mask(t).sum()) for t in range(8)}
    assert len(sizes) > 4  # subsets of several sizes take the same steps
    assert Steps.of(recipe, PLAN.subset_size).total == 50
    results = in_group(images, recipe, range(8))
    for trial in (0, 3, 7):
        assert results[trial].how == "group of 8"
        same_but_for_rounding(results[trial], alone(images, recipe, trial))
    # The check can fail: neighbours are other models.
    assert not np.allclose(results[0].test.margin, results[3].test.margin, atol=0.1)


def grouped(n_classes, image_shape):
    """GroupNorm over whole feature maps: over single pixels, as in a ResNet of 8x8 images, one step
    makes rounding a thousand times larger."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, n_classes),
    )  # fmt: skip


@pytest.mark.parametrize(
    "recipe",
    [RESNET, dataclasses.replace(RESNET, model=grouped, channels_last=True)],
    ids=["BatchNorm", "GroupNorm"],
)
def test_a_member_of_four_is_the_trial_alone(images, recipe):
    results = in_group(images, recipe, range(4))
    assert {result.how for result in results} == {"group of 4"}
    expected = alone(images, recipe, 2)
    # Rounding grows: ReLUs and normalization make a small difference a larger one, step by step.
    same_but_for_rounding(results[2], expected, rtol=2e-3)
    counters = [name for name in expected.weights if name.endswith("num_batches_tracked")]
    steps = Steps.of(recipe, PLAN.subset_size).total
    assert all(int(results[2].weights[name]) == steps for name in counters)
    assert bool(counters) == (recipe.model != grouped)


def normed(n_classes, image_shape):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(36, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, n_classes),
    )  # fmt: skip


def test_half_precision_is_that_of_a_model_alone(images):
    """Casts of weights and inputs in a group, autocast alone: bfloat16 has 8 bits."""
    recipe = dataclasses.replace(MLP, model=normed, precision="bfloat16", epochs=6)
    results, expected = in_group(images, recipe, range(3)), alone(images, recipe, 1)
    assert {result.how for result in results} == {"group of 3"}
    full = alone(images, dataclasses.replace(recipe, precision="float32"), 1)
    for result in (results[1], expected):
        assert not np.array_equal(result.test.margin, full.test.margin)
        assert np.corrcoef(result.test.margin, full.test.margin)[0, 1] > 0.97
    assert all(value.dtype != torch.bfloat16 for value in results[1].weights.values())


def test_neither_order_nor_company_matters(images):
    first = in_group(images, MLP, [0, 1, 2, 3])
    second = in_group(images, MLP, [3, 0, 2, 1])
    for trial, place in ((0, 1), (1, 3), (2, 2), (3, 0)):
        assert same_bits(second[place], first[trial])
    assert same_bits(in_group(images, MLP, [9, 2, 7, 5])[1], first[2])


class Doomed(nn.Linear):
    """Gives NaN from its first weights on, if those are all seven."""

    def forward(self, x):
        return super().forward(x.flatten(1)) + torch.where(self.weight.mean() > 6, torch.nan, 0.0)


def doomed(n_classes, image_shape):
    net = Doomed(64, n_classes)
    if torch.initial_seed() == PLAN.seeds(1).init:
        nn.init.constant_(net.weight, 7.0)
    return net


def test_a_member_that_diverges_leaves_the_others_untouched(images, monkeypatch):
    recipe = dataclasses.replace(MLP, model=doomed)
    lively = in_group(images, recipe, [0, 2, 3, 4])
    results = in_group(images, recipe, [0, 1, 3, 4])
    assert isinstance(results[1], DivergedError)
    assert "epoch 1 of 12" in str(results[1])
    for place in (0, 2, 3):
        assert same_bits(results[place], lively[place])
    with pytest.raises(DivergedError, match="epoch 1 of 12"):
        alone(images, recipe, 1)


def test_a_group_that_diverges_as_a_whole_stops(images):
    epochs = []
    results = in_group(
        images, dataclasses.replace(MLP, learning_rate=1e30), [0, 1], on_epoch=epochs.append
    )
    assert all(isinstance(result, DivergedError) for result in results)
    assert set(epochs) < {1, 2, 3, 4}  # of 12


class OnDevice(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read back, and values sent from the host."""

    REFUSED = ("_local_scalar_dense", "lift_fresh", "lift", "is_nonzero", "item", "nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.REFUSED, name
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            assert len({x.device for x in tensors}) == 1, name
        return result


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(RESNET, crop_padding=1, label_smoothing=0.1),
        dataclasses.replace(MLP, optimizer="adamw", crop_scale=(0.4, 1.0), flip=True),
    ],
    ids=["resnet", "mlp"],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_step_needs_nothing_of_the_host(images, recipe, together):
    from raymem.training.ranks import ALONE
    from raymem.training.step import Feed, SingleStep

    steps = Steps.of(recipe, PLAN.subset_size)
    started = [
        start(fresh_model(images, recipe), images, PLAN.mask(t), recipe, PLAN.seeds(t))
        for t in range(2)
    ]
    states, subsets = [state for state, _ in started], [subset for _, subset in started]
    if together:
        group = Group(states, subsets, images, recipe, steps)
        course, step = group.course, group.step
    else:
        group = Group(states[:1], subsets[:1], images, recipe, steps)
        course = group.course
        feed = Feed(20, 1, steps.batch, images.device)
        course.feed = feed
        step = SingleStep(states[0], images, recipe, ALONE, feed)
    course.begin()
    step()  # a group's first is compared with a model alone
    with OnDevice():
        step()
        step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnDevice():
        states[0].history.cumulative_loss.sum().item()


def dropping(n_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, n_classes))


class Remembering(nn.Linear):
    """Its buffer is another tensor after each batch: nothing that a stack would see."""

    def __init__(self, n_classes):
        super().__init__(64, n_classes)
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + x.flatten(1).detach().mean(0)
        return super().forward(x.flatten(1) - 0.01 * self.seen)


def remembering(n_classes, image_shape):
    return Remembering(n_classes)


def averaging(n_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, n_classes))


@pytest.mark.parametrize(
    ("model", "why"),
    [(dropping, "random"), (remembering, "seen"), (averaging, "averages its statistics")],
)
def test_what_cannot_be_stacked_is_trained_alone_and_the_log_says_why(images, model, why, caplog):
    recipe = dataclasses.replace(MLP, model=model, epochs=2)
    with caplog.at_level(logging.WARNING, "raymem"):
        results = in_group(images, recipe, [0, 1])
    (record,) = caplog.records
    assert "one by one" in record.message
    assert why in record.message
    for trial in (0, 1):
        assert results[trial].how == "alone"
        assert same_bits(results[trial], alone(images, recipe, trial))


@pytest.mark.parametrize("change", [{"precision": "float16"}, {"compile": True}])
def test_recipes_that_are_not_for_groups(images, change, monkeypatch, caplog):
    from raymem.training import group

    trained = []
    monkeypatch.setattr(group, "run_trial", lambda *a, **k: trained.append(k) or "trained")
    with caplog.at_level(logging.WARNING, "raymem"):
        assert in_group(images, dataclasses.replace(MLP, **change), [0, 1]) == ["trained"] * 2
    assert "one by one" in caplog.text


def test_where_memory_is_short_a_group_is_halved(images, caplog, monkeypatch):
    recipe = dataclasses.replace(MLP, epochs=2)
    step = StackedStep._step

    def greedy(self):
        if len(self.stack.history.cumulative_loss) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(StackedStep, "_step", greedy)
    with caplog.at_level(logging.WARNING, "raymem"):
        results = in_group(images, recipe, range(5))
    assert "5 models in one step do not fit" in caplog.text
    assert [result.how for result in results] == [*["group of 2"] * 2, "alone", *["group of 2"] * 2]
    for trial, result in enumerate(results):
        same_but_for_rounding(result, alone(images, recipe, trial))


def test_each_member_has_its_extras(images):
    rule = CurvatureRule(paper=None)
    heard = []
    results = run_group(
        images,
        [
            dataclasses.replace(member(0), curvature=rule),
            dataclasses.replace(member(1), keep_weights=False),
        ],
        MLP,
        subset_size=PLAN.subset_size,
        on_result=lambda number, outcome: heard.append((number, outcome)),
    )
    assert results[0].curvature.values["curvature"].shape == (N,)
    expected = alone(images, MLP, 0, curvature=rule).curvature.values["curvature"]
    assert np.allclose(results[0].curvature.values["curvature"], expected, rtol=0.02, atol=1e-3)
    assert results[1].curvature is None
    assert results[1].weights is None
    assert heard == list(enumerate(results))
    assert all(isinstance(result, TrialResult) for result in results)


def lost_after(steps, trials):
    """Checkpoints of a group whose worker is lost after so many steps: all are saved, then none."""
    kept = {t: Kept(10**9) for t in trials}
    kept[trials[0]].left = steps
    for one in kept.values():
        one.save = lambda data, one=one: setattr(one, "data", data)
    last = kept[trials[-1]]

    def save(data):
        last.data = data
        raise Kept.Lost

    last.save = save
    return kept


@pytest.mark.parametrize(
    "recipe",
    [MLP, RECIPES["adamw"], RECIPES["rmsprop"], dataclasses.replace(MLP, model=normed)],
    ids=["sgd", "adamw", "rmsprop", "BatchNorm"],
)
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_resumed_group_ends_as_the_undisturbed_one(images, recipe, after):
    recipe = dataclasses.replace(recipe, epochs=3, crop_padding=1)
    undisturbed = in_group(images, recipe, [0, 1, 2])
    kept = lost_after(after, [0, 1, 2])

    def run():
        members = [member(t, checkpoints=kept[t]) for t in range(3)]
        return run_group(images, members, recipe, subset_size=PLAN.subset_size)

    with pytest.raises(Kept.Lost):
        run()
    assert all(same_bits(a, b) for a, b in zip(run(), undisturbed, strict=True))
    # Bytes of one model, not of the stack that it is a view of.
    assert (
        len(kept[1].data) < 3 * 4 * sum(t.numel() for t in undisturbed[1].weights.values()) + 50_000
    )


def test_checkpoints_of_a_group_go_on_alone_and_in_other_groups(images):
    kept = lost_after(11, [0, 1, 2, 3])
    members = [member(t, checkpoints=kept[t]) for t in range(4)]
    with pytest.raises(Kept.Lost):
        run_group(images, members, MLP, subset_size=PLAN.subset_size)
    resumed = alone(images, MLP, 0, checkpoints=kept[0])
    assert resumed.how == "group of 4, then alone"
    same_but_for_rounding(resumed, alone(images, MLP, 0))
    # Trial 5 has no checkpoint: it starts, while two others go on.
    mixed = [member(1, checkpoints=kept[1]), member(5), member(2, checkpoints=kept[2])]
    results = run_group(images, mixed, MLP, subset_size=PLAN.subset_size)
    both = "group of 4, then group of 2"
    assert [r.how for r in results] == [both, "alone", both]
    for result, trial in zip(results, (1, 5, 2), strict=True):
        same_but_for_rounding(result, alone(images, MLP, trial))


def test_a_store_that_is_full_ends_the_group(images):
    class Full(Kept):
        def save(self, data):
            raise StoreFullError("no space")

    members = [member(0, checkpoints=Full(3)), member(1)]
    with pytest.raises(StoreFullError):
        run_group(images, members, MLP, subset_size=PLAN.subset_size)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(model="m", epochs=1, optimizer="sgd", nesterov=True, weight_decay=0.01),
        Recipe(model="m", epochs=1, optimizer="sgd", momentum=0.0),
        Recipe(model="m", epochs=1, optimizer="adam", weight_decay=0.01, learning_rate=0.01),
        Recipe(model="m", epochs=1, optimizer="adamw", weight_decay=0.1, learning_rate=0.01),
        Recipe(model="m", epochs=1, optimizer="rmsprop", weight_decay=0.1, learning_rate=0.01),
    ],
    ids=lambda r: r.optimizer + ("" if r.momentum else " plain"),
)
def test_the_optimizer_moves_as_torchs(recipe):
    from raymem.training.optimizer import Optimizer, rates
    from raymem.training.private import torch_optimizer

    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    theirs.load_state_dict(ours.state_dict())
    steps = Steps(batch=1, total=20, epochs=1)
    moves, other = Optimizer(list(ours.parameters()), recipe), torch_optimizer(theirs, recipe)
    rows = rates(recipe, steps, 0, 20)
    for step in range(20):
        x, y = torch.randn(8, 5).double(), torch.randn(8, 4).double()
        for net in (ours, theirs):
            net.zero_grad()
            F.mse_loss(net(x), y).backward()
        moves.step(rows[step])
        from raymem.training import learning_rate_factor

        rate = recipe.learning_rate * learning_rate_factor(recipe, step / 20)
        other.param_groups[0]["lr"] = rate
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_every_trial_of_a_study_takes_the_same_steps(images):
    counts = []

    class Counting(nn.Linear):
        def forward(self, x):
            counts.append(len(x)) if self.training else None
            return super().forward(x.flatten(1))

    recipe = dataclasses.replace(
        MLP, model=lambda n_classes, image_shape: Counting(64, n_classes), epochs=3
    )
    for trial in range(3):
        counts.clear()
        alone(images, recipe, trial)
        assert counts == [50] * round(3 * PLAN.subset_size / 50)


def test_float32_is_float32_in_a_trial_and_settings_come_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    deterministic = torch.backends.cudnn.deterministic
    try:
        with fast_arithmetic(1):
            assert torch.backends.cudnn.deterministic
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic == deterministic
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
