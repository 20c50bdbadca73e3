"""Curvature of many models in one pass over the images, against a pass each and scoring alone."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.curvature import digits_like_cifar
from benchmarks.rows import Row
from benchmarks.streaming import Watched, peak_memory, rate
from raymem import CurvatureRule
from raymem.curvature.streaming import ScoringModel, stream_models
from raymem.curvature.streaming.blocks import Reading, decode_block, read_blocks
from raymem.data.shards import Transform, list_shards
from raymem.data.shards.ray_data import OBJECT_STORE_BYTES, with_readers
from raymem.fleet import Engine
from raymem.fleet.cluster import connected
from raymem.training import Meter, batch_of, fast_arithmetic

RULE = CurvatureRule(mode="gauss-newton", paper=None)
GOAL, MEMORY_GOAL = 1.3, 1.1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is scored."""

    images: int = 2000
    side: int = 224
    shards: int = 40
    models: int = 8
    large_shard: int = 5000
    """Images of the one tar whose memory is compared with that of one of a quarter."""


QUICK = Sizes(images=240, side=96, shards=12, models=4, large_shard=800)


def write_shards(folder: Path, sizes: Sizes, n: int, n_shards: int) -> None:
    """n JPEGs, a little larger than what models take, as WebDataset tars."""
    x, y = digits_like_cifar(min(n, 500), 10)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i in range(shard * n // n_shards, (shard + 1) * n // n_shards):
                size = tuple(int(sizes.side * scale) for scale in rng.uniform(1.1, 1.6, 2))
                file = io.BytesIO()
                Image.fromarray(x[i % len(x)]).resize(size).save(file, "JPEG", quality=90)
                members = (("jpg", file.getvalue()), ("cls", str(y[i % len(y)]).encode()))
                for extension, content in members:
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def small_net(number: int, sizes: Sizes) -> ScoringModel:
    """Two convolutions with large strides: scoring is cheap, so that decoding is what shows."""
    torch.manual_seed(number)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=8), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    transform = Transform(size=(sizes.side, sizes.side), way="fit")
    return ScoringModel(name=f"net{number}", net=net, transform=transform, n_classes=10)


def score_alone(folder: str, sizes: Sizes, part: int, of: int, done: Any) -> None:
    """Every block of some shards under all models, and nothing else: pixels are there before.

    Puts (time, images) into `done` after each block and model, from the first block on.
    """
    torch.set_num_threads(1)
    models = [small_net(number, sizes) for number in range(sizes.models)]
    shards = list_shards(folder)
    transform = models[0].transform
    reading = Reading(
        shards=shards, transform=transform, n_classes=10, batch_size=batch_of(transform.values)
    )
    blocks = [
        decode_block(reading, block)
        for number in range(part, len(shards), of)
        for block in read_blocks(reading, number)
    ]
    meters: list[Meter] = []
    with fast_arithmetic(1):
        for block in blocks:
            x, y = torch.from_numpy(block.pixels), torch.from_numpy(block.labels)
            meters = meters or [Meter(model.net, x, y, RULE) for model in models]
            for meter in meters:
                meter.all(x, y, reading.batch_size)
                done.put((time.time(), len(x)))


def alone_rate(folder: Path, sizes: Sizes, cores: int) -> float:
    """Images times models a second, on all cores."""
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    workers = [
        context.Process(target=score_alone, args=(str(folder), sizes, part, cores, done))
        for part in range(cores)
    ]
    for worker in workers:
        worker.start()
    n, events = sizes.images * sizes.models, list[tuple[float, int]]()
    while sum(images for _, images in events) < n:
        events.append(done.get())
    for worker in workers:
        worker.join()
    return rate(events, n)


def scored(
    folder: Path, sizes: Sizes, *, one_pass: bool, engine: Engine = "ray"
) -> tuple[float, float]:
    """Seconds of all models, and images times models a second once workers have started."""
    models = [small_net(number, sizes) for number in range(sizes.models)]
    groups = [models] if one_pass else [[model] for model in models]
    with tempfile.TemporaryDirectory() as target:
        store, start = Watched(target), time.perf_counter()
        for group in groups:
            stream_models(
                list_shards(str(folder)),
                group,
                store,
                RULE,
                models_per_pass=len(group),
                engine=engine,
            )
        seconds = time.perf_counter() - start
        return seconds, rate(store.events, sizes.images * sizes.models)


def measure(quick: bool) -> Iterator[Row]:
    sizes, cores = QUICK if quick else Sizes(), os.cpu_count() or 1
    what = f"{sizes.images:,} JPEGs at {sizes.side} pixels under {sizes.models} small models"
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at) / "set"
        write_shards(folder, sizes, sizes.images, sizes.shards)
        alone = alone_rate(folder, sizes, cores)
        with connected(data_bytes=OBJECT_STORE_BYTES, num_cpus=with_readers()):
            one, together = scored(folder, sizes, one_pass=True)
            each, _ = scored(folder, sizes, one_pass=False)
        yield Row(
            what=f"{what}, one pass against scoring decoded images",
            result=f"{alone / together:.2f}x the time ({together:.0f} against {alone:.0f} images x "
            "models/s)",
            goal=f"{GOAL}x",
            met=alone <= GOAL * together,
            why="the first quarter, in which workers start, is not timed",
        )
        yield Row(
            what=f"{what}, {sizes.models} passes against one",
            result=f"{each / one:.2f}x the time ({each:.0f} against {one:.0f} s, start of workers "
            "included)",
        )
        peaks = []
        for n in (sizes.large_shard // 4, sizes.large_shard):
            tar = Path(at) / str(n)
            write_shards(tar, sizes, n, 1)
            peaks.append(peak_memory(lambda tar=tar: scored_one(tar, sizes)))
        small, large = peaks
        yield Row(
            what=f"peak memory of scoring one tar of {sizes.large_shard:,} images at {sizes.side} "
            "pixels, against one of a quarter",
            result=f"{large / small:.2f}x ({large / 1e9:.2f} against {small / 1e9:.2f} GB)",
            goal=f"{MEMORY_GOAL}x",
            met=large <= MEMORY_GOAL * small,
        )


def scored_one(folder: Path, sizes: Sizes) -> None:
    """A set under two models, in a Ray of its own."""
    models = [small_net(number, sizes) for number in range(2)]
    with tempfile.TemporaryDirectory() as target:
        stream_models(list_shards(str(folder)), models, Watched(target), RULE)
