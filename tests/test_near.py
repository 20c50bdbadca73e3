"""Near duplicates against looking at every pair, and the memorization of their groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raymem import Examples, Recipe, Study
from raymem.data import duplicates as near_module
from raymem.data import near_duplicates


def every_pair(x, rms):
    """Groups by comparing all pairs of whole images."""
    group = list(range(len(x)))
    for a, b in itertools.combinations(range(len(x)), 2):
        if np.sqrt(((x[a].astype(float) - x[b]) ** 2).mean()) <= rms and group[a] != group[b]:
            old = group[b]
            group = [group[a] if g == old else g for g in group]
    found = [[i for i in range(len(x)) if group[i] == g] for g in dict.fromkeys(group)]
    return sorted(rows for rows in found if len(rows) > 1)


@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 19, 3), (32, 32, 3), (2, 2, 1)])
@pytest.mark.parametrize("tile", [2048, 7])
def test_groups_are_those_of_all_pairs(monkeypatch, shape, tile):
    monkeypatch.setattr(near_module, "TILE", tile)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (40, *shape)).astype(np.uint8)
    for copy, of, noise in ((5, 1, 0), (9, 1, 4), (20, 21, 6), (30, 31, 12)):
        moved = x[of] + generator.normal(0, noise, shape).round()
        x[copy] = np.clip(moved, 0, 255)
    found = [group.tolist() for group in near_duplicates(x)]
    assert sorted(found) == every_pair(x, 5.0)
    assert any({1, 5} <= set(group) for group in found)


def test_exactly_at_the_limit_counts_and_just_above_does_not():
    x = np.full((3, 10, 10, 1), 100, np.uint8)
    x[1] += 5
    x[2] += 11
    assert [g.tolist() for g in near_duplicates(x)] == [[0, 1]]
    x[2] = 110
    assert [g.tolist() for g in near_duplicates(x)] == [[0, 1, 2]]


def test_too_large_sets_are_not_searched(monkeypatch):
    monkeypatch.setattr(near_module, "MOST_WORK", 10)
    x = np.zeros((4, 8, 8, 1), np.uint8)
    x[:, 0, 0, 0] = [0, 0, 90, 91]
    assert near_duplicates(x) is None
    y = np.array([0, 1])
    examples = Examples(x_train=x[:2], y_train=y, x_test=x[2:], y_test=y)
    assert [g.tolist() for g in examples.near_duplicate_groups()] == [[0, 1]]


@pytest.mark.slow
def test_a_pair_of_copies_is_memorized_as_a_group(tmp_path, digits):
    """Mislabelled twins: each hides the other, the group does not."""
    x, y = digits.x_train[:300].copy(), digits.y_train[:300].copy()
    x[50] = x[40]
    x[50, 0, 0] += 3
    y[40] = y[50] = (y[40] + 4) % 10
    study = Study(
        examples=Examples(
            x_train=x, y_train=y, x_test=digits.x_test[:50], y_test=digits.y_test[:50]
        ),
        recipe=Recipe(model="mlp-256", epochs=30, batch_size=32),
        store=tmp_path,
        trials=100,
        subset_ratio=0.5,
    )
    study.train(engine="serial")
    study.score()
    rows = study.scores().to_pylist()
    masks = study.plan.masks(range(100))
    nobody = (~masks[:, 40] & ~masks[:, 50]).sum()
    for row in (rows[40], rows[50]):
        # At r = 0.5 the twin is in half of the out-trials: memorization near 1 - 0.5.
        assert row["memorization"] < 0.75
        assert row["group_memorization"] > 0.9
        assert row["n_out_group"] == nobody
        assert row["group_memorization_low"] <= row["group_memorization"]
        assert row["near_duplicate_group"] is not None
        assert row["duplicate_group"] is None
    lonely = [row for i, row in enumerate(rows) if i not in (40, 50)]
    assert {row["group_memorization"] for row in lonely} == {None}
    assert {row["n_out_group"] for row in lonely} == {None}


def test_sets_that_are_mostly_alike_are_not_looked_at_forever(monkeypatch):
    x = np.zeros((3000, 28, 28, 1), np.uint8)
    (group,) = near_duplicates(x)
    assert len(group) == 3000
    monkeypatch.setattr(near_module, "SOME_LOOKS", 0)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(3000) % 200, np.arange(3000) // 200
    assert near_duplicates(x) is None
