from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from typing import get_args

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from learners import memorizes_everything, memorizes_nothing, numbered_examples, recipe
from processes import wait_until

from raymem import Store, Study, verify
from raymem.errors import (
    DamagedObjectError,
    ResultMismatchError,
    StoreError,
    StoreFullError,
    StoreHeldError,
    StudyMismatchError,
)
from raymem.store import DriverLock, Files, Target, TrialKey
from raymem.store import lock as lock_module
from raymem.store.derived import Note
from raymem.store.trials import digest, encode

KEY = TrialKey(math.inf, 3)


@pytest.fixture(params=["local", "memory"])
def files(request, tmp_path):
    return Files(tmp_path / "store" if request.param == "local" else f"memory://{tmp_path.name}")


def small_study(store, **changes):
    settings = {
        "examples": numbered_examples(),
        "recipe": recipe(memorizes_everything),
        "store": store,
        "trials": 4,
        **changes,
    }
    return Study(**settings)


@pytest.fixture
def trained(tmp_path):
    study = small_study(tmp_path / "store")
    study.train(engine="serial")
    study.score()
    return study


# Files


def test_create_is_if_absent_and_replace_is_not(files):
    assert files.create("a/b.json", b"first")
    assert not files.create("a/b.json", b"second")
    assert files.read("a/b.json") == b"first"
    files.replace("a/b.json", b"third")
    assert files.read("a/b.json") == b"third"
    files.replace("a/c.json", b"")
    assert files.list() == ["a/b.json", "a/c.json"]
    assert files.list("nothing/here") == []
    files.delete("a/b.json")
    files.delete("a/b.json")
    assert not files.exists("a/b.json")


def test_one_of_many_racers_creates(tmp_path):
    files, won, start = Files(tmp_path), [], threading.Barrier(8)

    def race(n):
        start.wait()
        if files.create("key", str(n).encode() * 1000):
            won.append(n)

    for round_ in range(20):
        threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == round_ + 1
        assert files.read("key") == str(won[-1]).encode() * 1000
        files.delete("key")
    assert list(files.temporaries()) == []


@pytest.mark.parametrize("point", ["fsync", "link"])
def test_a_kill_while_writing_leaves_no_object(tmp_path, monkeypatch, point):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    files = Files(tmp_path)
    monkeypatch.setattr(os, point, kill)
    with pytest.raises(Killed):
        files.create("trials/x", b"half")
    monkeypatch.undo()
    assert files.list() == []
    assert files.create("trials/x", b"whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, "no space")

    files = Files(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    for write in (files.create, files.replace):
        with pytest.raises(StoreFullError, match="free some") as caught:
            write("a/b", b"data")
        assert caught.value.exit_code == 4
    assert files.list() == []
    assert list(files.temporaries()) == []


def test_disks_without_hard_links_are_written_too(tmp_path, monkeypatch):
    def no_links(*arguments):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    files = Files(tmp_path)
    assert files.create("a", b"1")
    assert not files.create("a", b"2")
    assert files.read("a") == b"1"


def test_unknown_file_systems_say_what_to_install():
    with pytest.raises(StoreError, match="raymem"):
        Files("carrier-pigeon://coop")


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="choose another --store"):
        Files(tmp_path / "file").create("a", b"")


# Study


def test_a_study_is_made_once_and_found_again(tmp_path):
    store = small_study(tmp_path).open_store()
    first = store.files.read("study.json")
    small_study(tmp_path, trials=100).open_store()
    assert store.files.read("study.json") == first
    assert store.plan() == small_study(tmp_path).plan
    assert store.target == Target(trials=0)
    store.target = Target(trials=5, epsilons=(0.5, math.inf))
    assert Store(tmp_path).target == Target(trials=5, epsilons=(0.5, math.inf))
    assert len(store.target.wanted()) == 10


def changed_examples():
    e = numbered_examples()
    x, y = e.x_train.copy(), e.y_train.copy()
    x[5, 1, 1] = 9
    y[7] = (y[7] + 1) % 4
    return type(e)(x_train=x, y_train=y, x_test=e.x_test, y_test=e.y_test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "plan.seed: store has 0, this run has 1"),
        ({"subset_ratio": 0.5}, "plan.subset_ratio: store has 0.7, this run has 0.5"),
        ({"kind": "fixed-size"}, "plan.kind"),
        ({"recipe": recipe(memorizes_everything, epochs=3)}, "recipe.epochs: store has 2"),
        ({"recipe": recipe(memorizes_nothing)}, "recipe.model.code"),
        ({"examples": changed_examples()}, "train-00005.content_hash"),
        ({"examples": changed_examples()}, "train-00007.label: store has 3, this run has 0"),
    ],
)
def test_another_study_is_refused_with_the_difference(tmp_path, changes, message):
    small_study(tmp_path).open_store()
    with pytest.raises(StudyMismatchError, match=message):
        small_study(tmp_path, **changes).open_store()


def test_no_study_and_a_newer_format_are_said(tmp_path):
    with pytest.raises(StoreError, match="there is no study"):
        Store(tmp_path).study()
    store = small_study(tmp_path).open_store()
    body = json.loads(store.files.read("study.json"))
    store.files.replace("study.json", json.dumps({**body, "format": 99}).encode())
    with pytest.raises(StoreError, match="format 99"):
        store.study()


# Trials


def test_trial_files_have_the_columns_and_the_words(trained):
    store = Store(trained.store)
    schema = pq.read_schema(store.files.path(KEY.object_key))
    expected = {
        "trial": "int32", "epsilon": "double", "split": "string", "index": "int64",
        "in_subset": "bool", "correct": "bool", "margin": "float", "cumulative_loss": "float",
        "learning_epoch": "int32", "forgetting_count": "int32",
    }  # fmt: skip
    assert {field.name: str(field.type) for field in schema} == expected
    assert all(field.metadata[b"meaning"] for field in schema)
    table = store.trial(KEY)
    assert table["split"].to_pylist() == ["train"] * 60 + ["test"] * 20
    assert table["index"].to_pylist() == [*range(60), *range(20)]
    inside = table["in_subset"].to_pylist()
    assert inside == trained.plan.mask(3).tolist() + [None] * 20
    assert table.select(["split", "index"]).equals(store.examples().select(["split", "index"]))
    assert [v is None for v in table["cumulative_loss"].to_pylist()] == [not i for i in inside]
    assert set(table["epsilon"].to_pylist()) == {math.inf}


def test_trials_whose_test_rows_come_first_are_damage(trained):
    """By position they would be taken for training examples."""
    store = Store(trained.store)
    table, about = store.trial(KEY), store.provenance(KEY)
    n_train = trained.plan.n
    turned = pa.concat_tables([table.slice(n_train), table.slice(0, n_train)])
    store.files.delete(KEY.object_key)
    store.commit(KEY, turned, about)
    with pytest.raises(DamagedObjectError, match="test rows among its training rows"):
        trained.score()
    with pytest.raises(DamagedObjectError, match="test rows among its training rows"):
        store.train_rows(KEY, ["correct"])
    assert problems_of(store) == {("damaged", KEY.object_key)}


def test_all_trials_scan_as_one_table(trained):
    folder = Store(trained.store).files.path("trials")
    table = pq.read_table(folder, partitioning=None)
    assert table.num_rows == 4 * 80
    assert sorted(set(table["trial"].to_pylist())) == [0, 1, 2, 3]


def test_other_tools_read_the_tables(trained):
    path = Store(trained.store).files.path("scores/examples.parquet")
    import duckdb
    import pandas
    import polars

    memorized = pandas.read_parquet(path)["memorization"].dropna()
    assert polars.read_parquet(path)["memorization"].drop_nulls().to_list() == memorized.tolist()
    (count,) = duckdb.sql(f"select count(memorization) from '{path}'").fetchall()[0]
    assert count == len(memorized) > 0


def test_a_commit_is_once_and_a_different_result_is_noticed(trained):
    store = Store(trained.store)
    table, about = store.trial(KEY), store.provenance(KEY)
    before = store.files.read(KEY.object_key)
    assert store.commit(KEY, table, {**about, "seconds": 99}) == "duplicate"
    margin = table["margin"].to_numpy().copy()
    margin[0] += 1e-6
    place = table.column_names.index("margin")
    other = table.set_column(place, table.field(place), [margin])
    with pytest.raises(ResultMismatchError, match="two results"):
        store.commit(KEY, other, about)
    assert store.commit(KEY, other, {**about, "arithmetic": "another machine"}) == "drift"
    assert store.files.read(KEY.object_key) == before


def test_the_digest_sees_values_nulls_and_names(trained):
    table = Store(trained.store).trial(KEY)
    same = encode(table, {"seconds": 1})
    assert digest(pq.read_table(pa.BufferReader(same))) == digest(table)
    first = table["cumulative_loss"].null_count
    assert first > 0
    filled = table.set_column(7, "cumulative_loss", table["cumulative_loss"].fill_null(0.0))
    renamed = table.rename_columns(["t", *table.column_names[1:]])
    assert len({digest(table), digest(filled), digest(renamed)}) == 3


# Verify


def problems_of(store, **settings):
    return {(p.kind, p.key) for p in verify(store, **settings)}


def test_a_whole_store_has_no_problems(trained):
    assert verify(Store(trained.store)) == []
    Store(trained.store).target = Target(trials=5)
    assert problems_of(Store(trained.store)) == {("missing", "trials/eps-inf/000004.parquet")}


def flip_a_byte(data, at=None):
    at = len(data) // 3 if at is None else at
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage", [flip_a_byte, lambda d: d[:-20], lambda d: d[: len(d) // 2], lambda d: b""]
)
def test_damage_is_found_moved_away_and_trained_again(trained, damage):
    store = Store(trained.store)
    before = store.scores().to_pylist()
    store.files.replace(KEY.object_key, damage(store.files.read(KEY.object_key)))
    assert problems_of(store) == {("damaged", KEY.object_key)}
    verify(store, repair=True)
    assert store.files.exists(f"damaged/{KEY.object_key}")
    assert problems_of(store) == {("missing", KEY.object_key)}
    assert trained.train(engine="serial").committed == 1
    trained.score()
    assert store.scores().to_pylist() == before


def test_no_flipped_byte_goes_unnoticed(trained):
    store = Store(trained.store)
    whole = store.files.read(KEY.object_key)
    for at in range(0, len(whole), 97):
        store.files.replace(KEY.object_key, flip_a_byte(whole, at))
        assert problems_of(store) == {("damaged", KEY.object_key)}, at


def test_a_trial_of_another_place_or_plan_is_damage(trained, tmp_path):
    store = Store(trained.store)
    zero, one = (store.files.path(TrialKey(math.inf, t).object_key) for t in (0, 1))
    os.replace(one, zero)
    found = {p.key: p.detail for p in verify(store) if p.kind == "damaged"}
    assert found == {"trials/eps-inf/000000.parquet": "its subset is not the plan's"}


def test_scoring_refuses_trials_of_another_study(trained, tmp_path):
    other = small_study(tmp_path / "other", seed=1)
    other.train(engine="serial")
    stray = Store(other.store).files.read(KEY.object_key)
    Store(trained.store).files.replace(KEY.object_key, stray)
    with pytest.raises(StudyMismatchError, match="another study"):
        trained.score()


def test_every_note_is_part_of_a_store(trained):
    store = Store(trained.store)
    for name in get_args(Note):
        store.write_note(name, {})
    assert problems_of(store) == set()


def test_foreign_objects_and_leftovers_are_named(trained):
    store = Store(trained.store)
    store.files.replace("holiday.jpg", b"")
    leftover = store.files.path("trials/eps-inf/.000009.parquet.abc.tmp")
    with open(leftover, "wb") as file:
        file.write(b"half")
    assert problems_of(store) == {("foreign", "holiday.jpg")}
    verify(store, repair=True)
    assert not os.path.exists(leftover)
    assert store.files.exists("holiday.jpg")


def test_a_damaged_index_and_an_edited_study_are_found(trained):
    store = Store(trained.store)
    index = store.files.read("examples.parquet")
    store.files.replace("examples.parquet", flip_a_byte(index))
    assert problems_of(store) == {("damaged", "examples.parquet")}
    store.files.replace("examples.parquet", index)
    body = json.loads(store.files.read("study.json"))
    body["study"]["plan"]["seed"] = 5
    store.files.replace("study.json", json.dumps(body).encode())
    with pytest.raises(DamagedObjectError, match="edited"):
        verify(store)


# The lock


def driver_of(files):
    """Who holds the lock, by driver.json: process, host."""
    record = json.loads(files.read("driver.json"))
    return record["pid"], record["host"]


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    files = Files(tmp_path)
    with DriverLock(files):
        with pytest.raises(StoreHeldError, match=str(os.getpid())) as caught:
            DriverLock(files).__enter__()
        assert caught.value.exit_code == 3
    with DriverLock(files):
        assert driver_of(files) == (os.getpid(), socket.gethostname())
    assert files.list() == []


@pytest.mark.alone
def test_a_dead_drivers_lock_is_taken_over_at_once(tmp_path):
    program = (
        "import os, sys\nfrom raymem.store import DriverLock, Files\n"
        f"DriverLock(Files({str(tmp_path)!r})).__enter__()\n"
        "print('held', flush=True)\nos.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout.read().startswith(b"held")
    # Killed and not yet waited for: a zombie drives nothing.
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    start = time.monotonic()
    with DriverLock(Files(tmp_path)):
        assert time.monotonic() - start < 2
    child.wait()
    child.stdout.close()


def test_a_process_number_used_again_is_not_the_driver(tmp_path):
    files = Files(tmp_path)
    held = DriverLock(files)
    record = json.loads(held._record())
    record["process_started"] -= 1000
    files.create("driver.json", json.dumps(record).encode())
    with DriverLock(files):
        now = json.loads(files.read("driver.json"))
        assert now["token"] != record["token"]
        assert now["process_started"] != record["process_started"]
    assert files.list() == []


@pytest.mark.parametrize("seconds", [-3600, 2, 3600])
def test_a_clock_that_is_set_ends_no_drivers_hold(tmp_path, monkeypatch, seconds):
    """Linux keeps when processes started as a time since the boot, and moves the boot."""
    files, boot = Files(tmp_path), psutil._psplatform.boot_time
    with DriverLock(files):
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot() + seconds)
        with pytest.raises(StoreHeldError, match=str(os.getpid())):
            DriverLock(files).__enter__()


def test_a_driver_elsewhere_lives_while_its_counter_moves(tmp_path, monkeypatch):
    files = Files(tmp_path)
    record = {**json.loads(DriverLock(files)._record()), "host": "elsewhere", "interval": 7.0}
    files.create("driver.json", json.dumps(record).encode())
    naps = []

    def live(seconds):
        naps.append(seconds)
        files.replace("driver.json", json.dumps({**record, "counter": 5}).encode())

    monkeypatch.setattr(lock_module.time, "sleep", live)
    with pytest.raises(StoreHeldError, match="elsewhere"):
        DriverLock(files).__enter__()
    monkeypatch.setattr(lock_module.time, "sleep", naps.append)
    with DriverLock(files):
        assert driver_of(files) == (os.getpid(), socket.gethostname())
    assert naps == [15.0, 15.0]


def test_a_driver_that_lost_its_lock_notices(tmp_path):
    files = Files(tmp_path)
    with DriverLock(files, interval=0.05) as first:
        files.delete("driver.json")
        files.create("driver.json", DriverLock(files)._record())
        assert first.lost.wait(5)
    assert files.exists("driver.json")


def test_a_torn_lock_is_no_lock(tmp_path):
    files = Files(tmp_path)
    files.create("driver.json", b'{"tok')
    with DriverLock(files):
        assert driver_of(files) == (os.getpid(), socket.gethostname())
    assert files.list() == []


@pytest.mark.alone
def test_progress_is_in_the_lock(tmp_path):
    files, progress = Files(tmp_path), {"done": 1}
    with DriverLock(files, interval=0.05, progress=lambda: progress):
        progress["done"] = 2
        for _ in range(100):
            record = json.loads(files.read("driver.json"))
            if record["progress"] == {"done": 2}:
                break
            time.sleep(0.05)
        assert record["counter"] > 0
        assert record["progress"] == {"done": 2}


def test_numbers_survive_a_round_trip(trained):
    table = Store(trained.store).scores()
    memorization = table["memorization"].to_numpy()[:60]
    assert np.isfinite(memorization).sum() > 0
    assert table["null_reason"].to_pylist()[60:] == ["test example"] * 20
