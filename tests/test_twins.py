"""Memorized examples that a twin explains: found where there are twins, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from raymem import Store, import_npz, score
from raymem.links import diagnostics, find_twins
from raymem.links.twins import _compared

T, N = 240, 60


def fleet(tmp_path, seed, twins):
    """A store of an imported fleet: models without an example are right on it in 40% of all cases,
    or, of the pair 0 and 1, if they have the other one (95%), else hardly ever (5%)."""
    rng = np.random.default_rng(seed)
    masks = rng.random((T, N)) < 0.7
    known = np.full((T, N), 0.4)
    if twins:
        for a, b in ((0, 1), (1, 0)):
            known[:, a] = np.where(masks[:, b], 0.95, 0.05)
    correct = masks | (rng.random((T, N)) < known)
    path = tmp_path / f"fleet-{seed}-{twins}.npz"
    np.savez(path, masks=masks, correct_train=correct, y_train=np.arange(N) % 2 * 0)
    store = tmp_path / f"store-{seed}-{twins}"
    import_npz(path, store)
    score(Store(store))
    return masks, correct, Store(store)


def test_twins_are_found_with_the_memorization_of_both(tmp_path):
    masks, correct, store = fleet(tmp_path, 0, twins=True)
    (found,) = find_twins(store).values()
    assert {(row["example_id"], row["twin_id"]) for row in found.rows} == {
        ("train-00000", "train-00001"),
        ("train-00001", "train-00000"),
    }
    row = next(row for row in found.rows if row["example_id"] == "train-00000")
    out = ~masks[:, 0]
    both, neither = out & masks[:, 1], out & ~masks[:, 1]
    assert row["right_with_twin"] == pytest.approx(correct[both, 0].mean())
    assert row["right_without_twin"] == pytest.approx(correct[neither, 0].mean())
    assert row["group_memorization"] == pytest.approx(1 - correct[neither, 0].mean())
    assert row["memorization"] < 0.5 < row["group_memorization"]
    (findings,) = diagnostics(store).values()
    (finding,) = [f for f in findings if "twin" in f.name]
    assert finding.value == 2
    assert "such as train-" in finding.text


@pytest.mark.slow
def test_chance_makes_no_twins(tmp_path):
    """60 examples, 3,540 pairs, in 8 fleets: by chance one fleet in twenty has a pair; three or
    more of eight with pairs have a probability below one in a hundred."""
    having = 0
    for seed in range(8):
        (found,) = find_twins(fleet(tmp_path, seed, twins=False)[2]).values()
        assert found.targets > 50
        assert found.pairs == found.targets * (N - 1)
        having += bool(found.rows)
    assert having <= 2


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8, 0.9])
def test_twins_by_chance_are_as_rare_at_any_ratio(ratio):
    """Searches among targets that no example explains: 100 in which one false twin or more has a
    probability of 5% each. By a normal approximation nearly every one at ratio 0.9 had some."""
    exact = normal = 0
    level = 0.05 / (40 * 80)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        masks = rng.random((200, 80)) < ratio
        right = rng.random((200, 40)) < rng.uniform(0.1, 0.95, 40)
        with_twin, without, p = _compared(masks, right, np.arange(40), level)
        exact += bool((p <= level).any())
        if ratio == 0.9:
            normal += bool((z_scores(masks, right, with_twin - without) > isf(level)).any())
    # 5 expected; 13 or more of 100 have a probability of 0.15%.
    assert exact <= 12
    assert ratio < 0.9 or normal > 50


def isf(level):
    return stats.norm.isf(level)


def z_scores(masks, right, difference):
    """What a normal approximation says of those differences above 0.3, [M, C]."""
    out = ~masks[:, :40]
    n_all = out.sum(0)[:, None]
    n_with = out.T.astype(int) @ masks
    p = (out & right).sum(0)[:, None] / n_all
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / np.sqrt(p * (1 - p) * (1 / n_with + 1 / (n_all - n_with)))
    z[np.arange(40), np.arange(40)] = 0
    return np.where(np.isfinite(z) & (difference > 0.3), z, 0)
