from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raymem import Plan
from raymem.errors import PlanError
from raymem.plan import block_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "plan.json").read_text())
ratios = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.7, 0.85, 0.9, 0.99])
seeds = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize("case", GOLDEN["masks"], ids=lambda c: f"{c['kind']}-{c['subset_ratio']}")
def test_masks_are_the_same_for_ever(case):
    pool = tuple(case["pool"]) if case["pool"] else None
    plan = Plan(
        n=case["n"],
        subset_ratio=case["subset_ratio"],
        kind=case["kind"],
        seed=case["seed"],
        pool=pool,
    )
    digest = hashlib.sha256(np.packbits(plan.mask(case["trial"])).tobytes()).hexdigest()
    assert digest == case["sha256"]


@pytest.mark.parametrize("case", GOLDEN["seeds"])
def test_seeds_are_the_same_for_ever(case):
    plan = Plan(n=10, seed=case["seed"])
    found = plan.seeds(case["trial"], float(case["epsilon"]), case["attempt"])
    assert vars(found) == case["seeds"]


def test_numpy_draws_the_published_philox():
    # Known answer of Random123's kat_vectors for counter 0 and key 0.
    zero = reference.philox4x64([0] * 4, (0, 0))
    assert zero == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(seed=seeds, trial=st.integers(0, 5000), n=st.integers(1, 30))
def test_balanced_masks_are_what_the_definition_says(seed, trial, n):
    expected = reference.balanced_mask(n, 14, 20, seed, trial)
    assert Plan(n=n, subset_ratio=0.7, seed=seed).mask(trial).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(r=ratios, seed=seeds, block=st.integers(0, 50), n=st.integers(1, 200))
def test_every_block_is_balanced_exactly(r, seed, block, n):
    plan = Plan(n=n, subset_ratio=r, seed=seed)
    B = plan.block
    counts = plan.masks(range(block * B, (block + 1) * B)).sum(axis=0)
    assert (counts == round(r * B)).all()


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["balanced", "fixed-size"]),
    r=ratios,
    seed=seeds,
    trials=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
)
def test_masks_do_not_depend_on_order(kind, r, seed, trials):
    plan = Plan(n=50, subset_ratio=r, seed=seed, kind=kind)
    again = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    backwards = again.masks(reversed(trials))[::-1]
    assert np.array_equal(plan.masks(trials), backwards)


def test_the_size_of_tiles_does_not_show(monkeypatch):
    plan = Plan(n=1000, seed=3)
    expected = plan.mask(7)
    monkeypatch.setattr("raymem.plan.TILE", 64)
    assert np.array_equal(plan.mask(7), expected)


def test_fixed_size_subsets_have_the_size():
    plan = Plan(n=101, subset_ratio=0.7, kind="fixed-size")
    assert set(plan.masks(range(30)).sum(axis=1)) == {71}


@pytest.mark.parametrize("kind", ["balanced", "fixed-size"])
def test_each_example_is_in_with_probability_r(kind):
    T, n, r = 2000, 300, 0.7
    counts = Plan(n=n, subset_ratio=r, kind=kind, seed=11).masks(range(T)).sum(axis=0)
    # Balanced blocks leave no variance; independent draws have T r (1 - r). alpha = 1e-6.
    if kind == "balanced":
        assert (counts == T * r).all()
    else:
        spread = ((counts - T * r) ** 2 / (T * r * (1 - r))).sum()
        assert stats.chi2.ppf(5e-7, n) < spread < stats.chi2.ppf(1 - 5e-7, n)


def test_one_balanced_subset_is_a_bernoulli_draw():
    # Sizes of subsets of different blocks are independent Binomial(n, r). alpha = 1e-6.
    n, r = 400, 0.7
    plan = Plan(n=n, subset_ratio=r, seed=5)
    sizes = np.array([plan.mask(20 * block).sum() for block in range(300)])
    spread = ((sizes - n * r) ** 2 / (n * r * (1 - r))).sum()
    assert stats.chi2.ppf(5e-7, 300) < spread < stats.chi2.ppf(1 - 5e-7, 300)


def test_examples_are_drawn_independently_of_each_other():
    # In a block two examples share Hypergeometric(20, 14, 14) trials. alpha = 1e-6.
    n, blocks = 200, 100
    plan = Plan(n=n, subset_ratio=0.7, seed=8)
    shared = []
    for block in range(blocks):
        masks = plan.masks(range(20 * block, 20 * block + 20))
        shared += (masks[:, : n // 2] & masks[:, n // 2 :]).sum(axis=0).tolist()
    expected = stats.hypergeom(20, 14, 14)
    values = np.arange(8, 15)
    seen = np.array([np.sum(np.array(shared) == v) for v in values])
    wanted = expected.pmf(values) * len(shared)
    # Rare ends are pooled with their neighbours.
    keep = wanted > 10
    chi2 = ((seen[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    assert chi2 < stats.chi2.ppf(1 - 1e-6, keep.sum() - 1)
    assert keep.sum() >= 5


def test_neighbouring_seeds_and_blocks_have_unrelated_masks():
    a, b = Plan(n=20_000, seed=0), Plan(n=20_000, seed=1)
    for first, second in ((a.mask(0), b.mask(0)), (a.mask(0), a.mask(20))):
        r = np.corrcoef(first, second)[0, 1]
        assert abs(r) < 4.9 / math.sqrt(20_000)  # alpha = 1e-6


def test_candidate_pool_draws_the_pool_and_keeps_the_rest():
    plan = Plan(n=30, subset_ratio=0.5, kind="candidate-pool", pool=(9, 3, 20))
    masks = plan.masks(range(20))
    rest = np.setdiff1d(np.arange(30), [3, 9, 20])
    assert masks[:, rest].all()
    assert (masks[:, [3, 9, 20]].sum(axis=0) == 10).all()
    assert plan.subset_size == 27 + 2


@settings(max_examples=20, deadline=None)
@given(seed=seeds, trial=st.integers(0, 500))
def test_others_than_candidates_are_drawn_at_their_own_ratio(seed, trial):
    pool = (3, 9, 20)
    plan = Plan(n=30, subset_ratio=0.5, kind="candidate-pool", pool=pool, rest_ratio=0.7, seed=seed)
    candidates, others = (
        reference.balanced_mask(30, members, 20, seed, trial) for members in (10, 14)
    )
    expected = [(candidates if i in pool else others)[i] for i in range(30)]
    assert plan.mask(trial).tolist() == expected
    assert plan.subset_size == 19 + 2  # 0.7 of 27, and half of 3


def test_the_ratio_of_others_is_part_of_the_identity_where_it_is_not_one():
    plan = Plan(n=30, subset_ratio=0.5, kind="candidate-pool", pool=(1,), rest_ratio=0.7)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert plan.as_dict()["rest_ratio"] == 0.7
    whole = Plan(n=30, subset_ratio=0.5, kind="candidate-pool", pool=(1,))
    assert "rest_ratio" not in whole.as_dict()
    # Both ratios are whole in a block, or there is none.
    fine = Plan(n=9, subset_ratio=0.5, kind="candidate-pool", pool=(1,), rest_ratio=0.66)
    assert fine.block == 50
    with pytest.raises(PlanError, match="need blocks of 300 trials"):
        Plan(n=9, subset_ratio=1 / 3, kind="candidate-pool", pool=(1,), rest_ratio=0.99)


def test_ratio_one_has_everything_in():
    plan = Plan(n=5, subset_ratio=1)
    assert plan.masks(range(3)).all()
    assert plan.worst_case_stderr(100) == math.inf


def test_seeds_differ_in_everything_they_depend_on():
    plan = Plan(n=5)
    drawn = [
        seed
        for trial in range(3)
        for epsilon in (1.0, math.inf)
        for attempt in (1, 2)
        for seed in vars(plan.seeds(trial, epsilon, attempt)).values()
    ]
    assert len(set(drawn)) == len(drawn) == 48
    assert all(0 <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"n": 5, "subset_ratio": 0},
        {"n": 5, "subset_ratio": 1.1},
        {"n": 5, "subset_ratio": float("nan")},
        {"n": 5, "subset_ratio": 0.123},
        {"n": 5, "seed": -1},
        {"n": 5, "kind": "cyclic"},
        {"n": 5, "kind": "candidate-pool"},
        {"n": 5, "kind": "candidate-pool", "pool": (1, 1)},
        {"n": 5, "kind": "candidate-pool", "pool": (5,)},
        {"n": 5, "pool": (1,)},
        {"n": 5, "rest_ratio": 0.7},
        {"n": 5, "kind": "candidate-pool", "pool": (1,), "rest_ratio": 0},
        {"n": 5, "kind": "candidate-pool", "pool": (1,), "rest_ratio": 1.1},
        {"n": 1, "kind": "fixed-size", "subset_ratio": 0.3},
    ],
)
def test_impossible_plans_are_refused(settings):
    with pytest.raises(PlanError):
        Plan(**settings)


def test_blocks_are_the_smallest_that_the_ratio_needs():
    for r in (0.5, 0.7, 0.9, 1 / 3, 0.33, 0.995):
        B = block_of(r)
        assert B >= 20
        assert abs(r * B - round(r * B)) < 1e-6
        smaller = [b for b in range(20, B) if abs(r * b - round(r * b)) < 1e-6]
        assert smaller == []
