"""Membership inference: against loops, on margins of a known law, on noise, at the edges."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner
from learners import numbered_examples
from scipy.stats import norm, spearmanr

from raymem import Plan, Store, import_npz, membership, score, verify
from raymem.cli import main
from raymem.encoding import to_json
from raymem.errors import DamagedObjectError, StoreError
from raymem.scores import attack, read_membership
from raymem.scores.lira import Moments, add_margins, margin_sums, scores, vulnerability
from raymem.show import write_report
from raymem.show.terminal_membership import correlation_text, stale_text
from raymem.store import TrialKey, columns, trial_table
from raymem.training import TrialResult
from raymem.training.loop import SubsetHistory
from raymem.training.trial import Evaluation

ONLINE, OFFLINE, LOSS = range(3)


def imported(folder, masks, margins, **more):
    """A scored store of an imported fleet with these margins [T, N]; None: without margins."""
    arrays = {"masks": masks, "correct_train": masks if margins is None else margins > 0, **more}
    if margins is not None:
        arrays["margins_train"] = margins.astype(np.float32)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "fleet.npz", **arrays)
    store = import_npz(folder / "fleet.npz", folder / "store")
    score(store)
    return store


def lira_by_loops(margins, masks, target, references):
    """Carlini et al. 2022, algorithm 1, from its definition: log ratio and one-sided z by example,
    None where an arm is empty."""
    N = margins.shape[1]
    arms = {
        arm: [[margins[t, i] for t in references if masks[t, i] == arm] for i in range(N)]
        for arm in (True, False)
    }
    fixed = {}
    for arm, lists in arms.items():
        squares, freedom = 0.0, 0
        for values in lists:
            if len(values) > 1:
                mean = math.fsum(values) / len(values)
                squares += math.fsum((v - mean) ** 2 for v in values)
                freedom += len(values) - 1
        fixed[arm] = math.sqrt(squares / freedom)
    ratios, above = [], []
    for i in range(N):
        if not arms[True][i] or not arms[False][i]:
            ratios.append(None)
            above.append(None)
            continue
        own = len(arms[True][i]) >= 32 and len(arms[False][i]) >= 32
        found = {}
        for arm in (True, False):
            values = arms[arm][i]
            mean = math.fsum(values) / len(values)
            spread = np.std(values, ddof=1) if own else fixed[arm]
            found[arm] = norm.logpdf(margins[target, i], mean, spread)
            if not arm:
                above.append((margins[target, i] - mean) / spread)
        ratios.append(found[True] - found[False])
    return ratios, above


def auc_by_pairs(values, members):
    pairs = [(a > b) + 0.5 * (a == b) for a in values[members] for b in values[~members]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("T", [12, 70])
def test_scores_are_those_of_loops(T):
    """With 70 trials some examples have 32 in each arm, and variances of their own, some not."""
    rng = np.random.default_rng(T)
    masks = rng.random((T, 30)) < 0.5
    masks[:, 0] = True  # no model without it
    margins = 50 + rng.normal(size=(T, 30)) * rng.uniform(0.5, 3, 30) + masks
    left_out = [3, 5, 6]
    references = [t for t in range(T) if t not in left_out]
    wanted = lira_by_loops(margins, masks, 3, references)
    if T == 70:
        n = masks[references].sum(0)
        assert 0 < ((n >= 32) & (len(references) - n >= 32)).sum() < 30
    for found, expected in zip(scores(margins, masks, 3, left_out), wanted, strict=True):
        assert [x is None for x in expected] == np.isnan(found).tolist()
        known = ~np.isnan(found)
        assert found[known] == pytest.approx([x for x in expected if x is not None], rel=1e-9)


def test_numbers_of_an_attack_are_those_of_pairs_and_thresholds():
    rng = np.random.default_rng(1)
    members, of = rng.random(240) < 0.4, np.repeat(np.arange(6), 40)
    values = np.round(rng.normal(size=240) + members, 1)  # with ties
    found = attack("a", values, members, of)

    def by_thresholds(values, members):
        rates = [(np.inf, 0.0, 0.0)]
        rates += [(c, (values[~members] >= c).mean(), (values[members] >= c).mean())
                  for c in np.unique(values)]  # fmt: skip
        best = max((tpr + 1 - fpr) / 2 for _, fpr, tpr in rates)
        low, one = (max(t for _, f, t in rates if f <= limit) for limit in (0.001, 0.01))
        return auc_by_pairs(values, members), best, low, one

    rates = (found.auc, found.balanced_accuracy, found.tpr_at_low_fpr, found.tpr_at_fpr)
    left_out = [by_thresholds(values[of != k], members[of != k]) for k in range(6)]
    for j, rate in enumerate(rates):
        assert rate.value == pytest.approx(by_thresholds(values, members)[j])
        jackknife = math.sqrt(5 / 6 * sum((row[j] - np.mean(left_out, 0)[j]) ** 2
                                          for row in left_out))  # fmt: skip
        assert rate.stderr == pytest.approx(jackknife)
    for fpr, tpr in zip(found.roc.fpr, found.roc.tpr, strict=True):
        assert fpr * (~members).sum() >= 1
        assert tpr == max(
            [(values[members] >= c).mean() for c in np.unique(values)
             if (values[~members] >= c).mean() <= fpr], default=0
        )  # fmt: skip


def test_an_attack_without_others_knows_nothing():
    found = attack("a", [1.0, 2.0], [True, True], [0, 1])
    assert math.isnan(found.auc.value)
    assert math.isnan(found.tpr_at_fpr.stderr)
    assert found.roc.fpr == found.roc.tpr == []
    assert math.isnan(attack("a", [1.0, 2.0], [True, False], [0, 0]).auc.stderr)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """d' = 1.5 for every example, whose margins differ otherwise; 200 trials."""
    rng = np.random.default_rng(2)
    masks = rng.random((200, 300)) < 0.5
    margins = rng.normal(size=300) * 3 + rng.normal(size=masks.shape) * 2 + 1.5 * 2 * masks
    store = imported(tmp_path_factory.mktemp("gaussian"), masks, margins)
    return masks, margins.astype(np.float32), store, membership(store)


def test_a_known_law_is_reached(gaussian):
    """AUC is Phi(d'/sqrt 2), the rate at 1% Phi(d' - z(99%)), less what 100 models in each arm do
    not know; the threshold on the loss, for which examples differ, finds less."""
    _, _, _, found = gaussian
    (here,) = found.attacked.values()
    assert (here.trials, here.targets, here.references, here.examples) == (200, 20, 199, 300)
    assert here.members + here.others == 20 * 300
    assert here.own_variances == 1
    auc, at_fpr = norm.cdf(1.5 / math.sqrt(2)), norm.cdf(1.5 - norm.isf(0.01))
    for one in here.attacks[:2]:
        assert abs(one.auc.value - auc) < 4 * one.auc.stderr < 0.04
        assert abs(one.tpr_at_fpr.value - at_fpr) < 4 * one.tpr_at_fpr.stderr
    loss = here.attacks[LOSS]
    d = 1.5 * 2 / math.sqrt(2**2 + 3**2)
    assert abs(loss.auc.value - norm.cdf(d / math.sqrt(2))) < 0.04
    assert loss.auc.value < here.attacks[ONLINE].auc.value - 0.1
    apart = np.array(found.table["vulnerability"].to_numpy())
    error = np.array(found.table["vulnerability_stderr"].to_numpy())
    assert apart.mean() == pytest.approx(1.5, abs=0.05)
    assert np.std((apart - 1.5) / error) == pytest.approx(1, abs=0.15)


def test_a_store_is_attacked_as_its_arrays_are(gaussian):
    masks, margins, _, found = gaussian
    (here,) = found.attacked.values()
    targets = np.linspace(0, 199, 20).astype(int)
    everyone = [scores(margins, masks, t, [t]) for t in targets]
    who = masks[targets].ravel()
    for j in (ONLINE, OFFLINE):
        pooled = np.concatenate([both[j] for both in everyone])
        expected = attack("", pooled, who, np.repeat(np.arange(20), 300))
        assert here.attacks[j].auc.value == pytest.approx(expected.auc.value, abs=1e-6)
        assert here.attacks[j].auc.stderr == pytest.approx(expected.auc.stderr, rel=1e-3)
    row = found.table.slice(7, 1).to_pylist()[0]
    inside, out = margins[masks[:, 7], 7], margins[~masks[:, 7], 7]
    assert (row["n_in"], row["n_out"]) == (len(inside), len(out))
    assert row["margin_in"] == pytest.approx(inside.mean(), rel=1e-5)
    assert row["margin_out_stdev"] == pytest.approx(out.std(ddof=1), rel=1e-5)
    pooled = math.sqrt((inside.var(ddof=1) * (len(inside) - 1)
                        + out.var(ddof=1) * (len(out) - 1)) / 198)  # fmt: skip
    assert row["vulnerability"] == pytest.approx((inside.mean() - out.mean()) / pooled, rel=1e-5)
    known = found.table.to_pandas().dropna(subset=["vulnerability", "memorization"])
    rho = np.mean([rank_correlation(masks, margins, a, b) for a, b in ((0, 1), (1, 0))])
    assert here.correlation.value == pytest.approx(rho, abs=1e-3)
    assert here.correlation.low < rho < here.correlation.high
    # No pairing of these numbers could have a larger one.
    assert rho < here.correlation.ceiling <= 1
    assert 0 < here.correlation.tied < 1
    top = known.sort_values("vulnerability", ascending=False)["example_id"].head(10)
    assert [row["example_id"] for row in here.most_vulnerable] == top.tolist()


def rank_correlation(masks, margins, a, b):
    """Vulnerability in every second trial from `a` on, memorization in those from `b` on."""
    apart, memorized = [], []
    for i in range(masks.shape[1]):
        inside, out = (margins[a::2, i][masks[a::2, i] == arm] for arm in (True, False))
        freedom = len(inside) + len(out) - 2
        spread = (inside.var() * len(inside) + out.var() * len(out)) / freedom
        apart.append((inside.mean() - out.mean()) / math.sqrt(spread))
        inside, out = (margins[b::2, i][masks[b::2, i] == arm] > 0 for arm in (True, False))
        memorized.append(inside.mean() - out.mean())
    return spearmanr(apart, memorized).statistic


def test_noise_that_both_share_is_no_correlation():
    """Margins that know nothing of subsets: from the same trials, what looks vulnerable by chance
    looks memorized too; from others it does not. 600 examples: 4 standard errors are 0.16."""
    plan = Plan(n=600, subset_ratio=0.5)
    margins = np.random.default_rng(5).normal(size=(200, 600))
    found = membership(balanced("memory://membership-shared", plan, range(200), margins))
    (here,) = found.attacked.values()
    same = found.table.to_pandas()
    assert spearmanr(same["vulnerability"], same["memorization"]).statistic > 0.5
    assert abs(here.correlation.value) < 0.16
    assert here.correlation.low < 0 < here.correlation.high


def on_noise(plan, trials, left_out):
    """The first 20 trials attacked, of `trials` whose margins are noise."""
    masks = plan.masks(range(trials))
    margins = np.random.default_rng(0).normal(size=masks.shape)
    found = [scores(margins, masks, t, left_out(t))[0] for t in range(20)]
    of = np.repeat(np.arange(20), plan.n)
    return attack("", np.concatenate(found), masks[:20].ravel(), of)


def test_on_noise_of_balanced_plans_leaving_out_the_block_is_fair():
    """And leaving out the target alone is not: the others of the block tell its subset exactly, and
    the score knows. Of ratio 0.9 two trials of a block are out, one if the target is the other."""
    plan = Plan(n=2000, subset_ratio=0.9, seed=3)
    masks = plan.masks(range(20))
    for t in range(20):
        others = np.delete(masks, t, 0).sum(0)
        assert np.array_equal(others == 17, masks[t])
    fair = on_noise(plan, 60, lambda t: range(20))
    assert abs(fair.auc.value - 0.5) < 4 * fair.auc.stderr < 0.03
    assert abs(fair.tpr_at_fpr.value - 0.01) < 4 * fair.tpr_at_fpr.stderr < 0.01
    assert abs(fair.tpr_at_low_fpr.value - 0.001) < max(4 * fair.tpr_at_low_fpr.stderr, 0.002)
    naive = on_noise(plan, 20, lambda t: [t])
    assert naive.auc.value < 0.5 - 5 * naive.auc.stderr
    assert naive.tpr_at_fpr.value < 0.5 * 0.01


def balanced(url, plan, trials, margins, epsilon=math.inf):
    """A scored store of a balanced plan with these margins, [trials, N]."""
    examples = numbered_examples(plan.n, 4)
    store = Store(url)
    study = {
        "data": {"fingerprint": examples.fingerprint, "image_shape": [2, 2, 1],
                 "n_train": plan.n, "n_test": 4},
        "plan": plan.as_dict(), "recipe": {"model": {"name": "none"}},
    }  # fmt: skip
    store.open_study(study, examples)
    about = {"study_hash": store.study().hash, "attempt": 1, "seeds": {}, "seconds": 0.0,
             "device": "cpu", "arithmetic": "none", "host": ""}  # fmt: skip
    for t in trials:
        key, mask = TrialKey(epsilon, t), plan.mask(t)
        n = int(mask.sum())
        history = SubsetHistory(
            cumulative_loss=np.zeros(n, np.float32),
            learning_epoch=np.ones(n, np.int32),
            forgetting_count=np.zeros(n, np.int32),
        )
        train, test = (
            Evaluation(correct=x > 0, margin=x.astype(np.float32)) for x in (margins[t], np.ones(4))
        )
        result = TrialResult(train=train, test=test, history=history, seconds=0.0)
        store.commit(key, trial_table(key, mask, result), about)
    score(store)
    return store


def test_in_balanced_plans_the_whole_block_is_left_out():
    plan = Plan(n=50, subset_ratio=0.5, seed=1)
    masks = plan.masks(range(60))
    margins = np.random.default_rng(4).normal(size=masks.shape) + masks
    trials = [t for t in range(60) if t not in (7, 33)]  # two did not come
    store = balanced("memory://membership-balanced", plan, trials, margins)
    (here,) = membership(store, targets=6).attacked.values()
    assert (here.trials, here.targets, here.references) == (58, 6, 38)
    chosen = [trials[k] for k in np.linspace(0, 57, 6).astype(int)]
    values, who = [], []
    for t in chosen:
        references = [k for k in trials if k // 20 != t // 20]
        values += lira_by_loops(margins.astype(np.float32).astype(float), masks, t, references)[0]
        who += masks[t].tolist()
    expected = auc_by_pairs(np.array(values), np.array(who))
    assert here.attacks[ONLINE].auc.value == pytest.approx(expected, abs=1e-6)
    assert here.own_variances == 0
    assert any("one variance for each arm" in note for note in here.notes)


def test_a_single_block_is_refused_and_named():
    plan = Plan(n=30, subset_ratio=0.5, seed=1)
    margins = np.random.default_rng(5).normal(size=(20, 30))
    store = balanced("memory://membership-one-block", plan, range(20), margins)
    with pytest.raises(StoreError, match=r"a single block of trials.*train 40 trials or more"):
        membership(store)


def test_models_that_memorize_everything_are_told_exactly():
    """Margins are 2 in and -2 out, whoever is asked: no spread, and every attack is perfect."""
    plan = Plan(n=60, subset_ratio=0.5)
    margins = np.where(plan.masks(range(40)), 2.0, -2.0)
    store = balanced("memory://membership-everything", plan, range(40), margins)
    found = membership(store, targets=4)
    (here,) = found.attacked.values()
    for one in here.attacks:
        assert one.auc.value == one.tpr_at_low_fpr.value == 1
    assert found.table["vulnerability"].null_count == found.table.num_rows == 60
    assert here.most_vulnerable == []
    assert math.isnan(here.correlation.value)
    json.dumps(to_json(here), allow_nan=False)


def test_constant_margins_tell_nothing(tmp_path):
    masks = np.random.default_rng(6).random((30, 20)) < 0.5
    found = membership(imported(tmp_path, masks, np.full(masks.shape, 0.1)))
    (here,) = found.attacked.values()
    for one in here.attacks:
        assert one.auc.value == one.balanced_accuracy.value == 0.5
        assert one.tpr_at_fpr.value == 0
    assert found.table["vulnerability"].null_count == 20
    assert set(found.table["margin_in_stdev"].to_pylist()) == {0.0}


def test_examples_with_an_empty_arm_are_null_and_not_attacked(tmp_path):
    rng = np.random.default_rng(7)
    masks = rng.random((12, 40)) < 0.5
    masks[:, 0], masks[:, 1] = True, False
    masks[:, 2] = np.arange(12) == 0  # in one trial only: not attackable there
    found = membership(imported(tmp_path, masks, rng.normal(size=masks.shape)))
    rows = found.table.to_pylist()
    assert rows[0]["margin_out"] is rows[0]["vulnerability"] is rows[0]["margin_out_stdev"] is None
    assert rows[1]["margin_in"] is rows[1]["vulnerability_stderr"] is None
    assert rows[2]["margin_in_stdev"] is None
    assert rows[2]["vulnerability"] is not None
    (here,) = found.attacked.values()
    assert here.examples == 38
    n = masks.sum(0)
    alone = (n == 1) | (n == 11)  # one trial's reference trials lack an arm of it
    assert here.members + here.others == 12 * 38 - alone.sum()
    assert any("12 target trials" in note for note in here.notes)
    assert any("0.1%" in note for note in here.notes)


def test_tiny_stores_are_refused_or_say_what_they_lack(tmp_path):
    rng = np.random.default_rng(8)

    def refused(name, masks, margins, match):
        store = imported(tmp_path / name, masks, margins)
        with pytest.raises(StoreError, match=match) as caught:
            membership(store)
        assert "\n" not in str(caught.value)

    some = rng.random((4, 10)) < 0.5
    refused("bare", some, None, "no margins.*margins_train")
    refused("one", some[:1], rng.normal(size=(1, 10)), "a single trial")
    refused("full", np.ones((4, 10), bool), rng.normal(size=(4, 10)), "subset ratio 1")
    two = np.array([[True, False], [False, True]])
    refused("two", two, rng.normal(size=(2, 2)), "no variance is known; train more trials")
    four = np.array([[True, True], [False, False], [True, True], [False, False]])
    store = imported(tmp_path / "four", four, rng.normal(size=(4, 2)))
    (here,) = membership(store).attacked.values()  # an arm of one trial has the other's variance
    assert (here.targets, here.references, here.members, here.others) == (4, 3, 4, 4)
    assert math.isnan(here.correlation.value)
    with pytest.raises(ValueError, match="targets"):
        membership(store, targets=0)


def test_margins_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        add_margins(margin_sums([0.0]), [math.inf], [True])
    with pytest.raises(ValueError, match="target"):
        scores([[0.0], [1.0]], [[True], [False]], 0, [1])
    plan = Plan(n=30, subset_ratio=0.5, seed=1)
    margins = np.random.default_rng(5).normal(size=(40, 30))
    margins[21, 3] = math.inf
    store = balanced("memory://membership-infinite", plan, range(40), margins)
    with pytest.raises(DamagedObjectError, match=r"000021.parquet has margins.*not finite"):
        membership(store)


def test_a_fleet_balanced_as_a_whole_is_warned_of(tmp_path):
    """As LiRA's own scripts draw it: every example in half of all trials."""
    rng = np.random.default_rng(9)
    masks = rng.permuted(np.tile([[True], [False]], (8, 25)), axis=0)
    (here,) = membership(imported(tmp_path, masks, rng.normal(size=masks.shape))).attacked.values()
    assert any("exactly 8 of the 16 imported trials" in note for note in here.notes)


def test_vulnerability_needs_spread_and_both_arms():
    sums = margin_sums([1.0, 1.0, 1.0])
    for t, inside in enumerate([True, False, True]):
        add_margins(sums, [1.0, t, t], [inside, True, inside])
    apart, error = vulnerability(Moments.of(sums))
    assert np.isnan(apart).tolist() == np.isnan(error).tolist() == [True, True, False]


def raymem(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_the_command_writes_what_the_report_shows(gaussian):
    _, _, store, found = gaussian
    (here,) = found.attacked.values()
    with pytest.raises(StoreError, match="raymem membership"):
        store.scores("membership")
    text = raymem("membership", store.url)
    assert re.search(r"inf +200 +20 +LiRA online +0\.8\d+ \+- 0\.0", text)
    assert correlation_text(here) in " ".join(text.split())
    assert here.most_vulnerable[0]["example_id"] in text
    assert store.scores("membership").equals(found.table)
    assert set(found.table.column_names) == set(columns.MEMBERSHIP)
    assert read_membership(store) == [here]
    assert json.loads(raymem("membership", store.url, "--json"))["epsilons"][0]["epsilon"] == "inf"
    assert [p for p in verify(store) if p.kind != "missing"] == []
    write_report(store.url)
    page = store.files.read("report.html").decode()
    assert '<h2 id="membership">Who can be recognized?</h2>' in page
    assert f"with AUC {max(one.auc.value for one in here.attacks):.2f} [" in page
    assert '<a href="#membership">' in page
    assert "run `raymem membership` again" not in page
    assert store.files.exists("figures/membership-roc.png")
    assert "200 trials at epsilon inf, of which 199" in stale_text([here], {math.inf: 199})
    store.write_note("membership", {"epsilons": [{"epsilon": "<b>"}]})
    assert read_membership(store) == []
    evil = dataclasses.replace(here, trials=100, notes=["<i>evil</i>"])
    store.write_note("membership", {"epsilons": [to_json(evil)]})
    write_report(store.url)
    page = store.files.read("report.html").decode()
    assert "&lt;i&gt;evil&lt;/i&gt;" in page
    assert "<i>evil" not in page
    assert "run `raymem membership` again" in page


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.1, 0.3, "Vulnerability is positively correlated with memorization"),
        (-0.3, -0.1, "Vulnerability is negatively correlated with memorization"),
        (-0.1, 0.3, "Vulnerability has no significant correlation with memorization"),
    ],
)
def test_a_correlation_is_called_so_when_its_interval_is_on_one_side(gaussian, low, high, says):
    (here,) = gaussian[3].attacked.values()
    rho = dataclasses.replace(here.correlation, value=(low + high) / 2, low=low, high=high)
    text = correlation_text(dataclasses.replace(here, correlation=rho))
    assert text.startswith(f"{says}: rank correlation {rho.value:.3f} [{low:.3f}, {high:.3f}]")


def test_errors_of_the_command_are_one_line(tmp_path):
    store = imported(tmp_path, np.eye(4, dtype=bool), None)
    text = raymem("membership", store.url, code=1)
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
