"""Shards of encoded images: what is read, how it is decoded, and what is written once."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import shard_files
import torch
from PIL import Image

from raymem import CurvatureRule, Recipe, Store, Study, stream_curvature
from raymem.cli import main, run_curvature_job
from raymem.curvature.streaming import ScoringModel
from raymem.curvature.streaming.scoring_model import read_weights
from raymem.data.shards import Transform, list_shards
from raymem.data.shards.ray_data import actors
from raymem.data.shards.shard_readers import read_shard
from raymem.errors import ExamplesError, FleetError, RecipeError, StoreError, StudyMismatchError
from raymem.models import build_model
from raymem.scores import join_curvature
from raymem.store import TrialKey
from raymem.training import measure

N = 60
INF = float("inf")
ROOT = Path(__file__).parents[1]
FORMS = ("tar", "parquet", "folders")


def scoring_model(name="net", seed=0, size=16, **more):
    torch.manual_seed(seed)
    net = build_model("tiny-resnet", n_classes=10, image_shape=(size, size, 3))
    transform = Transform(size=(size, size), way="fit")
    return ScoringModel(name=name, net=net, transform=transform, n_classes=10, **more)


@pytest.fixture(scope="module")
def records(digits):
    return shard_files.encoded(digits, N)


@pytest.fixture(scope="module")
def shards_at(records, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    shard_files.write_all(root, records)
    return root


def by_id(table, name="curvature"):
    ids = [Path(i).stem for i in table["example_id"].to_pylist()]
    return dict(zip(ids, table[name].to_pylist(), strict=True))


def stream(at, store, model=None, **more):
    return stream_curvature(
        list_shards(str(at)), model or scoring_model(), Store(store), engine="serial", **more
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_scores_of_the_same_pixels_in_memory(
    records, shards_at, tmp_path, form
):
    model = scoring_model()
    summary = stream(shards_at / form, tmp_path, model)
    assert (summary.scored, summary.bad, summary.mode) == (N, [], "gauss-newton")
    assert summary.shards == (10 if form == "folders" else 3)
    table = Store(tmp_path).curvature("net")
    pixels = np.stack([model.transform(data) for _, _, data in records])
    labels = torch.tensor([label for _, label, _ in records])
    expected = measure(model.net, torch.from_numpy(pixels), labels)
    for name, values in expected.values.items():
        found = by_id(table, name)
        np.testing.assert_allclose(
            [found[key] for key, _, _ in records], values, rtol=2e-3, atol=1e-6 * values.max()
        )
    assert by_id(table, "label") == {key: label for key, label, _ in records}
    assert set(table["ok"].to_pylist()) == {True}
    assert set(table["mode"].to_pylist()) == {"gauss-newton"}
    assert table["error"].null_count == N


@pytest.mark.alone
@pytest.mark.slow
def test_ray_data_gives_what_this_process_gives_once_per_shard(shards_at, tmp_path):
    model = scoring_model()
    stream(shards_at / "tar", tmp_path / "here", model)
    store = Store(tmp_path / "ray")
    shards = list_shards(str(shards_at / "tar"))
    summary = stream_curvature(shards, model, store, batch_size=7)
    assert (summary.scored, summary.shards, summary.done_before) == (N, 3, 0)
    here, there = (Store(tmp_path / name).curvature("net") for name in ("here", "ray"))
    for name in ("example_id", "label", "content_hash", "ok", "mode"):
        assert here[name].to_pylist() == there[name].to_pylist()
    np.testing.assert_allclose(here["curvature"], there["curvature"], rtol=2e-3)
    files = sorted(key for key in store.files.list("curvature") if key.endswith("parquet"))
    assert files == [f"curvature/net/part-{k}.parquet" for k in range(3)]


def test_the_folder_of_a_model_is_one_table_for_others_too(shards_at, tmp_path):
    import duckdb
    import pandas

    stream(shards_at / "tar", tmp_path)
    folder = tmp_path / "curvature" / "net"
    assert len(pandas.read_parquet(folder)) == N
    assert duckdb.sql(f"select count(*) from '{folder}/*.parquet'").fetchall() == [(N,)]


def test_what_is_in_the_store_is_not_scored_again(shards_at, tmp_path):
    model, store = scoring_model(), Store(tmp_path)
    shards = list_shards(str(shards_at / "tar"))
    first = stream_curvature(shards[1:2], model, store, engine="serial")
    assert first.scored == 20
    before = store.files.read("curvature/net/part-1.parquet")
    second = stream_curvature(shards, model, store, engine="serial")
    assert (second.scored, second.done_before, second.shards) == (40, 1, 3)
    assert store.files.read("curvature/net/part-1.parquet") == before
    third = stream_curvature(shards, model, store, engine="serial")
    assert (third.scored, third.done_before) == (0, 3)
    assert store.curvature("net").num_rows == N


def test_another_set_with_the_same_names_of_shards_is_not_taken_for_done(records, tmp_path):
    for name, part in (("one", records[:10]), ("two", records[10:20])):
        shard_files.write_tar(tmp_path / name / "part.tar", part)
    stream(tmp_path / "one", tmp_path / "store")
    with pytest.raises(StudyMismatchError, match="data"):
        stream(tmp_path / "two", tmp_path / "store")


def test_two_drivers_do_not_score_the_same_shards(shards_at, tmp_path):
    from raymem.errors import StoreHeldError
    from raymem.store import DriverLock, Files

    with (
        DriverLock(Files(tmp_path / "curvature" / "net")),
        pytest.raises(StoreHeldError, match="held by process"),
    ):
        stream(shards_at / "tar", tmp_path)
    assert stream(shards_at / "tar", tmp_path).scored == N


def test_another_model_or_rule_under_the_same_name_is_refused(shards_at, tmp_path):
    stream(shards_at / "tar", tmp_path)
    with pytest.raises(StudyMismatchError, match="weights"):
        stream(shards_at / "tar", tmp_path, scoring_model(seed=1))
    with pytest.raises(StudyMismatchError, match="rule"):
        stream(shards_at / "tar", tmp_path, rule=CurvatureRule(probes=5))
    with pytest.raises(StudyMismatchError, match="transform"):
        stream(shards_at / "tar", tmp_path, scoring_model(size=8))
    other = stream(shards_at / "tar", tmp_path, scoring_model("other", seed=1))
    assert other.scored == N
    assert Store(tmp_path).streamed_models() == ["net", "other"]


# Bad images


def truncated(data):
    return data[: len(data) // 2]


def spoil(records):
    bad = list(records)
    bad[3] = (bad[3][0], bad[3][1], truncated(bad[3][2]))
    bad[25] = (bad[25][0], bad[25][1], b"this is no picture")
    bad[41] = (bad[41][0], None, bad[41][2])
    bad[59] = (bad[59][0], 10, bad[59][2])
    return bad


WRONG = {"digit0003", "digit0025", "digit0041", "digit0059"}


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_bad_images_are_named_counted_and_never_scored(records, tmp_path, form):
    write = shard_files.write_tar if form == "tar" else shard_files.write_parquet
    for number, part in enumerate(shard_files.parts(spoil(records), 3)):
        write(tmp_path / form / f"part-{number}.{form}", part)
    with pytest.raises(ExamplesError, match=r"digit0003 in shard part-0 .*--on-bad skip"):
        stream(tmp_path / form, tmp_path / "fatal")
    assert Store(tmp_path / "fatal").streamed_shards("net") == set()
    summary = stream(tmp_path / form, tmp_path / "store", skip_bad=True)
    assert {bad.example_id for bad in summary.bad} == WRONG
    assert {bad.shard for bad in summary.bad} == {"part-0", "part-1", "part-2"}
    assert summary.scored == N - 4
    table = Store(tmp_path / "store").curvature("net")
    rows = {row["example_id"]: row for row in table.to_pylist()}
    assert len(rows) == N
    for key, row in rows.items():
        assert row["ok"] == (key not in WRONG)
        for name in ("curvature", "loss", "content_hash", "mode"):
            assert (row[name] is None) == (key in WRONG), (key, name)
    assert "no label" in rows["digit0041"]["error"]
    assert "label 10" in rows["digit0059"]["error"]
    good = stream_good(records, tmp_path)
    for key in set(rows) - WRONG:
        assert rows[key]["curvature"] == pytest.approx(good[key], rel=2e-3)


def stream_good(records, tmp_path):
    shard_files.write_tar(tmp_path / "good" / "all.tar", records)
    stream(tmp_path / "good", tmp_path / "good-store")
    return by_id(Store(tmp_path / "good-store").curvature("net"))


def test_a_tar_that_ends_early_keeps_what_it_has_and_says_so(records, tmp_path):
    shard_files.write_tar(tmp_path / "s" / "a.tar", records[:30])
    data = (tmp_path / "s" / "a.tar").read_bytes()
    (tmp_path / "s" / "a.tar").write_bytes(data[: len(data) // 2])
    summary = stream(tmp_path / "s", tmp_path / "store", skip_bad=True)
    (bad,) = [bad for bad in summary.bad if "ends early" in bad.error]
    assert bad.shard == "a"
    assert 5 < summary.scored < 25
    with pytest.raises(ExamplesError, match="ends early"):
        stream(tmp_path / "s", tmp_path / "fatal")


def test_a_tar_cut_between_two_members_is_not_taken_for_whole(records, tmp_path):
    shard_files.write_tar(tmp_path / "s" / "a.tar", records[:30])
    data = (tmp_path / "s" / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "s" / "a.tar") as tar:
        cut = tar.getmembers()[20].offset
    (tmp_path / "s" / "a.tar").write_bytes(data[:cut])
    summary = stream(tmp_path / "s", tmp_path / "store", skip_bad=True)
    assert summary.scored == 10
    assert ["end-of-archive" in bad.error for bad in summary.bad] == [True]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2"])
def test_no_damage_to_a_tar_goes_unnoticed(records, tmp_path, suffix):
    """A flipped byte or a cut anywhere: every record is right, or there is one of error."""
    import bz2
    import gzip

    plain = tmp_path / "plain.tar"
    shard_files.write_tar(plain, records[:6])
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress}[suffix]
    data = pack(plain.read_bytes())
    # Named .tar whatever is inside: what it is shows in its first bytes.
    path = tmp_path / "a.tar"
    rng = np.random.default_rng(0)

    def found():
        (shard,) = list_shards(str(path))
        return [(r.example_id, r.label, r.data, bool(r.error)) for r in read_shard(shard)]

    path.write_bytes(data)
    right = found()
    assert [r[:3] for r in right] == records[:6]
    assert not any(r[3] for r in right)
    for at in rng.integers(1, len(data), 60):
        path.write_bytes(data[:at])
        now = found()
        # Behind the end mark there is only padding.
        assert any(r[3] for r in now) or now == right, at
    if suffix != "tar":  # pixels of an uncompressed tar have no checksum
        for at in rng.integers(10, len(data), 60):
            spoiled = bytearray(data)
            spoiled[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(spoiled))
            now = found()
            assert any(r[3] for r in now) or now == right, at


def test_two_archives_in_one_file_are_not_taken_for_one(records, tmp_path):
    import gzip

    for name, part in (("a", records[:3]), ("b", records[3:6])):
        shard_files.write_tar(tmp_path / f"{name}.tar", part)
    a, b = ((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    for name, data in (("plain", a + b), ("gz", gzip.compress(a) + gzip.compress(b))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes(data)
        last = list(read_shard(list_shards(str(tmp_path / name))[0]))[-1]
        assert "another archive" in last.error


def test_a_damaged_parquet_shard_is_reported_not_lost(records, tmp_path):
    shard_files.write_parquet(tmp_path / "s" / "a.parquet", records[:20])
    shard_files.write_parquet(tmp_path / "s" / "b.parquet", records[20:40])
    data = (tmp_path / "s" / "b.parquet").read_bytes()
    (tmp_path / "s" / "b.parquet").write_bytes(data[:-500])
    summary = stream(tmp_path / "s", tmp_path / "store", skip_bad=True)
    assert summary.scored == 20
    assert [bad.shard for bad in summary.bad] == ["b"]


def test_an_empty_tar_is_an_empty_object(records, tmp_path):
    shard_files.write_tar(tmp_path / "s" / "a.tar", records[:5])
    shard_files.write_tar(tmp_path / "s" / "b.tar", [])
    assert stream(tmp_path / "s", tmp_path / "store").scored == 5
    assert Store(tmp_path / "store").streamed_shards("net") == {"a", "b"}


def test_a_set_without_any_good_image_is_refused(records, tmp_path):
    shard_files.write_tar(tmp_path / "s" / "a.tar", records[:5], labels=False)
    with pytest.raises(ExamplesError, match="digit0000: it has no label"):
        stream(tmp_path / "s", tmp_path / "store", skip_bad=True)


# Reading


def test_webdataset_conventions(records, tmp_path):
    (key, _, data), path = records[0], tmp_path / "a.tar"
    members = [
        ("x/n01440764_10026.JPEG", data), ("x/n01440764_10026.json", b'{"label": 7}'),
        ("x/.hidden.jpg", data), ("x/one.txt", b"a caption"), ("x/one.cls", b"3"),
        (f"{key}.seg.png", data), (f"{key}.cls", b" 4\n"),
        ("bad.jpg", data), ("bad.cls", b"cat"),
        ("key.jpg", data), ("key.seg.png", b"mask"), ("key.cls", b"1"),
        ("img.000.png", data), ("img.001.png", data), ("img.cls", b"1"),
        ("caf\udce9.png", data), ("caf\udce9.cls", b"99999999999999999999"),
    ]  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(_folder("x"))
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (shard,) = list_shards(str(path))
    found = [(r.example_id, r.label, r.data == data, bool(r.error)) for r in read_shard(shard)]
    assert found == [
        ("n01440764_10026", 7, True, False), (key, 4, True, False), ("bad", None, True, True),
        ("key", 1, True, False), ("img", 1, True, True), ("caf\\xe9", 10**20 - 1, True, False),
    ]  # fmt: skip


def _folder(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_parquet_conventions(records, tmp_path):
    data = records[0][2]
    tables = {
        "cifar": {"img": [{"bytes": data, "path": None}], "fine_label": [3], "coarse_label": [1]},
        "ilsvrc": {"image": [{"bytes": data, "path": "n01440764_1_n01440764.JPEG"}], "label": [5]},
        "binary": {"jpg": [data], "cls": [6], "__key__": ["k"]},
        "null": {"image": [{"bytes": None, "path": "a.jpg"}], "label": [0]},
    }
    expected = {
        "cifar": ("cifar-000000", 3, ""), "ilsvrc": ("n01440764_1", 5, ""),
        "binary": ("k", 6, ""), "null": ("a", 0, "the row has no image"),
    }  # fmt: skip
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        (shard,) = list_shards(str(tmp_path / f"{name}.parquet"))
        (record,) = read_shard(shard)
        assert (record.example_id, record.label, record.error) == expected[name]
    pq.write_table(pa.table({"image": [data], "label": ["cat"]}), tmp_path / "words.parquet")
    with pytest.raises(ExamplesError, match="label is string"):
        list(read_shard(list_shards(str(tmp_path / "words.parquet"))[0]))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ExamplesError, match="columns text"):
        list(read_shard(list_shards(str(tmp_path / "text.parquet"))[0]))


def test_folders_number_classes_by_name_or_as_the_model_does(records, tmp_path):
    for name, (_, _, data) in zip(("cat", "dog", "ant"), records, strict=False):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(data)
    at = str(tmp_path / "set")

    def labels(classes):
        return {s.name: s.label for s in list_shards(at, classes)}

    hidden = tmp_path / "set" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "1.jpg").write_bytes(records[0][2])
    assert labels(None) == {"ant": 0, "cat": 1, "dog": 2}
    assert labels(("dog", "cat", "bat", "ant")) == {"ant": 3, "cat": 1, "dog": 0}
    with pytest.raises(ExamplesError, match="folders ant are no classes of the model"):
        labels(("dog", "cat"))
    with pytest.raises(ExamplesError, match="3 folders of classes"):
        list_shards(at, n_classes=1000)
    assert len(list_shards(at, n_classes=3)) == 3
    shard_files.write_tar(tmp_path / "set" / "stray.tar", records[:1])
    with pytest.raises(ExamplesError, match=r"both stray\.tar and folders"):
        list_shards(at)
    (tmp_path / "set" / "stray.tar").unlink()
    ids = [r.example_id for s in list_shards(at) for r in read_shard(s)]
    assert ids == ["ant/1.jpg", "cat/1.jpg", "dog/1.jpg"]


def test_patterns_single_files_and_other_file_systems(records, shards_at, tmp_path):
    import fsspec

    at = str(shards_at / "tar")
    assert [s.name for s in list_shards(f"{at}/part-[01].tar*")] == ["part-0", "part-1"]
    assert [s.name for s in list_shards(f"{at}/part-2.tar")] == ["part-2"]
    shard_files.write_tar(tmp_path / "x.tar.gz", records[:4])
    assert len(list(read_shard(list_shards(str(tmp_path / "x.tar.gz"))[0]))) == 4
    memory = fsspec.filesystem("memory")
    for name in ("part-0.tar", "part-1.tar"):
        memory.pipe_file(f"/shards-test/{name}", (shards_at / "tar" / name).read_bytes())
    summary = stream("memory://shards-test", "memory://shards-test-store")
    assert summary.scored == 40


@pytest.mark.parametrize(
    ("data", "message"),
    [("nowhere", "no .tar"), ("{0..3}.tar", "not with braces"), ("x*.tar", "no .tar"),
     ("nofs://a", "no file system")],
)  # fmt: skip
def test_nothing_to_read_is_an_error(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExamplesError, match=message):
        list_shards(data)


def test_two_shards_of_one_name_are_refused(records, tmp_path):
    shard_files.write_tar(tmp_path / "a.tar", records[:2])
    shard_files.write_parquet(tmp_path / "a.parquet", records[:2])
    with pytest.raises(ExamplesError, match="two shards"):
        list_shards(str(tmp_path))


# Transforms


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (224, 300)])
def test_the_crop_is_torchvisions(size):
    from torchvision import transforms as T

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    for resize, crop, name in ((36, 32, "bilinear"), (32, 32, "bicubic")):
        ours = Transform(size=(crop, crop), resize=resize, interpolation=name)(file.getvalue())
        mode = T.InterpolationMode(name)
        theirs = T.Compose([T.Resize(resize, mode), T.CenterCrop(crop)])(image)
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_timms_models_bring_their_transform():
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from raymem.data.shards.transform import of_timm

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 260, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    for name in ("resnet18", "resnet50", "mobilenetv2_100"):
        config = resolve_model_data_config(timm.create_model(name, pretrained=False))
        theirs = create_transform(**config, is_training=False)
        pixels = of_timm(config)(file.getvalue())
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
        torch.testing.assert_close((x - mean) / std, theirs(image), rtol=1e-5, atol=1e-5)


def test_folder_images_get_the_pixels_that_a_study_of_the_folder_has(records, tmp_path):
    from raymem import load_examples

    for split in ("train", "test"):
        shard_files.write_folders(tmp_path / "set" / split, records[:40])
    examples = load_examples(tmp_path / "set", image_size=16)
    hashes = dict(zip(examples.train_ids, examples.content_hashes, strict=False))
    grey = examples.image_shape[2] == 1
    model = scoring_model()
    assert not grey
    stream_curvature(
        list_shards(str(tmp_path / "set"), examples.classes), model, Store(tmp_path / "store"),
        engine="serial",
    )  # fmt: skip
    streamed = by_id_full(Store(tmp_path / "store").curvature("net"))
    assert set(hashes) <= set(streamed)
    assert all(streamed[i] == digest for i, digest in hashes.items())


def by_id_full(table):
    return dict(
        zip(table["example_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True)
    )


# Models


def test_a_store_keeps_models_that_score_its_own_examples(digits, tmp_path):
    study = Study(
        examples=digits,
        recipe=Recipe(model="mlp-32", epochs=2, learning_rate=0.1),
        store=tmp_path / "study",
        trials=3,
        curvature=CurvatureRule(),
        keep_models=2,
    )
    study.train(engine="serial")
    study.score()
    store = Store(tmp_path / "study")
    assert [key.trial for key in sorted(store.kept())] == [0, 1]
    # The study's own pixels as PNGs, under its ids.
    rows = []
    for i in range(50):
        file = io.BytesIO()
        Image.fromarray(digits.x_train[i, :, :, 0]).save(file, "PNG")
        rows.append((digits.train_ids[i], int(digits.y_train[i]), file.getvalue()))
    shard_files.write_tar(tmp_path / "set" / "a.tar", rows)
    model = ScoringModel.of_store(store, TrialKey(INF, 1))
    assert model.name == "eps-inf-000001"
    stream(tmp_path / "set", tmp_path / "study", model)
    joined = join_curvature(store, store.scores(), model.name)
    there = {r["example_id"]: r for r in joined.to_pylist() if r["curvature"] is not None}
    assert set(there) == set(digits.train_ids[:50])
    trial = store.trial(TrialKey(INF, 1)).slice(0, 1200)
    np.testing.assert_allclose(
        [there[i]["curvature"] for i in digits.train_ids[:50]],
        trial["curvature"].to_numpy()[:50],
        rtol=1e-3,
    )
    with pytest.raises(StoreError, match="keeps no weights of trial 2"):
        ScoringModel.of_store(store, TrialKey(INF, 2))


def test_damaged_weights_are_found(digits, tmp_path):
    from raymem import verify

    study = Study(
        examples=digits, recipe=Recipe(model="mlp-8", epochs=1), store=tmp_path, trials=1,
        keep_models=1,
    )  # fmt: skip
    study.train(engine="serial")
    store, path = Store(tmp_path), tmp_path / "models/eps-inf/000000.safetensors"
    assert verify(store) == []
    data = bytearray(path.read_bytes())
    for at in (3, 40, len(data) // 2, len(data) - 1):
        spoiled = bytearray(data)
        spoiled[at] ^= 1
        path.write_bytes(bytes(spoiled))
        problems = verify(store)
        assert [(p.kind, p.key) for p in problems] == [
            ("damaged", "models/eps-inf/000000.safetensors")
        ], at


def test_weights_that_give_no_numbers_give_no_scores(records, tmp_path):
    model = scoring_model()
    with torch.no_grad():
        model.net[1].fc.weight[3] = torch.nan
    shard_files.write_tar(tmp_path / "set" / "a.tar", records[:5])
    forced = CurvatureRule(mode="gauss-newton")
    summary = stream(tmp_path / "set", tmp_path / "s", model, rule=forced, skip_bad=True)
    assert (summary.scored, len(summary.bad)) == (0, 5)
    table = Store(tmp_path / "s").curvature("net")
    assert set(table["ok"].to_pylist()) == {False}
    for name in ("curvature", "curvature_stderr", "loss"):
        assert table[name].null_count == 5


@pytest.mark.parametrize("name", ["..", ".", "a/b", "", "-x"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(StoreError, match="cannot name a folder"):
        scoring_model(name)


def test_changed_code_of_a_kept_model_is_refused(digits, tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    study = Study(
        examples=digits, recipe=Recipe(model="mymodels:net", epochs=1), store=tmp_path / "s",
        trials=1, keep_models=1,
    )  # fmt: skip
    study.train(engine="serial")
    store, key = Store(tmp_path / "s"), TrialKey(INF, 0)
    assert ScoringModel.of_store(store, key).transform.grey
    changed = {"name": "mymodels:net", "code": "0" * 64}
    monkeypatch.setattr("raymem.curvature.streaming.scoring_model.identity", lambda model: changed)
    with pytest.raises(StudyMismatchError, match="code of mymodels:net"):
        ScoringModel.of_store(store, key)


CODE = """
import torch


def net(n_classes, image_shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n_classes))
"""


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/raymem-evil",)


def test_weights_are_read_without_running_what_is_in_them(tmp_path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=4)
    state = net.state_dict()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt"
    )
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        found = read_weights(str(tmp_path / name))
        assert all(torch.equal(found[k], v) for k, v in state.items())
        model = ScoringModel.of_timm("resnet18", weights=str(tmp_path / name), n_classes=4)
        assert (model.n_classes, model.transform.size) == (4, (224, 224))
    Path(tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(RecipeError, match="cannot be read as weights"):
            read_weights(str(tmp_path / name))
    assert not Path("/tmp/raymem-evil").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("x")
    for name, message in (
        ("list.pt", "no state dict"), ("text.safetensors", "cannot be read"),
        ("none.pt", "no file"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            read_weights(str(tmp_path / name))
    with pytest.raises(RecipeError, match="do not fit"):
        ScoringModel.of_timm("resnet18", weights=str(tmp_path / "a.pt"), n_classes=5)
    with pytest.raises(RecipeError, match="no model"):
        ScoringModel.of_timm("resnet17", weights=str(tmp_path / "a.pt"))


# Joining


def test_a_join_with_other_labels_repeated_or_no_common_ids_is_refused(digits, tmp_path):
    study = Study(
        examples=digits, recipe=Recipe(model="mlp-8", epochs=1), store=tmp_path / "s", trials=1
    )
    study.train(engine="serial")
    study.score()
    store = Store(tmp_path / "s")
    records = shard_files.encoded(digits, 12)
    named = [(digits.train_ids[i], r[1], r[2]) for i, r in enumerate(records)]
    wrong = [(named[0][0], (named[0][1] + 1) % 10, named[0][2]), *named[1:]]
    sets = {
        "fine": named, "labels": wrong, "twice": [*named, named[3]], "others": records,
    }  # fmt: skip
    for name, rows in sets.items():
        shard_files.write_tar(tmp_path / name / "a.tar", rows)
        stream(tmp_path / name, tmp_path / "s", scoring_model(name))
    joined = join_curvature(store, store.scores(), "fine")
    assert joined.num_rows == store.scores().num_rows
    assert joined["curvature"].null_count == joined.num_rows - 12
    for name, message in (
        ("labels", "1 examples have another label"), ("twice", "more than once"),
        ("others", "no example of the scores"), ("nothing", "no curvature of 'nothing'"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            join_curvature(store, store.scores(), name)


def test_a_store_of_curvature_alone_has_a_status_and_can_be_repaired(shards_at, tmp_path):
    from click.testing import CliRunner

    from raymem import verify

    stream(shards_at / "tar", tmp_path)
    store = Store(tmp_path)
    assert verify(store) == []
    assert "net: 3 shards" in CliRunner().invoke(main, ["status", str(tmp_path)]).output
    path = tmp_path / "curvature/net/part-1.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    (tmp_path / "note.txt").write_text("x")
    assert [(p.kind, p.key) for p in verify(store)] == [
        ("damaged", "curvature/net/part-1.parquet"), ("foreign", "note.txt"),
    ]  # fmt: skip
    verify(store, repair=True)
    assert stream(shards_at / "tar", tmp_path).scored == 20
    assert [p.kind for p in verify(store)] == ["foreign"]


# The job


def job(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run_curvature_job(arguments=[str(a) for a in arguments])
    return stopped.value.code


def test_the_job_scores_and_the_command_joins(digits, tmp_path, capsys):
    from click.testing import CliRunner

    store = tmp_path / "s"
    study = Study(
        examples=digits, recipe=Recipe(model="mlp-8", epochs=1), store=store, trials=2,
        keep_models=2,
    )  # fmt: skip
    study.train(engine="serial")
    study.score()
    records = [(digits.train_ids[i], *r[1:]) for i, r in enumerate(shard_files.encoded(digits, 30))]
    shard_files.write_tar(tmp_path / "set" / "a.tar", records)
    code = job(
        "--data", tmp_path / "set", "--store", store, "--models-of", store, "--engine", "serial",
        "--paper",
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "eps-inf-000000: 1 shard," in out
    assert "eps-inf-000001: 1 shard," in out
    result = CliRunner().invoke(
        main,
        ["scores", str(store), "--with", "eps-inf-000001", "--sort", "curvature", "--top", "5"],
    )
    assert result.exit_code == 0, result.output
    head, *rows = result.output.splitlines()
    assert head.split().count("curvature") == 1
    assert sum(row.startswith("digit-") for row in rows) == 5
    status = CliRunner().invoke(main, ["status", str(store)]).output
    assert "curvature of eps-inf-000001: 1 shard\n" in status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model"),
        (["--model", "resnet18", "--models-of", "x"], "give --model"),
        (["--model", "a", "--model", "b", "--weights", "w"], "exactly one --model"),
        (["--model", "a", "--model", "b", "--name", "n"], "exactly one --model"),
        (["--model", "resnet17", "--weights", "w.pt"], "no model 'resnet17'"),
        (["--models-of", "nowhere"], "no study in"),
    ],
)
def test_the_job_says_what_is_missing(shards_at, tmp_path, capsys, arguments, message):
    code = job("--data", shards_at / "tar", "--store", tmp_path, "--engine", "serial", *arguments)
    assert code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"CPU": 4}, (1, None, None), (2, {"num_cpus": 1})),
        ({"CPU": 2}, (1, None, None), (1, {"num_cpus": 1})),
        ({"CPU": 64}, (4, None, None), (15, {"num_cpus": 4})),
        ({"CPU": 8, "GPU": 2}, (1, None, None), (2, {"num_gpus": 1})),
        ({"CPU": 8, "GPU": 2}, (1, None, 0.25), (8, {"num_gpus": 0.25})),
        ({"CPU": 8, "GPU": 2}, (1, None, 0), (6, {"num_cpus": 1})),
        ({"CPU": 8}, (1, 3, 1), (3, {"num_gpus": 1})),
    ],
)
def test_scorers_leave_room_to_read(resources, asked, expected):
    assert actors(resources, *asked) == expected


@pytest.mark.parametrize(("cpus", "asked"), [(1, (1, None)), (4, (4, None)), (4, (1, 4))])
def test_a_cluster_without_room_to_read_is_refused(cpus, asked):
    with pytest.raises(FleetError, match="to read with"):
        actors({"CPU": cpus}, *asked, None)


@pytest.mark.slow
def test_a_resnet50_at_224_pixels_goes_through(records, tmp_path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model("resnet50", num_classes=1000)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    shard_files.write_tar(tmp_path / "set" / "a.tar", records[:4])
    code = job(
        "--data", tmp_path / "set", "--store", tmp_path / "s", "--model", "resnet50",
        "--weights", tmp_path / "w.safetensors",
    )  # fmt: skip
    assert code == 0
    rows = Store(tmp_path / "s").curvature("resnet50").to_pylist()
    assert [row["mode"] for row in rows] == ["gauss-newton"] * 4
    assert all(row["curvature"] > 0 for row in rows)
    assert all(row["curvature_stderr"] > 0 for row in rows)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from test_shards import scoring_model
from raymem import Store
from raymem.curvature.streaming import stream_models
from raymem.data.shards import list_shards
if __name__ == "__main__":
    models = [scoring_model(), scoring_model("other", seed=1)]
    stream_models(list_shards({data!r}), models, Store({store!r}), batch_size=8)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_killed_at_any_shard_and_run_again_gives_the_same_objects(digits, tmp_path):
    records = shard_files.encoded(digits, 480)
    for number, part in enumerate(shard_files.parts(records, 24)):
        shard_files.write_tar(tmp_path / "set" / f"part-{number:02d}.tar", part)
    for model in (scoring_model(), scoring_model("other", seed=1)):
        stream(tmp_path / "set", tmp_path / "whole", model, batch_size=8)
    script = tmp_path / "run.py"
    folder = tmp_path / "killed/curvature"
    text = SCRIPT.format(
        tests=str(ROOT / "tests"), data=str(tmp_path / "set"), store=str(tmp_path / "killed")
    )
    script.write_text(text)
    for wanted in (1, 16):
        process = subprocess.Popen([sys.executable, script], start_new_session=True)
        deadline = time.monotonic() + 240
        while len(list(folder.glob("*/*.parquet"))) < wanted and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.parquet")}
        assert wanted <= len(there) < 48
    subprocess.run([sys.executable, script], check=True, timeout=300)
    now = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.parquet")}
    assert all(now[path] == when for path, when in there.items())
    assert len(now) == 48
    for path in now:
        same = tmp_path / "whole/curvature" / path.relative_to(folder)
        assert path.read_bytes() == same.read_bytes()
