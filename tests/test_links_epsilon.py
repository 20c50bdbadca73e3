"""Links 2 and 3 on studies with a known law, and the doubts they must have about others."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from raymem import Examples, Plan, Study, flip_labels
from raymem.errors import ExamplesError, PlanError, PrivacyError
from raymem.links import (
    find_links,
    fit_link2,
    fit_loss,
    fit_rivals,
    link2,
    link3,
    most_memorized,
    verdict,
)
from raymem.links.epsilons import Link2, Observed
from raymem.links.fits import fit_curvature
from raymem.links.verdicts import verdict_on_link2
from raymem.privacy import EPSILON_GRIDS, Privacy
from raymem.show.terminal_links import link2_text
from raymem.store import Store, TrialKey
from raymem.training import Recipe

EPSILONS = np.array(EPSILON_GRIDS["default"])
A, B, C, SLOPE, C2 = 0.4, 2.0, 0.15, 3.0, 0.5


def loss_of(epsilons):
    return A + B * np.exp(-C * epsilons)


def curvature_of(epsilons):
    return SLOPE * loss_of(epsilons) * -np.expm1(-epsilons) + C2


def noisy(rng, T=20, law=curvature_of, epsilons=EPSILONS):
    shared = rng.normal(0, 0.02, T)  # subsets are the same at all epsilons
    losses = loss_of(epsilons)[:, None] + shared + rng.normal(0, 0.05, (len(epsilons), T))
    curvature = law(epsilons)[:, None] + rng.normal(0, 0.15, (len(epsilons), T))
    return losses, curvature


def test_the_fit_finds_a_law_without_noise():
    losses, curvature = loss_of(EPSILONS)[:, None], curvature_of(EPSILONS)[:, None]
    found = fit_link2(EPSILONS, losses, curvature)
    for got, truth in zip(
        (found.parameters[name].value for name in ("a", "b", "c", "slope", "c2")),
        (A, B, C, SLOPE, C2),
        strict=True,
    ):
        assert got == pytest.approx(truth, rel=1e-3)
    assert found.fits[0].law == "theorem"


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """In 85 or more of 100 studies of 20 trials, by nominal 95% intervals.

    Over 420 such studies they covered a 93.6%, slope 93.9%, c2 93.3% of the time; of 100 that cover
    93%, 84 or fewer have a probability of 0.2%."""
    rng = np.random.default_rng(7)
    inside = {"slope": 0, "c2": 0, "a": 0}
    truth = {"slope": SLOPE, "c2": C2, "a": A}
    for _ in range(100):
        found = fit_link2(EPSILONS, *noisy(rng), replicates=60, seed=1)
        for name, value in truth.items():
            inside[name] += found.parameters[name].low <= value <= found.parameters[name].high
    assert min(inside.values()) >= 85, inside


def test_doubts_about_the_papers_grid():
    """From epsilon 5 on 1 - e^-eps is 1: nothing tells slope from c2 but the loss's decay."""
    grid = np.array(EPSILON_GRIDS["paper-curvature"], np.float64)
    flat = fit_link2(grid, np.full((20, 20), 1.0), np.full((20, 20), 2.0))
    assert any("not identified" in doubt for doubt in flat.warnings)
    assert not any("not identified" in doubt for doubt in fit_on_default().warnings)


def fit_on_default():
    return fit_link2(EPSILONS, *noisy(np.random.default_rng(1)))


def test_another_law_is_seen():
    """Data from a logarithm: a rival predicts left-out epsilons better, and it is said."""
    rng = np.random.default_rng(2)
    finite = EPSILONS[:-1]
    losses, curvature = noisy(rng, law=lambda e: 1 + 2 * np.log1p(e), epsilons=finite)
    found = fit_link2(finite, losses, curvature)
    assert found.fits[0].law in ("logarithm", "power")
    assert any("predicts left-out epsilons better" in doubt for doubt in found.warnings)


def test_doubts_about_a_falling_curvature():
    against = noisy(np.random.default_rng(3), law=lambda e: 8 - curvature_of(e))
    found = fit_link2(EPSILONS, *against)
    slope = found.parameters["slope"]
    assert (slope.value, slope.at_boundary) == (0, True)
    assert math.isnan(slope.low)
    assert any("slope is at the boundary of 0" in doubt for doubt in found.warnings)
    text = link2_text(found)
    assert "slope 0 (at the boundary)" in text
    assert "[0, 0]" not in text


# Means of the digits in docs/privacy.md: rounded, one column for all trials.
DIGITS_LOSS = np.array([1.97, 1.66, 1.24, 0.94, 0.90, 0.95, 0.97, 0.99, 0.64])[:, None]
DIGITS_CURVATURE = np.array([1.32, 1.73, 2.86, 4.02, 4.41, 4.59, 4.82, 4.98, 14.5])[:, None]


def test_an_unclipped_inf_is_not_on_the_curve():
    """On the stored digits the fit through inf, which was not clipped, has slope 0."""
    found = fit_link2(EPSILONS, DIGITS_LOSS, DIGITS_CURVATURE)
    assert found.clipped_at_inf is False
    assert [o.epsilon for o in found.fitted] == list(EPSILONS[:-1])
    assert 2 < found.parameters["slope"].value < 3
    finite = fit_link2(EPSILONS[:-1], DIGITS_LOSS[:-1], DIGITS_CURVATURE[:-1])
    assert finite.fits == found.fits
    through = fit_link2(EPSILONS, DIGITS_LOSS, DIGITS_CURVATURE, clipped_at_inf=True)
    assert through.parameters["slope"].at_boundary
    error = {fit.law: fit.loo_rmse for fit in found.fits}
    assert error["theorem-constant-loss"] == pytest.approx(0.66, abs=0.01)
    assert error["power"] == pytest.approx(0.65, abs=0.01)
    assert error["theorem"] == pytest.approx(1.65, abs=0.01)


def test_a_clipped_inf_is_on_the_curve():
    losses, curvature = noisy(np.random.default_rng(1))
    found = fit_link2(EPSILONS, losses, curvature, clipped_at_inf=True)
    assert len(found.fitted) == len(EPSILONS)
    slope = found.parameters["slope"]
    assert slope.low < SLOPE < slope.high
    assert found.fits[0].law == "theorem"


def test_a_constant_loss_is_a_law_of_its_own():
    finite = EPSILONS[:-1]
    losses = loss_of(finite)[:, None]
    found = fit_link2(finite, losses, (2 * -np.expm1(-finite) + 0.3)[:, None])
    assert found.fits[0].law == "theorem-constant-loss"
    assert found.fits[0].parameters == pytest.approx({"slope": 2, "c2": 0.3})


def test_bootstrap_samples_at_the_boundary_are_told():
    """The curvature hardly follows the law: over ten studies the slope is at the boundary, or is
    there in some of the bootstrap samples, and it is said."""
    for seed in range(10):
        flat = noisy(np.random.default_rng(seed), law=lambda e: 3 + 0.02 * curvature_of(e))
        found = fit_link2(EPSILONS, *flat, replicates=60)
        slope = found.parameters["slope"]
        told = any(d.startswith("slope is at the boundary of 0") for d in found.warnings)
        assert told == (slope.at_boundary or slope.low <= 0), slope


def test_curvature_in_and_out_of_the_subset_is_fitted_apart():
    losses, inside = noisy(np.random.default_rng(5))
    _, outside = noisy(np.random.default_rng(6), law=lambda e: 2 * curvature_of(e))
    found = fit_link2(EPSILONS, losses, (inside + outside) / 2, arms={"in": inside, "out": outside})
    for arm, slope in (("in", SLOPE), ("out", 2 * SLOPE)):
        assert found.slope_by_arm[arm].low < slope < found.slope_by_arm[arm].high
    assert found.observed[0].curvature_in == pytest.approx(inside[0].mean())
    assert found.observed[0].curvature_out_stderr == pytest.approx(
        outside[0].std(ddof=1) / math.sqrt(20)
    )
    text = link2_text(found)
    assert "in the subset" in text
    assert "slope of the curvature of examples out of the subset" in text


def test_clipping_and_noise_are_told_apart_where_they_can_be():
    rng = np.random.default_rng(8)
    losses, curvature = noisy(rng)
    cannot = str(verdict_on_link2(fit_link2(EPSILONS, losses, curvature)))
    assert "cannot be told apart" in cannot
    assert "at 64 (change" in cannot
    alone = fit_link2(EPSILONS, losses, curvature, clipped_at_inf=True)
    assert "nothing was trained without clipping" in str(verdict_on_link2(alone))
    unclipped = curvature[-1].mean() + 5 + rng.normal(0, 0.1, 30)
    both = fit_link2(EPSILONS, losses, curvature, clipped_at_inf=True, unclipped=unclipped)
    assert both.clipping.low < 5 < both.clipping.high
    said = str(verdict_on_link2(both))
    assert "all of this change is that of noise" in said
    assert f"changes curvature by {both.clipping.value:.3g} [" in said
    assert json.loads(json.dumps(both.as_dict(), allow_nan=False))["clipping"]["value"] > 4


def test_doubts_about_few_trials_and_few_epsilons():
    few = fit_link2(EPSILONS, *noisy(np.random.default_rng(4), T=5))
    assert any("5 trials at each epsilon" in doubt for doubt in few.warnings)
    three = np.array([0.5, 2, 8, math.inf])
    found = fit_link2(three, *noisy(np.random.default_rng(4), epsilons=three))
    assert found.shape is None
    assert found.warnings == ["3 finite epsilons: too few to fit a law, 4 are needed"]
    mixed = fit_link2(EPSILONS, *noisy(np.random.default_rng(4)), modes=["exact", "probes"])
    assert any("2 modes" in doubt for doubt in mixed.warnings)


def test_loss_fits_are_those_of_a_fine_grid():
    """Against brute force over a, b and c."""
    rng = np.random.default_rng(5)
    e = np.array([0.5, 1, 2, 4, 8, 16.0])
    y = 0.3 + np.exp(-0.4 * e) + rng.normal(0, 0.05, 6)
    shape = fit_loss(e, y)
    best = min(
        ((y - a - b * np.exp(-c * e)) ** 2).sum()
        for a in np.linspace(0, 1, 41)
        for b in np.linspace(0, 2, 41)
        for c in np.geomspace(0.05, 3, 41)
    )
    assert ((y - shape(e)) ** 2).sum() <= best + 1e-9


def test_slopes_are_never_negative():
    z = np.linspace(0, 1, 8)
    assert fit_curvature(z, 3 - z)[0] == 0
    slope, c2 = fit_curvature(z, 2 * z)
    assert (slope, c2) == (pytest.approx(2), pytest.approx(0, abs=1e-12))


def test_rivals_know_their_own_data():
    e = np.array([0.5, 1, 2, 4, 8, 16, 32, 64])
    for law, y in {
        "constant": np.full(8, 2.0),
        "logarithm": 1 + 2 * np.log1p(e),
        "power": 1 + 0.2 * e**0.5,
    }.items():
        fits = {fit.law: fit for fit in fit_rivals(e, y)}
        assert fits[law].rmse < 1e-6
        assert fits[law].loo_rmse < 1e-6
        others = [fit.loo_rmse for name, fit in fits.items() if name != law]
        assert law == "constant" or min(others) > 10 * fits[law].loo_rmse


# Planted labels.


def test_flipped_labels_are_others_and_the_same_in_every_run(digits):
    flipped, more = flip_labels(digits, 0.1), flip_labels(digits, 0.2)
    rows = np.array(flipped.planted)
    wrong = np.flatnonzero(flipped.y_train != digits.y_train)
    assert (wrong == rows).all()
    assert len(rows) == 120
    assert set(rows) < set(more.planted)
    assert (more.y_train[rows] == flipped.y_train[rows]).all()
    assert flipped.fingerprint != digits.fingerprint
    # All other classes alike: chi-square over the 9 shifts, at 0.1%.
    many = flip_labels(digits, 1.0)
    shift = np.bincount((many.y_train - digits.y_train) % 10, minlength=10)
    assert shift[0] == 0
    expected = 1200 / 9
    assert ((shift[1:] - expected) ** 2 / expected).sum() < 26.1


def test_shares_that_are_none(digits):
    with pytest.raises(ExamplesError, match="must be in"):
        flip_labels(digits, 1.5)


# Whole studies.


def private_study(url, **more):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
    y = np.arange(60) % 3
    settings = {
        "examples": Examples(x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:]),
        "recipe": Recipe(
            model="mlp-64", epochs=40, batch_size=20, learning_rate=0.5, schedule="constant"
        ),
        "store": url,
        "trials": 40,
        "subset_ratio": 0.5,
        "epsilons": (1.0, math.inf),
        "privacy": Privacy(accountant="rdp"),
    }
    return Study(**{**settings, **more})


@pytest.fixture(scope="module")
def scored():
    study = private_study("memory://links-epsilon")
    study.train(engine="serial")
    study.score()
    return study


def test_a_private_study_is_audited(scored):
    private, plain = link3(Store(scored.store))
    assert (private.epsilon, plain.epsilon) == (1.0, math.inf)
    assert private.mechanism.spent_epsilon <= 1
    assert plain.mechanism is None
    # Random labels: what is right beyond chance is memorized.
    assert plain.pool.value > 0.4
    assert plain.pool.low > private.pool.high
    assert not private.refuted
    assert all(check.violations == 0 for check in private.bounds)
    assert plain.pairs.accuracy > 0.9
    assert plain.pairs.epsilon > 1
    assert (plain.pairs.p_value, plain.pairs.allowed) == (None, None)
    assert private.pairs.low < private.pairs.allowed < private.pairs.refuted_from
    assert (private.pairs.runs, private.candidates.examples) == (20, 40)
    said = verdict([private, plain])
    assert said.not_shown.startswith("that training is private: a better attack may see more")
    assert f"the claim allows {private.pairs.allowed:.1%}" in said.text
    json.dumps([private.as_dict(), plain.as_dict()], allow_nan=False)


def test_scores_say_what_was_spent(scored):
    table = scored.scores()
    rows = {row["epsilon"]: row for row in table.to_pylist()}
    assert 0.9 < rows[1.0]["spent_epsilon"] <= 1
    assert (rows[1.0]["delta"], rows[1.0]["accountant"]) == (1e-5, "rdp")
    assert (rows[math.inf]["spent_epsilon"], rows[math.inf]["delta"]) == (math.inf, None)
    trials = scored.scores("trials").to_pylist()
    by_epsilon = {row["epsilon"]: row for row in trials}
    assert by_epsilon[1.0]["noise_multiplier"] > 1
    assert by_epsilon[math.inf]["noise_multiplier"] == 0
    assert by_epsilon[1.0]["steps"] == by_epsilon[math.inf]["steps"] == 40
    # The same subsets: rows pair up.
    sizes = {(row["epsilon"], row["trial"]): row["subset_size"] for row in trials}
    assert all(sizes[1.0, t] == sizes[math.inf, t] for t in range(40))


def test_links_are_json(scored):
    links = find_links(Store(scored.store)).as_dict()
    text = json.dumps(links, allow_nan=False)
    assert json.loads(text) == links
    assert links["link_3_memorization_and_epsilon"][0]["epsilon"] == 1.0


def test_epsilons_equal_in_six_digits_keep_their_own_results(scored):
    """The store tells them apart by twelve digits; so must links.json."""
    close = (2.0000001, 2.0000002)
    assert len({TrialKey(epsilon, 0).object_key for epsilon in close}) == 2
    found = find_links(Store(scored.store))
    per_epsilon = {
        field.name: dict.fromkeys(close, value[1.0])
        for field in dataclasses.fields(found)
        if isinstance(value := getattr(found, field.name), dict) and 1.0 in value
    }
    assert "diagnostics" in per_epsilon
    written = dataclasses.replace(found, **per_epsilon).as_dict()
    for name in ("diagnostics", "twins", "link_1_memorization_and_curvature", "link_1_bins"):
        if written.get(name):
            assert list(written[name]) == ["2.0000001", "2.0000002"], name


def test_pool_means_are_those_of_a_direct_computation(scored):
    """Mean and clustered standard error from dense arrays, the latter against resampled runs."""
    store = Store(scored.store)
    (audit,) = [a for a in link3(store) if math.isinf(a.epsilon)]
    keys = sorted(key for key in store.done() if math.isinf(key.epsilon))
    inside, right = [], []
    for key in keys:
        table = store.trial(key).filter(store.trial(key)["in_subset"].is_valid())
        inside.append(table["in_subset"].to_numpy())
        right.append(table["correct"].to_numpy())
    inside, right = np.array(inside), np.array(right)

    def mean(rows):
        i, c = inside[rows], right[rows]
        p = (c & i).sum(0) / i.sum(0)
        q = (c & ~i).sum(0) / (~i).sum(0)
        return (p - q).mean()

    assert audit.pool.value == pytest.approx(mean(np.arange(40)))
    rng = np.random.default_rng(0)
    resampled = [mean(rng.integers(40, size=40)) for _ in range(400)]
    assert audit.pool.stderr == pytest.approx(np.std(resampled), rel=0.25)


def test_a_mechanism_is_fixed_by_its_store(scored, monkeypatch):
    """Another version of the accountant finds another noise; trials of one store all have one."""
    store = Store(scored.store)
    before = store.mechanism(1.0)
    from raymem.privacy import accounting

    def another(*arguments):
        return accounting.Account(99.0, "rdp", 0.1, None)

    monkeypatch.setattr(accounting, "calibrated", another)
    study = private_study("memory://links-epsilon", trials=41)
    study.train(engine="serial")
    assert store.mechanism(1.0) == before
    about = {store.provenance(k)["privacy"]["noise_multiplier"] for k in store.done() if k[0] == 1}
    assert about == {before.noise_multiplier}


def test_more_epsilons_renumber_nothing():
    first = private_study("memory://more-epsilons", trials=2)
    first.train(engine="serial")
    store = Store("memory://more-epsilons")
    before = {key: store.provenance(key)["digest"] for key in store.done()}
    more = private_study("memory://more-epsilons", trials=2, epsilons=(0.5, 1.0, math.inf))
    progress = more.train(engine="serial")
    assert progress.committed == 2
    assert {key: store.provenance(key)["digest"] for key in before} == before
    assert len(store.done()) == 6


def test_broken_training_is_caught_by_guesses(monkeypatch):
    """Noise that was planned and not added, at a claimed epsilon of 0.5, on random labels."""
    from raymem.fleet import fleet
    from raymem.privacy import sgd
    from raymem.training import private

    monkeypatch.setattr(sgd.PrivateSteps, "_make_private", unclipped)
    study = private_study("memory://broken", epsilons=(0.5,), privacy=Privacy())
    with pytest.raises(PrivacyError, match="not those of its examples taken alone"):
        study.train(engine="serial")
    # A test of the model before training would end it there; the audit must see it by itself.
    for module in (private, fleet):
        monkeypatch.setattr(module, "check_private", lambda model, image_shape: "ghost")
    monkeypatch.setattr(sgd.PrivateSteps, "_check_rows", lambda self, B: None)
    study.train(engine="serial")
    study.score()
    (audit,) = link3(Store("memory://broken"))
    assert audit.refuted
    assert audit.pairs.epsilon > 0.5
    assert "membership in one of two trials is told too well" in audit.reasons
    assert "REFUTED" in str(verdict([audit]))


@pytest.mark.slow
def test_noise_that_is_counted_and_not_added_is_refuted(monkeypatch):
    """DP-SGD that adds 3% of its noise at a claimed epsilon of 1, on random labels: all else is as
    planned, and the model is as private alone as it is tested to be."""
    from raymem.privacy.sgd import PrivateSteps

    whole = PrivateSteps._make_private

    def quieter(self):
        whole(self)
        assert self.mode == "ghost"
        self._optimizer._adjusted_noise_multiplier = 0.03 * self.mechanism.noise_multiplier

    monkeypatch.setattr(PrivateSteps, "_make_private", quieter)
    study = private_study("memory://quieter", epsilons=(1.0,))
    study.train(engine="serial")
    study.score()
    (audit,) = link3(Store("memory://quieter"))
    assert audit.pairs.low > audit.pairs.refuted_from > audit.pairs.allowed
    assert audit.candidates.p_value <= audit.level
    for reason in ("mean memorization", "a candidate's membership", "one of two trials"):
        assert reason in audit.reasons


def unclipped(self):
    """A mechanism that counts its steps, and neither clips nor adds noise."""

    class Account:
        def __init__(self, m):
            self.history = [(m.noise_multiplier, m.sample_rate, m.steps)]

    class Plain:
        def __init__(self, inner, batch):
            self.inner, self.batch, self.skip = inner, batch, False

        def signal_skip_step(self, skip):
            self.skip = skip

        def zero_grad(self):
            pass

        def step(self):
            if self.skip:
                return
            for group in self.inner.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad /= self.batch
            self.inner.step()
            self.inner.zero_grad()

    self._account = Account(self.mechanism)
    self._optimizer = Plain(self._inner, self.mechanism.expected_batch)
    self.mode = "hooks"
    self._wrapped = self._model
    self._model.remove_hooks = lambda: None


def test_candidates_come_from_an_earlier_store(scored):
    examples = scored.examples
    pool = most_memorized(examples, scored.store, 7)
    table = scored.scores()
    rows = [r for r in table.to_pylist() if r["split"] == "train" and math.isinf(r["epsilon"])]
    order = sorted(rows, key=lambda r: (-r["memorization"], r["example_id"]))
    assert set(pool) == {row["index"] for row in order[:7]}
    assert Plan(n=40, subset_ratio=0.5, kind="candidate-pool", pool=pool).mask(0).sum() >= 33
    # The same ids with other pixels, or other labels, are not the same examples.
    x = examples.x_train.copy()
    x[list(pool)] ^= 1
    kept = {
        "x_train": examples.x_train, "y_train": examples.y_train, "x_test": examples.x_test,
        "y_test": examples.y_test, "train_ids": examples.train_ids, "test_ids": examples.test_ids,
    }  # fmt: skip
    with pytest.raises(PlanError, match="7 of the 7 most memorized"):
        most_memorized(Examples(**{**kept, "x_train": x}), scored.store, 7)
    with pytest.raises(PlanError, match="same pixels and label"):
        most_memorized(Examples(**{**kept, "y_train": (examples.y_train + 1) % 3}), scored.store, 7)
    with pytest.raises(PlanError, match="fewer than 41"):
        most_memorized(examples, scored.store, 41)


def test_link2_reads_trials(scored):
    found = link2(Store(scored.store))
    assert [o.epsilon for o in found.observed] == [1.0, math.inf]
    assert found.warnings == ["curvature was not measured"]
    rows = [r for r in scored.scores("trials").to_pylist() if math.isinf(r["epsilon"])]
    n = [r["subset_size"] for r in rows]
    direct = np.mean(
        [(r["loss_in"] * k + r["loss_out"] * (40 - k)) / 40 for r, k in zip(rows, n, strict=True)]
    )
    assert found.observed[1].loss == pytest.approx(direct)


@pytest.mark.parametrize(
    ("curvature", "stderr", "says"),
    [
        ([1.0, 2.0, 4.0, 9.0], 0.1, "rises with epsilon where all gradients are clipped, from 1 at "
         "0.5 to 4 at 8 (change 3 [2.72, 3.28])"),
        ([4.0, 2.0, 1.0, 9.0], 0.1, "falls with epsilon"),
        ([1.0, 1.1, 1.2, 9.0], 0.1, "does not change significantly with epsilon"),
        ([1.0, 5.0, 4.0, 9.0], 0.1, "but is largest at 2 (5)"),
        ([1.0, 2.0, 4.0, 9.0], math.nan, "does not change significantly"),
        ([1.0, 2.0, 4.0, 9.0], math.nan, "not known with one trial"),
        ([1.0, 2.0, 4.0, 9.0], 0.1, "the change from 4 at 8 to 9 at inf is that of clipping and of "
         "the remaining noise together"),
    ],
)  # fmt: skip
def test_the_verdict_on_link_2_knows_its_error(curvature, stderr, says):
    observed = [
        Observed(epsilon=e, trials=20, loss=1.0, loss_stderr=0.1, curvature=c,
                 curvature_stderr=stderr)
        for e, c in zip((0.5, 2, 8, math.inf), curvature, strict=True)
    ]  # fmt: skip
    link = Link2(observed=observed, curvature_modes=[], clipped_at_inf=False, fits=[], warnings=[])
    found = verdict_on_link2(link)
    assert says in found.text
    assert "only a shape is compared" in found.not_shown
    assert found.estimate == pytest.approx(curvature[2] - curvature[0])


def test_one_private_epsilon_is_compared_with_inf():
    observed = [
        Observed(epsilon=e, trials=20, loss=1.0, loss_stderr=0.1, curvature=c, curvature_stderr=0.1)
        for e, c in ((8.0, 1.0), (math.inf, 6.0))
    ]
    link = Link2(observed=observed, curvature_modes=[], clipped_at_inf=False, fits=[], warnings=[])
    said = str(verdict_on_link2(link))
    assert "rises with epsilon, from 1 at 8 to 6 at inf (change 5" in said
    assert "cannot be told apart" in said
