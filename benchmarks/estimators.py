"""Memorization and influence against the dense numpy way, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil

from benchmarks.rows import Row
from raymem import memorization
from raymem.scores import Bits, PairRule, find_pairs

TOP = 5


def fleet(N: int, M: int, T: int):
    generator = np.random.default_rng(0)
    easy_train, easy_test = generator.beta(4, 0.5, N), generator.beta(4, 0.5, M)
    masks, correct_train = np.zeros((T, N), bool), np.zeros((T, N), bool)
    correct_test = np.zeros((T, M), bool)
    for t in range(T):  # row by row, so that making them is not the peak of memory
        masks[t] = generator.random(N) < 0.7
        correct_train[t] = masks[t] | (generator.random(N) < easy_train)
        correct_test[t] = generator.random(M) < easy_test
    for j in range(0, M, 50):  # some pairs that are there
        correct_test[:, j] = masks[:, j] | (generator.random(T) < 0.1)
        correct_train[:, j] = masks[:, j]
    return masks, correct_train, correct_test


def dense(masks, correct_train, correct_test, z: float):
    """Both averages by a masked product each, as published code does; then the same rule."""
    inside, outside = masks.astype(np.float32), (~masks).astype(np.float32)
    mem = (correct_train * inside).sum(0) / inside.sum(0)
    mem -= (correct_train * outside).sum(0) / outside.sum(0)
    right = correct_test.astype(np.float32)
    influence = (right.T @ inside) / inside.sum(0)
    influence -= (right.T @ outside) / outside.sum(0)
    p = right.mean(0)
    null = np.sqrt(p * (1 - p))[:, None] * np.sqrt(1 / inside.sum(0) + 1 / outside.sum(0))
    strong = (influence >= 0.15) & (influence >= z * null) & (mem >= 0.25)
    pairs = set(zip(*(a.tolist() for a in np.nonzero(strong)), strict=True))
    best = np.argpartition(-influence, TOP, axis=1)[:, :TOP]
    values = np.take_along_axis(influence, best, axis=1)
    return pairs, float(values[values > 1e-4].sum())


def ours(masks, correct_train, correct_test, z: float):
    mem = memorization(masks, correct_train).value
    N, M = masks.shape[1], correct_test.shape[1]
    rule = PairRule(z=z, top=TOP, max_pairs=10_000_000)
    pairs = find_pairs(Bits.of(masks), Bits.of(correct_test), mem, np.zeros(N), np.zeros(M), rule)
    strong = zip(pairs.test_index[pairs.strong], pairs.train_index[pairs.strong], strict=True)
    order = np.lexsort((-pairs.influence, pairs.test_index))
    test, value = pairs.test_index[order], pairs.influence[order]
    place = np.arange(len(test)) - np.searchsorted(test, test)
    return {(int(j), int(i)) for j, i in strong}, float(value[place < TOP].sum())


class Peak:
    """Most resident memory while the block runs, above what there was before, in GB."""

    def __enter__(self) -> Peak:
        process = psutil.Process()
        start = process.memory_info().rss
        self.gigabytes, self._done = 0.0, threading.Event()

        def watch() -> None:
            while not self._done.wait(0.002):
                self.gigabytes = max(self.gigabytes, (process.memory_info().rss - start) / 1e9)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(way: str, N: int, M: int, T: int) -> None:
    data = fleet(N, M, T)
    with Peak() as peak:
        start = time.perf_counter()
        pairs, top = {"dense": dense, "ours": ours}[way](*data, 5.0)
        took = time.perf_counter() - start
    answer = {"seconds": took, "peak": peak.gigabytes, "pairs": sorted(pairs), "top": top}
    print(json.dumps(answer))


def run(way: str, *sizes: int) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    program = f"from benchmarks.estimators import measure; measure({way!r}, *{sizes})"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout)


def against_the_dense_way(quick: bool) -> Iterator[Row]:
    sizes = (10_000, 2_000, 200) if quick else (50_000, 10_000, 200)
    ratios, memory = [], []
    for _ in range(1 if quick else 3):
        mine, usual = run("ours", *sizes), run("dense", *sizes)
        assert mine["pairs"] == usual["pairs"], "the two ways keep different strong pairs"
        assert abs(mine["top"] - usual["top"]) <= 1e-4 * usual["top"], "the tops differ"
        ratios.append(usual["seconds"] / mine["seconds"])
        memory.append(mine["peak"] / usual["peak"])
    N, M, T = sizes
    faster, share = statistics.median(ratios), statistics.median(memory)
    yield Row(
        what=f"memorization and influence pairs of {N:,} x {M:,} x {T}, against two dense "
        f"masked products and the same rule ({len(mine['pairs']):,} strong pairs on both sides)",
        result=f"{faster:.1f}x faster ({mine['seconds']:.1f} against {usual['seconds']:.1f} s), "
        f"peak memory {share:.2f} of it ({mine['peak']:.2f} against {usual['peak']:.1f} GB)",
        goal="2x faster, 0.10 of the memory",
        met=faster >= 2 and share <= 0.1,
    )
