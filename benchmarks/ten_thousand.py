"""Ten thousand trials that are next to empty: what a fleet costs beside its training.

A real fleet on a local Ray, four workers; 8 training and 4 test examples of 2 x 2 pixels, one epoch
of mlp-1. Memory is sampled all the while, of the driver, the trial queue, the workers and Ray's
object store: none of them may grow with the number of trials.

    python -m benchmarks --only ten-thousand         2 to 5 minutes
    python -m benchmarks.ten_thousand --trials 300   a try
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measured import keep
from benchmarks.rows import Row, seconds
from raymem import Examples, Recipe, Store, Study
from raymem.fleet.cluster import connected
from raymem.store import TrialKey

WORKERS = 4
SHARES = (0.1, 0.5, 1.0)
IN_SHARED_MEMORY = re.compile(r'ray_object_store_memory{.*Location="MMAP_SHM".*} (\S+)')


def empty_study(folder: str, trials: int) -> Study:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (12, 2, 2, 1), dtype=np.uint8)
    y = np.arange(12) % 2
    examples = Examples(x_train=x[:8], y_train=y[:8], x_test=x[8:], y_test=y[8:])
    return Study(
        examples=examples, recipe=Recipe(model="mlp-1", epochs=1), store=folder, trials=trials
    )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Memory at one moment, MB; NaN where the process is not there (yet)."""

    done: int
    driver: float
    queue: float
    largest_worker: float
    object_store: float


class Sampler:
    """Samples the memory of this process's Ray once a second while the block runs."""

    def __init__(self, trials: Path) -> None:
        self.trials, self.samples = trials, list[Sample]()
        self._stop = threading.Event()

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            with contextlib.suppress(OSError, psutil.Error):
                self.samples.append(self._sample())

    def _sample(self) -> Sample:
        me, names = psutil.Process(), dict[str, list[float]]()
        for process in me.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = " ".join(process.cmdline())
                names.setdefault(name.split("(")[0], []).append(process.memory_info().rss / 1e6)
        queue = [mb for name, found in names.items() if "_QueueActor" in name for mb in found]
        workers = [mb for name, found in names.items() if "RayTrainWorker" in name for mb in found]
        return Sample(
            done=len(os.listdir(self.trials)) if self.trials.is_dir() else 0,
            driver=me.memory_info().rss / 1e6,
            queue=max(queue, default=math.nan),
            largest_worker=max(workers, default=math.nan),
            object_store=object_store_megabytes(),
        )


def object_store_megabytes() -> float:
    """What lies in the object stores of the connected cluster, as their nodes' metrics say."""
    import ray

    total = 0.0
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        total += sum(float(value) for value in IN_SHARED_MEMORY.findall(text))
    return total / 1e6


def calls_a_second() -> float:
    """How often a trial queue actor answers, when many workers ask at once."""
    import ray

    from raymem.fleet import TrialQueue

    queue = ray.remote(TrialQueue).options(num_cpus=0).remote([TrialKey(math.inf, 0)])
    ray.get(queue.register.remote("a", "group", 0))
    calls = 2000
    took = seconds(lambda: ray.get([queue.heartbeat.remote("a") for _ in range(calls)]))
    ray.kill(queue)
    return calls / took


def run(trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raymem-empty-") as folder:
        study = empty_study(folder, trials)
        with connected(num_cpus=WORKERS):
            start = time.time()
            with Sampler(Path(folder) / "trials" / "eps-inf") as sampler:
                study.train(max_workers=WORKERS)
            wall = time.time() - start
            calls = calls_a_second()
        store = Store(folder)
        moments = sorted(os.stat(store.files.path(key.object_key)).st_mtime for key in store.done())
        training = statistics.median(
            store.provenance(TrialKey(math.inf, t))["seconds"]
            for t in range(0, trials, math.ceil(trials / 200))
        )
        status = [sys.executable, "-c", "from raymem.cli import main; main()", "status", folder]
        return {
            "trials": trials,
            "workers": WORKERS,
            "wall": wall,
            "start": moments[0] - start,
            "per_trial": wall / trials,
            "per_trial_running": (moments[-1] - moments[0]) / (trials - 1),
            "first_tenth": per_trial(moments[: trials // 10]),
            "last_tenth": per_trial(moments[-trials // 10 :]),
            "training": training,
            "calls_a_second": calls,
            "memory": memory_at(sampler.samples, trials),
            "listing": seconds(store.done),
            "status": seconds(lambda: subprocess.run(status, check=True, capture_output=True)),
            "resume": seconds(lambda: study.train(max_workers=WORKERS)),
        }


def per_trial(moments: list[float]) -> float:
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def memory_at(samples: list[Sample], trials: int) -> list[dict[str, float]]:
    """The sample nearest to each share of the trials; the last one of a running fleet for all."""
    running = [s for s in samples if not math.isnan(s.queue) and s.done > 0]
    found = []
    for share in SHARES:
        nearest = min(running, key=lambda s: abs(s.done - share * trials))
        found.append({"share": share, **vars(nearest)})
    return found


def rows(found: dict[str, Any]) -> Iterator[Row]:
    trials = found["trials"]
    overhead = found["workers"] * found["per_trial_running"] - found["training"]
    yield Row(
        what=f"{trials:,} empty trials, {WORKERS} workers on {os.cpu_count()} cores, start to end",
        result=f"{found['wall']:.0f} s, {1e3 * found['per_trial']:.1f} ms a trial; "
        f"{found['start']:.0f} s to the first commit, then {1e3 * found['first_tenth']:.1f} ms a "
        f"trial in the first tenth and {1e3 * found['last_tenth']:.1f} ms in the last",
        goal="20 ms",
        met=found["per_trial"] < 0.02,
    )
    yield Row(
        what="of a worker's time per trial: train and evaluate, the rest",
        result=f"{1e3 * found['training']:.1f} ms, {1e3 * overhead:.1f} ms",
    )
    memory = found["memory"]
    for name, label in (
        ("driver", "driver"),
        ("queue", "trial queue actor"),
        ("largest_worker", "largest worker"),
        ("object_store", "object store"),
    ):
        values = [sample[name] for sample in memory]
        at = ", ".join(f"{s['done']:,}" for s in memory)
        yield Row(
            what=f"memory of the {label} after {at} trials",
            result=", ".join(f"{value:.1f}" for value in values) + " MB",
            goal="flat: 5%, or 10 MB",
            met=values[-1] - values[0] < max(10, 0.05 * values[0]),
        )
    yield Row(
        what=f"with {trials:,} trials done: listing, `raymem status`, resume to nothing left",
        result=f"{found['listing']:.2f}, {found['status']:.1f}, {found['resume']:.2f} s",
        goal="10 s each",
        met=max(found["listing"], found["status"], found["resume"]) < 10,
    )
    yield Row(
        what="calls that a trial queue actor answers, asked without waiting",
        result=f"{found['calls_a_second']:,.0f}/s",
    )


def measure(quick: bool) -> Iterator[Row]:
    found = run(1_000 if quick else 10_000)
    keep("ten_thousand", found)
    yield from rows(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Empty trials, so many.")
    parser.add_argument("--trials", type=int, default=10_000)
    found = run(parser.parse_args().trials)
    keep("ten_thousand", found)
    for row in rows(found):
        print(f"| {' | '.join(row.cells())} |")


if __name__ == "__main__":
    main()
