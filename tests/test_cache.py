"""Reading a cache: one copy a node, mapped; the set as a study and as a stream sees it."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shard_files
import torch
from shard_files import WNIDS, ilsvrc, write_ilsvrc, write_tar

from raymem import Examples, Recipe, Store, Study, load_examples, stream_curvature
from raymem.curvature.streaming import ScoringModel
from raymem.data import Cache, CachedExamples
from raymem.data import duplicates as near
from raymem.data import local_copy as local
from raymem.data.shards import Transform, ingest, list_shards
from raymem.data.shards.shard_readers import read_shard
from raymem.errors import DamagedObjectError, ExamplesError, StoreFullError
from raymem.models import build_model

SIZE = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of 120 + 40 images in three shards a split, and the set's tars."""
    root = tmp_path_factory.mktemp("made")
    train, val = ilsvrc(120, 40)
    train[7] = (*train[7][:2], train[3][2])
    val[9] = (*val[9][:2], train[3][2])
    write_ilsvrc(root / "set", "tar", train, val, n_shards=3)
    ingest(root / "set", root / "cache", size=SIZE, engine="serial")
    return root


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A copy of that cache that a test may damage, with local copies in its own folder."""
    monkeypatch.setenv("RAYMEM_CACHE_DIR", str(tmp_path / "local"))
    shutil.copytree(made / "cache", tmp_path / "cache")
    return Cache(tmp_path / "cache")


def no_pixels(monkeypatch):
    def refuse(*_):
        raise AssertionError("pixels were fetched")

    monkeypatch.setattr(Cache, "arrays", refuse)


def in_memory(examples):
    """The same set as arrays."""
    return Examples(
        x_train=np.array(examples.x_train), y_train=examples.y_train,
        x_test=np.array(examples.x_test), y_test=examples.y_test, classes=examples.classes,
        train_ids=examples.train_ids, test_ids=examples.test_ids, name=examples.name,
    )  # fmt: skip


def test_a_cached_set_is_the_set_of_its_arrays(cache):
    examples = load_examples(cache.url)
    assert isinstance(examples, CachedExamples)
    arrays = in_memory(examples)
    for name in (
        "fingerprint", "content_hashes", "image_shape", "n_classes", "n_examples", "name",
        "classes", "train_ids", "test_ids",
    ):  # fmt: skip
        assert getattr(examples, name) == getattr(arrays, name), name
    assert examples.describe() == arrays.describe()
    assert examples.index_table().equals(arrays.index_table())
    for method in ("duplicate_groups", "near_duplicate_groups", "label_conflicts"):
        found, expected = (getattr(e, method)() for e in (examples, arrays))
        assert [g.tolist() for g in found] == [g.tolist() for g in expected], method
    assert len(examples.duplicate_groups()) == 1
    assert not examples.x_train.flags.writeable


def test_nothing_but_pixels_fetches_pixels(cache, monkeypatch):
    no_pixels(monkeypatch)
    monkeypatch.setattr(near, "MOST_BYTES", 1000)
    examples = load_examples(cache.url)
    assert examples.describe().startswith("set: 120 train and 40 test images, 16x16x3, 10 classes")
    assert len(examples.fingerprint) == 64
    assert examples.index_table().num_rows == 160
    # Too large to search: exact duplicates, by their hashes.
    assert [len(group) for group in examples.near_duplicate_groups()] == [3]
    assert repr(examples) == f"CachedExamples({cache.url!r})"
    assert (len(examples.y_train), len(examples.y_test)) == (120, 40)
    assert len(pickle.dumps(examples)) < 300
    assert len(pickle.dumps(examples.cache)) < 300
    again = pickle.loads(pickle.dumps(examples))
    assert again.fingerprint == examples.fingerprint
    with pytest.raises(AssertionError, match="pixels were fetched"):
        _ = again.x_train


def test_relative_paths_and_other_file_systems(cache, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.chdir(tmp_path)
    assert load_examples("cache").fingerprint == cache.about["fingerprint"]
    assert load_examples(Path("cache")).cache.url == str(tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "cache") + "/", "/cache-test/", recursive=True)
    examples = load_examples("memory://cache-test")
    assert examples.cache.url == "memory:///cache-test"
    np.testing.assert_array_equal(examples.x_train, load_examples("cache").x_train)
    with pytest.raises(ExamplesError, match=r"16x16; ingest the set again .* --size 32"):
        load_examples("cache", image_size=32)
    assert load_examples("cache", image_size=16).n_examples == 160


def test_what_is_no_whole_cache_is_refused(cache, tmp_path):
    with pytest.raises(ExamplesError, match=r"no cache at .*; make one with `raymem ingest"):
        Cache(tmp_path / "nothing")
    path = tmp_path / "cache/cache.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ExamplesError, match="format 99"):
        Cache(cache.url)
    path.write_text("{")
    with pytest.raises(DamagedObjectError, match="does not read back"):
        Cache(cache.url)
    path.write_text(json.dumps(about | {"fingerprint": "0" * 64}))
    with pytest.raises(DamagedObjectError, match="another set's"):
        Cache(cache.url).index()
    path.unlink()
    for open_it in (load_examples, list_shards, Cache):
        with pytest.raises(ExamplesError, match=r"not finished; run `raymem ingest .*--size 16`"):
            open_it(cache.url)


def test_a_damaged_index_is_named(cache, tmp_path):
    path = tmp_path / "cache/index.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedObjectError, match=r"index\.parquet does not read back"):
        Cache(cache.url).index()
    path.unlink()
    with pytest.raises(DamagedObjectError, match="it is not there"):
        Cache(cache.url).index()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other", "text"])
def test_a_damaged_piece_is_named_and_never_mapped(cache, made, tmp_path, damage):
    piece = tmp_path / "cache/pieces/train/imagenet-train-0001-000.npy"
    data = bytearray(piece.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        piece.write_bytes(bytes(data))
    elif damage == "cut":
        piece.write_bytes(bytes(data[:-100]))
    elif damage == "gone":
        piece.unlink()
    elif damage == "other":
        shutil.copy(tmp_path / "cache/pieces/train/imagenet-train-0002-000.npy", piece)
    else:
        piece.write_text("no array")
    message = (
        r"pieces/train/imagenet-train-0001-000\.npy is damaged \(.*\); delete it, "
        r"shards/train/imagenet-train-0001\.parquet and cache\.json there, and ingest again"
    )
    with pytest.raises(DamagedObjectError, match=message):
        cache.arrays()
    assert not list((tmp_path / "local").rglob("*.npy"))
    assert not list((tmp_path / "local").rglob("*.part"))
    (shard,) = [s for s in list_shards(cache.url) if "train-0001" in s.name]
    with pytest.raises(DamagedObjectError, match=message):
        list(read_shard(shard))
    # What the message says is the way out.
    piece.unlink(missing_ok=True)
    (tmp_path / "cache/shards/train/imagenet-train-0001.parquet").unlink()
    (tmp_path / "cache/cache.json").unlink()
    summary = ingest(made / "set", tmp_path / "cache", size=SIZE, engine="serial")
    assert (summary.images, summary.about) == (40, cache.about)
    Cache(cache.url).arrays()


SCRIPT = """
import sys, time
from raymem.data import Cache, local_copy as local
copy = local._copy
def slow(*arguments):
    with open({log!r}, "a") as log:
        log.write("copy\\n")
    time.sleep(0.5)
    copy(*arguments)
local._copy = slow
x_train, _, x_test, _ = Cache({url!r}).arrays({folder!r})
print(int(x_train.sum()), int(x_test.sum()))
"""


@pytest.mark.alone
def test_two_processes_at_once_copy_once(cache, tmp_path):
    log = tmp_path / "log"
    text = SCRIPT.format(log=str(log), url=cache.url, folder=str(tmp_path / "both"))
    processes = [
        subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    x_train, _, x_test, _ = cache.arrays(tmp_path / "alone")
    assert said == [f"{int(x_train.sum())} {int(x_test.sum())}\n"] * 2
    assert log.read_text() == "copy\ncopy\n"  # train and test, each once


def test_what_a_killed_copy_left_is_cleaned(cache, tmp_path):
    folder = tmp_path / "local" / cache.about["fingerprint"]
    folder.mkdir(parents=True)
    (folder / "train.part").write_bytes(b"half")
    (folder / "test.npy").write_bytes(b"cut short by a full disk")
    x_train, _, x_test, _ = cache.arrays()
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "test.npy", "train.npy"]
    assert (len(x_train), len(x_test)) == (120, 40)
    before = (folder / "train.npy").stat().st_mtime_ns
    cache.arrays()
    assert (folder / "train.npy").stat().st_mtime_ns == before


def test_a_disk_that_is_too_small_is_found_before_copying(cache, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreFullError, match=r"0\.00 GB are needed.*RAYMEM_CACHE_DIR"):
        cache.arrays()
    assert not list((tmp_path / "local").rglob("*.npy"))


def test_large_copies_say_how_far_they_are(cache, monkeypatch, capsys, tmp_path):
    cache.arrays(tmp_path / "a")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(local, "LARGE_BYTES", 0)
    cache.arrays(tmp_path / "b")
    said = capsys.readouterr().err
    assert "once per node" in said
    assert "copied 0.0 of 0.0 GB" in said


def test_a_study_of_a_cache_is_the_study_of_its_arrays(cache, tmp_path):
    recipe = Recipe(model="mlp-8", epochs=1)
    stores = []
    for name, examples in (
        ("cached", load_examples(cache.url)), ("arrays", in_memory(load_examples(cache.url))),
    ):  # fmt: skip
        study = Study(examples=examples, recipe=recipe, store=tmp_path / name, trials=2)
        study.train(engine="serial")
        stores.append(Store(tmp_path / name))
    assert stores[0].study().hash == stores[1].study().hash
    assert stores[0].examples().equals(stores[1].examples())
    for key in stores[0].done():
        assert stores[0].trial(key).equals(stores[1].trial(key))


# As shards


def scoring_model(size=SIZE):
    torch.manual_seed(0)
    net = build_model("tiny-resnet", n_classes=10, image_shape=(size, size, 3))
    return ScoringModel(
        name="net", net=net, transform=Transform(size=(size, size), way="fit"), n_classes=10
    )


def test_scores_from_a_cache_are_those_of_its_shards_to_the_bit(cache, made, tmp_path):
    shards = list_shards(cache.url)
    assert [s.name for s in shards[:2]] == [f"train/imagenet-train-000{k}-000" for k in (0, 1)]
    assert {s.kind for s in shards} == {"cache"}
    stream_curvature(shards, scoring_model(), Store(tmp_path / "a"), engine="serial")
    original = list_shards(str(made / "set"))
    stream_curvature(original, scoring_model(), Store(tmp_path / "b"), engine="serial")
    tables = [Store(tmp_path / name).curvature("net").sort_by("example_id") for name in "ab"]
    assert tables[0].num_rows == 160
    assert tables[0].equals(tables[1])


def test_the_examples_of_a_piece_are_those_of_the_index(made, tmp_path):
    train, val = ilsvrc(30, 20)
    train[2] = (*train[2][:2], b"")
    val[3] = (val[3][0], 77, val[3][2])
    write_tar(tmp_path / "set/train.tar", train)
    write_tar(tmp_path / "set/val.tar", val)
    ingest(tmp_path / "set", tmp_path / "cache", size=8, engine="serial", on_bad="quarantine")
    records = [r for shard in list_shards(str(tmp_path / "cache")) for r in read_shard(shard)]
    assert all(record.pixels.shape == (8, 8, 3) and not record.error for record in records)
    assert [(r.example_id, r.label) for r in records] == [
        (key, label) for key, label, _ in (*train, *val) if key not in (train[2][0], val[3][0])
    ]
    examples = load_examples(tmp_path / "cache")
    x_train, _, x_test, _ = examples.cache.arrays(tmp_path / "local")
    pixels = dict(zip((*examples.train_ids, *examples.test_ids), (*x_train, *x_test), strict=True))
    for record in records:
        np.testing.assert_array_equal(record.pixels, pixels[record.example_id])


def test_a_model_of_another_size_is_refused(cache, tmp_path):
    with pytest.raises(ExamplesError, match="images are 16x16x3, the model wants 32x32x3"):
        stream_curvature(
            list_shards(cache.url), scoring_model(32), Store(tmp_path), engine="serial"
        )


def test_a_large_folder_is_several_shards_of_a_stream(made, tmp_path, monkeypatch):
    records = ilsvrc(25, 0)[0]
    shard_files.write_folders(tmp_path / "set", records)
    assert [s.name for s in list_shards(str(tmp_path / "set"))][:2] == ["0", "1"]
    monkeypatch.setattr("raymem.data.shards.records.FOLDER_FILES", 2)
    shards = list_shards(str(tmp_path / "set"))
    assert [s.name for s in shards][:2] == ["0.1-of-2", "0.2-of-2"]
    assert len({s.name for s in shards}) == len(shards) > 10
    found = [(r.example_id, r.label, r.data) for s in shards for r in read_shard(s)]
    assert sorted(found) == sorted(records)
    assert WNIDS[0] in found[0][0]
