"""Private means private: models that mix examples are refused, and for all others one example moves
the clipped sum by C at most."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from timm.layers import DropPath, EvoNorm2dS0, StdConv2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from raymem import Privacy, Study
from raymem.errors import FleetError, PrivacyError
from raymem.models import build_model
from raymem.plan import Plan
from raymem.privacy import Mechanism, check_function, check_private, clipped_sum
from raymem.privacy.per_example import exact_modes
from raymem.store import Store
from raymem.training import Images, Recipe, run_trial

SHAPE = (8, 8, 3)
K = 10


class Through(nn.Module):
    """A convolutional net with a function of the user's own in the middle."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, K)
        self.function = function

    def forward(self, x):
        return self.head(F.relu(self.function(self.conv(x))).mean((2, 3)))


class Patches(nn.Module):
    """Attention over the patches of one image."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Linear(48, 16), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, K)

    def forward(self, x):
        h = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        return self.head((h + F.scaled_dot_product_attention(q, k, v)).mean(1))


class Dense(nn.Module):
    """Linear layers called in a way of the test's own."""

    def __init__(self, call, **more):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, K)
        self.call = call
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.call(self, x.flatten(1))


class MixesBackwards(torch.autograd.Function):
    """The identity, whose gradient is not."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - 0.5 * gradient.mean(0)


def after_convolution(layer):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        layer,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, K),
    )


def named(name):
    return build_model(name, n_classes=K, image_shape=SHAPE)


def twice(net, x):
    return net.head(F.relu(net.b(F.relu(net.b(F.relu(net.a(x)))))))


def remembers(net, x):
    h = net.a(x)
    out = net.head(h - net.mean)
    net.mean = 0.9 * net.mean + 0.1 * h.detach().mean(0)
    return out


def tied():
    net = Dense(
        lambda net, x: net.head(net.c(F.relu(net.b(F.relu(net.a(x)))))), c=nn.Linear(16, 16)
    )
    net.c.weight = net.b.weight
    return net


ACCEPTED = {
    "mlp": (lambda: named("mlp-16"), "ghost"),
    "group-norm": (lambda: after_convolution(nn.GroupNorm(2, 8)), "expanded-weights"),
    "tiny-resnet-gn": (lambda: named("tiny-resnet-gn"), "expanded-weights"),
    "instance-norm": (lambda: after_convolution(nn.InstanceNorm2d(8)), "expanded-weights"),
    "instance-norm-affine": (
        lambda: after_convolution(nn.InstanceNorm2d(8, affine=True)),
        "hooks",
    ),
    "evo-norm": (lambda: after_convolution(EvoNorm2dS0(8, groups=2)), "hooks"),
    "attention": (Patches, "ghost"),
    # Exact by hooks alone: expanded weights and ghosts count its layer's calls apart.
    "layer-used-twice": (lambda: Dense(twice), "hooks"),
    "standardized-weights": (
        lambda: nn.Sequential(
            StdConv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, K),
        ),
        "hooks",
    ),
}
RANDOM = {
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.3), nn.Linear(16, K)
    ),
    "functional-dropout": lambda: Through(lambda h: F.dropout(h, 0.3)),
    "drop-path": lambda: after_convolution(DropPath(0.3)),
    "stochastic-depth": lambda: after_convolution(StochasticDepth(0.3, "row")),
}
REFUSED = {
    "batch-norm": (lambda: named("tiny-resnet"), r"layer 1\.bn1 is a BatchNorm2d.*with -gn"),
    "functional-batch-norm": (
        lambda: Through(lambda h: F.batch_norm(h, None, None, training=True)),
        r"code before layer head \(Linear\) mixes the examples",
    ),
    "standardized-over-the-batch": (
        lambda: Through(lambda h: (h - h.mean(0)) / (h.std(0) + 1e-5)),
        r"code before layer head \(Linear\) mixes",
    ),
    "a-layer-that-mixes": (
        lambda: after_convolution(Centred()),
        r"layer 1 \(Centred\) mixes",
    ),
    "instance-norm-with-statistics": (
        lambda: after_convolution(nn.InstanceNorm2d(8, track_running_stats=True)),
        r"changes running_mean of layer 1 \(InstanceNorm2d\)",
    ),
    "spectral-norm": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(192, K))
        ),
        "changes _[uv] of layer",
    ),
    "mask-for-the-batch": (
        lambda: after_convolution(StochasticDepth(0.3, "batch")),
        "one random mask for the whole batch",
    ),
    "mask-from-the-batch": (
        lambda: Through(lambda h: h * (h > h.quantile(0.7))),
        r"code before layer head \(Linear\) mixes",
    ),
    "mixed-gradients": (lambda: Through(MixesBackwards.apply), "a backward pass mixes"),
    "size-of-the-batch": (lambda: Through(lambda h: h * len(h)), "how many are in its batch"),
    "place-in-the-batch": (
        lambda: Through(lambda h: h * torch.arange(len(h)).reshape(-1, 1, 1, 1)),
        "on its place there",
    ),
    "hidden-by-a-zero": (
        lambda: Dense(
            lambda net, x: net.head(net.a(x) + net.gate * net.a(x).mean(0)),
            gate=nn.Parameter(torch.zeros(1)),
        ),
        "mixes the examples",
    ),
    "memory": (lambda: Dense(remembers, mean=torch.zeros(16)), "remembers earlier batches"),
    "tied": (tied, r"c\.weight and b\.weight are one parameter"),
    "tied-in-a-function": (
        lambda: Dense(lambda net, x: net.head(F.linear(F.relu(net.b(net.a(x))), net.b.weight))),
        r"weight of layer b \(Linear\) are not those of its examples taken alone",
    ),
    "unused": (lambda: Dense(lambda net, x: net.head(net.a(x))), "per-example gradients"),
    "cannot-run": (
        lambda: Dense(lambda net, x: net.head(net.a(x)) if len(x) == 1 else x.fail()),
        "does not run on random images",
    ),
}


class Centred(nn.Module):
    def forward(self, h):
        return h - h.mean(0)


def data(n, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=draws), torch.randint(0, K, (n,), generator=draws)


@pytest.mark.parametrize("name", ACCEPTED)
def test_models_that_treat_each_image_by_itself_are_accepted(name):
    torch.manual_seed(0)
    make, mode = ACCEPTED[name]
    assert check_private(make(), SHAPE) == mode


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_of_each_image_by_itself_is_accepted(name):
    torch.manual_seed(0)
    assert check_private(RANDOM[name](), SHAPE) in ("ghost", "expanded-weights")


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_examples_are_refused(name):
    torch.manual_seed(0)
    make, says = REFUSED[name]
    with pytest.raises(PrivacyError, match=says):
        check_private(make(), SHAPE)


@pytest.mark.parametrize("name", ACCEPTED)
def test_one_example_moves_the_sum_by_c_at_most_in_every_mode(name):
    """Any example of a batch taken away, added or replaced, in each mode that the check grants."""
    torch.manual_seed(0)
    net = ACCEPTED[name][0]().double().train()
    x, y = data(7)
    x = x.double()
    C = 0.05
    tested = 0
    for mode in exact_modes(ACCEPTED[name][0]().train(), SHAPE):

        def total(rows, x=x, mode=mode):
            parts = clipped_sum(copy.deepcopy(net), x[rows], y[rows], C, mode)
            return torch.cat([part.flatten() for part in parts.values()])

        everyone = list(range(6))
        whole = total(everyone)
        for i in everyone:
            without = total([j for j in everyone if j != i])
            # Gradients of fresh nets are longer than C here: each is clipped to that very length.
            moved = float((whole - without).norm())
            assert 0.99 * C < moved <= C * (1 + 1e-5)
            replaced = total([6 if j == i else j for j in everyone])
            assert float((whole - replaced).norm()) <= 2 * C * (1 + 1e-5)
            tested += 1
    assert tested >= 6


def test_what_was_refused_does_move_the_sum_by_more():
    """The fault that the check is for: statistics over the batch, clipped as if they were none."""
    torch.manual_seed(0)
    net = Through(lambda h: F.batch_norm(h, None, None, training=True)).train()
    x, y = data(64)
    C = 0.5

    def total(x):
        parts = clipped_sum(copy.deepcopy(net), x, y, C, "hooks")
        return torch.cat([part.flatten() for part in parts.values()])

    changed = x.clone()
    changed[0] *= 20
    assert float((total(x) - total(changed)).norm()) > 4 * C


def test_the_check_leaves_model_and_random_state_alone():
    torch.manual_seed(0)
    net = named("tiny-resnet-gn").eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    check_private(net, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# In training, and before a fleet starts.


def images(n=40):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *SHAPE), np.uint8)
    return Images.from_arrays(x, rng.integers(0, K, n), x[:5], np.arange(5), K)


def train(model, epsilon=8.0, **more):
    recipe = Recipe(model=model, epochs=2, batch_size=10, learning_rate=0.5, **more)
    mechanism = Mechanism(
        epsilon=epsilon,
        delta=1e-5,
        sample_rate=0.5,
        expected_batch=10,
        steps=4,
        noise_multiplier=0.0 if math.isinf(epsilon) else 1.0,
        max_grad_norm=math.inf if math.isinf(epsilon) else 1.0,
        accountant="rdp",
        spent_epsilon=epsilon,
        total_variation=None,
    )
    mask = np.arange(40) < 20
    return run_trial(images(), mask, recipe, Plan(n=40).seeds(0, epsilon), mechanism=mechanism)


def standardized(n_classes, image_shape):
    return ACCEPTED["standardized-weights"][0]()


def used_twice(n_classes, image_shape):
    return ACCEPTED["layer-used-twice"][0]()


def batch_normalized(n_classes, image_shape):
    return REFUSED["functional-batch-norm"][0]()


class TurnsCoat(nn.Module):
    """Mixes examples as soon as its weights have moved."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, K)
        self.first = None

    def forward(self, x):
        weight = float(self.layer.weight.detach().double().sum())
        if self.first is None:
            self.first = weight
        h = self.layer(x.flatten(1))
        return h if weight == self.first else h + h.mean(0)


def turns_coat(n_classes, image_shape):
    return TurnsCoat()


@pytest.mark.parametrize("model", [standardized, used_twice])
def test_models_exact_by_hooks_train_privately(model):
    result = train(model)
    assert np.isfinite(result.train.margin).all()


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_trials_refuse_before_they_train(epsilon):
    if math.isinf(epsilon):  # nothing is promised there
        assert np.isfinite(train(batch_normalized, epsilon).train.margin).all()
        return
    with pytest.raises(PrivacyError, match="mixes the examples"):
        train(batch_normalized, epsilon)


def test_models_that_mix_once_they_are_trained_give_no_result(monkeypatch):
    from raymem.training import private

    monkeypatch.setattr(private, "check_private", lambda model, shape: "ghost")
    with pytest.raises(PrivacyError, match="mixes the examples"):
        train(turns_coat)


def test_trained_weights_are_tested_as_they_are():
    net = TurnsCoat()
    net(data(2)[0])
    check_function(net, SHAPE)
    with torch.no_grad():
        net.layer.weight += 1
    with pytest.raises(PrivacyError, match="mixes the examples"):
        check_function(net, SHAPE)


def test_fleets_refuse_before_anything_is_trained(tmp_path):
    from raymem import Examples

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, *SHAPE), np.uint8)
    examples = Examples(
        x_train=x[:40], y_train=np.arange(40) % K, x_test=x[40:], y_test=np.arange(10) % K
    )
    study = Study(
        examples=examples,
        recipe=Recipe(model=batch_normalized, epochs=1),
        store=str(tmp_path / "store"),
        trials=1,
        epsilons=(8.0, math.inf),
        privacy=Privacy(accountant="rdp"),
    )
    with pytest.raises(PrivacyError, match="mixes the examples"):
        study.train(engine="serial")
    assert Store(str(tmp_path / "store")).done() == set()
    with pytest.raises((PrivacyError, FleetError)):
        dataclasses.replace(study, epsilons=(8.0,)).train(engine="serial")
