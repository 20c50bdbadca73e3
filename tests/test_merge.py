"""Two halves of one study become one store: the same whatever the order, the kill, the place."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import uuid

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem import Examples, Recipe, Store, Study, import_npz, merge, score, verify
from raymem.cli import main
from raymem.errors import (
    DamagedObjectError,
    ResultMismatchError,
    StoreError,
    StoreHeldError,
    StudyMismatchError,
)
from raymem.privacy import Mechanism
from raymem.store import DriverLock, Files, Target, TrialKey
from raymem.store.trials import encode

N, M, TRIALS, KEPT = 40, 12, 10, 3
DERIVED = ("scores/", "checkpoints/", "figures/", "driver.json", "links.json", "report.html")
NOTES = ("command.json", "repeat.json", "until.json")
MECHANISM = Mechanism(
    epsilon=2.0, delta=1e-5, sample_rate=0.1, expected_batch=8, steps=10, noise_multiplier=1.5,
    max_grad_norm=1.0, accountant="prv", spent_epsilon=1.99, total_variation=None,
)  # fmt: skip


def key(trial):
    return TrialKey(math.inf, trial)


def study_of(digits, store, **changes):
    few = Examples(
        x_train=digits.x_train[:N], y_train=digits.y_train[:N],
        x_test=digits.x_test[:M], y_test=digits.y_test[:M],
    )  # fmt: skip
    defaults = {"recipe": Recipe(model="mlp-8", epochs=2), "trials": TRIALS, "keep_models": KEPT}
    return Study(examples=few, store=store, **{**defaults, **changes})


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A study that was never interrupted; tests leave it as it is."""
    study = study_of(digits, tmp_path_factory.mktemp("merge") / "whole")
    study.train(engine="serial")
    study.score()
    store = Store(study.store)
    for note in NOTES:
        store.files.replace(note, b"{}")
    store.files.replace("links.json", b"{}")
    store.files.replace("report.html", b"<html>")
    return store


@pytest.fixture(autouse=True)
def _forget_what_is_in_memory():
    yield
    forget()


def forget():
    """Of a file system that looks at all its files to find some."""
    files = Files("memory://")
    for name in [name for name in files.fs.store if name.startswith("/merge-")]:
        del files.fs.store[name]


def place():
    return f"memory://merge-{uuid.uuid4().hex}"


def part(whole, trials, url=None):
    """What a store of these trials only would have."""
    store, trials = Store(url or place()), set(trials)
    for name in whole.files.list():
        trial = TrialKey.parse(name)
        if trial is None or trial.trial in trials:
            store.files.create(name, whole.files.read(name))
    return store


def objects(store):
    """All that is not made of the rest."""
    return {
        name: store.files.read(name)
        for name in store.files.list()
        if not name.startswith(DERIVED) and name not in NOTES
    }


def rewritten(store, trial, *, other=False, without_weights=False, **about):
    """Another run of a trial: with what is recorded of it changed, or with another result."""
    name = key(trial).object_key
    table, recorded = store.trial(key(trial)), {**store.provenance(key(trial)), **about}
    if without_weights:
        recorded.pop("weights")
        store.files.delete(key(trial).weights_key)
    if other:
        margin = table["margin"].to_numpy().copy()
        margin[0] += 1e-3
        at = table.column_names.index("margin")
        table = table.set_column(at, table.field(at), [margin])
    store.files.delete(name)
    assert store.commit(key(trial), table, recorded) == "committed"


# What comes out


@pytest.mark.parametrize("places", ["local", "memory"])
def test_the_halves_score_as_the_whole(whole, tmp_path, places):
    urls = [tmp_path / name if places == "local" else place() for name in "ABO"]
    first, second = part(whole, range(9), urls[0]), part(whole, range(7, TRIALS), urls[1])
    first.target, second.target = Target(trials=9), Target(trials=TRIALS)
    found = merge(first, second, urls[2])
    assert (found.trials, found.copied, found.in_both) == (TRIALS, TRIALS, 2)
    assert (found.drift, found.missing, found.there, found.weights) == (0, 0, 0, KEPT)
    out = Store(urls[2])
    assert objects(out) == objects(whole)
    assert [name for name in out.files.list() if name.startswith(DERIVED)] == []
    assert [name for name in NOTES if out.files.exists(name)] == []
    score(out)
    for name in ("examples", "trials", "folds", "influence"):
        scores = f"scores/{name}.parquet"
        assert out.files.read(scores) == whole.files.read(scores), name
    assert verify(out) == []
    assert set(out.weights(key(0))) == set(whole.weights(key(0)))


subsets = st.sets(st.integers(0, 5))


@settings(max_examples=5, deadline=None)
@given(parts=st.tuples(subsets, subsets, subsets))
def test_merging_is_a_union(whole, parts):
    forget()
    a, b, c = (part(whole, trials) for trials in parts)
    expected = objects(part(whole, set().union(*parts)))
    left, right = place(), place()
    merge(a, b, left)
    assert objects(Store(left)) == objects(part(whole, parts[0] | parts[1]))
    merge(b, a, right)
    assert objects(Store(left)) == objects(Store(right))
    one, other, within = place(), place(), place()
    merge(left, c, one)
    merge(b, c, within)
    merge(a, within, other)
    assert objects(Store(one)) == objects(Store(other)) == expected
    again = merge(left, c, one)
    assert (again.copied, again.weights) == (0, 0)
    assert objects(Store(one)) == expected
    # Into the first itself, too.
    merge(merge_into(a, b), c, a)
    assert objects(a) == expected


def merge_into(first, second):
    merge(first, second, first)
    return first


def test_of_equal_results_the_first_is_taken(whole):
    a, b = part(whole, range(4)), part(whole, range(2, 6))
    rewritten(b, 3, seconds=99.0, host="elsewhere")
    ab, ba = place(), place()
    assert merge(a, b, ab).in_both == 2
    merge(b, a, ba)
    assert Store(ab).provenance(key(3))["host"] == a.provenance(key(3))["host"]
    assert Store(ba).provenance(key(3))["host"] == "elsewhere"
    assert Store(ab).trial(key(3)).equals(Store(ba).trial(key(3)))
    assert set(objects(Store(ab))) == set(objects(Store(ba)))


def test_of_equal_results_the_one_with_weights_is_taken(whole):
    a, b = part(whole, range(2)), part(whole, range(2))
    rewritten(a, 0, without_weights=True)
    for first, second in ((a, b), (b, a)):
        out = Store(place())
        merge(first, second, out)
        assert objects(out) == objects(b)
    # What is there is not replaced, and another run's weights are not put beside it.
    merge(a, b, a)
    assert a.kept() == {key(1)}
    assert [p for p in verify(a) if p.kind != "missing"] == []


def test_weights_come_later_if_they_are_of_the_run(whole):
    a, b = part(whole, range(2)), part(whole, range(2))
    a.files.delete(key(1).weights_key)
    assert merge(a, b, a).weights == 1
    assert objects(a) == objects(b)


def test_the_target_is_all_that_was_wanted(whole):
    a, b, out = part(whole, range(3)), part(whole, range(3)), Store(place())
    a.target = Target(trials=30, epsilons=(math.inf, 2.0))
    b.target = Target(trials=8, epsilons=(0.5,))
    found = merge(a, b, out)
    assert out.target == Target(trials=30, epsilons=(0.5, 2.0, math.inf))
    assert found.missing == 30 * 3 - 3
    assert {p.kind for p in verify(out)} == {"missing"}


def test_epsilons_trained_apart_come_together(whole):
    a, b, out = part(whole, range(4)), part(whole, []), Store(place())
    for trial in range(4):
        table, at = whole.trial(key(trial)), 1
        table = table.set_column(at, table.field(at), [np.full(table.num_rows, 2.0)])
        b.commit(TrialKey(2.0, trial), table, whole.provenance(key(trial)))
    a.target = Target(trials=4)
    b.target = Target(trials=4, epsilons=(2.0,))
    found = merge(a, b, out)
    assert (found.trials, found.in_both, found.missing) == (8, 0, 0)
    assert out.done() == a.done() | b.done()
    assert verify(out) == []
    assert [summary.trials for summary in score(out)] == [4, 4]


def test_a_trial_that_failed_in_one_and_is_done_in_the_other_is_done(whole):
    a, b, out = part(whole, range(3)), part(whole, range(3, TRIALS)), Store(place())
    a.record_failure(key(4), 1, "out-of-memory", "too large")
    b.record_failure(key(1), 1, "diverged", "not finite")
    b.record_failure(key(1), 2, "diverged", "not finite")
    a.record_failure(key(1), 1, "diverged", "not finite, here")
    assert merge(a, b, out).failures == 3
    assert [(f.key.trial, f.attempt) for f in out.failures()] == [(1, 1), (1, 2), (4, 1)]
    assert out.files.read(key(1).failed_key(1)) == a.files.read(key(1).failed_key(1))
    score(out)
    assert set(out.scores("trials")["status"].to_pylist()) == {"done"}
    assert out.files.read("scores/examples.parquet") == whole.files.read("scores/examples.parquet")
    a.files.replace(key(4).failed_key(1), b"{")
    with pytest.raises(DamagedObjectError, match=r"000004\.1\.json in memory:.*verify memory:"):
        merge(a, b, place())


def test_imported_fleets_merge_too(tmp_path):
    generator = np.random.default_rng(0)
    masks = generator.random((6, 10)) < 0.5
    np.savez(tmp_path / "fleet.npz", masks=masks, correct_train=masks)
    whole = import_npz(tmp_path / "fleet.npz", tmp_path / "whole")
    a, b = part(whole, range(3)), part(whole, range(2, 6))
    output = raymem("merge", a.url, b.url, tmp_path / "out")
    assert "raymem import npz FILE" in output
    assert objects(Store(tmp_path / "out")) == objects(whole)


# Kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize("into_first", [False, True])
def test_a_killed_merge_goes_on_to_the_same_store(whole, monkeypatch, into_first):
    expected, writes = objects(part(whole, range(4))), 0
    for limit in itertools.count():
        a, b = part(whole, {0, 2}), part(whole, {1, 2, 3})
        rewritten(b, 2, seconds=99.0)
        out = a if into_first else Store(place())
        written = itertools.count()

        def create(self, name, data, real=Files.create, written=written, limit=limit):
            if name != "driver.json" and next(written) == limit:
                raise Killed
            return real(self, name, data)

        monkeypatch.setattr(Files, "create", create)
        try:
            merge(a, b, out)
        except Killed:
            writes += 1
        else:
            break
        finally:
            monkeypatch.undo()
        between = objects(out)
        merge(a, b, out)
        assert objects(out) == expected
        assert between.items() <= expected.items()
        assert {p.kind for p in verify(out)} <= {"missing"}
    assert writes == (4 if into_first else 9)


def test_weights_of_a_run_that_was_killed_are_replaced(whole):
    a, b, out = part(whole, [0]), part(whole, [1]), Store(place())
    out.files.create(key(0).weights_key, b.files.read(key(1).weights_key))
    merge(a, b, out)
    assert objects(out) == objects(part(whole, range(2)))


def test_a_store_that_another_driver_took_over_is_left(whole, monkeypatch):
    out, real = place(), DriverLock.__enter__

    def lost(self):
        real(self).lost.set()
        return self

    monkeypatch.setattr(DriverLock, "__enter__", lost)
    with pytest.raises(StoreHeldError, match="took"):
        merge(part(whole, [0]), part(whole, [1]), out)
    assert Store(out).done() == set()


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"plan\.seed: .* has 0, .* has 1"),
        ({"subset_ratio": 0.5}, r"plan\.subset_ratio: .* has 0\.7, .* has 0\.5"),
        ({"recipe": Recipe(model="mlp-8", epochs=3)}, r"recipe\.epochs: .* has 2, .* has 3"),
    ],
)
def test_another_study_is_refused_with_the_difference(digits, whole, changes, message):
    other = study_of(digits, place(), **changes).open_store()
    here, out = part(whole, range(2)), Store(place())
    with pytest.raises(StudyMismatchError, match=message):
        merge(here, other, out)
    assert out.files.list() == []
    with pytest.raises(StudyMismatchError, match=message):
        merge(here, part(whole, [3]), other)
    assert other.done() == set()


def test_results_of_one_hardware_that_differ_are_refused(whole):
    a, b, out = part(whole, range(8)), part(whole, range(8)), Store(place())
    rewritten(b, 4, other=True)
    rewritten(b, 6, other=True)
    rewritten(b, 7, other=True, arithmetic="another machine")
    for order in ((a, b), (b, a)):
        with pytest.raises(ResultMismatchError, match=r"^trial 4, trial 6: memory") as caught:
            merge(*order, out)
        assert "\n" not in str(caught.value)
    assert out.files.list() == []


@pytest.mark.parametrize("about", [{"arithmetic": "another machine"}, {"device": "cuda"}])
def test_results_of_other_hardware_drift_and_the_first_stays(whole, about):
    a, b = part(whole, range(4)), part(whole, range(6))
    for store in (a, b):
        rewritten(
            store, 1, other=store is b, **({} if store is a and "device" not in about else about)
        )
    ab, ba = Store(place()), Store(place())
    assert merge(a, b, ab).drift == 1
    assert merge(b, a, ba).drift == 1
    for out, first in ((ab, a), (ba, b)):
        name = key(1).object_key
        assert out.files.read(name) == first.files.read(name)
        assert [p for p in verify(out) if p.kind != "missing"] == []
    # What is in the merged store already stays there.
    assert merge(b, a, ab).drift == 1
    assert ab.files.read(key(1).object_key) == a.files.read(key(1).object_key)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "damage", [lambda d: flip(d, len(d) // 3), lambda d: flip(d, 40), lambda d: d[:-20]]
)
def test_a_damaged_trial_is_named(whole, damage, which):
    stores, out = [part(whole, range(4)), part(whole, range(3, 6))], Store(place())
    name = key(3).object_key
    stores[which].files.replace(name, damage(stores[which].files.read(name)))
    for place_ in (out, stores[0]):
        with pytest.raises(DamagedObjectError) as caught:
            merge(*stores, place_)
        text = str(caught.value)
        assert text.startswith(f"{name} in {stores[which].url} is damaged (")
        assert f"raymem verify {stores[which].url} --repair" in text
        assert "\n" not in text
    verify(stores[which], repair=True)
    merge(*stores, out)
    assert objects(out) == objects(part(whole, range(6)))


def test_a_trial_with_a_wrong_digest_or_place_is_named(whole):
    a, b = part(whole, range(3)), part(whole, range(3, 6))
    table, about = a.trial(key(1)), a.provenance(key(1))
    a.files.replace(key(1).object_key, encode(table, {**about, "digest": "0" * 64}))
    with pytest.raises(DamagedObjectError, match="recorded digest"):
        merge(a, b, place())
    a.files.replace(key(1).object_key, b.files.read(key(4).object_key))
    with pytest.raises(DamagedObjectError, match="subset is not the plan's"):
        merge(a, b, place())
    a.files.replace(key(1).object_key, a.files.read("examples.parquet"))
    with pytest.raises(DamagedObjectError, match="does not record digest"):
        merge(a, b, place())


@pytest.mark.parametrize("name", ["examples.parquet", "target.json", key(0).weights_key])
def test_other_damage_is_named_too(whole, name):
    a, b = part(whole, range(3)), part(whole, range(3, 6))
    a.files.replace(name, a.files.read(name)[:-9])
    with pytest.raises(DamagedObjectError, match=f"{name} in {a.url} is damaged"):
        merge(a, b, place())


def test_an_edited_study_is_refused(whole):
    a, b = part(whole, range(3)), part(whole, range(3, 6))
    body = json.loads(b.files.read("study.json"))
    body["study"]["plan"]["seed"] = 5
    b.files.replace("study.json", json.dumps(body).encode())
    with pytest.raises(DamagedObjectError, match="edited"):
        merge(a, b, place())


def test_places_that_make_no_sense_are_refused(whole, tmp_path):
    a, b = part(whole, [0], tmp_path / "a"), part(whole, [1], tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for first, second, out, message in (
        (a, tmp_path / "link", tmp_path / "out", "given twice"),
        (a, b, b, f"give it first: `raymem merge {b.url} {a.url} {b.url}`"),
        (a, b, tmp_path / "a" / "out", "is inside"),
        (a, b, tmp_path, "is inside"),
        (a, tmp_path / "nothing", tmp_path / "out", "there is no study in"),
    ):
        with pytest.raises(StoreError, match=message):
            merge(first, second, out)
    assert not (tmp_path / "out").exists()
    assert merge(a, b, tmp_path / "link").trials == 2
    assert a.done() == {key(0), key(1)}
    lost = part(whole, [4])
    lost.files.delete("study.json")
    with pytest.raises(StoreError, match=r"no study\.json"):
        merge(a, b, lost)


def test_mechanisms_must_agree(whole):
    a, b, out = part(whole, [0]), part(whole, [1]), Store(place())
    a.fix_mechanism(MECHANISM)
    b.fix_mechanism(dataclasses.replace(MECHANISM, epsilon=8.0))
    merge(a, b, out)
    assert (out.mechanism(2.0), out.mechanism(8.0)) == (a.mechanism(2.0), b.mechanism(8.0))
    b.fix_mechanism(dataclasses.replace(MECHANISM, noise_multiplier=1.6))
    with pytest.raises(StudyMismatchError, match=r"noise_multiplier: .* has 1\.5, .* has 1\.6"):
        merge(a, b, place())


# Streamed curvature


def stream(store, model, shards, **about):
    about = {"weights": "w", "data": "s3://set", "raymem": "0.1", **about}
    store.files.create(f"curvature/{model}/_about.json", json.dumps(about).encode())
    for shard in shards:
        store.write_streamed(model, shard, pa.table({"example_id": [shard]}), about)


def test_streamed_curvature_is_joined_shard_by_shard(whole):
    a, b, out = part(whole, [0]), part(whole, [1]), Store(place())
    stream(a, "resnet50", ["x", "y"])
    stream(b, "resnet50", ["y", "z"], raymem="0.2")
    stream(b, "other", ["x"])
    assert merge(a, b, out).shards == 4
    assert out.streamed() == {"other": {"x"}, "resnet50": {"x", "y", "z"}}
    assert out.curvature("resnet50")["example_id"].to_pylist() == ["x", "y", "z"]
    assert merge(a, b, out).shards == 0
    stream(b, "third", ["x"])
    stream(a, "third", ["y"], weights="v")
    with pytest.raises(StudyMismatchError, match=r"curvature/third .*weights: .* has v, .* has w"):
        merge(a, b, out)
    assert not out.files.exists("curvature/third/_about.json")


def test_curvature_of_a_run_that_drifted_is_left_out(whole):
    a, b, out = part(whole, [0, 1]), part(whole, [0, 1, 2]), Store(place())
    weights = {n: b.provenance(key(n))["weights"] for n in range(3)}
    rewritten(b, 1, other=True, arithmetic="another machine", weights="of another run")
    for n in range(3):
        stream(b, f"eps-inf-{n:06d}", ["x"], weights=weights[n] if n != 1 else "of another run")
    stream(a, "eps-inf-000000", ["y"], weights=weights[0])
    b.files.delete(key(1).weights_key)
    assert merge(a, b, out).drift == 1
    assert out.streamed() == {"eps-inf-000000": {"x", "y"}, "eps-inf-000002": {"x"}}
    assert out.kept() == {key(0), key(1), key(2)}


# The command


def raymem(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_says_what_it_did_and_what_is_next(whole, tmp_path):
    a, b = part(whole, range(5), tmp_path / "a"), part(whole, range(3, 8), tmp_path / "b")
    rewritten(b, 4, other=True, arithmetic="another machine")
    for store in (a, b):
        store.target = Target(trials=10)
    output = raymem("merge", a.url, b.url, tmp_path / "out")
    assert "out: 8 trials, 2 more are wanted" in output
    assert "copied: 8 trials, weights of 3 models, 0 failed attempts, 0 shards" in output
    assert "in both: 2 trials" in output
    assert "drift: 1 trials" in output
    assert "run its job with --store" in output
    for store in (a, b):
        store.target = Target(trials=8)
    b = part(whole, range(5, 8), tmp_path / "c")
    b.target = Target(trials=8)
    output = raymem("merge", a.url, b.url, a.url)
    assert "copied: 3 trials" in output
    assert f"the job's `score` stage: python jobs/NAME.py score --store {a.url}" in output
    with DriverLock(a.files):
        assert "is held by process" in raymem("merge", a.url, b.url, a.url, code=3)
    assert raymem("merge", a.url, a.url, a.url, code=1).startswith("error: ")
