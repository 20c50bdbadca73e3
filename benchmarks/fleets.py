"""Fleets: how much of the workers' time is training, overhead, resume, and models needed."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, seconds
from raymem import Examples, Recipe, Store, Study, load_examples, memorization
from raymem.store import TrialKey

WORKERS = 2
WARM_UP = 20


def commits(store: Store) -> list[tuple[float, float]]:
    """(moment of the commit, seconds of training and evaluation) of each trial, in order."""
    found = [
        (
            os.stat(store.files.path(key.object_key)).st_mtime_ns / 1e9,
            store.provenance(key)["seconds"],
        )
        for key in store.done()
    ]
    return sorted(found)


def useful_share(quick: bool) -> Iterator[Row]:
    digits = load_examples("digits")
    epochs, trials = (210, 6) if quick else (250, 24)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            examples=digits,
            recipe=Recipe(model="mlp-512-256", epochs=epochs, batch_size=64),
            store=folder,
            trials=trials,
        )
        study.train(max_workers=WORKERS)
        found = commits(Store(folder))
    first, last = found[0][0], found[-1][0]
    useful = sum(max(0.0, end - max(end - took, first)) for end, took in found)
    share = useful / (WORKERS * (last - first))
    mean = np.mean([took for _, took in found])
    yield Row(
        what=f"share of {WORKERS} workers' time from the first to the last commit inside train and "
        f"evaluate, {trials} trials of {mean:.1f} s",
        result=f"{share:.3f}",
        goal="0.95",
        met=bool(share >= 0.95),
    )


def overhead(quick: bool) -> Iterator[Row]:
    digits, trials = load_examples("digits"), 200 if quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(model="mlp-8", epochs=1, batch_size=1200)
        study = Study(examples=digits, recipe=recipe, store=folder, trials=trials)
        study.train(max_workers=WORKERS)
        found = commits(Store(folder))
    # A worker's first trials load kernels: they are longer, and began before the span.
    start, later = found[WARM_UP][0], found[WARM_UP + 1 :]
    span = later[-1][0] - start
    per_trial = WORKERS * span / len(later) - np.mean([took for _, took in later])
    yield Row(
        what=f"overhead of a nearly empty trial of 1,797 examples, lease to commit on a local disk "
        f"({trials:,} trials, {WORKERS} workers)",
        result=f"{1e3 * per_trial:.1f} ms",
        goal="20 ms",
        met=bool(0 < per_trial < 0.02),
    )


def resume(quick: bool) -> Iterator[Row]:
    trials = 1_000 if quick else 10_000
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    examples = Examples(
        x_train=x[:50], y_train=np.arange(50) % 2, x_test=x[50:], y_test=np.arange(10) % 2
    )
    recipe = Recipe(model="mlp-4", epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        Study(examples=examples, recipe=recipe, store=folder, trials=1).train(engine="serial")
        template = Path(store.files.path(TrialKey(math.inf, 0).object_key))
        for trial in range(1, trials):
            shutil.copyfile(template, store.files.path(TrialKey(math.inf, trial).object_key))
        study = Study(examples=examples, recipe=recipe, store=folder, trials=trials + 1)
        took = seconds(lambda: study.train(engine="serial"))
    yield Row(
        what=f"resume of a study with {trials:,} finished trials, to the end of one more (serial)",
        result=f"{took:.2f} s",
        goal="10 s",
        met=took < 10,
    )


def models_needed(quick: bool) -> Iterator[Row]:
    """Variance of memorization over disjoint fleets of 40, by plan and by outcome."""
    groups, size = (3, 20) if quick else (12, 40)
    digits = load_examples("digits")
    variance: dict[tuple[str, str], np.ndarray] = {}
    for kind in ("balanced", "fixed-size"):
        with tempfile.TemporaryDirectory() as folder:
            study = Study(
                examples=digits,
                recipe=Recipe(model="mlp-256", epochs=20, batch_size=64),
                store=folder,
                trials=groups * size,
                kind=kind,
            )
            study.train(max_workers=WORKERS)
            masks, correct, p_true = outcomes(study)
        for name in ("bit", "soft"):
            values = np.array(
                [estimate(masks[g], correct[g], p_true[g], name) for g in slices(groups, size)]
            )
            variance[kind, name] = values
    base = variance["fixed-size", "bit"]
    expected = {("balanced", "bit"): ".84", ("fixed-size", "soft"): ".57"}
    del variance["fixed-size", "bit"]
    for (kind, name), values in variance.items():
        ratio, error = variance_ratio(values, base)
        yield Row(
            what=f"variance of memorization, {kind} {name} over fixed-size bit: {groups} fleets of "
            f"{size} on digits, r = 0.7",
            result=f"{ratio:.2f} +- {error:.2f}",
            goal=f"about {expected[kind, name]}" if (kind, name) in expected else "",
        )


def slices(groups: int, size: int) -> list[slice]:
    return [slice(g * size, (g + 1) * size) for g in range(groups)]


def outcomes(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    store, N = Store(study.store), len(study.examples.train_ids)
    tables = [store.trial(TrialKey(math.inf, t)).slice(0, N) for t in range(study.trials)]

    def stack(name: str) -> np.ndarray:
        return np.array([t[name].to_numpy(zero_copy_only=False) for t in tables])

    return stack("in_subset").astype(bool), stack("correct"), 1 / (1 + np.exp(-stack("margin")))


def estimate(masks: np.ndarray, correct: np.ndarray, p_true: np.ndarray, name: str) -> np.ndarray:
    result = memorization(masks, correct, p_true)
    return result.value if name == "bit" else result.soft.value


def variance_ratio(values: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Ratio of mean variances over fleets, and its standard error by leaving fleets out."""

    def spread(v: np.ndarray) -> float:
        return float(np.nanmean(np.nanvar(v, axis=0, ddof=1)))

    def left_out(v: np.ndarray) -> float:
        found = [spread(np.delete(v, g, axis=0)) for g in range(len(v))]
        return float(np.sqrt((len(v) - 1) * np.var(found)) / spread(v))

    ratio = spread(values) / spread(base)
    return ratio, ratio * math.hypot(left_out(values), left_out(base))
