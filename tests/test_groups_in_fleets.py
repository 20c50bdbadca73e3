"""Workers that lease several trials and train them in one step."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trial_queue import Clock, keys
from torch import nn

from raymem import Recipe, Store, Study
from raymem.fleet import Stopped
from raymem.fleet.trial_queue import DEATHS_ALLOWED, LEASE_SECONDS, TrialQueue
from raymem.store import TrialKey
from raymem.training.group import Group

RECIPE = Recipe(model="mlp-16", epochs=4, batch_size=50)


@pytest.fixture(scope="module")
def examples(digits):
    return dataclasses.replace(
        digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200],
        x_test=digits.x_test[:50], y_test=digits.y_test[:50],
        train_ids=digits.train_ids[:200], test_ids=digits.test_ids[:50],
    )  # fmt: skip


def study(examples, folder, trials=7, **more):
    return Study(examples=examples, **{"recipe": RECIPE, "store": folder, "trials": trials, **more})


# The trial queue


def queue_with(n, workers, clock=None):
    queue = TrialQueue(keys(n), clock=clock or Clock())
    queue.expect("group", workers)
    for rank in range(workers):
        queue.register(f"w{rank}", "group", rank)
    return queue


def numbers(leases):
    return [lease.key.trial for lease in leases]


def test_a_group_is_leased_in_order_and_each_trial_finishes_by_itself():
    queue = queue_with(10, 1)
    leases = queue.lease_group("w0", 4)
    assert numbers(leases) == [0, 1, 2, 3]
    assert queue.progress().running == 4
    queue.finish("w0", leases[2].key, "committed")
    queue.finish("w0", leases[0].key, "diverged", "nan")
    progress = queue.progress()
    assert (progress.running, progress.committed) == (2, 1)
    for lease in (leases[1], leases[3]):
        queue.finish("w0", lease.key, "committed")
    # The one that diverged is tried again, with the others.
    assert {4, 5, 6, 7, 8, 9} <= set(numbers(queue.lease_group("w0", 100))) <= {0, *range(4, 10)}


def test_what_is_left_is_shared_so_that_no_worker_is_idle():
    queue = queue_with(10, 4)
    assert [len(queue.lease_group(f"w{rank}", 256)) for rank in range(4)] == [3, 3, 2, 2]


def test_workers_that_are_starting_get_their_share_too():
    queue = TrialQueue(keys(12), clock=Clock())
    for worker_group in ("a", "b", "c"):
        queue.expect(worker_group, 1)
    queue.register("first", "a", 0)
    assert len(queue.lease_group("first", 256)) == 4
    queue.release_worker_group("b")  # never came
    queue.register("third", "c", 0)
    assert len(queue.lease_group("third", 256)) == 8


def test_a_group_whose_worker_is_silent_goes_back_whole_but_for_what_is_committed():
    clock = Clock()
    queue = queue_with(4, 2, clock)
    leases = queue.lease_group("w0", 2)
    for lease in queue.lease_group("w1", 2):
        queue.finish("w1", lease.key, "committed")
    queue.finish("w0", leases[0].key, "committed")
    clock.now += LEASE_SECONDS + 1
    assert numbers(queue.lease_group("w1", 9)) == [1]
    queue.finish("w0", leases[1].key, "committed")  # late, and it counts
    assert queue.progress().complete is False  # the other still trains it
    queue.finish("w1", leases[1].key, "duplicate")
    assert (queue.progress().committed, queue.progress().complete) == (4, True)


@pytest.mark.parametrize("poison", [0, 7, 15])
def test_a_trial_that_kills_its_group_is_found_and_the_others_are_trained(poison):
    queue = TrialQueue(keys(16), clock=Clock())
    sizes = []
    for generation in range(40):
        name = f"g{generation}"
        queue.register(name, "group", 0)
        while (leases := queue.lease_group(name, 16)) is not None:
            if leases[0].key is None:
                break
            sizes.append(len(leases))
            if poison in numbers(leases):
                break
            for lease in leases:
                queue.finish(name, lease.key, "committed")
        if queue.progress().complete:
            break
    progress = queue.progress()
    assert (progress.committed, progress.failed) == (15, 1)
    (lost,) = queue.take_lost()
    assert (lost.key.trial, lost.cause) == (poison, "worker-died")
    assert progress.deaths == DEATHS_ALLOWED
    assert sizes[0] == 16
    assert len(sizes) <= 9  # all, groups of four, the four of one of them


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), worker_groups=st.integers(1, 3))
def test_whatever_happens_every_trial_is_committed_once(seed, n, worker_groups):
    draw, clock = random.Random(seed), Clock()
    queue = TrialQueue(keys(n), clock=clock)
    born, workers, committed = 0, {}, set()

    def start(worker_group, rank):
        nonlocal born
        born += 1
        workers[f"w{born}"] = (worker_group, rank, [])
        queue.register(f"w{born}", worker_group, rank)

    for worker_group in range(worker_groups):
        for rank in range(2):
            start(f"worker group{worker_group}", rank)
    for _ in range(4000):
        if queue.progress().complete:
            break
        name = draw.choice(sorted(workers))
        worker_group, rank, held = workers[name]
        clock.now += draw.choice([0, 1, LEASE_SECONDS / 3])
        if draw.random() < 0.04 and n > 2:
            queue.release_worker_group(worker_group)
            for other in [w for w, (its, _, _) in workers.items() if its == worker_group]:
                del workers[other]
            for new in range(2):
                start(f"{worker_group}'", new)
        elif not held:
            leases = queue.lease_group(name, draw.choice([1, 3, 8])) or []
            held += [lease.key for lease in leases if lease.key is not None]
            assert len(set(held)) == len(held)
        else:
            key = held.pop(draw.randrange(len(held)))
            queue.finish(name, key, "duplicate" if key in committed else "committed")
            committed.add(key)
    progress = queue.progress()
    assert progress.complete
    assert progress.committed == n == len(committed)
    assert (progress.failed, progress.fatal, progress.running) == (0, None, 0)


# Fleets


def test_a_fleet_of_groups_is_the_fleet(examples, tmp_path):
    alone, grouped = study(examples, tmp_path / "alone"), study(examples, tmp_path / "grouped")
    alone.train(engine="serial")
    assert grouped.train(engine="serial", models_per_step=3).done == 7
    first, second = Store(tmp_path / "alone"), Store(tmp_path / "grouped")
    arithmetic = [second.provenance(TrialKey(math.inf, t))["arithmetic"] for t in range(7)]
    assert [text.rpartition(", ")[2] for text in arithmetic] == [*["group of 3"] * 6, "alone"]
    assert all("float32, evaluated in float32" in text for text in arithmetic)
    for trial in range(7):
        a, b = (s.trial(TrialKey(math.inf, trial)).to_pandas() for s in (first, second))
        assert np.allclose(a.margin, b.margin, rtol=1e-3, atol=1e-3)
        assert a.in_subset.equals(b.in_subset)
        assert np.allclose(a.cumulative_loss, b.cumulative_loss, rtol=1e-3, equal_nan=True)
    grouped.score()


def test_a_member_that_diverges_is_recorded_and_the_others_are_committed(examples, tmp_path):
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    found = study(examples, tmp_path, trials=3, recipe=wild)
    progress = found.train(engine="serial", models_per_step=3)
    assert (progress.done, progress.failed) == (0, 3)
    assert len(Store(tmp_path).failures()) == 9


def test_private_trials_are_trained_alone(examples, tmp_path):
    from raymem import Privacy

    private = study(
        examples, tmp_path, trials=2, epsilons=(8.0, math.inf), privacy=Privacy(accountant="rdp")
    )
    private.train(engine="serial", models_per_step=4)
    for key in private.target.wanted():
        assert Store(tmp_path).provenance(key)["arithmetic"].endswith(", alone")


def test_a_fleet_of_groups_goes_on_from_its_checkpoints(examples, tmp_path, monkeypatch):
    took = []

    def dying(step):
        def one(*args):
            step(*args)
            took.append(1)
            if len(took) == 6:
                raise KeyboardInterrupt

        return one

    begin = Group.__init__

    def counted(self, *args, **more):
        begin(self, *args, **more)
        self.step = dying(self.step)

    calm = study(examples, tmp_path / "calm", trials=3)
    calm.train(engine="serial", models_per_step=3)
    lost = study(examples, tmp_path / "lost", trials=3)
    with monkeypatch.context() as patch:
        patch.setattr(Group, "__init__", counted)
        with pytest.raises(KeyboardInterrupt):
            lost.train(engine="serial", models_per_step=3, checkpoint_seconds=0.0)
        store = Store(tmp_path / "lost")
        assert store.checkpointed() == set(keys(3))
        lost.train(engine="serial", models_per_step=3, checkpoint_seconds=0.0)
    # 140 examples, batches of 50, four epochs: eleven steps, of which the last one of the first
    # driver was taken and not saved.
    assert len(took) == 6 + 6
    for key in keys(3):
        about = store.provenance(key)
        assert about["resumed"]
        assert about["digest"] == Store(tmp_path / "calm").provenance(key)["digest"]
    assert store.checkpointed() == set()


def test_the_option_is_a_number_or_auto():
    import click

    from raymem.cli.options import setting_options
    from raymem.fleet import Resources

    @setting_options(Resources())
    @click.command()
    def command(models_per_step, **others):
        click.echo(repr(models_per_step))

    run = CliRunner().invoke
    assert run(command, []).output == "None\n"
    assert run(command, ["--models-per-step", "32"]).output == "32\n"
    for wrong in ("0", "many", "-1"):
        refused = run(command, ["--models-per-step", wrong])
        assert refused.exit_code == 2
        assert "Invalid value for '--models-per-step'" in refused.output


def test_a_cpu_trains_one_model_at_a_time_by_itself(examples):
    from raymem.training import Images, models_per_step

    e = examples
    images = Images.from_arrays(e.x_train, e.y_train, e.x_test, e.y_test, 10)
    assert images.device == torch.device("cpu")
    assert models_per_step(images, RECIPE, 140) == 1


@pytest.mark.alone
def test_groups_on_ray(examples, tmp_path):
    found = study(examples, tmp_path, trials=8)
    progress = found.train(models_per_step=4, max_workers=2, gpus_per_trial=0)
    store = found.open_store()
    assert progress.done == 8
    how = {store.provenance(key)["arithmetic"].rpartition(", ")[2] for key in keys(8)}
    assert how == {"group of 4"}


class StopsItself(nn.Module):
    """Gets SIGTERM in its third forward pass in training, as a process that is ended does."""

    passes = 0

    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_inputs, n_classes)

    def forward(self, x):
        StopsItself.passes += self.training
        if self.training and StopsItself.passes == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.layer(x.flatten(1))


def stops_itself(n_classes, image_shape):
    return StopsItself(image_shape[0] * image_shape[1] * image_shape[2], n_classes)


@pytest.mark.parametrize("models_per_step", [1, 3])
def test_a_stop_in_mid_trial_is_no_failure_of_the_trial(examples, tmp_path, models_per_step):
    """It was recorded as an error of the trial, and the fleet said that training had failed."""
    fleet = study(examples, tmp_path / "store", 3, recipe=Recipe(model=stops_itself, epochs=2))
    StopsItself.passes = 0
    with pytest.raises(Stopped, match="run the same command again"):
        fleet.train(engine="serial", models_per_step=models_per_step)
    assert Store(tmp_path / "store").failures() == []
    assert fleet.train(engine="serial", models_per_step=models_per_step).done == 3


class RunsOutOfTime(StopsItself):
    """Hears in its first forward pass that time is nearly up, and is ended in its ninth."""

    def forward(self, x):
        StopsItself.passes += self.training
        if self.training and StopsItself.passes in (1, 9):
            signal.raise_signal(signal.SIGUSR1 if StopsItself.passes == 1 else signal.SIGTERM)
        return self.layer(x.flatten(1))


def runs_out_of_time(n_classes, image_shape):
    return RunsOutOfTime(image_shape[0] * image_shape[1] * image_shape[2], n_classes)


def test_a_trial_is_saved_before_time_is_up_and_goes_on_from_there(examples, tmp_path):
    recipe = Recipe(model=runs_out_of_time, epochs=12, batch_size=20)
    StopsItself.passes = 10
    study(examples, tmp_path / "calm", 1, recipe=recipe).train(engine="serial")
    fleet = study(examples, tmp_path / "store", 1, recipe=recipe)
    StopsItself.passes = 0
    with pytest.raises(Stopped, match="run the same command again"):
        fleet.train(engine="serial")
    assert len(Store(tmp_path / "store").checkpointed()) == 1
    assert fleet.train(engine="serial").done == 1
    key = TrialKey(math.inf, 0)
    about, calm = (Store(tmp_path / name).provenance(key) for name in ("store", "calm"))
    assert about["resumed"]
    assert about["digest"] == calm["digest"]
