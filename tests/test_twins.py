"""Memorized examples that a twin explains: found where there are twins, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from raymem import Store, import_npz, score
from raymem.links import diagnostics, find_twins

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
