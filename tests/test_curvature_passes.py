"""Curvature under many models in one pass over the images: what each alone gives, decoded once."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections import Counter

import numpy as np
import pytest
import shard_files
import torch

from benchmarks import passes
from raymem import CurvatureRule, Store, stream_curvature
from raymem.curvature.streaming import (
    ScorerOptions,
    ScoringModel,
    blocks,
    gather,
    pipeline,
    stream_models,
)
from raymem.curvature.streaming.blocks import Reading, read_blocks
from raymem.curvature.streaming.scorer import ModelSource, Work
from raymem.data.shards import Transform, list_shards
from raymem.data.shards.records import Record, Shard
from raymem.errors import CurvatureError, ExamplesError
from raymem.models import build_model

# 50 images a shard, batches of 16: blocks of 48 and 2.
N, SHARDS, BATCH = 150, 3, 16
RULE = CurvatureRule(mode="gauss-newton")


def scoring_model(number, size=8, n_classes=10):
    torch.manual_seed(number)
    net = build_model("mlp-8", n_classes=n_classes, image_shape=(size, size, 3))
    transform = Transform(size=(size, size), way="fit")
    return ScoringModel(name=f"net{number}", net=net, transform=transform, n_classes=n_classes)


MODELS = [scoring_model(number) for number in range(4)]


@pytest.fixture(scope="module")
def records(digits):
    return shard_files.encoded(digits, N)


@pytest.fixture(scope="module")
def shards(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number, part in enumerate(shard_files.parts(records, SHARDS)):
        shard_files.write_tar(folder / f"part-{number}.tar", part)
    return list_shards(str(folder))


def run(shards, models, at, **settings):
    given = {"engine": "serial", "batch_size": BATCH, **settings}
    return stream_models(shards, models, Store(at), RULE, **given)


def objects(at):
    """The bytes of all scores."""
    files = Store(at).files
    return {key: files.read(key) for key in files.list("curvature") if key.endswith(".parquet")}


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """Each model by itself."""
    at = tmp_path_factory.mktemp("alone")
    for model in MODELS:
        stream_curvature(shards, model, Store(at), RULE, engine="serial", batch_size=BATCH)
    return objects(at)


@pytest.mark.parametrize("models_per_pass", [None, 1, 3])
def test_a_pass_gives_the_bytes_of_each_model_alone(shards, alone, tmp_path, models_per_pass):
    summaries = run(shards, MODELS, tmp_path, models_per_pass=models_per_pass)
    assert [(s.model, s.scored, s.mode) for s in summaries] == [
        (f"net{k}", N, "gauss-newton") for k in range(4)
    ]
    assert objects(tmp_path) == alone
    assert len(alone) == 4 * SHARDS
    tables = [Store(tmp_path).curvature(model.name) for model in MODELS]
    assert len({tuple(table["curvature"].to_pylist()) for table in tables}) == 4


@pytest.mark.parametrize(("models_per_pass", "times"), [(4, 1), (3, 2), (1, 4)])
def test_each_image_is_decoded_once_a_pass(shards, tmp_path, monkeypatch, models_per_pass, times):
    decoded, original = Counter(), blocks.decode_block

    def counting(reading, block):
        decoded.update(record.example_id for record in block.records)
        return original(reading, block)

    monkeypatch.setattr(pipeline, "decode_block", counting)
    run(shards, MODELS, tmp_path, models_per_pass=models_per_pass)
    assert len(decoded) == N
    assert set(decoded.values()) == {times}


@pytest.mark.alone
def test_on_ray_a_pass_gives_the_same_bytes(shards, alone, tmp_path):
    run(shards, MODELS, tmp_path, engine="ray", models_per_pass=3)
    assert objects(tmp_path) == alone


def test_an_interrupted_pass_goes_on_where_it_was(shards, alone, tmp_path, monkeypatch):
    """Stopped after any number of objects, those of a shard that only some models have among them:
    the next run scores exactly what is missing, and touches nothing that is there."""
    written, original = [], Store.write_streamed

    class Killed(BaseException):
        pass

    def dying(store, model, shard, table, about):
        if len(written) == left:
            raise Killed
        written.append((model, shard))
        return original(store, model, shard, table, about)

    monkeypatch.setattr(Store, "write_streamed", dying)
    monkeypatch.setattr(gather, "WRITERS", 1)
    for left in (2, 7):
        with pytest.raises(Killed):
            run(shards, MODELS, tmp_path)
        assert len(objects(tmp_path)) == left
    left = -1
    summaries = run(shards, MODELS, tmp_path)
    assert sum(s.done_before for s in summaries) == 7
    assert sum(s.scored for s in summaries) == (4 * SHARDS - 7) * N // SHARDS
    assert objects(tmp_path) == alone
    assert len(set(written)) == len(written) == 4 * SHARDS
    assert [s.scored for s in run(shards, MODELS, tmp_path)] == [0] * 4


def test_models_that_come_later_are_scored_alone(shards, alone, tmp_path):
    run(shards[:2], MODELS[:2], tmp_path)
    summaries = run(shards, MODELS, tmp_path)
    assert [s.done_before for s in summaries] == [2, 2, 0, 0]
    assert [s.scored for s in summaries] == [N // SHARDS] * 2 + [N] * 2
    assert objects(tmp_path) == alone


def test_an_image_that_cannot_be_read_is_bad_under_every_model(records, tmp_path):
    bad = [*records[:20], ("worse", 3, b"no picture"), *records[20:30]]
    shard_files.write_tar(tmp_path / "set" / "a.tar", bad)
    shards = list_shards(str(tmp_path / "set"))
    with pytest.raises(ExamplesError, match="worse in shard a cannot be scored"):
        run(shards, MODELS[:2], tmp_path / "fail")
    for summary in run(shards, MODELS[:2], tmp_path / "skip", skip_bad=True):
        assert [image.example_id for image in summary.bad] == ["worse"]
        assert summary.scored == 30
        table = Store(tmp_path / "skip").curvature(summary.model)
        assert [row["example_id"] for row in table.to_pylist() if not row["ok"]] == ["worse"]
        assert table["curvature"].null_count == 1


def test_a_model_that_gives_nan_spoils_no_other(shards, alone, tmp_path):
    broken = scoring_model(7)
    with torch.no_grad():
        list(broken.net.parameters())[-1][0] = float("nan")
    sound, spoiled = run(shards, [MODELS[1], broken], tmp_path, skip_bad=True)
    assert (sound.scored, spoiled.scored, len(spoiled.bad)) == (N, 0, N)
    assert {k: v for k, v in objects(tmp_path).items() if "/net1/" in k} == {
        k: v for k, v in alone.items() if "/net1/" in k
    }


def test_models_of_other_pixels_need_a_pass_of_their_own(shards, tmp_path):
    for other in (scoring_model(8, size=9), scoring_model(8, n_classes=11)):
        with pytest.raises(CurvatureError, match="net0 and net8 take different pixels"):
            run(shards, [MODELS[0], other], tmp_path)


# Memory


def test_no_more_than_a_block_of_a_shard_is_read_ahead(monkeypatch):
    read = []

    def endless(shard):
        for number in range(5_000):
            read.append(number)
            yield Record(example_id=str(number), label=0, data=b"x")

    monkeypatch.setattr(blocks, "read_shard", endless)
    shard = Shard(url="a.tar", name="a", kind="tar")
    reading = Reading(
        shards=[shard], transform=Transform(size=(224, 224)), n_classes=2, batch_size=8
    )
    found, seen = read_blocks(reading, 0), 0
    for block in found:
        assert block.place.first == seen
        seen += len(block.records)
        assert len(block.records) <= 64
        assert len(read) <= seen + 1
    assert (seen, block.place.last) == (5_000, True)


@pytest.mark.parametrize("side", [8, 32, 224, 600, 4000])
@pytest.mark.parametrize("batch_size", [1, 7, 85])
def test_a_block_is_whole_batches_of_bounded_size(side, batch_size):
    transform = Transform(size=(side, side))
    images = Reading(shards=[], transform=transform, n_classes=2, batch_size=batch_size).images
    assert images % batch_size == 0
    assert images >= batch_size
    assert images == batch_size or images * transform.values <= blocks.BLOCK_BYTES
    assert images == batch_size or images <= blocks.BLOCK_IMAGES


# How many models


def test_as_many_models_as_fit_in_memory_share_a_pass(shards, tmp_path, monkeypatch):
    loaded = Counter()
    # Three models, held twice, in a quarter of it.
    memory = 3.5 * 2 * 4 * MODELS[0].weight_bytes
    monkeypatch.setattr(pipeline, "scorer_memory", lambda gpus, threads: memory)
    original = Work.passes

    def counting(work, models_per_pass):
        loaded[models_per_pass] += 1
        return original(work, models_per_pass)

    monkeypatch.setattr(Work, "passes", counting)
    run(shards, MODELS, tmp_path)
    assert loaded == {3: 1}


def test_passes_share_out_what_is_missing_once():
    rng = np.random.default_rng(0)
    wanted = {
        shard: sorted(rng.choice(9, rng.integers(1, 9), replace=False).tolist())
        for shard in range(20)
    }
    models = {number: ModelSource(name=f"m{number}", source=MODELS[0]) for number in range(9)}
    work = Work(
        store_url="", reading=None, models=models, wanted=wanted, rule=RULE, threads=1, sample=None
    )  # fmt: skip
    pairs = Counter((shard, model) for shard, of in wanted.items() for model in of)
    for most in (1, 4, 9, 100):
        parts = list(work.passes(most))
        assert all(len(part.models) <= most for part in parts)
        assert all(
            set(part.models) == {m for of in part.wanted.values() for m in of} for part in parts
        )
        shared = Counter(
            (shard, m) for part in parts for shard, of in part.wanted.items() for m in of
        )
        assert shared == pairs
        assert sum(part.pairs for part in parts) == work.pairs


def test_settings_that_make_no_sense_are_refused():
    for name in ("models_per_pass", "scorers", "batch_size", "threads"):
        with pytest.raises(CurvatureError, match=f"{name} must be 1 or more, got 0"):
            dataclasses.replace(ScorerOptions(), **{name: 0})


def test_the_benchmark_compares_the_same_work(tmp_path):
    sizes = passes.Sizes(images=24, side=32, shards=6, models=2, large_shard=0)
    passes.write_shards(tmp_path / "set", sizes, sizes.images, sizes.shards)
    done = queue.Queue()
    passes.score_alone(str(tmp_path / "set"), sizes, 0, 1, done)
    assert sum(images for _, images in done.queue) == 48
    for one_pass in (True, False):
        _, rate = passes.scored(tmp_path / "set", sizes, one_pass=one_pass, engine="serial")
        assert rate > 0
    assert passes.peak_memory(lambda: time.sleep(0.7)) > 1e7
