"""The explorer of 60,000 examples in a browser: size of the page, time to load, to draw, to brush.

Needs Chromium and playwright; the store is made here, `tables_only`.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.rows import Row
from raymem import Examples, Store
from raymem.show.explorer import explorer_page, explorer_section
from raymem.show.notebook import StudyResults
from raymem.store import StudyRecord, TrialKey, columns
from raymem.store.trials import encode

MODELS = 400
# What feels immediate (Nielsen 1993), in milliseconds.
IMMEDIATE = 100.0
LARGEST_PAGE = 15e6
# Milliseconds from the menu to the drawn plot and the filled table.
DRAWS = """
async () => {
  const wait = () => new Promise(requestAnimationFrame);
  const menu = document.getElementById("explorer-y"), found = [];
  for (const name of ["loss_out", "curvature_out", "accuracy_out", "curvature_out"]) {
    menu.value = name;
    const count = document.querySelector(".explorer-count"), start = performance.now();
    count.textContent = "";
    menu.dispatchEvent(new Event("change"));
    while (!count.textContent) await wait();
    found.push(performance.now() - start);
  }
  return found;
}
"""
# Milliseconds between frames, from now on.
FRAMES = """
() => {
  window.frames_ = [];
  let last = performance.now();
  const next = () => {
    const now = performance.now();
    window.frames_.push(now - last);
    last = now;
    requestAnimationFrame(next);
  };
  requestAnimationFrame(next);
}
"""


def brushed(page: Any) -> tuple[list[float], str]:
    """Milliseconds between frames while a mouse drags a region, and what was selected."""
    page.locator(".explorer-canvas canvas").scroll_into_view_if_needed()
    box = page.locator(".explorer-canvas canvas").bounding_box()
    x, y = box["x"] + 0.2 * box["width"], box["y"] + 0.1 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(FRAMES)
    for k in range(1, 61):
        page.mouse.move(x + k * box["width"] / 120, y + k * box["height"] / 120)
    frames = page.evaluate("window.frames_")
    page.mouse.up()
    return frames, page.locator(".explorer-count").inner_text()


def smooth_images(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images that compress as photographs do, uint8 [n, 32, 32, 3]."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (n, 6, 6, 3), np.uint8)
    kinds = [np.asarray(Image.fromarray(c).resize((32, 32), 3)) for c in coarse[:2000]]
    shift = rng.integers(0, 40, (n, 1, 1, 3))
    base = np.stack(kinds)[np.arange(n) % len(kinds)]
    return np.clip(base.astype(int) + shift, 0, 255).astype(np.uint8)


def tables_only(
    url: Path | str,
    *,
    n: int = 50_000,
    m: int = 10_000,
    trials: int = 400,
    classes: int = 100,
    pairs: int = 200_000,
) -> Store:
    """A store with score tables, relations and trials of n + m examples, made here.

    Its numbers are of the kinds that real ones are: counts over 400 models, long tails.
    """
    rng = np.random.default_rng(0)
    store = Store(url)
    rows = np.arange(n + m)
    index = pa.table(
        {
            "split": ["train"] * n + ["test"] * m,
            "index": [*range(n), *range(m)],
            "example_id": [f"image-{k:06d}" for k in rows],
            "label": rng.integers(0, classes, n + m),
            "content_hash": pa.nulls(n + m, pa.string()),
            "duplicate_group": pa.nulls(n + m, pa.int64()),
            "near_duplicate_group": pa.array(rows // 3, mask=rows > 300),
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
    hard = rng.beta(0.3, 1.2, n + m)
    write_scores(store, index, rng, hard, n, record.hash)
    write_pairs(store, index, rng, pairs, n, m)
    write_trials(store, trials, rng, hard, n)
    return store


def write_scores(
    store: Store, index: pa.Table, rng: np.random.Generator, hard: Any, n: int, study_hash: str
) -> None:
    size = len(hard)
    n_in = rng.binomial(MODELS, 0.7, size)
    accuracy_in = rng.binomial(n_in, 1 - hard / 9) / n_in
    accuracy_out = rng.binomial(MODELS - n_in, 1 - hard) / (MODELS - n_in)
    memorization = accuracy_in - accuracy_out
    values = {
        "n_in": n_in, "n_out": MODELS - n_in, "accuracy_in": accuracy_in,
        "accuracy_out": accuracy_out, "memorization": memorization,
        "memorization_low": memorization - 0.05, "memorization_high": memorization + 0.05,
    }  # fmt: skip
    of = {**columns.SCORES_EXAMPLES, **columns.SCORES_CURVATURE}
    arrays: dict[str, pa.Array] = {}
    for name, column in of.items():
        if name in index.column_names:
            arrays[name] = index[name]
        elif name == "epsilon":
            arrays[name] = pa.array(np.full(size, math.inf))
        elif name in values or pa.types.is_floating(column.type):
            drawn = values.get(name, hard * rng.gamma(2, 1, size))
            absent = np.zeros(size, bool) if name == "accuracy_out" else np.arange(size) >= n
            arrays[name] = pa.array(drawn, column.type, mask=absent)
        else:
            arrays[name] = pa.nulls(size, column.type)
    table = pa.table(arrays, schema=columns.schema(of))
    store.write_scores("examples", table, {"study_hash": study_hash})


def write_pairs(
    store: Store, index: pa.Table, rng: np.random.Generator, pairs: int, n: int, m: int
) -> None:
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


def write_trials(store: Store, trials: int, rng: np.random.Generator, hard: Any, n: int) -> None:
    """What each trial made of each example, and the table of trials."""
    size = len(hard)
    for trial in range(trials):
        inside = rng.random(size) < 0.7
        inside[n:] = False
        right = rng.random(size) < np.where(inside, 1, 1 - hard)
        known = pa.array(inside, mask=np.arange(size) >= n)
        table = pa.table({"in_subset": known, "correct": pa.array(right)})
        store.files.create(TrialKey(math.inf, trial).object_key, encode(table, {}))
    rows = [{"trial": t, "epsilon": math.inf, "status": "done"} for t in range(trials)]
    of = {name: columns.SCORES_TRIALS[name] for name in ("trial", "epsilon", "status")}
    store.write_scores("trials", pa.Table.from_pylist(rows, schema=columns.schema(of)), {})


def large_page(folder: Path, n: int = 50_000, m: int = 10_000, trials: int = 400) -> Path:
    """The explorer of a store of n + m examples with images, as a page in `folder`."""
    store = tables_only(folder / "store", n=n, m=m, trials=trials)
    index = store.examples()
    ids, labels = index["example_id"].to_pylist(), np.array(index["label"])
    images = smooth_images(n + m)
    examples = Examples(
        x_train=images[:n], y_train=labels[:n], x_test=images[n:], y_test=labels[n:],
        classes=store.study().classes, train_ids=tuple(ids[:n]), test_ids=tuple(ids[n:]),
    )  # fmt: skip
    path = folder / "explorer.html"
    path.write_text(explorer_page(explorer_section(StudyResults(store.url, examples)), "synthetic"))
    return path


def in_a_browser(quick: bool) -> list[Row]:
    """Size, load, draw and brush of one page."""
    from playwright.sync_api import sync_playwright

    n, m = (5_000, 1_000) if quick else (50_000, 10_000)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = large_page(Path(folder), n, m, trials=40 if quick else 400)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        loads = []
        for _ in range(3):
            page.goto(f"file://{path}")
            page.wait_for_selector("#explorer[data-ready]")
            loads.append(page.evaluate("performance.now()"))
        draws = page.evaluate(DRAWS)
        frames, selected = brushed(page)
        browser.close()
        size = path.stat().st_size
    brush, worst = statistics.median(frames), sorted(frames)[int(0.9 * len(frames))]
    what = f"explorer, {n + m:,} examples"
    return [
        Row(what=f"{what}: page", result=f"{size / 1e6:.1f} MB", goal="15 MB",
            met=size <= LARGEST_PAGE),
        Row(what=f"{what}: load", result=f"{statistics.median(loads):,.0f} ms", goal="3,000 ms",
            met=statistics.median(loads) <= 3000),
        Row(what=f"{what}: another measure drawn", result=f"{statistics.median(draws):,.0f} ms"),
        Row(what=f"{what}: between frames of a brush",
            result=f"{brush:.0f} ms median, {worst:.0f} ms at 90% ({selected})",
            goal=f"{IMMEDIATE:.0f} ms at 90%", met=worst <= IMMEDIATE),
    ]  # fmt: skip
