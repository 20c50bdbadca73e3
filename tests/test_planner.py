"""What a plan can tell: formulas against simulations, warnings, and the stopping rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from scipy.optimize import brentq

from raymem import Recipe, Store, Study, run_job
from raymem.cli import main
from raymem.privacy import Mechanism
from raymem.scores import (
    InterimResult,
    Until,
    expected_stderr,
    expected_width,
    interim_result,
    memorization,
    power_of_pairs,
    power_to_list,
    trials_for,
)
from raymem.show import dry_run
from raymem.show.dry_run import Cluster, planned, warnings

RECIPE = Recipe(model="mlp-32", epochs=6, learning_rate=0.2)


def fleets(p_in, p_out, T, r, examples, seed=0):
    """Outcomes of one fleet in which examples are independent."""
    rng = np.random.default_rng(seed)
    masks = rng.permuted(np.arange(T)[:, None] < round(r * T) * np.ones(examples), axis=0)
    return masks, rng.random((T, examples)) < np.where(masks, p_in, p_out)


@pytest.mark.parametrize(
    ("p_in", "p_out", "r"), [(0.5, 0.5, 0.7), (0.99, 0.5, 0.5), (0.98, 0.3, 0.7)]
)
def test_errors_and_widths_are_those_of_simulated_fleets(p_in, p_out, r):
    """Of 4,000 examples each; a standard deviation is then known to 1.1%."""
    result = memorization(*fleets(p_in, p_out, 200, r, 4000))
    assert np.std(result.value) == pytest.approx(expected_stderr(p_in, p_out, 200, r), rel=0.045)
    widths = result.high - result.low
    assert np.median(widths) == pytest.approx(expected_width(p_in, p_out, 200, r), rel=0.05)


def test_the_table_of_trials_for_an_error_of_a_twentieth():
    """Trials for a standard error of 0.05 by ratio, computed by hand from p(1 - p)."""
    for (p_in, p_out), by_ratio in {
        (0.5, 0.5): {0.5: 400, 0.7: 477, 0.9: 1112},
        (0.99, 0.5): {0.5: 208, 0.7: 339, 0.9: 1005},
    }.items():
        for r, wanted in by_ratio.items():
            assert expected_stderr(p_in, p_out, wanted, r) == pytest.approx(0.05, rel=0.005)
    assert expected_stderr(0.5, 0.5, 100, 1.0) == math.inf
    assert expected_width(0.5, 0.5, 100, 1.0) == math.inf
    assert trials_for(lambda t: False, 20) is None
    assert trials_for(lambda t: t >= 61, 20) == 80


def test_power_is_how_often_it_happens():
    """Pairs of influence 0.3 among a million, in 3,000 simulated pairs: a share is known to 0.9
    points, and the normal approximation is good for a few."""
    T, r, z = 400, 0.7, 4.75
    for influence in (0.2, 0.3):
        masks, correct = fleets(0.3 + influence, 0.3, T, r, 3000, seed=1)
        n_in, n_out = masks.sum(0), (~masks).sum(0)
        found = (correct & masks).sum(0) / n_in - (correct & ~masks).sum(0) / n_out
        p = correct.mean(0)
        null = np.sqrt(p * (1 - p) * (1 / n_in + 1 / n_out))
        share = np.mean(found >= np.maximum(0.15, z * null))
        assert power_of_pairs(influence, 0.3, T, r, 10**6) == pytest.approx(share, abs=0.05)
    assert power_to_list(0.99, 0.99, 400, 0.7) == 0.0
    assert power_to_list(0.99, 0.19, 400, 0.7) == 1.0


@pytest.fixture
def study(digits, tmp_path):
    def make(**more):
        return Study(
            examples=digits,
            store=tmp_path / "store",
            **{"recipe": RECIPE, "trials": 40, **more},
        )

    return make


def test_a_plan_says_what_it_costs_elsewhere(study):
    text = planned(study(), Cluster(machines=10, at_once=4, times_faster=8.0, price=3.0))
    assert "40 trials on 10 machines, 4 at once on each, 8 times as fast as here" in text
    assert "mean of 3; the process had" in text
    assert "would take less than a minute, half a minute to start; " in text
    assert " s of a core in all" in text
    assert "this  0.7    40 " in text
    # The store is not made by asking.
    assert "not made yet" in text


def test_the_pilot_is_a_group_where_trials_are_trained_in_groups(study):
    text = planned(study(), Cluster(at_once=1), models_per_step=5)
    (pilot,) = [line for line in text.splitlines() if line.startswith("pilot: ")]
    assert "its share of one group of 5 that took" in pilot
    # No more than there are trials.
    assert "one group of 3 that" in planned(study(trials=3), models_per_step=5)


def test_a_group_costs_a_trial_its_share(study, monkeypatch):
    monkeypatch.setattr(dry_run, "timed_group", lambda *_, models, **__: (3600.0 / models, 5000))
    text = planned(study(), Cluster(at_once=1), models_per_step=20)
    assert "pilot: a trial took 3 min 0 s" in text
    assert "would take 2 h 0 min, half a minute to start" in text


def test_the_price_is_that_of_all_machines_for_the_time_it_takes(study, monkeypatch):
    """40 trials of 8 hours here: an hour each there, 40 at once, on 10 machines at 3 an hour."""
    monkeypatch.setattr(dry_run, "timed_trial", lambda *_, **__: (8 * 3600.0, 5000))
    text = planned(study(), Cluster(machines=10, at_once=4, times_faster=8.0, price=3.0))
    assert "would take 1 h 0 min, half a minute to start; 40 hours of a core in all" in text
    assert "price: 30.00 at 3 a machine and hour" in text
    half = planned(study(trials=20), Cluster(machines=10, at_once=4, times_faster=8.0, price=3.0))
    assert "price: 15.00 " in half
    assert "price: " not in planned(study(), Cluster())


def test_plans_that_cannot_answer_are_told_so(study):
    few = " ".join(warnings(study(trials=20), {}))
    assert "fewer than two blocks" in few
    assert "would not be on the list; " in few
    assert "trials would be enough to find four in five" in few
    assert warnings(study(trials=20_000), {}) == []
    assert warnings(study(trials=4, subset_ratio=1.0), {}) == []


def test_a_plan_says_which_claims_its_audit_could_not_refute(study):
    """Pure epsilon-DP: all of 24,000 guesses right are likely if each is right but for e^-64."""
    asked = study(trials=40, epsilons=(0.5, 64), subset_ratio=0.5, recipe=RECIPE)
    claims = {
        epsilon: Mechanism(
            epsilon=epsilon, delta=1e-5, sample_rate=0.1, expected_batch=10, steps=10,
            noise_multiplier=1.0, max_grad_norm=1.0, accountant="prv", spent_epsilon=epsilon,
            total_variation=None,
        )
        for epsilon in (0.5, 64)
    }  # fmt: skip
    said = " ".join(warnings(asked, claims))
    assert "could not refute the claim at epsilon 64: its audit" in said


def test_a_fleet_stops_at_the_end_of_a_block_when_it_knows_enough(study):
    told = []
    asked = study(trials=400)
    asked.train_until(Until.parse("reliability=0.65"), on_message=told.append, engine="serial")
    store = Store(asked.store)
    done = len(store.done())
    assert done % 20 == 0
    assert 40 <= done < 400
    last = interim_result(store, sorted(store.done()))
    assert last.reliability >= 0.65
    (summary,) = asked.score()
    assert last.reliability == pytest.approx(summary.reliability, abs=1e-9)
    table = asked.scores().filter(asked.scores()["split"].to_numpy() == "train")
    width = table["memorization_high"].to_numpy() - table["memorization_low"].to_numpy()
    assert last.width() == pytest.approx(np.quantile(width, 0.9))
    assert told[-1].endswith("reached")
    status = CliRunner().invoke(main, ["status", str(asked.store)]).output
    assert f"until reliability=0.65: {last.reliability:.3f} at {done} trials" in status
    # Nothing is trained again; one look says that it is enough.
    told.clear()
    asked.train_until(Until.parse("reliability=0.65"), on_message=told.append, engine="serial")
    assert len(store.done()) == done
    assert len(told) == 1
    assert CliRunner().invoke(main, ["verify", str(asked.store)]).exit_code == 0


def test_trials_are_a_hard_cap(study):
    asked = study(trials=60)
    asked.train_until(Until.parse("ci-width=0.01"), on_message=lambda text: None, engine="serial")
    assert len(Store(asked.store).done()) == 60


@pytest.mark.parametrize("text", ["reliability", "speed=0.5", "reliability=2", "ci-width=nan"])
def test_other_targets_are_refused(text, capsys):
    with pytest.raises(ValueError, match="a target is"):
        Until.parse(text)
    with pytest.raises(SystemExit) as end:
        run_job(lambda options: None, data="digits", store="memory://until", trials=2,
                arguments=["--until", text])  # fmt: skip
    assert end.value.code == 2


def test_looks_come_where_the_target_is_forecast():
    rule = Until.parse("reliability=0.98")
    assert rule.forecast(_seen(100, 0.95)) == math.ceil(100 * 0.98 * 0.05 / (0.95 * 0.02))
    assert rule.next_interim(_seen(100, 0.95), 20, 10_000) == 160  # half as many more, whole blocks
    assert rule.next_interim(_seen(100, 0.979), 20, 10_000) == 120
    assert rule.next_interim(_seen(100, math.nan), 20, 10_000) == 160
    assert rule.next_interim(_seen(100, 0.95), 20, 130) == 130
    assert not rule.reached(math.nan)


def test_widths_are_forecast_from_the_examples_that_make_them():
    """Always right with and never without: Newcombe's interval in closed form, which narrows as 1
    over trials, not as 1 over their root."""
    rule = Until.parse("ci-width=0.1")
    z2 = stats.norm.ppf(0.975) ** 2
    needed = brentq(lambda t: math.hypot(z2 / (0.7 * t + z2), z2 / (0.3 * t + z2)) - 0.1, 40, 1e4)
    for trials in (40, 100):
        assert rule.forecast(_seen(trials)) == pytest.approx(needed, rel=0.01)
    assert rule.forecast(_seen(200)) == 200  # it is reached
    assert rule.next_interim(_seen(100), 20, 1000) == math.ceil(needed / 20) * 20
    half = _seen(400, out=0.5)
    assert rule.forecast(half) == pytest.approx(400 * (half.width() / 0.1) ** 2, rel=0.03)
    assert Until.parse("ci-width=0.0001").forecast(_seen(40, out=0.5)) is None  # too far to say
    unknown = InterimResult(
        trials=40, reliability=0.5, right=np.zeros((2, 3)), n=np.array([[40] * 3, [0] * 3])
    )
    assert math.isnan(unknown.width())
    assert rule.forecast(unknown) is None
    assert not rule.reached(unknown.width())


def _seen(trials: int, reliability: float = 0.5, out: float = 0.0) -> InterimResult:
    n = np.array([[0.7 * trials] * 9, [0.3 * trials] * 9])
    return InterimResult(trials=trials, reliability=reliability, right=n * [[1], [out]], n=n)
