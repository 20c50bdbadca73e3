"""Decoding a large set once: forms of sets, bad images, resuming, and what is written."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import scipy.io
import shard_files
from click.testing import CliRunner
from PIL import Image, ImageOps
from processes import no_survivors, wait_until
from shard_files import WNIDS, ilsvrc, saved, write_ilsvrc, write_parquet, write_tar

from raymem.cli import main
from raymem.data import Cache, CachedExamples
from raymem.data.shards import Transform, ingest, ingestion, records
from raymem.data.shards import pieces as pieces_module
from raymem.data.shards.finish_cache import _against
from raymem.data.shards.records import Shard
from raymem.data.shards.splits import find_splits
from raymem.errors import (
    DamagedObjectError,
    ExamplesError,
    StoreError,
    StoreHeldError,
    StudyMismatchError,
)
from raymem.fleet.cluster import CPU_NODE
from raymem.store import DriverLock, Files

FORMS = ("folders", "tar", "parquet")
SIZE = 16


def run(data, cache, **more):
    return ingest(data, cache, **{"size": SIZE, "engine": "serial", **more})


def rows_of(path, *names):
    table = pq.read_table(path)
    return list(
        zip(*(table[name].to_pylist() for name in names or table.column_names), strict=True)
    )


# What the caches of a set are, whatever its form


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """About 1,000 images, odd and bad ones among them, in three forms, each ingested."""
    root = tmp_path_factory.mktemp("spoiled")
    train, val = ilsvrc(800, 200)
    with pytest.MonkeyPatch.context() as patch:
        # So that Pillow refuses a picture of 150 x 150 pixels, and warns of one of 120 x 120.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 11_000)
        patch.setattr(pieces_module, "PIECE_BYTES", 30 * SIZE * SIZE * 3)
        patch.setattr(records, "FOLDER_FILES", 60)
        wrong = shard_files.bad(side=150)
        right = shard_files.odd() | {"large": saved(Image.new("RGB", (120, 120), "teal"))}
        for k, data in enumerate(right.values()):
            train[11 * k] = (*train[11 * k][:2], data)
            val[5 * k] = (*val[5 * k][:2], data)
        for k, (data, _) in enumerate(wrong.values()):
            train[11 * k + 4] = (*train[11 * k + 4][:2], data)
            val[5 * k + 1] = (*val[5 * k + 1][:2], data)
        val[199] = (val[199][0], None, val[199][2])
        for form in FORMS:
            write_ilsvrc(root / form, form, train, val)
            with pytest.raises(ExamplesError, match="15 of 1,000 images cannot be used"):
                run(root / form, root / f"{form}-cache")
            summary = run(root / form, root / f"{form}-cache", on_bad="quarantine")
            assert summary.images == 0  # nothing decoded was lost
    return root, train, val, wrong


def test_all_forms_give_one_cache(spoiled, tmp_path):
    root, *_ = spoiled
    caches = [Cache(root / f"{form}-cache") for form in FORMS]
    same = [cache.index().drop_columns(["piece", "row"]) for cache in caches]
    assert same[0].equals(same[1])
    assert same[0].equals(same[2])
    assert caches[0].about == caches[1].about | {"name": "folders"}
    assert caches[0].about == caches[2].about | {"name": "folders"}
    files = []
    for cache, form in zip(caches, FORMS, strict=True):
        cache.arrays(tmp_path / form)
        (folder,) = (tmp_path / form).iterdir()
        assert folder.name == cache.about["fingerprint"]
        files.append([(folder / f"{split}.npy").read_bytes() for split in ("train", "test")])
    assert files[0] == files[1] == files[2]
    assert caches[0].about["classes"] == list(WNIDS)
    assert set(same[0]["wnid"].to_pylist()) == set(WNIDS)


def test_the_index_has_every_good_image_sorted_by_id(spoiled):
    root, train, val, _ = spoiled
    rejected = {i for _, i in rows_of(root / "tar-cache/rejects.parquet", "split", "example_id")}
    assert len(rejected) == 15
    expected = [
        (split, index, key, label, WNIDS[label])
        for split, rows in (("train", train), ("test", val))
        for index, (key, label, _) in enumerate(sorted(r for r in rows if r[0] not in rejected))
    ]
    names = ("split", "index", "example_id", "label", "wnid")
    assert rows_of(root / "tar-cache/index.parquet", *names) == expected


def test_rejects_are_the_same_list_and_say_why(spoiled):
    root, train, val, wrong = spoiled
    lists = [rows_of(root / f"{form}-cache/rejects.parquet") for form in FORMS]
    assert lists[0] == lists[1] == lists[2]
    assert lists[0] == sorted(lists[0], key=lambda row: row[:2])
    said = {(split, key): error for split, key, _, error in lists[0]}
    for k, (name, (_, message)) in enumerate(wrong.items()):
        assert message in said["train", train[11 * k + 4][0]], name
        assert message in said["test", val[5 * k + 1][0]], name
    assert said["test", val[199][0]] == "it has no label"
    labels = {(split, key): label for split, key, label, _ in lists[0]}
    assert labels["test", val[199][0]] is None
    assert labels["train", train[4][0]] == train[4][1]


def by_hand(data, size):
    """The largest centred square, antialiased, made in another way than the code's."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:
            image = opened
        image = image.convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


@pytest.mark.filterwarnings("ignore")
def test_pixels_are_those_of_a_slow_pipeline(spoiled, tmp_path):
    root, train, val, _ = spoiled
    examples = CachedExamples(root / "folders-cache")
    x_train, _, x_test, _ = examples.cache.arrays(tmp_path)
    for rows, ids, x in ((train, examples.train_ids, x_train), (val, examples.test_ids, x_test)):
        data = {key: data for key, _, data in rows}
        for key, pixels in zip(ids, x, strict=True):
            np.testing.assert_array_equal(pixels, by_hand(data[key], SIZE), err_msg=key)


def test_large_folders_are_cut_and_large_shards_have_several_pieces(spoiled):
    root, *_ = spoiled
    objects = sorted(p.name for p in (root / "folders-cache/shards/train").iterdir())
    assert objects[:2] == [f"{WNIDS[0]}.1-of-2.parquet", f"{WNIDS[0]}.2-of-2.parquet"]
    assert len(list((root / "folders-cache/shards/test").iterdir())) == 4
    pieces = sorted((root / "tar-cache/pieces/train").iterdir())
    assert [p.name for p in pieces[:2]] == [f"imagenet-train-0000-00{k}.npy" for k in (0, 1)]
    assert max(p.stat().st_size for p in pieces) == 128 + 30 * SIZE * SIZE * 3
    assert sum(len(np.load(p)) for p in pieces) == 793


def test_grey_has_one_channel(tmp_path):
    train, val = ilsvrc(20, 10)
    write_ilsvrc(tmp_path / "set", "tar", train, val, n_shards=1)
    run(tmp_path / "set", tmp_path / "cache", grey=True)
    cache = Cache(tmp_path / "cache")
    assert cache.image_shape == (SIZE, SIZE, 1)
    x = cache.arrays(tmp_path / "local")[0]
    ids = cache.split("train")["example_id"].to_pylist()
    image = Image.open(io.BytesIO({k: d for k, _, d in train}[ids[0]])).convert("L")
    expected = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(x[0, :, :, 0], np.asarray(expected))


# Where things are


@pytest.fixture(scope="module")
def small():
    return ilsvrc(40, 20)


def kaggle(root, train, val):
    write_ilsvrc(root / "tmp", "folders", train, val)
    (root / "ILSVRC/Data").mkdir(parents=True)
    (root / "tmp").rename(root / "ILSVRC/Data/CLS-LOC")
    (root / "ILSVRC/Data/CLS-LOC/val_labels.txt").unlink()
    (root / "ILSVRC/Data/CLS-LOC/test").mkdir()
    (root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG").write_bytes(train[0][2])
    lines = [f"{key},{WNIDS[y]} 1 2 3 4 {WNIDS[0]} 5 6 7 8" for key, y, _ in val[::-1]]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines))


def class_folders(root, train, val):
    write_ilsvrc(root, "folders", train, val)
    (root / "val_labels.txt").unlink()
    for key, label, _ in val:
        folder = root / "val" / WNIDS[label]
        folder.mkdir(exist_ok=True)
        (root / "val" / f"{key}.JPEG").rename(folder / f"{key}.JPEG")


def relabelled(write):
    """Folders whose map of labels `write` makes, given its folder and the labels in order."""

    def make(root, train, val):
        write_ilsvrc(root, "folders", train, val)
        (root / "val_labels.txt").unlink()
        write(root, [label for _, label, _ in val])

    return make


def by_position(root, labels):
    path = root / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("\n".join(WNIDS[y] for y in labels) + "\n")


def numbered(root, labels):
    lines = [f"ILSVRC2012_val_{k + 1:08d}.JPEG {y}" for k, y in enumerate(labels)]
    (root / "val.txt").write_text("\n".join(lines))


def devkit(root, labels):
    """ILSVRC's own ids run in another order than WordNet's."""
    at = root / "ILSVRC2012_devkit_t12" / "data"
    at.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(10)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.zeros((11, 1), kind)
    for k, y in enumerate(order):
        synsets[k, 0] = (np.array([[k + 1]]), WNIDS[y], "a word")
    synsets[10, 0] = (np.array([[11]]), "n00000001", "an inner node")
    scipy.io.savemat(at / "meta.mat", {"synsets": synsets})
    ids = {int(y): k + 1 for k, y in enumerate(order)}
    path = at / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("\n".join(str(ids[y]) for y in labels) + "\n")


LAYOUTS = {
    "kaggle": kaggle,
    "class-folders": class_folders,
    "by-position": relabelled(by_position),
    "numbered": relabelled(numbered),
    "devkit": relabelled(devkit),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "kaggle-below", "validation", "split-folders"])
def test_layouts_that_people_have_give_the_same_cache(small, tmp_path, layout):
    write_ilsvrc(tmp_path / "tar", "tar", *small)
    expected = run(tmp_path / "tar", tmp_path / "expected").about
    data = tmp_path / "data"
    data.mkdir()
    if layout == "validation":
        class_folders(tmp_path / "x", *small)
        shutil.copytree(tmp_path / "x", data, dirs_exist_ok=True)
        (data / "val").rename(data / "Validation")
    elif layout == "split-folders":
        for split in ("train", "val", "test"):
            (data / split).mkdir()
            for path in (tmp_path / "tar").glob(f"*-{split}-*"):
                path.rename(data / split / path.name.replace(split, "x"))
    elif layout == "kaggle-below":
        kaggle(data, *small)
    else:
        LAYOUTS[layout](data, *small)
    at = data / "ILSVRC" if layout == "kaggle-below" else data
    assert run(at, tmp_path / "cache").about["fingerprint"] == expected["fingerprint"]


def test_splits_are_where_the_user_says(small, tmp_path):
    write_ilsvrc(tmp_path / "a", "tar", *small)
    expected = run(tmp_path / "a", tmp_path / "expected").about["fingerprint"]
    for path in (tmp_path / "a").iterdir():
        path.rename(tmp_path / "a" / path.name.replace("train", "x").replace("val", "y"))
    with pytest.raises(ExamplesError, match="neither train nor val"):
        run(tmp_path / "a", tmp_path / "cache")
    with pytest.raises(ExamplesError, match="give both"):
        run(tmp_path / "a", tmp_path / "cache", train="*-x-*.tar")
    found = run(tmp_path / "a", tmp_path / "cache", train="*-x-*.tar", val=f"{tmp_path}/a/*-y-*")
    assert found.about["fingerprint"] == expected
    class_folders(tmp_path / "b", *small)
    (tmp_path / "b/train").rename(tmp_path / "b/learn")
    found = run(tmp_path / "b", tmp_path / "cache2", train="learn", val=str(tmp_path / "b/val"))
    assert found.about["fingerprint"] == expected
    # The map given by hand goes before any that is found.
    write_ilsvrc(tmp_path / "c", "folders", *small)
    (tmp_path / "c/val_labels.txt").rename(tmp_path / "map.txt")
    (tmp_path / "c/val.txt").write_text("nonsense")
    found = run(tmp_path / "c", tmp_path / "cache3", val_labels=tmp_path / "map.txt")
    assert found.about["fingerprint"] == expected


def test_links_are_followed_and_never_for_ever(small, tmp_path):
    class_folders(tmp_path / "real", *small)
    expected = run(tmp_path / "real", tmp_path / "expected").about["fingerprint"]
    real, data = tmp_path / "real", tmp_path / "data"
    (data / "val").mkdir(parents=True)
    (data / "train").symlink_to(real / "train")
    for folder in (real / "val").iterdir():
        (data / "val" / folder.name).symlink_to(folder)
    (data / "val" / WNIDS[0]).unlink()
    (data / "val" / WNIDS[0]).mkdir()
    for path in (real / "val" / WNIDS[0]).iterdir():
        (data / "val" / WNIDS[0] / path.name).symlink_to(path)
    (real / "train" / WNIDS[1] / "loop").symlink_to(real / "train")
    assert run(data, tmp_path / "cache").about["fingerprint"] == expected


def test_a_cache_may_be_inside_of_the_set_but_is_none(small, tmp_path):
    write_ilsvrc(tmp_path / "set", "parquet", *small)
    expected = run(tmp_path / "set", tmp_path / "cache").about
    run(tmp_path / "set", tmp_path / "set" / "cache")
    (tmp_path / "set/cache/cache.json").unlink()
    (tmp_path / "set/cache/shards/train/data/train-00001-of-00004.parquet").unlink()
    again = run(tmp_path / "set", tmp_path / "set" / "cache")
    assert (again.images, again.about) == (10, expected)
    with pytest.raises(ExamplesError, match="cannot be the set and its cache"):
        run(tmp_path / "set", tmp_path / "set")
    with pytest.raises(ExamplesError, match="is a cache already"):
        run(tmp_path / "cache", tmp_path / "cache2")


def test_ids_of_folders_without_ilsvrcs_names_begin_with_the_split(small, tmp_path):
    train, val = small
    for split, rows in (("train", train), ("val", val)):
        named = [(f"{k % 2}/{k}", str(label), d) for k, (_, label, d) in enumerate(rows)]
        for key, label, data in named:
            path = tmp_path / "set" / split / f"class {label}" / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (tmp_path / "set/train/class 0/._0.png").write_bytes(b"hidden")
    run(tmp_path / "set", tmp_path / "cache")
    examples = CachedExamples(tmp_path / "cache")
    assert examples.train_ids[0] == "train/class 0/0/0.png"
    assert examples.test_ids[-1] == "val/class 9/1/3.png"
    assert examples.classes[:2] == ("class 0", "class 1")
    assert set(examples.cache.index()["wnid"].to_pylist()) == {None}


def test_class_names_come_from_ids_then_from_metadata_then_are_numbers(small, tmp_path):
    train, val = small
    plain = [[(f"k{k}-{len(r)}", y, d) for k, (_, y, d) in enumerate(r)] for r in small]
    words = [f"word {k}" for k in range(10)]
    one_off = [(train[1][0], 0, train[1][2]), train[0], *train[2:]]

    def classes(name, rows, names):
        for split, records_ in zip(("train", "validation"), rows, strict=True):
            write_parquet(tmp_path / name / f"{split}-0.parquet", records_, names)
        return run(tmp_path / name, tmp_path / f"{name}-cache").about["classes"]

    assert classes("ids", small, words) == list(WNIDS)
    assert classes("words", plain, words) == words
    assert classes("numbers", plain, None) == [str(k) for k in range(10)]
    # One training image whose id says another class: ids say nothing then.
    assert classes("disagree", (one_off, val), words) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no map"),
        ("a b\nc\n", "no map"),
        ("ILSVRC2012_val_00000001 n99999999", "the class n99999999, which is none of the 10"),
        ("ILSVRC2012_val_00000001 10", "the class 10, which is none"),
        ("cat.png 3", "names none of the validation images"),
        ("ILSVRC2012_val_00000001 1\nILSVRC2012_val_00000001.JPEG 2", "two classes"),
        ("1\n2\n3", "no meta.mat beside it"),
    ],
)
def test_maps_of_labels_that_do_not_fit_are_refused(small, tmp_path, text, message):
    write_ilsvrc(tmp_path / "set", "folders", *small)
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ExamplesError, match=message):
        run(tmp_path / "set", tmp_path / "cache", val_labels=tmp_path / "map.txt")
    assert not (tmp_path / "cache").exists()


def test_other_maps_that_do_not_fit(small, tmp_path):
    write_ilsvrc(tmp_path / "set", "folders", *small)
    with pytest.raises(ExamplesError, match="cannot be read"):
        run(tmp_path / "set", tmp_path / "cache", val_labels=tmp_path / "none.txt")
    (tmp_path / "ground.txt").write_text("\n".join("1" for _ in range(20)))
    (tmp_path / "meta.mat").write_bytes(b"no matlab")
    with pytest.raises(ExamplesError, match=r"meta\.mat cannot be read"):
        run(tmp_path / "set", tmp_path / "cache", val_labels=tmp_path / "ground.txt")
    for k, path in enumerate(sorted((tmp_path / "set/val").iterdir())):
        path.rename(path.with_name(f"{k}.png"))
    (tmp_path / "short.txt").write_text(f"{WNIDS[0]}\n{WNIDS[1]}\n")
    with pytest.raises(ExamplesError, match="has 2 lines and there are 20 validation images"):
        run(tmp_path / "set", tmp_path / "cache", val_labels=tmp_path / "short.txt")


def _no_val(root, train, val):
    write_ilsvrc(root, "folders", train, val)
    shutil.rmtree(root / "val")


def _two_vals(root, train, val):
    class_folders(root, train, val)
    shutil.copytree(root / "val", root / "valid")


def _no_map(root, train, val):
    write_ilsvrc(root, "folders", train, val)
    (root / "val_labels.txt").unlink()


def _strange_folder(root, train, val):
    class_folders(root, train, val)
    (root / "val" / WNIDS[0]).rename(root / "val" / "dogs")


def _stray_image(root, train, val):
    class_folders(root, train, val)
    (root / "train" / "stray.png").write_bytes(train[0][2])


def _only_train(root, train, val):
    write_tar(root / "train.tar", train)


def _no_train(root, train, val):
    write_ilsvrc(root, "folders", train, val)
    (root / "train").rename(root / "images")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_val, "none of val, validation, valid, test"),
        (_two_vals, "has val, valid; give --train"),
        (_no_map, "no map of labels is beside them"),
        (_strange_folder, "the folders dogs of .* are none of train's classes"),
        (_stray_image, r"images outside of them, such as stray\.png"),
        (_only_train, "1 shards of train and 0 of val"),
        (_no_train, "no train/"),
        (lambda root, train, val: root.mkdir(), "no .tar, .parquet or image files"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(small, tmp_path, make, message):
    make(tmp_path / "set", *small)
    with pytest.raises(ExamplesError, match=message):
        find_splits(str(tmp_path / "set"))


# Bad sets


def shards(root, train, val):
    write_tar(root / "train-0.tar", train[: len(train) // 2])
    write_tar(root / "train-1.tar", train[len(train) // 2 :])
    write_tar(root / "val-0.tar", val)


def test_bad_images_are_one_error_that_names_them_and_the_way_out(small, tmp_path):
    train, val = (list(rows) for rows in small)
    train[3] = (*train[3][:2], b"no picture")
    train[30] = (train[30][0], -1, train[30][2])
    val[4] = (val[4][0], 10, val[4][2])
    val[5] = (val[5][0], None, val[5][2])
    shards(tmp_path / "set", train, val)
    with pytest.raises(ExamplesError) as refused:
        run(tmp_path / "set", tmp_path / "cache")
    text = str(refused.value)
    for words in (
        "4 of 60 images cannot be used", f"train {train[3][0]} (no image format that Pillow knows)",
        "label -1 is none of the 10 classes", "label 10 is none of the 10 classes",
        "it has no label", "--on-bad quarantine", "shards/train/train-0.parquet",
    ):  # fmt: skip
        assert words in text
    assert not (tmp_path / "cache/cache.json").exists()
    with pytest.raises(ExamplesError, match=r"is not finished; run `raymem ingest .*set .* 16`"):
        Cache(tmp_path / "cache")
    # Repaired, with the object of its shard deleted, only that shard is decoded again.
    shards(tmp_path / "set", *small)
    for name in ("train/train-0", "train/train-1", "test/val-0"):
        (tmp_path / f"cache/shards/{name}.parquet").unlink()
    summary = run(tmp_path / "set", tmp_path / "cache")
    assert (summary.images, summary.about["n_rejects"]) == (60, 0)


def test_a_shard_that_ends_early_is_named(small, tmp_path):
    shards(tmp_path / "set", *small)
    data = (tmp_path / "set/train-1.tar").read_bytes()
    (tmp_path / "set/train-1.tar").write_bytes(data[: 2 * len(data) // 3])
    with pytest.raises(ExamplesError, match=r"train-1 \(the rest\) \(the shard ends early"):
        run(tmp_path / "set", tmp_path / "cache")
    summary = run(tmp_path / "set", tmp_path / "cache", on_bad="quarantine")
    assert [reject.example_id for reject in summary.rejects] == ["train-1 (the rest)"]
    assert 25 < summary.about["n_train"] < 40


def test_repeated_ids_are_an_error_within_and_across_splits(small, tmp_path):
    train, val = small
    for name, t, v in (("within", [*train, train[2]], val), ("across", train, [*val, train[2]])):
        shards(tmp_path / name, t, v)
        with pytest.raises(ExamplesError, match=f"1 ids are not unique .*{train[2][0]} in shards/"):
            run(tmp_path / name, tmp_path / f"{name}-cache", on_bad="quarantine")


@pytest.mark.parametrize("cache", ["local", "memory://ingest-ids/cache"])
def test_the_command_for_repeated_ids_helps(small, tmp_path, cache):
    cache = str(tmp_path / cache) if cache == "local" else cache
    train, val = small
    shards(tmp_path / "set", train, [*val, train[2]])
    with pytest.raises(ExamplesError) as refused:
        run(tmp_path / "set", cache)
    command = shlex.split(re.search("`(.*)`", str(refused.value))[1])
    if command[0] == "rm":
        subprocess.run(command, check=True)
    else:
        assert command[:2] == ["python", "-c"]
        exec(command[2], {})  # the store is in this process
    shards(tmp_path / "set", train, val)
    assert run(tmp_path / "set", cache).about["n_test"] == len(val)


def test_small_folders_share_a_task():
    transform = Transform(size=(8, 8), way="fit")

    def tasks(*sizes, kind="folder"):
        return [
            ingestion.DecodeTask(
                cache="cache",
                split="train",
                shard=Shard(url=str(k), name=str(k), kind=kind, files=("x",) * n),
                transform=transform,
            )
            for k, n in enumerate(sizes)
        ]

    classes = tasks(*[1] * 1000)
    runs = ingestion.batches(classes)
    assert [task for run in runs for task in run] == classes
    assert 60 < len(runs) < 70
    assert max(map(len, ingestion.batches(tasks(*[20] * 100_000)))) == 50
    large = tasks(*[1000] * 70)
    assert ingestion.batches(large) == [[task] for task in large]
    files = tasks(0, 0, 0, kind="tar")
    assert ingestion.batches(files) == [[task] for task in files]
    assert ingestion.batches([]) == []


def test_classes_without_images(small, tmp_path):
    train, val = small
    shards(tmp_path / "a", [r for r in train if r[1] != 3], val)
    with pytest.raises(ExamplesError, match="1 classes have no training image: 3"):
        run(tmp_path / "a", tmp_path / "a-cache")
    shards(tmp_path / "b", train, [r for r in val if r[1] != 3])
    findings = run(tmp_path / "b", tmp_path / "b-cache").about["findings"]
    assert findings == [f"1 classes have no test image: {WNIDS[3]}"]
    shards(tmp_path / "c", train, [(k, None, d) for k, _, d in val])
    with pytest.raises(ExamplesError, match="test set is empty"):
        run(tmp_path / "c", tmp_path / "c-cache", on_bad="quarantine")
    shards(tmp_path / "d", [(k, None, d) for k, _, d in train], val)
    with pytest.raises(ExamplesError, match="no training image can be read and has a label"):
        run(tmp_path / "d", tmp_path / "d-cache", on_bad="quarantine")
    shards(tmp_path / "e", [(k, 0, d) for k, _, d in train], [(k, 0, d) for k, _, d in val])
    with pytest.raises(ExamplesError, match="only one class"):
        run(tmp_path / "e", tmp_path / "e-cache")


def test_counts_and_copies(small, tmp_path):
    train, val = (list(rows) for rows in small)
    train[1], train[2] = ((*r[:2], train[0][2]) for r in train[1:3])
    val[7] = (*val[7][:2], train[0][2])
    train += [("n01440000_999", 0, train[5][2])]
    shards(tmp_path / "set", train, val)
    about = run(tmp_path / "set", tmp_path / "cache").about
    assert about["duplicates"] == {"train": 3, "test": 0, "across": 1}
    assert about["class_sizes"]["train"] == {
        "smallest": {"class": WNIDS[1], "images": 4}, "largest": {"class": WNIDS[0], "images": 5},
    }  # fmt: skip
    assert about["findings"] == ["1 test images are exact copies of training images"]


def test_a_set_of_imagenets_classes_is_held_against_imagenet(tmp_path):
    wnids = [f"n{10_000_000 + k}" for k in range(1000)]
    image = saved(Image.new("RGB", (4, 4), "red"), "PNG")
    write_tar(tmp_path / "train.tar", [(f"{w}_{k}", k, image) for k, w in enumerate(wnids)])
    val = [(f"ILSVRC2012_val_{k + 1:08d}", k, image) for k in range(1000)]
    val[3] = (val[3][0], 3, b"")
    write_tar(tmp_path / "val.tar", val)
    found = run(tmp_path, tmp_path / "cache", size=1, on_bad="quarantine").about["findings"]
    text = " | ".join(found)
    assert "1,000 training images, where ILSVRC 2012 has 1,281,167 (-1,280,167) |" in text
    assert "1,000 classes do not have 732 to 1,300 training images" in text
    assert "999 test images, where ILSVRC 2012 has 50,000 (-49,001), and 1 were left out" in text
    assert f"{wnids[0]} has 1" in text


def test_imagenets_own_counts_are_no_finding():
    sizes = np.full(1000, 1281)
    sizes[0] += 167
    odd = _against("train", sizes, 0, [str(k) for k in range(1000)], 1_281_167, 732, 1300)
    assert odd == ["1 classes do not have 732 to 1,300 training images: 0 has 1,448"]
    sizes[:20] = 1281 + 8
    sizes[20] += 7
    assert int(sizes.sum()) == 1_281_167
    assert _against("train", sizes, 0, [""] * 1000, 1_281_167, 732, 1300) == []
    assert _against("test", np.full(1000, 50), 0, [""] * 1000, 50_000, 50, 50) == []


# Again and again


def test_other_settings_are_refused_and_the_same_are_not(small, tmp_path):
    write_ilsvrc(tmp_path / "set", "folders", *small)
    data, cache = tmp_path / "set", tmp_path / "cache"
    run(data, cache)
    assert run(f"{data}/", cache).images == 0
    for other, message in (
        ({"size": 8}, "size: there 16, here 8"), ({"grey": True}, "channels: there 3, here 1"),
        ({"train": "train", "val": "val"}, "train: there None, here train"),
    ):  # fmt: skip
        with pytest.raises(StudyMismatchError, match=message):
            run(data, cache, **other)
    shutil.copytree(data, tmp_path / "other")
    with pytest.raises(StudyMismatchError, match=r"data: there .*set, here .*other"):
        run(tmp_path / "other", cache)
    # What labels mean must not change in mid-ingest either.
    (cache / "cache.json").unlink()
    text = (data / "val_labels.txt").read_text()
    (data / "val_labels.txt").write_text(text.replace(WNIDS[3], WNIDS[4]))
    with pytest.raises(StudyMismatchError, match="val_labels_digest"):
        run(data, cache)
    (data / "val_labels.txt").write_text(text)
    (data / "train" / "n00000005").mkdir()
    (data / "train" / "n00000005" / "n00000005_1.JPEG").write_bytes(small[0][0][2])
    with pytest.raises(StudyMismatchError, match="class_folders_digest"):
        run(data, cache)


def test_a_folder_that_changed_in_mid_ingest_is_named(small, tmp_path):
    write_ilsvrc(tmp_path / "set", "folders", *small)
    run(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "cache/cache.json").unlink()
    next((tmp_path / "set/train" / WNIDS[2]).iterdir()).unlink()
    with pytest.raises(DamagedObjectError, match=rf"train/{WNIDS[2]}.parquet was decoded when"):
        run(tmp_path / "set", tmp_path / "cache")
    (tmp_path / f"cache/shards/train/{WNIDS[2]}.parquet").unlink()
    assert run(tmp_path / "set", tmp_path / "cache").images == 3


def test_a_damaged_shard_object_is_named(small, tmp_path):
    shards(tmp_path / "set", *small)
    run(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "cache/cache.json").unlink()
    path = tmp_path / "cache/shards/train/train-1.parquet"
    # The last byte of the ids' pages: elsewhere there are bytes that nobody reads, such as of
    # statistics in a page's header, and where they are depends on the length of the folder's name.
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.path_in_schema == "example_id"
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedObjectError, match=r"train-1\.parquet does not read back; delete it"):
        run(tmp_path / "set", tmp_path / "cache")


def test_two_drivers_do_not_ingest_at_once(small, tmp_path):
    shards(tmp_path / "set", *small)
    with (
        DriverLock(Files(tmp_path / "cache")),
        pytest.raises(StoreHeldError, match="held by process"),
    ):
        run(tmp_path / "set", tmp_path / "cache")
    assert run(tmp_path / "set", tmp_path / "cache").images == 60


def test_other_file_systems(small, tmp_path):
    import fsspec

    shards(tmp_path / "set", *small)
    expected = run(tmp_path / "set", tmp_path / "cache").about
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set") + "/", "/ingest-test/set/", recursive=True)
    found = run("memory://ingest-test/set", "memory://ingest-test/cache").about
    assert found == expected
    write_ilsvrc(tmp_path / "folders", "folders", *small)
    memory.put(str(tmp_path / "folders") + "/", "/ingest-test/folders/", recursive=True)
    found = run("memory://ingest-test/folders", "memory://ingest-test/cache2").about
    assert found["fingerprint"] == expected["fingerprint"]
    with pytest.raises(ExamplesError, match="no file system"):
        run("nofs://a", tmp_path / "c")
    with pytest.raises(StoreError, match="no file system"):
        run(tmp_path / "set", "nofs://a")


SCRIPT = """
import importlib, time
module = importlib.import_module("raymem.data.shards.ingestion")
if __name__ == "__main__":
    if {engine!r} == "serial":
        decode = module.decode_shard
        module.decode_shard = lambda task: (time.sleep(0.1), decode(task))[1]
    module.ingest({data!r}, {cache!r}, size=16, engine={engine!r})
"""


def start(tmp_path, engine):
    script = tmp_path / f"drive_{engine}.py"
    script.write_text(
        SCRIPT.format(data=str(tmp_path / "set"), cache=str(tmp_path / "cache"), engine=engine)
    )
    return subprocess.Popen(
        [sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def many_shards(root, n):
    train, val = ilsvrc(30 * n, 60)
    for number, part in enumerate(shard_files.parts(train, n)):
        write_tar(root / f"train-{number:02d}.tar", part)
    write_tar(root / "val.tar", val)


@pytest.mark.alone
def test_a_killed_driver_costs_its_shard_only(tmp_path):
    many_shards(tmp_path / "set", 20)
    folder = tmp_path / "cache/shards"
    process = start(tmp_path, "serial")
    wait_until(lambda: len(times(folder)) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = times(folder)
    assert 3 <= len(before) < 21
    assert not (tmp_path / "cache/cache.json").exists()
    # What a kill in mid-write leaves: pieces that no shard's object names.
    (tmp_path / "cache/pieces/train/train-19-000.npy").write_bytes(b"half")
    summary = run(tmp_path / "set", tmp_path / "cache")
    assert (summary.shards, summary.done_before) == (21, len(before))
    assert {path: when for path, when in times(folder).items() if path in before} == before
    assert summary.about == run(tmp_path / "set", tmp_path / "whole").about
    Cache(tmp_path / "cache").arrays(tmp_path / "local")


@pytest.mark.alone
def test_ctrl_c_stops_after_the_shard_and_says_how_to_go_on(tmp_path):
    many_shards(tmp_path / "set", 20)
    process = start(tmp_path, "serial")
    wait_until(lambda: len(times(tmp_path / "cache/shards")) >= 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "shards; run the same command again to go on" in said
    assert not (tmp_path / "cache/driver.json").exists()
    assert run(tmp_path / "set", tmp_path / "cache").about["n_train"] == 600


@pytest.mark.alone
def test_ray_gives_what_this_process_gives(small, tmp_path):
    write_ilsvrc(tmp_path / "set", "tar", *small, n_shards=2)
    here = run(tmp_path / "set", tmp_path / "here")
    there = run(tmp_path / "set", tmp_path / "there", engine="ray")
    assert (there.images, there.shards) == (60, 4)
    assert there.about == here.about
    for key in ("index.parquet", "rejects.parquet", "pieces/train/imagenet-train-0001-000.npy"):
        assert (tmp_path / "here" / key).read_bytes() == (tmp_path / "there" / key).read_bytes()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data's own settings
@pytest.mark.parametrize(
    ("resources", "held"),
    [({CPU_NODE: 1}, {"CPU": 1.0, CPU_NODE: 0.001}), ({}, {"CPU": 1.0})],
    ids=["cpu nodes", "no such nodes"],
)
def test_decoding_takes_cpu_nodes_where_there_are_such(small, tmp_path, resources, held):
    """tests/test_asking.py has what the autoscalers make of it."""
    write_ilsvrc(tmp_path / "set", "tar", *small, n_shards=2)
    # In a process of its own: Ray reads once how it authenticates, and other tests do it otherwise.
    driver = f"""
import ray
from raymem.data.shards import ingest, ingestion

def noted(batch):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(f"{{ray.get_runtime_context().get_assigned_resources()}}\\n")
    from raymem.data.shards.ingestion import decode_on_ray
    return decode_on_ray(batch)

ingestion.decode_on_ray = noted
ray.init(
    address="local", num_cpus=2, resources={resources!r}, include_dashboard=False,
    log_to_driver=False, logging_level="ERROR",
)
folders = {str(tmp_path / "set")!r}, {str(tmp_path / "cache")!r}
print("images", ingest(*folders, size={SIZE}, engine="ray").images)
"""
    finished = subprocess.run(
        [sys.executable, "-c", driver],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "images 60" in finished.stdout, finished.stderr
    seen = [ast.literal_eval(line) for line in (tmp_path / "log").read_text().splitlines()]
    # Ray Data adds the memory it has seen tasks take.
    assert [{name: n for name, n in row.items() if name != "memory"} for row in seen] == [held] * 4


@pytest.mark.alone
@pytest.mark.slow
def test_ray_survives_a_killed_worker_and_resumes_after_a_killed_driver(tmp_path):
    train, val = ilsvrc(2000, 60)
    rng = np.random.default_rng(0)
    large = [saved(Image.fromarray(rng.integers(0, 256, (900, 900, 3), np.uint8))) for _ in "abc"]
    train = [(key, label, large[k % 3]) for k, (key, label, _) in enumerate(train)]
    for number, part in enumerate(shard_files.parts(train, 40)):
        write_tar(tmp_path / "set" / f"train-{number:02d}.tar", part)
    write_tar(tmp_path / "set/val.tar", val)
    folder = tmp_path / "cache/shards"

    def workers(process):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("ray::Map"):
                    yield child

    process = start(tmp_path, "ray")
    with no_survivors(process):
        wait_until(lambda: len(times(folder)) >= 3)
        wait_until(lambda: list(workers(process)))[0].kill()
        after = len(times(folder))
        wait_until(lambda: len(times(folder)) >= after + 5)
        assert process.poll() is None
        process.kill()
        process.wait()
    process.stderr.close()
    before = times(folder)
    assert len(before) < 41
    process = start(tmp_path, "ray")
    with no_survivors(process):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert {path: when for path, when in times(folder).items() if path in before} == before
    cache = Cache(tmp_path / "cache")
    assert (cache.about["n_train"], cache.about["n_test"]) == (2000, 60)
    cache.arrays(tmp_path / "local")


# The command


def test_the_command_says_what_it_made(small, tmp_path):
    train, val = (list(rows) for rows in small)
    train[3] = (*train[3][:2], b"")
    shards(tmp_path / "set", train, val)
    arguments = ["ingest", str(tmp_path / "set"), str(tmp_path / "cache"), "--size", "8"]
    arguments += ["--engine", "serial"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "error: 1 of 60 images cannot be used" in refused.stderr
    done = CliRunner().invoke(main, [*arguments, "--on-bad", "quarantine"])
    assert done.exit_code == 0, done.output
    for words in (
        "set: 39 train and 20 test images, 8x8x3, 10 classes", "1 images LEFT OUT",
        f"train {train[3][0]}: its image is empty",
        f"images of a class in train: 3 ({WNIDS[3]}) to 4 ({WNIDS[0]})",
    ):  # fmt: skip
        assert words in done.output
    about = json.loads((tmp_path / "cache/cache.json").read_text())
    assert about["fingerprint"][:16] in done.output
    assert not os.path.exists(tmp_path / "cache/driver.json")
    assert Path(tmp_path / "cache/_about.json").exists()
