"""Private training: what must hold of the mechanism at every step, and fails when it is broken."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from raymem.errors import PrivacyError
from raymem.models import build_model
from raymem.plan import Plan
from raymem.privacy import (
    EPSILON_GRIDS,
    Mechanism,
    Privacy,
    PrivateSteps,
    check_epsilons,
    check_private,
    mechanism_for,
    modes_of,
    physical_batches,
    poisson_batch,
)
from raymem.privacy.accounting import privacy_profile, spent_epsilon
from raymem.training import Images, Recipe, check_private_recipe, run_trial

SHAPE = (8, 8, 1)
MECHANISM = Mechanism(
    epsilon=8.0,
    delta=1e-5,
    sample_rate=0.25,
    expected_batch=10,
    steps=12,
    noise_multiplier=0.0,
    max_grad_norm=0.7,
    accountant="rdp",
    spent_epsilon=8.0,
    total_variation=None,
)
MODELS = {
    "mlp-16": "ghost",
    "tiny-resnet-gn": "expanded-weights",
    "resnet10t-gn": "expanded-weights",
}


def images(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, *SHAPE), np.uint8)
    y = rng.integers(0, 10, n)
    return Images.from_arrays(x, y, x[:5], y[:5], 10)


def model_of(name, seed=0, shape=SHAPE):
    torch.manual_seed(seed)
    return build_model(name, n_classes=10, image_shape=shape).train()


def steps_of(model, mechanism=MECHANISM, noise_seed=3, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return PrivateSteps(model, optimizer, mechanism, noise_seed, **more)


def update(model, private, x, y, parts):
    """What one step subtracts from the weights, as one vector."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for part in parts:
        private.add(x[part], y[part])
    private.step()
    return before - nn.utils.parameters_to_vector(model.parameters()).detach()


def data(n, seed=1, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, shape[2], shape[0], shape[1], generator=generator)
    return x, torch.randint(0, 10, (n,), generator=generator)


# (1) One example more or less moves the sum by C at most, in every step, however batches are cut.


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        *((name, 3) for name in MODELS if name != "resnet10t-gn"),
        *((name, 64) for name in MODELS),
        pytest.param("resnet10t-gn", 3, marks=pytest.mark.slow),
    ],
)
def test_one_example_moves_the_sum_by_c_at_most(name, largest):
    subset = np.arange(20)
    x, y = data(20)
    draws = torch.Generator().manual_seed(5)
    moved = []
    for _ in range(6):
        batch = poisson_batch(len(subset), 0.5, draws)
        left_out = 7
        sums = []
        for rows in (batch, batch[batch != left_out]):
            model = model_of(name)
            private = steps_of(model)
            parts = list(physical_batches(rows, largest))
            sums.append(update(model, private, x[rows], y[rows], parts) * 10)
        distance = float((sums[0] - sums[1]).norm())
        assert distance <= 0.7 * (1 + 1e-4)
        moved.append((distance, bool((batch == left_out).any())))
    assert {inside for _, inside in moved} == {True, False}
    # Gradients of fresh nets are longer than C: the clipped one has that very length.
    assert all((distance > 0.69) == inside for distance, inside in moved)


# (2) Per-example gradients are those of batches of one.


# timm adds shortcuts in place, which hooks and ghosts cannot follow.
@pytest.mark.parametrize(
    ("name", "shape", "mode"),
    [
        ("mlp-16", SHAPE, "expanded-weights"),
        ("mlp-16", SHAPE, "ghost"),
        ("mlp-16", SHAPE, "hooks"),
        ("tiny-resnet-gn", SHAPE, "expanded-weights"),
        pytest.param("cifar-resnet50-gn", (16, 16, 3), "expanded-weights", marks=pytest.mark.slow),
    ],
)
def test_clipped_sums_are_those_of_batches_of_one(name, shape, mode):
    x, y = data(6, shape=shape)
    x = x.double()
    model = model_of(name, shape=shape).double()
    norms, gradients = [], []
    for i in range(6):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        norms.append(float(gradient.norm()))
        gradients.append(gradient)
    model.zero_grad(set_to_none=True)
    # Between the lengths of the gradients: some are clipped, some are not.
    C = float(np.median(norms))
    expected = sum(g * min(1.0, C / norm) for g, norm in zip(gradients, norms, strict=True)) / 10
    mechanism = dataclasses.replace(MECHANISM, max_grad_norm=C)
    private = steps_of(model, mechanism, mode=mode)
    got = update(model, private, x, y, [slice(0, 4), slice(4, 6)])
    # Norms are divided by with 1e-6 added, and losses are float32.
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_cheapest_mode_is_chosen():
    for name, mode in MODELS.items():
        assert modes_of(model_of(name, shape=(32, 32, 1)))[0] == mode
    assert modes_of(nn.Sequential(nn.Linear(2, 2), nn.PReLU())) == ("hooks", "vmap")


# (3) Noise has standard deviation sigma C / expected batch, and there is noise in empty batches.


@pytest.mark.parametrize("name", ["mlp-64", "tiny-resnet-gn"])
def test_noise_is_as_large_as_it_must_be(name):
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=1.7)
    model = model_of(name)
    private = steps_of(model, mechanism)
    x, y = data(2)
    noise = torch.cat([update(model, private, x, y, []) for _ in range(20)]).double()
    expected = 1.7 * 0.7 / 10
    # 4 standard errors of a standard deviation.
    assert abs(float(noise.std()) / expected - 1) < 4 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(len(noise))
    assert private.steps == 20


def test_noise_is_added_once_to_a_batch_in_parts():
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=1.7)
    updates = []
    x, y = data(9)
    for parts in ([slice(0, 9)], [slice(0, 3), slice(3, 6), slice(6, 9)]):
        model = model_of("mlp-16")
        updates.append(update(model, steps_of(model, mechanism), x, y, parts))
    assert torch.allclose(*updates, atol=1e-6)


# (4) Each example is in a batch with probability q, by itself; nothing outside the subset ever is.


def test_batches_are_poisson():
    n, q, T = 50, 0.13, 4000
    draws = torch.Generator().manual_seed(0)
    seen = np.zeros((T, n), bool)
    for t in range(T):
        seen[t, poisson_batch(n, q, draws).numpy()] = True
    stderr = math.sqrt(q * (1 - q) / T)
    assert np.abs(seen.mean(0) - q).max() < 4.5 * stderr
    sizes = seen.sum(1)
    # Binomial, not fixed: the variance is n q (1 - q), to 4 standard errors of a variance.
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 4 * math.sqrt(2 / T)
    together = (seen[:, :-1] & seen[:, 1:]).mean()
    assert abs(together - q * q) < 4 * math.sqrt(q * q / (T * (n - 1)))


class Witness(nn.Module):
    """A net that notes the first pixel of every image it trains on."""

    seen: ClassVar[set[int]] = set()

    def __init__(self, n_classes, image_shape):
        super().__init__()
        self.layer = nn.Linear(64, n_classes)

    def forward(self, x):
        if self.training and len(x):
            Witness.seen |= {round(float(v) * 255) for v in x.detach().flatten(1)[:, 0]}
        return self.layer(x.flatten(1))


def witness(n_classes, image_shape):
    net = Witness(n_classes, image_shape)
    return nn.Sequential(nn.Identity(), net)


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_no_example_outside_the_subset_is_ever_touched(epsilon, monkeypatch):
    from raymem.training import private

    # The model is tested on random images, which the witness would note.
    monkeypatch.setattr(private, "check_private", lambda model, shape: "ghost")
    monkeypatch.setattr(private, "check_function", lambda model, shape: None)
    n = 200
    x = np.zeros((n, *SHAPE), np.uint8)
    x[:, 0, 0, 0] = np.arange(n)
    y = np.arange(n) % 10
    mask = Plan(n=n, subset_ratio=0.5).mask(0)
    recipe = Recipe(model=witness, epochs=12, batch_size=25, mean=(0.0,), std=(1.0,))
    mechanism = mechanism_for(
        Privacy(accountant="rdp"), epsilon, subset_size=100, batch_size=25, epochs=12
    )
    Witness.seen = set()
    run_trial(
        Images.from_arrays(x, y, x[:1], y[:1], 10),
        mask,
        recipe,
        Plan(n=n).seeds(0, epsilon),
        mechanism=mechanism,
    )
    assert set(np.flatnonzero(mask)) == Witness.seen


# (5) Steps that add noise are those accounted for, and those planned.


def test_what_is_done_is_what_is_accounted_for():
    model = model_of("mlp-16")
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=1.3)
    private = steps_of(model, mechanism)
    x, y = data(8)
    for k in range(12):
        rows = torch.arange(k % 5)
        for part in physical_batches(rows, 2):
            private.add(x[part], y[part])
        private.step()
    assert private.state()["account"] == [[1.3, 0.25, 12]]
    private.close()
    assert not any(
        hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in model.parameters()
    )


@pytest.mark.parametrize("steps", [11, 13])
def test_steps_that_were_not_planned_are_refused(steps):
    from raymem.errors import FleetError

    private = steps_of(model_of("mlp-16"), dataclasses.replace(MECHANISM, noise_multiplier=1.3))
    for _ in range(steps):
        private.step()
    with pytest.raises(FleetError, match=f"{steps} steps were taken.*of 12 planned"):
        private.close()


def test_a_batch_is_not_left_to_the_next_step():
    """What the optimizer summed goes with its step: the next one starts from nothing."""
    x, y = data(8)
    model = model_of("mlp-16")
    private = steps_of(model)
    update(model, private, x, y, [slice(0, 3), slice(3, 8)])
    assert float(update(model, private, x, y, []).abs().max()) == 0


def test_empty_batches_are_steps_too(monkeypatch):
    """Every batch that is drawn is a step: drawing again until one has examples would tell."""
    from raymem.training import private

    drawn = []

    def recorded(n, q, draws):
        drawn.append(len(batch := poisson_batch(n, q, draws)))
        return batch

    monkeypatch.setattr(private, "poisson_batch", recorded)
    mask = np.arange(40) < 4
    recipe = dataclasses.replace(RECIPE, batch_size=1)
    mechanism = mechanism_for(
        Privacy(accountant="rdp"), 8.0, subset_size=4, batch_size=1, epochs=10
    )
    run_trial(images(), mask, recipe, Plan(n=40).seeds(0, 8.0), mechanism=mechanism)
    assert len(drawn) == mechanism.steps == 40
    assert drawn.count(0) > 5


# (6) The mechanism does not depend on the subset.


def test_the_mechanism_is_that_of_the_nominal_size():
    plan = Plan(n=701, subset_ratio=0.5)
    sizes = {int(plan.mask(t).sum()) for t in range(20)}
    assert len(sizes) > 5
    made = {
        mechanism_for(
            Privacy(accountant="rdp"), 4.0, subset_size=plan.subset_size, batch_size=50, epochs=7
        )
        for _ in range(2)
    }
    (mechanism,) = made
    assert mechanism.expected_batch == 50
    assert mechanism.sample_rate == 50 / plan.subset_size
    assert mechanism.steps == round(7 * plan.subset_size / 50)


@pytest.mark.parametrize("length", [93, 99, 105, 117, 350, 1171])
def test_no_step_is_lost_to_rounding(length):
    mechanism = mechanism_for(Privacy(), math.inf, subset_size=length * 8, batch_size=8, epochs=20)
    assert mechanism.steps == 20 * length


# (7) Golden values of the accountants.


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "accountant", "epsilon", "tolerance"),
    [
        # opacus' own test of its RDP accountant.
        (1.5, 0.04, 2250, "rdp", 7.32911117143, 1e-4),
        # n = 35,000, batches of 256, sigma 1, 2,740 steps: measured with opacus 1.6.0.
        (1.0, 256 / 35000, 2740, "rdp", 2.39, 5e-3),
        (1.0, 256 / 35000, 2740, "prv", 2.16, 2e-2),
    ],
)
def test_golden_epsilons(sigma, q, steps, accountant, epsilon, tolerance):
    assert spent_epsilon(sigma, q, steps, 1e-5, accountant) == pytest.approx(epsilon, abs=tolerance)


def gaussian_epsilon(sigma, delta):
    """Of one Gaussian release, exactly (Balle & Wang 2018, Theorem 8), by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        eps = (low + high) / 2
        a, b = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
        spent = stats.norm.cdf(a) - math.exp(eps) * stats.norm.cdf(b)
        low, high = (eps, high) if spent > delta else (low, eps)
    return high


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_full_batches_are_gaussian_releases(sigma):
    """With q = 1, T steps are one release of sigma / sqrt(T): an exact reference."""
    T = 9
    exact = gaussian_epsilon(sigma / math.sqrt(T), 1e-5)
    spent = spent_epsilon(sigma, 1.0, T, 1e-5, "prv")
    assert exact <= spent <= exact + 0.03
    distance = 2 * stats.norm.cdf(math.sqrt(T) / (2 * sigma)) - 1
    ((_, upper),) = privacy_profile(sigma, 1.0, T, [0.0])
    assert distance <= upper <= distance + 3e-3


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0, 16.0, 100.0])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_spent_epsilon_is_never_above_its_target(epsilon, accountant):
    if epsilon == 0.1 and accountant == "rdp":
        with pytest.raises(PrivacyError, match="take a larger epsilon"):
            made(epsilon, accountant)
        return
    mechanism = made(epsilon, accountant)
    assert 0.97 * epsilon < mechanism.spent_epsilon <= epsilon
    again = spent_epsilon(
        mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps, 1e-5, accountant
    )
    assert again <= epsilon


def made(epsilon, accountant):
    privacy = Privacy(accountant=accountant)
    return mechanism_for(privacy, epsilon, subset_size=2000, batch_size=100, epochs=10)


def test_rdp_is_taken_where_prv_fails(monkeypatch):
    from opacus.accountants import PRVAccountant

    def fails(*arguments, **options):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fails)
    monkeypatch.setattr(PRVAccountant, "_get_dprv", fails)
    mechanism = made(2.0, "prv")
    assert (mechanism.accountant, mechanism.total_variation) == ("rdp", None)
    assert mechanism.spent_epsilon <= 2.0


# (8) More steps cost more, more noise less.


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_costs_rise_with_steps_and_fall_with_noise(accountant):
    by_steps = [spent_epsilon(1.0, 0.02, T, 1e-5, accountant) for T in (100, 400, 1600)]
    by_noise = [spent_epsilon(s, 0.02, 400, 1e-5, accountant) for s in (0.7, 1.0, 2.0)]
    assert by_steps == sorted(by_steps)
    assert by_noise == sorted(by_noise, reverse=True)


# What is asked for, and refused.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"delta": 0.0}, "delta must be in"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
        ({"max_grad_norm": math.inf}, "max_grad_norm must be a positive number"),
        ({"accountant": "gdp"}, "no accountant 'gdp'"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(PrivacyError, match=says):
        Privacy(**settings)


@pytest.mark.parametrize(
    ("epsilons", "n", "delta", "says"),
    [
        ((), 100, 1e-5, "at least one epsilon"),
        ((0.0, 1.0), 100, 1e-5, "must be positive, got 0.0"),
        ((math.nan,), 100, 1e-5, "must be positive, got nan"),
        ((-1.0,), 100, 1e-5, "must be positive"),
        ((1.0, 1.0), 100, 1e-5, "given twice"),
        ((1.0,), 100_000, 1e-5, "publishing a whole example"),
    ],
)
def test_epsilons_that_are_none(epsilons, n, delta, says):
    with pytest.raises(PrivacyError, match=says):
        check_epsilons(epsilons, n, delta)


def test_grids_are_the_papers():
    assert EPSILON_GRIDS["paper-curvature"] == tuple(5 * k for k in range(1, 21))
    assert EPSILON_GRIDS["scripts-curvature"] == (1, *EPSILON_GRIDS["paper-curvature"])
    assert EPSILON_GRIDS["paper-memorization"] == (1, 10, 20, 30, 40, 50)
    assert EPSILON_GRIDS["default"] == (0.5, 1, 2, 4, 8, 16, 32, 64, math.inf)
    assert EPSILON_GRIDS["quick"] == (0.5, 2, 8, math.inf)


def test_batch_norm_is_refused_by_name():
    with pytest.raises(PrivacyError, match=r"BatchNorm2d.*with -gn"):
        check_private(model_of("tiny-resnet"), SHAPE)
    check_private(model_of("tiny-resnet-gn"), SHAPE)


def test_recipes_that_cannot_be_private():
    recipe = Recipe(model="mlp-8", epochs=1, precision="bfloat16", compile=True)
    with pytest.raises(PrivacyError, match="precision bfloat16 and compile"):
        check_private_recipe(recipe)
    with pytest.raises(PrivacyError, match="2 workers per trial"):
        check_private_recipe(Recipe(model="mlp-8", epochs=1), 2)


def test_mechanisms_survive_json():
    import json

    for epsilon in (2.0, math.inf):
        mechanism = made(epsilon, "rdp")
        assert Mechanism.from_dict(json.loads(json.dumps(mechanism.as_dict()))) == mechanism


# Whole trials.

RECIPE = Recipe(model="mlp-16", epochs=3, batch_size=10, learning_rate=0.1)
RMSPROP = dataclasses.replace(RECIPE, optimizer="rmsprop", learning_rate=0.001)


def mechanism_of(epsilon, **privacy):
    return mechanism_for(
        Privacy(accountant="rdp", **privacy), epsilon, subset_size=20, batch_size=10, epochs=3
    )


def trial(mechanism, seeds=None, recipe=RECIPE, **more):
    mask = np.arange(40) % 2 == 0
    seeds = seeds or Plan(n=40).seeds(0, mechanism.epsilon)
    return run_trial(images(), mask, recipe, seeds, mechanism=mechanism, keep_weights=True, **more)


def same(a, b):
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_a_trial_is_the_same_again(epsilon):
    mechanism = mechanism_of(epsilon)
    assert same(trial(mechanism), trial(mechanism))


def test_secure_mode_is_never_the_same():
    mechanism = mechanism_of(8.0, secure_mode=True)
    assert mechanism.secure_mode
    assert not same(trial(mechanism), trial(mechanism))


@pytest.mark.parametrize(
    ("recipe", "moves"),
    [
        (RECIPE, functools.partial(torch.optim.SGD, momentum=0.9)),
        (RMSPROP, torch.optim.RMSprop),
    ],
    ids=["sgd", "rmsprop"],
)
def test_epsilon_inf_is_plain_training_on_the_same_batches(recipe, moves):
    """Against a loop of its own, on the batches that a private trial of these seeds draws."""
    mechanism, seeds = mechanism_of(math.inf), Plan(n=40).seeds(0, math.inf)
    assert not mechanism.clips
    result = trial(mechanism, seeds, recipe)
    data, subset = images(), torch.arange(0, 40, 2)
    torch.manual_seed(seeds.init)
    model = build_model("mlp-16", n_classes=10, image_shape=SHAPE, mean=(0.5,), std=(0.5,)).train()
    optimizer = moves(model.parameters(), lr=recipe.learning_rate)
    draws = torch.Generator().manual_seed(seeds.order)
    for k in range(mechanism.steps):
        rows = subset[torch.rand(20, generator=draws, dtype=torch.float64) < 0.5]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 + math.cos(math.pi * k / mechanism.steps)) / 2
        optimizer.zero_grad()
        x = data.x_train[rows].permute(0, 3, 1, 2).float() / 255
        (F.cross_entropy(model(x), data.y_train[rows], reduction="sum") / 10).backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, result.weights[name], atol=1e-5), name


def test_the_clip_control_clips_without_noise():
    plain, control = mechanism_of(math.inf), mechanism_of(math.inf, clip_control=True)
    assert control.clips
    assert control.noise_multiplier == 0
    noisy = dataclasses.replace(mechanism_of(8.0), noise_multiplier=0.0)
    seeds = Plan(n=40).seeds(0, math.inf)
    assert not same(trial(plain, seeds), trial(control, seeds))
    assert same(trial(control, seeds), trial(noisy, seeds))


class Interrupted(Exception):
    pass


class Interrupting:
    """Checkpoints that are due after every step, and a worker that dies after some."""

    def __init__(self, dies_after):
        self.saved, self.left = None, dies_after

    def load(self):
        return self.saved

    def due(self):
        return True

    def save(self, data):
        self.saved, self.left = data, self.left - 1
        if self.left == 0:
            raise Interrupted


@pytest.mark.parametrize(("epsilon", "recipe"), [(8.0, RECIPE), (math.inf, RECIPE), (8.0, RMSPROP)])
def test_a_trial_goes_on_where_its_worker_died(epsilon, recipe):
    mechanism = mechanism_of(epsilon)
    whole = trial(mechanism, recipe=recipe)
    checkpoints = Interrupting(dies_after=2)
    with pytest.raises(Interrupted):
        trial(mechanism, recipe=recipe, checkpoints=checkpoints)
    first = checkpoints.saved
    checkpoints.left = 2
    with pytest.raises(Interrupted):
        trial(mechanism, recipe=recipe, checkpoints=checkpoints)
    assert checkpoints.saved != first
    # The account goes on too: close() compares it with the plan.
    resumed = trial(mechanism, recipe=recipe, checkpoints=checkpoints)
    assert same(whole, resumed)
    assert (whole.history.cumulative_loss == resumed.history.cumulative_loss).all()


def test_physical_batches_do_not_change_a_trial(monkeypatch):
    from raymem.privacy import sgd

    mechanism = mechanism_of(8.0)
    whole = trial(mechanism)
    monkeypatch.setattr(sgd, "BYTES_FOR_GRADIENTS", 3 * 4 * 1210)
    parts = trial(mechanism)
    assert sgd.physical_batch(model_of("mlp-16"), mechanism) == 3
    for name, weight in whole.weights.items():
        assert torch.allclose(weight, parts.weights[name], atol=1e-5)


def test_label_smoothing_is_private_too():
    recipe = dataclasses.replace(RECIPE, label_smoothing=0.1)
    mask = np.arange(40) % 2 == 0
    mechanism = mechanism_of(8.0)
    result = run_trial(images(), mask, recipe, Plan(n=40).seeds(0, 8.0), mechanism=mechanism)
    assert np.isfinite(result.history.cumulative_loss).all()
