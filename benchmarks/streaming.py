"""Scoring shards with Ray Data against a bare loop on the same cores; memory against shards."""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.curvature import digits_like_cifar
from benchmarks.rows import Row
from raymem import CurvatureRule, Store, stream_curvature
from raymem.curvature.streaming import ScoringModel
from raymem.data.shards import Transform, list_shards
from raymem.models import build_model
from raymem.training import Meter, batch_of

SIZE = 48
RULE = CurvatureRule(mode="gauss-newton", paper=None)
# Both sides are timed over the last three quarters: workers that start are not what is compared.
SKIPPED = 0.25


def write_shards(folder: Path, n: int, n_shards: int) -> None:
    """n JPEGs of mixed sizes, 32 to 64 pixels, as WebDataset tars."""
    x, y = digits_like_cifar(min(n, 1000), 10)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i in range(shard * n // n_shards, (shard + 1) * n // n_shards):
                file = io.BytesIO()
                size = tuple(int(side) for side in rng.integers(32, 65, 2))
                Image.fromarray(x[i % len(x)]).resize(size).save(file, "JPEG")
                members = (("jpg", file.getvalue()), ("cls", str(y[i % len(x)]).encode()))
                for extension, content in members:
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def model() -> ScoringModel:
    torch.manual_seed(0)
    net = build_model("small-resnet", n_classes=10, image_shape=(SIZE, SIZE, 3))
    transform = Transform(size=(SIZE, SIZE), way="fit")
    return ScoringModel(name="net", net=net, transform=transform, n_classes=10)


def bare_loop(paths: list[str], done: multiprocessing.Queue) -> None:
    """Tars -> JPEGs -> batches -> the same curvature, and nothing else; says when batches end."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    scoring = model()
    size, meter = batch_of(3 * SIZE * SIZE), None
    images, labels = [], []

    def flush() -> None:
        nonlocal meter
        x, y = torch.from_numpy(np.stack(images)), torch.tensor(labels)
        meter = meter or Meter(scoring.net, x, y, RULE)
        meter(x, y)
        done.put((time.time(), len(images)))
        images.clear()
        labels.clear()

    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith("jpg"):
                    images.append(scoring.transform(data))
                else:
                    labels.append(int(data))
                if len(images) == len(labels) == size:
                    flush()
    if images:
        flush()


def rate(events: list[tuple[float, int]], n: int) -> float:
    """Images a second after the first quarter, from (time, images) of batches."""
    count, start = 0, 0.0
    for when, images in sorted(events):
        count += images
        if not start and count >= SKIPPED * n:
            start, before = when, count
    return (n - before) / (when - start)


def bare_rate(folder: Path, n: int, cores: int) -> float:
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    workers = [
        context.Process(target=bare_loop, args=(paths[k::cores], done)) for k in range(cores)
    ]
    for worker in workers:
        worker.start()
    events: list[tuple[float, int]] = []
    while sum(images for _, images in events) < n:
        events.append(done.get())
    for worker in workers:
        worker.join()
    return rate(events, n)


class Watched(Store):
    """A store that writes down when shards arrive."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.events: list[tuple[float, int]] = []

    def write_streamed(self, model, shard, table, about) -> bool:
        self.events.append((time.time(), table.num_rows))
        return super().write_streamed(model, shard, table, about)


def peak_memory(call: Callable[[], object]) -> float:
    """Bytes of this process and its children while `call` runs, shared ones (the object store among
    them) counted once."""
    peak, over = [0], threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not over.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        call()
    finally:
        over.set()
        watcher.join()
    return float(peak[0])


def streamed(folder: Path) -> tuple[Watched, float]:
    """The store with its times, and the peak of memory of all processes, in bytes."""
    with tempfile.TemporaryDirectory() as target:
        store = Watched(target)
        shards = list_shards(str(folder))
        return store, peak_memory(lambda: stream_curvature(shards, model(), store, RULE))


def against_the_bare_loop(quick: bool) -> Iterator[Row]:
    n, repeats, cores = (800, 1, os.cpu_count() or 1) if quick else (2000, 3, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        write_shards(few, n, 20 if quick else 40)
        pairs = []
        for _ in range(repeats):
            ours = rate(streamed(few)[0].events, n)
            time.sleep(10)  # Ray's processes end
            pairs.append((ours, bare_rate(few, n, cores)))
        share = statistics.median(a / b for a, b in pairs)
        ours, bare = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        yield Row(
            what=f"scoring shards with Ray Data, small-resnet at {SIZE} pixels, {n:,} JPEGs, "
            "against a bare loop per core",
            result=f"{share:.2f} ({ours / cores:.1f} against {bare / cores:.1f} images/s per core)",
            goal="0.8",
            met=share >= 0.8,
            why="decoding runs ahead in the first quarter, which is not timed",
        )
        write_shards(many, 4 * n, 4 * (20 if quick else 40))
        small, large = streamed(few)[1], streamed(many)[1]
        yield Row(
            what="peak memory of all processes, four times the shards",
            result=f"{large / small:.2f}x ({large / 1e9:.2f} against {small / 1e9:.2f} GB)",
            goal="1.1x",
            met=large <= 1.1 * small,
        )
