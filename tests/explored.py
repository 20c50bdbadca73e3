"""A small store to explore, and one of any size that only has its tables."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from raymem import CurvatureRule, Examples, Recipe, Store, Study
from raymem.store import StudyRecord, TrialKey, columns

EVIL = '<script>alert("x")</script>'


def trained(folder):
    """A study with labels that are wrong, copies, and names that are markup; returns it."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (90, 8, 8, 1), np.uint8)
    y = np.arange(90) % 3
    x[:, 0, :, 0] = (y * 80)[:, None]
    x[6] = x[9]
    y[:4] = (y[:4] + 1) % 3
    study = Study(
        examples=Examples(
            x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:],
            classes=("zero", EVIL, "two & more"),
            train_ids=tuple(f"train-{i}\"'><b>" for i in range(60)),
        ),
        recipe=Recipe(model="mlp-32", epochs=10, batch_size=20, learning_rate=0.3),
        store=folder / "store",
        trials=20,
        curvature=CurvatureRule(),
    )  # fmt: skip
    study.train(engine="serial")
    study.score()
    return study


def tables_only(url, *, n=50_000, m=10_000, trials=400, classes=100, pairs=200_000):
    """A store with score tables, relations and trials of n + m examples, made here; returns it.

    Its numbers are of the kinds that real ones are: counts over trials, long tails.
    """
    rng = np.random.default_rng(0)
    store = Store(url)
    index = pa.table(
        {
            "split": ["train"] * n + ["test"] * m,
            "index": [*range(n), *range(m)],
            "example_id": [f"image-{k:06d}" for k in range(n + m)],
            "label": rng.integers(0, classes, n + m),
            "content_hash": pa.nulls(n + m, pa.string()),
            "duplicate_group": pa.nulls(n + m, pa.int64()),
            "near_duplicate_group": pa.array(np.arange(n + m) // 3, mask=np.arange(n + m) > 300),
        }
    )
    identity = {
        "data": {"fingerprint": "0" * 64, "image_shape": [32, 32, 3], "n_train": n, "n_test": m},
        "plan": {"n": n, "subset_ratio": 0.7, "kind": "balanced", "seed": 0, "block": 20,
                 "pool": None},
        "recipe": {"model": {"name": "none"}},
    }  # fmt: skip
    names = [f"class {k}" for k in range(classes)]
    record = StudyRecord.create(identity, data_name="synthetic", classes=names)
    store.import_study(record, index)
    rows = np.arange(n + m)
    is_test = rows >= n
    models = 400
    n_in = rng.binomial(models, 0.7, n + m)
    hard = rng.beta(0.3, 1.2, n + m)
    right_in, right_out = rng.binomial(n_in, 1 - hard / 9), rng.binomial(models - n_in, 1 - hard)
    values = {"n_in": n_in, "n_out": models - n_in, "accuracy_in": right_in / n_in}
    values["accuracy_out"] = right_out / (models - n_in)
    values["memorization"] = values["accuracy_in"] - values["accuracy_out"]
    values["memorization_low"] = values["memorization"] - 0.05
    values["memorization_high"] = values["memorization"] + 0.05
    of = {**columns.SCORES_EXAMPLES, **columns.SCORES_CURVATURE}
    arrays = {}
    for name, column in of.items():
        if name in index.column_names:
            arrays[name] = index[name]
        elif name == "epsilon":
            arrays[name] = pa.array(np.full(n + m, math.inf))
        elif name in values or pa.types.is_floating(column.type):
            drawn = values.get(name, hard * rng.gamma(2, 1, n + m))
            absent = is_test if name != "accuracy_out" else np.zeros(n + m, bool)
            arrays[name] = pa.array(drawn, column.type, mask=absent)
        else:
            arrays[name] = pa.nulls(n + m, column.type)
    about = {"study_hash": record.hash}
    store.write_scores("examples", pa.table(arrays, schema=columns.schema(of)), about)
    write_pairs(store, index, rng, pairs, n, m)
    write_trials(store, trials, rng, hard, n)
    return store


def write_pairs(store, index, rng, pairs, n, m):
    train, test = rng.integers(0, n, pairs), rng.integers(0, m, pairs)
    ids, labels = index["example_id"], index["label"]
    table = pa.table(
        {
            "train_id": ids.take(pa.array(train)), "test_id": ids.take(pa.array(n + test)),
            "train_index": train, "test_index": test,
            "train_label": labels.take(pa.array(train)),
            "test_label": labels.take(pa.array(n + test)),
            "epsilon": np.full(pairs, math.inf), "influence": rng.uniform(-0.2, 0.9, pairs),
            "influence_stderr": np.full(pairs, 0.05), "memorization": np.full(pairs, 0.5),
            "strong": np.ones(pairs, bool),
        },
        schema=columns.schema(columns.INFLUENCE),
    )  # fmt: skip
    store.write_scores("influence", table, {})


def write_trials(store, trials, rng, hard, n):
    """What each trial made of each example, and the table of trials."""
    from raymem.store.trials import encode

    size = len(hard)
    for trial in range(trials):
        inside = rng.random(size) < 0.7
        inside[n:] = False
        right = rng.random(size) < np.where(inside, 1, 1 - hard)
        table = pa.table(
            {
                "in_subset": pa.array(inside, mask=np.arange(size) >= n),
                "correct": pa.array(right),
            }
        )
        store.files.create(TrialKey(math.inf, trial).object_key, encode(table, {}))
    rows = [{"trial": t, "epsilon": math.inf, "status": "done"} for t in range(trials)]
    of = {name: columns.SCORES_TRIALS[name] for name in ("trial", "epsilon", "status")}
    store.write_scores("trials", pa.Table.from_pylist(rows, schema=columns.schema(of)), {})
