"""What correlations of memorization can and cannot show, on fleets whose truth is known.

Shapes: F blocks of 20 trials, N training examples.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from raymem.encoding import json_object
from raymem.links import verdicts_on_link1
from raymem.links.correlation import correlate
from raymem.links.equal_loss import within_strata
from raymem.links.folds import Folds
from raymem.links.split_half import partial_spearman
from raymem.scores import most_tied, spearman_ceiling
from raymem.show import correlations_text

LAWS = {
    "p(1-p)g": lambda loss, g: np.exp(-loss) * (1 - np.exp(-loss)) * g,
    "loss*g": lambda loss, g: loss * g,
}


def fleet(seed, law, F=5, N=300):
    """Sums of a fleet in which true memorization is 1 - exp(-true out-loss) exactly: nothing can be
    added to the loss. Curvature is a function of that loss times g, drawn independently."""
    rng = np.random.default_rng(seed)
    loss = rng.gamma(0.4, 1.5, N)
    curvature = LAWS[law](loss, np.exp(0.5 * rng.standard_normal(N)))
    n_in, n_out = np.full((F, N), 14), np.full((F, N), 6)

    def mean_of(level, n):
        """Over n models whose values scatter by a factor around the level."""
        return level * rng.gamma(2 * n, 1 / (2 * n))

    return {
        "n_in": n_in, "n_out": n_out, "correct_in": n_in,
        "correct_out": rng.binomial(n_out, np.exp(-loss)),
        "n_curvature_out": n_out, "curvature_out": n_out * mean_of(curvature, n_out),
        "loss_out": n_out * mean_of(loss, n_out), "loss_in": n_in * mean_of(0.05 * loss, n_in),
    }  # fmt: skip


def correlated(sums, seed, replicates=30):
    F, N = sums["n_in"].shape
    names = ["curvature_out", "loss_out", "loss_in"]
    table = pa.table(
        {"fold": np.repeat(np.arange(F), N), **{k: v.ravel() for k, v in sums.items()}}
    )
    folds, rows = Folds(table, names), np.arange(N)
    mem = folds.memorization(np.ones(F), rows)
    values = {name: folds.mean(name, np.ones(F), rows) for name in names}
    return correlate(mem, values, folds, np.random.default_rng(seed), replicates)


def said(rows):
    """Everything that people read of one fleet, without its numbers."""
    found = {math.inf: rows}
    parts = [*map(str, verdicts_on_link1(found)), correlations_text(found)]
    return [re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", part) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_nothing_is_claimed_beyond_the_loss_where_nothing_is(law):
    """100 fleets of each law. Every sentence is the same for all of them but for its numbers and
    the direction of the plain correlation, and none speaks of more than the loss."""
    verdicts, equal = set(), []
    for seed in range(100):
        rows = correlated(fleet(seed, law), seed, replicates=8)
        verdict, *others = said(rows)
        verdicts.add(verdict)
        assert not re.search("beyond|says|goes the other|adds|more than the loss", verdict)
        for text in others:
            assert "None of these is a test" in text
            assert "beyond" not in text
        equal.append(next(r for r in rows if r.measure == "curvature_out").at_equal_loss)
    directions = ("is positively", "is negatively", "has no significant correlation with")
    kinds = {v.split("memorization:")[0].split("out-models ")[1][:13] for v in verdicts}
    assert all(any(d.startswith(k[:13]) for d in directions) for k in kinds)
    # Though nothing is there, coefficients are not 0, and methods disagree: 4 standard errors.
    values = np.array([e.values for e in equal])
    z = values.mean(0) / (values.std(0) / 10)
    assert np.abs(z).max() > 4
    assert np.ptp(values.mean(0)) > 0.05


@pytest.mark.slow
def test_pearson_without_noise_is_near_the_truth_for_40_to_2000_trials():
    """Ranks without noise are not reported: their attenuation has no such correction."""
    for F in (2, 5, 25, 100):
        found, plain, truth = [], [], []
        for seed in range(6):
            sums = fleet(seed, "loss*g", F=F, N=600)
            rng = np.random.default_rng(seed)
            loss = rng.gamma(0.4, 1.5, 600)
            curvature = LAWS["loss*g"](loss, np.exp(0.5 * rng.standard_normal(600)))
            row = correlated(sums, seed, replicates=2)[0]
            found.append(row.pearson_disattenuated)
            plain.append(row.pearson.value)
            truth.append(np.corrcoef(curvature, 1 - np.exp(-loss))[0, 1])
        error = 4 * np.std(np.array(found) - truth) / np.sqrt(6)
        assert abs(np.mean(found) - np.mean(truth)) < error + 0.01, (F, found, truth)


def test_the_ceiling_is_the_best_of_all_pairings():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (rng.integers(0, 3, 5).astype(float) for _ in range(2))
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            continue
        x, y = stats.rankdata(a), stats.rankdata(b)
        best = max(np.corrcoef(x, p)[0, 1] for p in itertools.permutations(y))
        assert spearman_ceiling(a, b) == pytest.approx(best)


def test_the_ceiling_of_an_untied_measure_has_a_formula():
    rng = np.random.default_rng(1)
    a = np.concatenate([np.zeros(500), np.full(70, 0.2), np.full(30, 0.5), rng.random(400) + 1])
    ties = sum(t**3 - t for t in (500, 70, 30))
    expected = math.sqrt(1 - ties / (1000**3 - 1000))
    assert spearman_ceiling(a, rng.random(1000)) == pytest.approx(expected)
    assert math.isnan(spearman_ceiling(np.zeros(5), np.arange(5)))
    assert most_tied(a) == (0.0, 0.5)
    assert math.isnan(most_tied([])[1])
    assert math.isnan(spearman_ceiling([], []))


def test_coefficients_are_those_of_brute_force():
    sums = fleet(3, "loss*g", N=200)
    mem = 1 - sums["correct_out"].sum(0) / sums["n_out"].sum(0)
    rows = {row.measure: row for row in correlated(sums, 3)}
    for name, n in (
        ("curvature_out", "n_curvature_out"),
        ("loss_out", "n_out"),
        ("loss_in", "n_in"),
    ):
        x, row = sums[name].sum(0) / sums[n].sum(0), rows[name]
        above = mem > 0.25
        pairs = [(a > b) + (a == b) / 2 for a in x[above] for b in x[~above]]
        assert row.auc.value == pytest.approx(np.mean(pairs))
        assert row.auc.low < row.auc.value < row.auc.high <= 1
        among = stats.spearmanr(mem[mem > 0], x[mem > 0]).statistic
        assert row.among_memorized.value == pytest.approx(among)
        assert row.among_memorized.low < among < row.among_memorized.high
        assert row.tied == pytest.approx(np.mean(mem == row.tied_at))
        assert row.spearman.value <= row.ceiling <= 1
    assert rows["loss_out"].at_equal_loss is None


def test_equal_loss_is_what_its_methods_say():
    sums = fleet(4, "p(1-p)g", N=200)
    mem = 1 - sums["correct_out"].sum(0) / sums["n_out"].sum(0)
    x, out = (sums[k].sum(0) / sums["n_out"].sum(0) for k in ("curvature_out", "loss_out"))
    inside = sums["loss_in"].sum(0) / sums["n_in"].sum(0)
    (equal, *_) = [row.at_equal_loss for row in correlated(sums, 4)]

    def residuals(values, given):
        design = np.stack([stats.rankdata(given), np.ones(200)], 1)
        ranks = stats.rankdata(values)
        return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]

    for value, given in ((equal.given_loss_out, out), (equal.given_loss_in, inside)):
        expected = np.corrcoef(residuals(mem, given), residuals(x, given))[0, 1]
        assert value == pytest.approx(expected)
    parts = np.array_split(np.argsort(out, kind="stable"), 20)
    within = [(stats.spearmanr(mem[p], x[p]).statistic, 10) for p in parts if np.ptp(mem[p]) > 0]
    assert equal.strata == pytest.approx(np.mean([rho for rho, _ in within]))
    # Across halves nothing is shared but the examples: near the same method on all trials.
    assert -1 < equal.cross_half < 1
    assert equal.cross_half != equal.given_loss_out


def test_methods_at_equal_loss_know_their_limits():
    nan = np.full(10, math.nan)
    assert math.isnan(partial_spearman(nan, nan, nan))
    assert math.isnan(partial_spearman(*(np.arange(10.0),) * 3))
    assert math.isnan(within_strata(np.zeros(40), np.arange(40.0), np.arange(40.0)))


def test_the_verdict_names_its_estimate_interval_and_limits():
    rows = correlated(fleet(5, "loss*g"), 5)
    (verdict,) = verdicts_on_link1({math.inf: rows})
    rho = rows[0].spearman
    assert (verdict.estimate, verdict.low, verdict.high) == (rho.value, rho.low, rho.high)
    assert f"Spearman {rho.format(2)} of at most {rows[0].ceiling:.2f}" in verdict.text
    assert "AUC" in verdict.text
    assert "The loss of the same models: Spearman" in verdict.text
    assert "the loss does not" in verdict.not_shown
    assert str(verdict).endswith(verdict.not_shown)
    assert set(json_object({math.inf: rows})["inf"][0]) >= {
        "ceiling", "tied", "among_memorized", "auc", "pearson_disattenuated", "at_equal_loss",
    }  # fmt: skip
