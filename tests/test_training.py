from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import reference
import torch
from torch.nn import functional as F

from raymem import Plan, Recipe
from raymem.errors import DivergedError, OutOfMemoryError, RecipeError, TrialError
from raymem.models import build_model
from raymem.training import (
    Images,
    augment,
    evaluate,
    learning_rate_factor,
    margins,
    run_trial,
    train,
)
from raymem.training.images import gather

MLP = Recipe(model="mlp-32", epochs=4, batch_size=50)
RESNET = Recipe(model="small-resnet", epochs=1, batch_size=64, crop_padding=1, flip=True)


@pytest.fixture(scope="module")
def images(digits):
    e = digits
    return Images.from_arrays(e.x_train[:300], e.y_train[:300], e.x_test[:100], e.y_test[:100], 10)


@pytest.fixture(scope="module")
def plan():
    return Plan(n=300, subset_ratio=0.7, seed=4)


def run(images, plan, recipe, trial=0):
    return run_trial(images, plan.mask(trial), recipe, plan.seeds(trial))


def same(a, b):
    pairs = [(a.train, b.train), (a.test, b.test), (a.history, b.history)]
    return all(
        np.array_equal(getattr(x, f.name), getattr(y, f.name))
        for x, y in pairs
        for f in dataclasses.fields(x)
    )


@pytest.mark.parametrize("recipe", [MLP, RESNET], ids=["mlp", "resnet"])
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(images, plan, recipe):
    alone = run(images, plan, recipe, trial=1)
    torch.manual_seed(99)
    random.seed(99)
    run(images, plan, MLP, trial=0)
    assert same(run(images, plan, recipe, trial=1), alone)
    assert not same(run(images, plan, recipe, trial=2), alone)


def test_a_trial_leaves_no_trace_in_the_process(images, plan):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    x = images.x_train.clone()
    run(images, plan, RESNET)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert torch.get_num_threads() == threads
    assert np.float64(1e-310) * 1.0 > 0
    assert torch.equal(x, images.x_train)


def test_every_example_is_evaluated_and_only_the_subset_trains(images, plan):
    mask = plan.mask(0)
    result = run(images, plan, MLP)
    assert result.train.correct.shape == result.train.margin.shape == (300,)
    assert result.test.correct.shape == (100,)
    assert result.history.cumulative_loss.shape == (mask.sum(),)
    # What is outside the subset has no effect: other pixels and labels there, the same model.
    x, y = images.x_train.clone(), images.y_train.clone()
    x[~torch.from_numpy(mask)] = 0
    y[~torch.from_numpy(mask)] = 0
    other = dataclasses.replace(images, x_train=x, y_train=y)
    again = run_trial(other, mask, MLP, plan.seeds(0))
    assert np.array_equal(again.train.margin[mask], result.train.margin[mask])
    assert np.array_equal(again.test.margin, result.test.margin)


@pytest.mark.parametrize("nominal", [None, 210, 150])
def test_history_is_what_a_plain_loop_records(images, plan, nominal):
    """The same training, written as one would by hand, one example's loss at a time."""
    mask, seeds = plan.mask(0), plan.seeds(0)
    subset = np.flatnonzero(mask)
    n = len(subset)
    recipe = dataclasses.replace(MLP, weight_decay=1e-3, schedule="linear")

    torch.manual_seed(seeds.init)
    net = build_model("mlp-32", n_classes=10, image_shape=(8, 8, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seeds.order)
    losses, right = np.zeros(n), [[] for _ in range(n)]
    steps = round(4 * (nominal or n) / 50)
    passes = [torch.randperm(n, generator=generator) for _ in range(5)]
    stream = torch.cat(passes)[: steps * 50]
    for number, batch in enumerate(stream.split(50)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - number / steps)
        rows = subset[batch.numpy()]
        x = images.x_train[rows].float().permute(0, 3, 1, 2) / 255
        logits = net(x)
        loss = F.cross_entropy(logits, images.y_train[rows])
        for position, row, logit in zip(batch.tolist(), rows, logits.detach(), strict=True):
            log_p = torch.log_softmax(logit.double(), 0)
            losses[position] -= log_p[images.y_train[row]].item()
            right[position].append(bool(logit.argmax() == images.y_train[row]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    history = run_trial(images, mask, recipe, seeds, subset_size=nominal).history
    expected = [reference.history(r) for r in right]
    assert history.cumulative_loss == pytest.approx(losses, rel=1e-3, abs=1e-3)
    assert history.learning_epoch.tolist() == [learned for learned, _ in expected]
    assert history.forgetting_count.tolist() == [forgotten for _, forgotten in expected]
    assert history.forgetting_count.sum() > 0
    visits = [len(r) for r in right]
    assert max(visits) - min(visits) == 1


def test_learning_and_forgetting_follow_the_definition(images, plan):
    """A model whose answers follow a script, epoch by epoch."""
    mask = np.zeros(300, bool)
    mask[:8] = True
    script = np.random.default_rng(0).random((6, 8)) < 0.6
    epochs = iter(script)

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            right = next(epochs)
            where = [
                int((images.x_train[:8].permute(0, 3, 1, 2) / 255 == i).flatten(1).all(1).nonzero())
                for i in x
            ]
            answers = [
                int(images.y_train[w]) if right[w] else (int(images.y_train[w]) + 1) % 10
                for w in where
            ]
            return F.one_hot(torch.tensor(answers), 10) * 3.0 + self.weight

    recipe = Recipe(model="unused", epochs=6, batch_size=8)
    history = train(Scripted(), images, mask, recipe, plan.seeds(0))
    expected = [reference.history(script[:, i].tolist()) for i in range(8)]
    assert history.learning_epoch.tolist() == [learned for learned, _ in expected]
    assert history.forgetting_count.tolist() == [forgotten for _, forgotten in expected]


def test_margins_are_log_odds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator, dtype=torch.float64) * 5
    y = torch.randint(0, 7, (50,), generator=generator)
    p = torch.softmax(logits, 1)[torch.arange(50), y]
    assert torch.allclose(margins(logits, y), torch.log(p / (1 - p)), atol=1e-6)
    assert torch.allclose(F.softplus(-margins(logits, y)), -torch.log(p), atol=1e-6)
    # Far out, where p rounds to 0 or 1, it is still finite.
    far = torch.tensor([[200.0, -200.0], [200.0, -200.0]])
    assert margins(far, torch.tensor([0, 1])).tolist() == [400.0, -400.0]


def test_evaluation_does_not_depend_on_the_batch(images):
    torch.manual_seed(0)
    net = build_model("small-resnet", n_classes=10, image_shape=(8, 8, 1))
    whole = evaluate(net, images.x_test, images.y_test)
    by_seven = evaluate(net, images.x_test, images.y_test, batch_size=7)
    assert np.allclose(whole.margin, by_seven.margin, atol=1e-4)
    assert np.array_equal(whole.correct, by_seven.correct)
    assert not net.training


def test_crops_and_flips_are_what_a_slow_loop_does():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (12, 5, 6, 3), generator=generator, dtype=torch.uint8)
    recipe = Recipe(model="unused", epochs=1, crop_padding=2, flip=True)
    found = augment(x, recipe, torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)
    shift = torch.randint(-2, 3, (2, 12, 1), generator=draws)
    flip = torch.rand(12, 1, generator=draws) < 0.5
    for b in range(12):
        expected = reference.crop_and_flip(
            x[b].tolist(), int(shift[0, b]), int(shift[1, b]), bool(flip[b]), 2
        )
        assert found[b].tolist() == expected
    assert flip.any()
    assert not flip.all()


def test_each_image_has_its_own_draw():
    x = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6, 1).repeat(500, 1, 1, 1)
    recipe = Recipe(model="unused", epochs=1, crop_padding=1, flip=True)
    found = augment(x, recipe, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 18


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "steps"])
def test_optimizers_and_schedules_learn(images, plan, optimizer, schedule):
    rate = {"sgd": 0.1, "rmsprop": 0.005}.get(optimizer, 0.02)
    recipe = Recipe(
        model="mlp-32", epochs=8, batch_size=104, optimizer=optimizer, schedule=schedule,
        learning_rate=rate, warmup=0.1, label_smoothing=0.05, nesterov=optimizer == "sgd",
    )  # fmt: skip
    assert run(images, plan, recipe).train.correct[plan.mask(0)].mean() > 0.8


def test_schedules_start_at_the_peak_and_warm_up_linearly():
    cosine = Recipe(model="unused", epochs=10, schedule="cosine", warmup=0.2)
    assert learning_rate_factor(cosine, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(cosine, 0.2) == pytest.approx(1)
    assert learning_rate_factor(cosine, 0.6) == pytest.approx(0.5)
    linear = Recipe(model="unused", epochs=10, schedule="linear")
    assert learning_rate_factor(linear, 0.75) == pytest.approx(0.25)


def test_mixed_precision_and_channels_last_train(images, plan):
    recipe = dataclasses.replace(RESNET, precision="bfloat16", channels_last=True, epochs=20)
    result = run(images, plan, recipe)
    assert result.train.margin.dtype == np.float32
    assert result.train.correct.mean() > 0.5


def test_a_trial_that_diverges_says_so(images, plan):
    wild = dataclasses.replace(MLP, learning_rate=1e8, epochs=3)
    with pytest.raises(DivergedError, match="epoch 1 of 3"):
        run(images, plan, wild)


def test_a_model_that_draws_at_random_in_eval_mode_is_refused(images, plan):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, x):
            return F.dropout(self.linear(x.flatten(1)), 0.5, training=True)

    recipe = dataclasses.replace(MLP, model=lambda n_classes, image_shape: Noisy())
    with pytest.raises(TrialError, match="eval mode"):
        run(images, plan, recipe)


def test_dropout_is_off_in_evaluation_and_seeded_in_training(images, plan):
    def dropped(n_classes, image_shape):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, n_classes)
        )

    recipe = dataclasses.replace(MLP, model=dropped)
    assert same(run(images, plan, recipe), run(images, plan, recipe))


def test_running_out_of_memory_has_a_name(images, plan):
    def greedy(n_classes, image_shape):
        class Greedy(torch.nn.Linear):
            def forward(self, x):
                if len(x) > 1:
                    torch.empty(1 << 46)
                return super().forward(x.flatten(1))

        return Greedy(64, 10)

    with pytest.raises(OutOfMemoryError, match="smaller batch_size"):
        run(images, plan, dataclasses.replace(MLP, model=greedy))


def test_no_batch_has_one_example_only():
    # 65 examples in batches of 64 would leave a batch of one, which BatchNorm refuses.
    x = torch.randint(0, 256, (65, 2, 2, 1), dtype=torch.uint8)
    images = Images(
        x_train=x, y_train=torch.arange(65) % 2, x_test=x, y_test=torch.arange(65) % 2, n_classes=2
    )

    def normed(n_classes, image_shape):
        return torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(4, 4),
            torch.nn.BatchNorm1d(4),
            torch.nn.Linear(4, 2),
        )

    recipe = Recipe(model=normed, epochs=1, batch_size=64)
    result = run_trial(images, np.ones(65, bool), recipe, Plan(n=65).seeds(0))
    assert np.isfinite(result.train.margin).all()


def test_an_empty_subset_is_an_error(images, plan):
    with pytest.raises(TrialError, match="empty"):
        run_trial(images, np.zeros(300, bool), MLP, plan.seeds(0))


def test_all_that_is_wrong_with_a_recipe_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        Recipe(model="mlp-8", epochs=0, batch_size=0, optimizer="lion", std=(0.0,), warmup=1.0)
    message = str(caught.value)
    for part in ("epochs", "batch_size", "lion", "std", "warmup"):
        assert part in message


def test_read_only_arrays_are_mapped_not_copied(digits):
    x = digits.x_train.copy()
    x.flags.writeable = False
    images = Images.from_arrays(x, digits.y_train, digits.x_test, digits.y_test, 10)
    assert images.x_train.data_ptr() == x.ctypes.data


def test_batches_are_gathered_as_indexing_would(tmp_path):
    """Whole images, in any order and more than once, from memory, a mapped file, and not from 0."""
    x = np.random.default_rng(0).integers(0, 256, (30, 5, 4, 3), np.uint8)
    np.save(tmp_path / "x.npy", x)
    rows = torch.tensor([29, 0, 7, 7, 12])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    for pixels in (x, mapped, x[::2].copy(), mapped[3:]):
        some = rows % len(pixels)
        got = gather(torch.from_numpy(pixels), some)
        assert np.array_equal(got.numpy(), pixels[some.numpy()])
        got[:] = 0  # a copy: the set is left alone
    assert np.array_equal(mapped, x)
    assert gather(torch.from_numpy(x), rows[:0]).shape == (0, 5, 4, 3)
