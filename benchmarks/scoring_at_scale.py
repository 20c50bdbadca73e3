"""Scoring and influence at ImageNet's size, each in a process of its own.

Trial files are made up: 1,281,167 training and 50,000 test examples of 1,000 classes, a learner
that is right with a probability of its own for each example, in and out of the subset. Everything
else is real: plan, files, scores. Few trials are scored, more trials, and as many in 20 folds:
three such runs say what a trial, a fold and the rest cost. Influence is measured at 2,000 trials,
on some classes.

    python -m benchmarks --only scoring-at-scale     10 minutes, 5 GB of disk
    python -m benchmarks --only influence-at-scale   1 minute
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measured import keep
from benchmarks.rows import Row
from raymem import Plan, Recipe, Store, score
from raymem.scores import Bits, PairRule, find_pairs
from raymem.store import StudyRecord, TrialKey, columns, trial_table
from raymem.training import TrialResult
from raymem.training.trial import Evaluation, SubsetHistory

IMAGENET, IMAGENET_TEST, CLASSES = 1_281_167, 50_000, 1000
TRIALS, FOLDS = 2000, 20
GIGABYTE = 1e9


def sizes(quick: bool) -> tuple[int, int]:
    return (100_000, 5_000) if quick else (IMAGENET, IMAGENET_TEST)


def labels(N: int, M: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes as ImageNet has them: by turns in no order, so that nothing is near its class."""
    return np.random.default_rng(0).permutation(N) % CLASSES, np.arange(M) % CLASSES


class Learner:
    """Right with probability p_in or p_out, both of the example; easy examples are most."""

    def __init__(self, N: int, M: int) -> None:
        generator = np.random.default_rng(1)
        self.p_out = generator.beta(2.0, 0.7, N + M).clip(1e-3, 1 - 1e-3)
        self.p_in = 1 - (1 - self.p_out) * generator.beta(0.7, 2.0, N + M)
        self.N, self.M = N, M

    def trial(self, mask: np.ndarray, seed: int) -> TrialResult:
        generator = np.random.default_rng((2, seed))
        inside = np.concatenate([mask, np.zeros(self.M, bool)])
        p = np.where(inside, self.p_in, self.p_out)
        # With logistic noise the margin is positive with probability p.
        margin = (np.log(p / (1 - p)) + generator.logistic(size=len(p))).astype(np.float32)
        sides = [
            Evaluation(correct=part > 0, margin=part)
            for part in (margin[: self.N], margin[self.N :])
        ]
        n = int(mask.sum())
        history = SubsetHistory(
            cumulative_loss=generator.gamma(2.0, 10.0, n).astype(np.float32),
            learning_epoch=generator.integers(0, 90, n, dtype=np.int32),
            forgetting_count=generator.poisson(1.0, n).astype(np.int32),
        )
        return TrialResult(train=sides[0], test=sides[1], history=history, seconds=1.0)


def make_store(url: str, N: int, M: int) -> Store:
    """A store with a study and an index, and no trial."""
    store, y = Store(url), np.concatenate(labels(N, M))
    numbers = np.arange(N + M)
    plan = Plan(n=N, seed=7)
    identity = {
        "data": {"fingerprint": "made up", "image_shape": [128, 128, 3], "n_train": N, "n_test": M},
        "plan": plan.as_dict(),
        "recipe": Recipe(model="resnet50", epochs=90).as_dict(),
    }
    index = pa.table(
        {
            "split": ["train"] * N + ["test"] * M,
            "index": np.concatenate([np.arange(N), np.arange(M)]),
            "example_id": [f"n{label:08d}_{i}" for label, i in zip(y, numbers, strict=True)],
            "label": y,
            "content_hash": [f"{i * 0x9E3779B97F4A7C15 % 2**128:032x}" for i in numbers.tolist()],
            "duplicate_group": pa.nulls(N + M, pa.int64()),
            "near_duplicate_group": pa.nulls(N + M, pa.int64()),
        }
    ).cast(columns.schema(columns.EXAMPLES))
    classes = [f"class {k}" for k in range(CLASSES)]
    record = StudyRecord.create(identity, data_name="made up", classes=classes)
    store.import_study(record, index)
    return store


def add_trials(store: Store, learner: Learner, numbers: range) -> dict[str, float]:
    """Commit trials; mean seconds of a mask and of a commit, and bytes, of one."""
    plan, mask_seconds, commit_seconds, size = store.plan(), 0.0, 0.0, 0
    for number in numbers:
        key = TrialKey(math.inf, number)
        start = time.perf_counter()
        mask = plan.mask(number)
        mask_seconds += time.perf_counter() - start
        result = learner.trial(mask, number)
        about = {
            "study_hash": store.study().hash,
            "attempt": 1,
            "seeds": vars(plan.seeds(number)),
            "seconds": 1.0,
            "device": "cpu",
            "host": "made up",
            "arithmetic": "made up",
        }
        start = time.perf_counter()
        store.commit(key, trial_table(key, mask, result), about)
        commit_seconds += time.perf_counter() - start
        size += store.files.fs.size(store.files.path(key.object_key))
    n = len(numbers)
    return {
        "mask_seconds": mask_seconds / n,
        "commit_seconds": commit_seconds / n,
        "trial_bytes": size / n,
    }


def in_a_process(call: str) -> dict[str, Any]:
    """What a function of this module returns, run alone; with seconds, and peak memory."""
    program = f"from benchmarks import scoring_at_scale as s; s.report(lambda: s.{call})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def report(call: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({**found, "seconds": seconds, "peak": peak, "before": before}))


def scored(url: str) -> dict[str, Any]:
    store = Store(url)
    (summary,) = score(store)
    return {
        "trials": summary.trials,
        "bytes": {
            name: store.files.fs.size(store.files.path(f"scores/{name}.parquet"))
            for name in ("examples", "folds", "influence")
        },
    }


def scoring(quick: bool) -> Iterator[Row]:
    """Three runs: few trials, more trials, and more trials in as many folds."""
    N, M = sizes(quick)
    few, more = 4, 20
    learner, block = Learner(N, M), Plan(n=N).block
    runs: dict[str, dict[str, Any]] = {}
    for name, numbers in (
        ("few", range(few)),
        ("more", range(more)),
        ("folds", range(0, more * block, block)),
    ):
        with tempfile.TemporaryDirectory(prefix="raymem-scale-") as folder:
            store = make_store(folder, N, M)
            made = add_trials(store, learner, numbers)
            runs[name] = {**made, **in_a_process(f"scored({folder!r})")}
    per_trial = (runs["more"]["seconds"] - runs["few"]["seconds"]) / (more - few)
    per_fold = (runs["folds"]["seconds"] - runs["more"]["seconds"]) / (more - 1)
    fixed = runs["few"]["seconds"] - few * per_trial - per_fold
    packed = TRIALS * (N + M) / 8 / GIGABYTE
    rest = runs["folds"]["peak"] - more * (N + M) / 8 / GIGABYTE
    fold_bytes = runs["folds"]["bytes"]["folds"] / more
    numbers = {
        "examples": N + M,
        "trial_bytes": runs["folds"]["trial_bytes"],
        "mask_seconds": runs["folds"]["mask_seconds"],
        "commit_seconds": runs["folds"]["commit_seconds"],
        "seconds_per_trial": per_trial,
        "seconds_per_fold": per_fold,
        "seconds_fixed": fixed,
        "peak_one_fold": runs["more"]["peak"],
        "peak_many_folds": runs["folds"]["peak"],
        "folds": more,
        "peak_at_2000": rest + packed,
        "seconds_at_2000": fixed + TRIALS * per_trial + FOLDS * per_fold,
        "fold_bytes": fold_bytes,
        "scores_bytes_at_2000": runs["folds"]["bytes"]["examples"] + FOLDS * fold_bytes,
        "spool_bytes": FOLDS * (N + M) * 92,
    }
    if not quick:
        keep("scoring", numbers)
    yield Row(
        what=f"scoring {N:,} + {M:,} examples: a trial, a fold, the rest",
        result=f"{per_trial:.2f}, {per_fold:.1f}, {fixed:.0f} s; 2,000 trials in 20 folds would "
        f"take 2000 x {per_trial:.2f} + 20 x {per_fold:.1f} + {fixed:.0f} = "
        f"{numbers['seconds_at_2000'] / 60:.0f} min",
    )
    yield Row(
        what=f"peak memory of the scoring process, {more} trials in 1 fold and in {more}",
        result=f"{runs['more']['peak']:.2f} and {runs['folds']['peak']:.2f} GB; with the packed "
        f"bits of 2,000 trials ({packed:.2f} GB) {numbers['peak_at_2000']:.1f} GB",
        goal="4 GB",
        met=numbers["peak_at_2000"] < 4,
    )
    yield Row(
        what="a trial of that size: its mask, its commit to a local disk, its file",
        result=f"{numbers['mask_seconds']:.2f} s, {numbers['commit_seconds']:.2f} s, "
        f"{numbers['trial_bytes'] / 1e6:.1f} MB ({numbers['trial_bytes'] * TRIALS / 1e9:.0f} GB "
        "for 2,000)",
    )


def pairs(N: int, M: int, classes: int) -> dict[str, Any]:
    """find_pairs at 2,000 trials on the test examples of some classes."""
    generator, y_train, y_test = np.random.default_rng(3), *labels(N, M)
    masks, correct = Bits(N), Bits(M)
    p = generator.random(M)
    for _ in range(TRIALS):
        masks.append(generator.integers(0, 256, N, np.uint8) < 179)  # 0.7 of 256
        correct.append(generator.random(M) < p)
    mem = generator.random(N)
    rule = PairRule(z=5.0)
    start = time.perf_counter()
    find_pairs(masks, correct, mem, y_train, y_test, rule, tests=slice(0, 0))
    fixed = time.perf_counter() - start
    start = time.perf_counter()
    tests = np.flatnonzero(y_test < classes)
    found = find_pairs(masks, correct, mem, y_train, y_test, rule, tests=tests)
    took = time.perf_counter() - start - fixed
    return {"fixed": fixed, "per_class": took / classes, "pairs": len(found.strong)}


def influence(quick: bool) -> Iterator[Row]:
    N, M = sizes(quick)
    classes = 20 if quick else 50
    found = in_a_process(f"pairs({N}, {M}, {classes})")
    whole = found["fixed"] + CLASSES * found["per_class"]
    packed = TRIALS * (N + M) / 8 / GIGABYTE
    numbers = {**found, "classes": classes, "seconds_at_2000": whole}
    if not quick:
        keep("influence", numbers)
    yield Row(
        what=f"influence of {N:,} on {M:,} examples of one class at 2,000 trials, on {classes} of "
        "1,000 classes",
        result=f"{1e3 * found['per_class']:.0f} ms a class and {found['fixed']:.0f} s; all would "
        f"take {found['fixed']:.0f} + 1000 x {found['per_class']:.3f} = {whole:.0f} s on one "
        f"process, whose peak is {found['peak']:.2f} GB, {packed:.2f} of it packed bits",
        goal="10 min",
        met=whole < 600,
    )
