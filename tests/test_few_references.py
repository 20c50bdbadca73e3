"""RMIA and attacks with few reference models: against loops, closed forms, noise, at the edges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from reference import rmia_scores
from scipy.stats import norm
from test_membership import balanced, imported

from raymem import Plan, membership
from raymem.errors import StoreError
from raymem.scores import lira, read_membership, rmia
from raymem.scores.attack_scores import ATTACKS, TargetScores, auc_by_example, by_example
from raymem.scores.few_references import arms, reference_sums
from raymem.scores.lira import Moments, add_margins, margin_sums
from raymem.scores.trial_margins import TrialMargins
from raymem.show import membership_text
from raymem.show.result_tables import references_table

SHIFT = 1.5


def auc_by_pairs(values, members):
    inside, out = values[members][:, None], values[~members]
    return ((inside > out) + 0.5 * (inside == out)).mean()


def summed(margins, masks, trials):
    sums = margin_sums(margins[0])
    for t in trials:
        add_margins(sums, margins[t], masks[t])
    return Moments.of(sums)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rmia_is_that_of_loops(scale):
    """Also where probabilities are 0 and 1 to the last digit."""
    rng = np.random.default_rng(0)
    masks = rng.random((9, 40)) < 0.5
    masks[:, 0], masks[:, 1] = True, False  # no model without, with
    margins = scale * (rng.normal(size=masks.shape) + masks)
    sample = [0, 3, 4, 9, 20, 21, 33]
    others = summed(margins, masks, range(1, 9))
    for a in (None, 0.0, 0.3, 1.0):
        if a is None:
            found = rmia.online(margins[0], others, sample)
        else:
            found = rmia.offline(margins[0], others, sample, a=a)
        wanted = rmia_scores(margins.tolist(), masks.tolist(), 0, range(1, 9), sample, a)
        assert [x is None for x in wanted] == np.isnan(found).tolist()
        known = ~np.isnan(found)
        assert found[known] == pytest.approx([x for x in wanted if x is not None], abs=1e-12)


def test_rmia_refuses_what_it_cannot_compute():
    others = summed(np.zeros((3, 2)), np.ones((3, 2), bool), range(3))
    with pytest.raises(ValueError, match="population"):
        rmia.online([0.0, 0.0], others, [0, 1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        rmia.offline([0.0, 0.0], others, [0, 1], a=1.5)


def test_the_population_is_the_same_every_time_and_no_larger_than_asked():
    sample = rmia.population(50_000)
    assert len(np.unique(sample)) == len(sample) == rmia.POPULATION
    assert np.array_equal(sample, rmia.population(50_000))
    assert 0 <= sample.min() < 1_000 < 49_000 < sample.max() < 50_000


def test_the_margin_minus_its_mean_is_that_of_numpy():
    rng = np.random.default_rng(1)
    masks, margins = rng.random((7, 20)) < 0.5, rng.normal(size=(7, 20))
    masks[:, 0] = True  # one arm has a mean as well
    found = lira.above_mean(margins[0], summed(margins, masks, range(1, 7)))
    assert found == pytest.approx(margins[0] - margins[1:].mean(0), abs=1e-12)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Members' margins are 1.5 standard deviations higher; examples differ otherwise."""
    rng = np.random.default_rng(2)
    masks = rng.random((90, 1000)) < 0.5
    margins = 2 * rng.normal(size=1000) + rng.normal(size=masks.shape) + SHIFT * masks
    store = imported(tmp_path_factory.mktemp("shifted"), masks, margins)
    return store, membership(store, targets=10)


def test_with_few_references_attacks_reach_their_closed_forms(shifted):
    """The mean of K references adds 1 / K to the variance, that of K / 2 out-models 2 / K: the AUC
    is Phi(shift / sqrt(2 (1 + 1 / K))). LiRA knows two means of K / 2 and is the worse for it."""
    _, found = shifted
    (here,) = found.attacked.values()
    assert [row.references for row in here.by_references] == [2, 4, 8, 16, 32, 64]
    for row in here.by_references:
        K = row.references
        assert row.references_in == K // 2
        rates = {one.name: one.auc for one in row.attacks}
        mean, offline = rates["margin minus mean"], rates["LiRA offline"]
        assert abs(mean.value - norm.cdf(SHIFT / math.sqrt(2 * (1 + 1 / K)))) < 0.015
        assert abs(offline.value - norm.cdf(SHIFT / math.sqrt(2 * (1 + 2 / K)))) < 0.015
        assert all(one.roc.fpr == [] for one in row.attacks)
    first, last = (here.by_references[k].attacks for k in (0, -1))
    auc = {name: [one.auc.value for row in (first, last) for one in row if one.name == name]
           for name in ATTACKS}  # fmt: skip
    assert auc["LiRA online"][0] < auc["margin minus mean"][0] - 0.05
    assert auc["LiRA online"][1] > auc["LiRA online"][0] + 0.05
    assert auc["RMIA online"][0] > auc["LiRA online"][0]


def test_rmia_reaches_its_closed_form_where_examples_do_not_differ(tmp_path):
    """p(x) / Pr(x) then has the order of margins, whose AUC is Phi(shift / sqrt 2)."""
    rng = np.random.default_rng(3)
    masks = rng.random((80, 800)) < 0.5
    margins = rng.normal(size=masks.shape) + SHIFT * masks
    (here,) = membership(imported(tmp_path, masks, margins), targets=10).attacked.values()
    for one in here.attacks[3:5]:
        assert one.auc.value == pytest.approx(norm.cdf(SHIFT / math.sqrt(2)), abs=0.015)


def test_each_example_has_its_references_and_none_is_of_the_targets_block():
    """Counted from the masks: as many in and out as asked, in the order that the seed fixes."""
    plan = Plan(n=60, subset_ratio=0.7, seed=1)
    margins = np.random.default_rng(4).normal(size=(60, 60))
    # A block's margins tell which block a sum is of.
    margins += 1000 * (np.arange(60) // 20)[:, None]
    trials = TrialMargins(balanced("memory://few-blocks", plan, range(60), margins), plan, math.inf)
    masks = plan.masks(range(60))
    for target in (trials.keys[5], trials.keys[44]):
        block = target.trial // 20
        eligible = [t for t in range(60) if t // 20 != block]
        order = [eligible[k] for k in np.random.default_rng((0, target.trial)).permutation(40)]
        for K in (2, 8, 16):
            wanted = arms(K, 0.7)
            sums = reference_sums(trials, target, wanted)
            assert sum(wanted) == K
            assert (sums.n == np.array(wanted)[:, None]).all()
            moments = Moments.of(sums)
            for i in range(60):
                for arm in (0, 1):
                    rows = [t for t in order if masks[t, i] == arm][: wanted[arm]]
                    mean = margins[rows, i].astype(np.float32).mean(dtype=np.float64)
                    assert moments.mean[arm, i] == pytest.approx(mean, abs=1e-4)


def test_attacks_of_a_store_are_those_of_loops(shifted):
    """Four references, all attacks on two targets, from the arrays."""
    store, _ = shifted
    trials = TrialMargins(store, store.plan(), math.inf)
    rows = [trials.one(key) for key in trials.keys]
    margins, masks = (np.stack(part) for part in zip(*rows, strict=True))
    found = membership(store, targets=2).attacked[math.inf].by_references[1]
    values, members = {name: [] for name in ATTACKS}, []
    for t in (0, 89):
        others = [k for k in range(90) if k != t]
        order = [others[k] for k in np.random.default_rng((0, t)).permutation(89)]
        chosen = np.zeros_like(masks)
        for arm in (True, False):
            for i in range(1000):
                chosen[[k for k in order if masks[k, i] == arm][:2], i] = True
        mean = (margins * chosen).sum(0) / 4
        out = (margins * (chosen & ~masks)).sum(0) / 2
        values["margin minus mean"].append(margins[t] - mean)
        values["LiRA offline"].append(margins[t] - out)  # one variance: the same order in a target
        members.append(masks[t])
    (one,) = (one for one in found.attacks if one.name == "margin minus mean")
    pooled, who = np.concatenate(values["margin minus mean"]), np.concatenate(members)
    assert one.auc.value == pytest.approx(auc_by_pairs(pooled, who), abs=1e-6)
    pooled = np.concatenate(values["LiRA offline"])
    (one,) = (one for one in found.attacks if one.name == "LiRA offline")
    assert one.auc.value == pytest.approx(auc_by_pairs(pooled, who), abs=2e-3)


def test_on_shuffled_membership_intervals_cover_one_half():
    """Of 30 studies of noise, 95% intervals of each attack's AUC (2.1 standard errors, 20 targets)
    have 0.5 in at least 26: with a rate of 95%, fewer have a probability of 0.3%."""
    inside = dict.fromkeys(ATTACKS, 0)
    for study in range(30):
        rng = np.random.default_rng(100 + study)
        margins, masks = 3 * rng.normal(size=(30, 300)), rng.random((30, 300)) < 0.5
        scores = TargetScores(rmia.population(300))
        for t in range(20):
            few = [k for k in range(30) if k != t][:8]
            scores.add(margins[t], masks[t], summed(margins, masks, few))
        for one in scores.attacks():
            inside[one.name] += abs(one.auc.value - 0.5) < 2.1 * one.auc.stderr
    assert min(inside.values()) >= 26, inside


def test_the_auc_of_each_example_is_that_of_pairs():
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 4, (12, 30)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = np.nan
    members = rng.random(scores.shape) < 0.5
    members[:, 0] = True
    found = auc_by_example(scores, members)
    assert math.isnan(found[0])
    for i in range(1, 30):
        known = ~np.isnan(scores[:, i])
        assert found[i] == pytest.approx(auc_by_pairs(scores[known, i], members[known, i]))


def test_the_best_attack_is_chosen_on_other_examples():
    """A threshold on the loss tells the even examples exactly and the odd ones not at all: chosen
    with a look at the even ones it would be used on them."""
    rng = np.random.default_rng(6)
    masks = rng.random((24, 400)) < 0.5
    signal = np.where(masks, 5.0, -5.0)
    margins = rng.normal(size=masks.shape) + np.where(np.arange(400) % 2, 0.0, signal)
    scores = TargetScores(np.arange(400))
    for t in range(12):
        scores.add(margins[t], masks[t], summed(margins, masks, range(12, 24)))
    found = by_example([scores], 400)
    on_odd = {one: scores.scores[one] for one in ATTACKS}
    members, known = np.stack(scores.members)[:, 1::2], np.stack(scores.known)[:, 1::2]
    auc = {name: auc_by_pairs(np.stack(v)[:, 1::2][known].astype(float), members[known])
           for name, v in on_odd.items()}  # fmt: skip
    assert set(found.attack[::2][~np.isnan(found.auc[::2])]) == {max(auc, key=auc.get)}
    assert np.nanmean(found.auc[::2]) > 0.95
    assert np.nanmean(found.auc[1::2]) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(found.stderr[(found.auc == 1) | (found.auc == 0)]).all()


def test_on_noise_the_chosen_attack_is_no_better_than_guessing_and_no_worse(tmp_path):
    """The largest of six AUCs of noise is above 0.5, that of the attack chosen elsewhere is not;
    with targets as references of each other it would be below."""
    means = []
    for study in range(6):
        rng = np.random.default_rng(200 + study)
        masks = rng.random((16, 400)) < 0.5
        store = imported(tmp_path / str(study), masks, rng.normal(size=masks.shape))
        means.append(np.nanmean(membership(store).table["attack_auc"].to_numpy()))
    assert np.mean(means) == pytest.approx(0.5, abs=0.02)


def test_what_was_found_is_shown_and_read_back(shifted):
    store, found = shifted
    found.write(store)
    (here,) = found.attacked.values()
    assert read_membership(store) == [here]
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))["epsilons"][0]
    assert [row["references"] for row in data["by_references"]] == [2, 4, 8, 16, 32, 64]
    assert data["population"] == 1000
    rows = references_table([here]).rows
    assert [row[1] for row in rows[:5]] == [2] * 5
    assert "with fewer reference trials" in membership_text(found)
    del data["by_references"], data["population"], data["best_attacks"]
    store.write_note("membership", {"epsilons": [data]})  # as earlier versions wrote it
    assert read_membership(store)[0].by_references == []
    columns = found.table.to_pandas()
    assert set(columns["attack"].dropna()) == set(here.best_attacks)
    assert (columns["n_targets_in"] + columns["n_targets_out"] == 10).all()
    known = columns.dropna(subset=["attack_auc"])
    assert known["attack_auc"].mean() == pytest.approx(norm.cdf(SHIFT / math.sqrt(2)), abs=0.02)


def test_too_few_trials_are_refused_or_left_out(tmp_path):
    rng = np.random.default_rng(7)
    plan = Plan(n=30, subset_ratio=0.5, seed=1)
    one = balanced("memory://few-one-block", plan, range(20), rng.normal(size=(20, 30)))
    with pytest.raises(StoreError, match="train 40 trials or more"):
        membership(one)
    masks = rng.random((6, 200)) < 0.5
    store = imported(tmp_path, masks, rng.normal(size=masks.shape))
    (here,) = membership(store).attacked.values()
    # Of five references four are two in and two out for 62% of the examples of a target, and eight
    # are not there.
    assert [row.references for row in here.by_references] == [2, 4]
