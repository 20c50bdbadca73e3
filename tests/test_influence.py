"""Influence against the double loop, its tiles, its threshold, and a planted pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raymem import Examples, Plan, Recipe, Study, influence
from raymem.scores import Bits, PairRule, find_pairs, hypergeometric_tail, join_pairs, pairs_work
from raymem.scores import influence_table as scoring_pairs
from raymem.scores.trial_sums import Outcomes


def module():
    import sys

    return sys.modules["raymem.scores.influence_pairs"]


def fleet(T=60, N=50, M=30, seed=0, balanced=True):
    """Masks, outcomes that depend on a few of them, memorization, labels."""
    generator = np.random.default_rng(seed)
    plan, drawn = Plan(n=N, seed=seed), generator.random((T, N)) < 0.7
    masks = plan.masks(range(T)) if balanced else drawn
    p = generator.random(M)
    correct = generator.random((T, M)) < p
    for j in range(0, M, 3):
        correct[:, j] = np.where(masks[:, j % N], generator.random(T) < 0.95, correct[:, j])
    correct[:, 1], correct[:, 2] = True, False
    mem = generator.random(N)
    return masks, correct, mem, generator.integers(0, 3, N), generator.integers(0, 3, M)


@pytest.mark.parametrize("balanced", [True, False])
def test_influence_is_the_double_loop(balanced):
    masks, correct, *_ = fleet(balanced=balanced)
    masks[:, 7], masks[:, 8] = True, False
    value, stderr = influence(masks, correct)
    expected = reference.influence(masks.tolist(), correct.tolist())
    for i in range(50):
        for j in range(30):
            if expected[i][j] is None:
                assert i in (7, 8)
                assert math.isnan(value[i, j])
                assert math.isnan(stderr[i, j])
            else:
                assert value[i, j] == pytest.approx(expected[i][j], abs=1e-9)
    inside, outside = correct[masks[:, 0], 4], correct[~masks[:, 0], 4]
    of_means = inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)
    assert stderr[0, 4] == pytest.approx(math.sqrt(of_means))


def as_dict(pairs):
    return {
        (int(i), int(j)): bool(s)
        for i, j, s in zip(pairs.train_index, pairs.test_index, pairs.strong, strict=True)
    }


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("same_class", [True, False])
@pytest.mark.parametrize("top", [0, 1, 4, 60])
def test_kept_pairs_are_those_of_the_rule_whatever_the_tiles(
    monkeypatch, balanced, same_class, top
):
    masks, correct, mem, y_train, y_test = fleet(balanced=balanced)
    rule = PairRule(top=top, level=0.1, same_class=same_class)
    expected = reference.kept_pairs(
        masks.tolist(), correct.tolist(), mem, y_train, y_test, least=0.15, least_mem=0.25,
        level=0.1, top=top, same_class=same_class,
    )  # fmt: skip
    assert sum(expected.values()) > 5
    for test_tile, train_tile in ((512, 4096), (8, 8), (16, 24)):
        monkeypatch.setattr(module(), "TEST_TILE", test_tile)
        monkeypatch.setattr(module(), "TRAIN_TILE", train_tile)
        pairs = find_pairs(masks, correct, mem, y_train, y_test, rule)
        assert as_dict(pairs) == expected
        value, stderr = influence(masks, correct)
        at = (pairs.train_index, pairs.test_index)
        assert pairs.influence == pytest.approx(value[at], abs=1e-12)
        assert pairs.stderr == pytest.approx(stderr[at], abs=1e-12)
        order = list(zip(~pairs.strong, -pairs.influence, strict=True))
        assert order == sorted(order)


def test_parts_joined_are_the_whole_and_max_pairs_is_hard():
    masks, correct, mem, y_train, y_test = fleet()
    for most in (1_000_000, 12):
        rule = PairRule(level=0.1, max_pairs=most)
        whole = find_pairs(masks, correct, mem, y_train, y_test, rule)
        parts = [
            find_pairs(masks, correct, mem, y_train, y_test, rule, tests=slice(s, s + 8))
            for s in range(0, 30, 8)
        ]
        joined = join_pairs(parts, rule)
        for name in ("train_index", "test_index", "influence", "stderr", "strong"):
            assert np.array_equal(getattr(whole, name), getattr(joined, name)), name
        assert whole.dropped == joined.dropped
        if most == 12:
            assert len(whole.influence) == 12
            full = find_pairs(masks, correct, mem, y_train, y_test, PairRule(level=0.1))
            assert whole.dropped == len(full.influence) - 12
            assert list(as_dict(whole).items()) == list(as_dict(full).items())[:12]


def test_same_class_only_is_the_default_from_a_thousand_classes_up():
    masks, correct, mem, *_ = fleet(N=50, M=30)
    few = find_pairs(masks, correct, mem, np.arange(50) % 10, np.arange(30) % 10)
    assert few.considered == (mem >= 0.25).sum() * 30
    assert (few.train_index % 10 != few.test_index % 10).any()
    many = np.arange(50) * 40, np.arange(30) * 40
    kept = find_pairs(masks, correct, mem, *many, PairRule(same_class=None))
    assert kept.considered == (mem >= 0.25).sum() * 30  # 50 classes only
    masks, correct, mem, *_ = fleet(N=1200, M=30)
    kept = find_pairs(masks, correct, mem, np.arange(1200), np.arange(30))
    assert (kept.train_index == kept.test_index).all()
    assert kept.considered == (mem[:30] >= 0.25).sum()


PER_PAIR = ("train_index", "test_index", "influence", "stderr", "strong")


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def sort_pairs(found):
    """The order of InfluencePairs: strong first, then by influence, test and training example."""
    keys = (found["train_index"], found["test_index"], -found["influence"], ~found["strong"])
    order = np.lexsort(keys)
    return {name: values[order] for name, values in found.items()}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    trials=st.integers(2, 40),
    classes=st.integers(1, 12),
    top=st.integers(0, 5),
    tiles=st.sampled_from([(512, 4096), (8, 8), (4, 24), (3, 5)]),
)
def test_pairs_of_one_class_are_all_pairs_of_each_class_alone(seed, trials, classes, top, tiles):
    """By class on the whole set; and all pairs, on each class cut out. The same to the bit."""
    generator = np.random.default_rng(seed)
    N, M = generator.integers(1, 90, 2)
    masks, correct, mem, *_ = fleet(T=trials, N=N, M=max(M, 3), seed=seed, balanced=False)
    M = correct.shape[1]
    mem[generator.random(N) < 0.1] = np.nan
    # Unequal classes; the last ones may be on one side only, or nowhere.
    y_train = (classes * generator.random(N) ** 2).astype(int)
    y_test = (classes * generator.random(M) ** 2).astype(int) + generator.integers(0, 2)
    rule = PairRule(level=0.2, top=top, same_class=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(), "TEST_TILE", tiles[0])
        patch.setattr(module(), "TRAIN_TILE", tiles[1])
        whole = find_pairs(masks, correct, mem, y_train, y_test, rule)
        cuts = [slice(0, M // 3), slice(M // 3, M)], [generator.permutation(M)[::2]]
        cuts[1].append(np.setdiff1d(np.arange(M), cuts[1][0]))
        for parts in cuts:
            found = [find_pairs(masks, correct, mem, y_train, y_test, rule, tests=p) for p in parts]
            joined = join_pairs(found, rule)
            for name in PER_PAIR:
                assert same(getattr(whole, name), getattr(joined, name)), name
    expected = {name: [] for name in PER_PAIR}
    for label in np.intersect1d(y_train, y_test):
        i, j = np.flatnonzero(y_train == label), np.flatnonzero(y_test == label)
        alone = find_pairs(
            masks[:, i], correct[:, j], mem[i], np.zeros(len(i)), np.zeros(len(j)),
            PairRule(level=0.2, top=top, same_class=False),
        )  # fmt: skip
        expected["train_index"].append(i[alone.train_index])
        expected["test_index"].append(j[alone.test_index])
        for name in PER_PAIR[2:]:
            expected[name].append(getattr(alone, name))
    empty = {name: getattr(whole, name)[:0] for name in PER_PAIR}
    expected = sort_pairs({n: np.concatenate([empty[n], *v]) for n, v in expected.items()})
    for name in PER_PAIR:
        assert same(getattr(whole, name), expected[name]), name


def test_by_class_no_pair_of_two_classes_is_multiplied(monkeypatch):
    """The columns that are unpacked, of T = 20 trials: of each class its own, once."""
    masks, correct, mem, *_ = fleet(T=20, N=300, M=60)
    y_train, y_test = np.arange(300) % 30, np.arange(60) % 40
    taken, take = [], Bits.take
    monkeypatch.setattr(Bits, "take", lambda bits, at: (taken.append(at), take(bits, at))[1])
    find_pairs(masks, correct, mem, y_train, y_test, PairRule(same_class=True))
    for tests, *trains in _by_tests(taken):
        assert len({*(y_test[tests]), *(label for at in trains for label in y_train[at])}) == 1
    assert sum(len(at) for at in taken) == 60 + 300  # 30 classes of ten, each gathered once


def _by_tests(taken):
    """Lists of what was taken: test examples, of which each class here has two or fewer, first."""
    for at in taken:
        if len(at) <= 2:
            group = [at]
            yield group
        else:
            group.append(at)


def test_work_is_counted_by_class_where_pairs_are():
    y_train, y_test = np.repeat(np.arange(1000), 1281), np.repeat(np.arange(1000), 50)
    by_class = pairs_work(2000, y_train, y_test, PairRule())
    everything = pairs_work(2000, y_train, y_test, PairRule(same_class=False))
    assert everything == 2000 * 1_281_000 * 50_000
    assert everything / 1000 < by_class < scoring_pairs.WORK_FOR_RAY < everything / 10


def test_tasks_have_whole_classes_and_all_test_examples(monkeypatch):
    monkeypatch.setattr(scoring_pairs, "TESTS_PER_TASK", 64)
    y_test = np.random.default_rng(0).integers(0, 40, 500)
    for by_class in (True, False):
        parts = scoring_pairs.parts_of(np.arange(40), y_test, PairRule(same_class=by_class))
        assert sorted(np.concatenate(parts).tolist()) == list(range(500))
        assert max(len(part) for part in parts) <= 64
        shared = sum(len(set(y_test[part])) for part in parts) - 40
        assert (shared < len(parts)) == by_class


def test_by_default_about_one_pair_is_kept_by_chance():
    """Masks that have nothing to do with outcomes; 40 fleets, expectation 40, Poisson-like."""
    strong = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        masks = Plan(n=200, seed=seed).masks(range(200))
        correct = generator.random((200, 100)) < generator.uniform(0.3, 0.7, 100)
        labels = np.zeros(200, int), np.zeros(100, int)
        rule = PairRule(min_influence=0, top=0)
        pairs = find_pairs(masks, correct, np.ones(200), *labels, rule)
        assert pairs.considered == 20_000
        assert pairs.level * 20_000 == pytest.approx(1)
        strong += len(pairs.strong)
    assert 10 <= strong <= 80


def test_under_permuted_masks_the_level_keeps_what_it_says():
    generator = np.random.default_rng(3)
    masks = Plan(n=400).masks(range(200))
    correct = generator.random((200, 300)) < generator.uniform(0.3, 0.7, 300)
    for level in (0.05, 0.02, 0.001):
        rule = PairRule(min_influence=0, top=0, level=level)
        pairs = find_pairs(masks, correct, np.ones(400), np.zeros(400), np.zeros(300), rule)
        # 120,000 pairs, of which those of one row or column are nearly independent. Counts are
        # discrete, so that fewer pass than the level allows.
        noise = math.sqrt(level * (1 - level) / 120_000)
        assert 0.6 * level - 8 * noise < len(pairs.strong) / 120_000 < level + 8 * noise


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8, 0.9])
def test_one_false_pair_is_expected_at_any_ratio(ratio):
    """A million pairs without influence, influence of 0.15 or more: the exact p-value lets one pass
    by chance, at 100, 200 and 400 trials; a normal approximation far more from ratio 0.8 on."""
    generator = np.random.default_rng(0)
    exact, normal, pairs = 0, 0, 1_000_000
    for T in (100, 200, 400):
        n_in = round(ratio * T)
        right = generator.binomial(T, generator.uniform(0.02, 0.98, pairs))
        k = generator.hypergeometric(right, T - right, n_in)
        p = right / T
        value = k / n_in - (right - k) / (T - n_in)
        null = np.sqrt(p * (1 - p) * (1 / n_in + 1 / (T - n_in)))
        at = np.flatnonzero(value >= 0.15)
        tail = hypergeometric_tail(k[at], np.full(len(at), n_in), right[at], T, below=1 / pairs)
        exact += int((tail <= 1 / pairs).sum())
        normal += int((value[at] >= stats.norm.isf(1 / pairs) * null[at]).sum())
    # Three expected; nine or more of a Poisson number of mean 3 have a probability of 0.4%.
    assert exact <= 8
    if ratio >= 0.8:
        assert normal > 3 * max(3, exact)


def test_tails_are_those_of_exact_integers():
    generator = np.random.default_rng(1)
    for T in (1, 7, 40, 300):
        n, m = (generator.integers(0, T + 1, 50) for _ in range(2))
        k = generator.integers(0, T + 1, 50)
        found = hypergeometric_tail(k, n, m, T)
        expected = [
            reference.hypergeometric_tail(*map(int, at), T) for at in zip(k, n, m, strict=True)
        ]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)
    # A tail whose first term is above the level is not summed.
    assert hypergeometric_tail(np.array([5]), np.array([10]), np.array([10]), 20, below=0.01) == 1


def test_bits_pack_and_unpack():
    table = np.random.default_rng(0).random((5, 29)) < 0.5
    bits = Bits.of(table)
    assert np.array_equal(bits.counts(), table.sum(axis=0))
    assert np.array_equal(bits.columns(8, 100), table[:, 8:])
    assert bits.columns(0, 8).dtype == bits.take(np.array([3])).dtype == np.float32
    for chosen in ([], [5], [28, 0, 9, 9], range(8, 20), range(29)):
        assert np.array_equal(bits.take(np.array(chosen, int)), table[:, list(chosen)])
    assert Bits(9).take(np.array([1, 8])).shape == (0, 2)
    with pytest.raises(ValueError, match="a row of 29"):
        bits.append(table[0, :10])


@pytest.mark.parametrize("wrong", ["trials", "mem", "labels", "values"])
def test_what_does_not_fit_is_refused(wrong):
    masks, correct, mem, y_train, y_test = fleet()
    change = {
        "trials": (masks[:-1], correct, mem, y_train, y_test),
        "mem": (masks, correct, mem[:-1], y_train, y_test),
        "labels": (masks, correct, mem, y_train, y_test[:-1]),
        "values": (masks * 2, correct, mem, y_train, y_test),
    }
    with pytest.raises(ValueError, match=r"trials|entries|true or false"):
        find_pairs(*change[wrong])
    with pytest.raises(ValueError, match="max_pairs"):
        PairRule(max_pairs=0)


def test_without_trials_there_are_no_pairs():
    pairs = find_pairs(Bits(10), Bits(4), np.full(10, np.nan), np.zeros(10), np.zeros(4))
    assert len(pairs.influence) == 0


@pytest.mark.slow
def test_on_ray_tasks_the_pairs_are_the_same(monkeypatch):
    masks, correct, mem, y_train, y_test = fleet()
    outcomes = Outcomes(50, 30, np.zeros(0, np.int64))
    for mask, right in zip(masks, correct, strict=True):
        outcomes.append(np.concatenate([np.zeros(30, bool), mask]), np.append(right, mask))
    for by_class in (False, True):
        arguments = (outcomes, mem, y_train, y_test, PairRule(level=0.1, same_class=by_class))
        here = scoring_pairs.influence_pairs(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(scoring_pairs, "WORK_FOR_RAY", 0)
            patch.setattr(scoring_pairs, "TESTS_PER_TASK", 8)
            there = scoring_pairs.influence_pairs(*arguments)
        assert list(as_dict(here).items()) == list(as_dict(there).items())
        assert here.strong.sum() > 5


def test_a_planted_pair_is_at_the_top(tmp_path, digits):
    """A test image, mislabelled, and its copy in training: only the copy teaches that label."""
    y_train, x_train = digits.y_train[:300].copy(), digits.x_train[:300].copy()
    y_test = digits.y_test[:60].copy()
    x_train[17] = digits.x_test[5]
    y_train[17] = y_test[5] = (digits.y_test[5] + 3) % 10
    study = Study(
        examples=Examples(
            x_train=x_train, y_train=y_train, x_test=digits.x_test[:60], y_test=y_test
        ),
        recipe=Recipe(model="mlp-256", epochs=30, batch_size=32),
        store=tmp_path,
        trials=40,
    )
    study.train(engine="serial")
    study.score()
    first = study.scores("influence").to_pylist()[0]
    assert (first["train_index"], first["test_index"]) == (17, 5)
    assert first["strong"]
    assert first["influence"] > 0.9
    assert (first["train_label"], first["test_label"]) == (y_train[17], y_test[5])
    assert first["memorization"] > 0.9
    group = study.open_store().examples()["near_duplicate_group"].to_pylist()
    assert group[17] is not None
    assert group[17] == group[300 + 5]
