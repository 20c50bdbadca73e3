"""Ratios measured side by side in one run, medians of repeats: python -m benchmarks [--quick].

Writes benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from raymem import Examples, Images, Plan, Recipe, Store, Study, TrialKey, run_trial
from raymem.models import build_model
from raymem.store import trial_table


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def images_like_cifar(n: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10


class Plain(Dataset):
    """The usual way: one image at a time through torchvision's transforms."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(32, padding=4, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return self.transform(self.x[i]), self.y[i]


def plain_loop(x: np.ndarray, y: np.ndarray, recipe: Recipe) -> None:
    torch.set_flush_denormal(True)
    model = build_model(recipe.model, n_classes=10, image_shape=(32, 32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(Plain(x, y), batch_size=recipe.batch_size, shuffle=True)
    for _ in range(recipe.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def trial_against_plain_loop(quick: bool) -> str:
    """Training only, one thread each, a small net on 32x32 images."""
    n = 500 if quick else 1500
    x, y = images_like_cifar(n)
    recipe = Recipe(model="mlp-64", epochs=3, crop_padding=4, flip=True)
    data = Images.from_arrays(x, y, x[:1], y[:1], 10)
    mask, seeds = np.ones(n, bool), Plan(n=n).seeds(0)
    lines = []
    for name in ("mlp-64", "small-resnet"):
        recipe = Recipe(model=name, epochs=3, crop_padding=4, flip=True)
        ratios = []
        for _ in range(3 if quick else 5):
            ours = seconds(lambda r=recipe: run_trial(data, mask, r, seeds))
            ratios.append(seconds(lambda r=recipe: plain_loop(x, y, r)) / ours)
        lines.append(f"{name} {statistics.median(ratios):.1f}x")
    return "one trial, training and evaluation, against DataLoader + transforms training: " + (
        ", ".join(lines)
    )


def commit_overhead(quick: bool) -> str:
    x, y = images_like_cifar(2000)
    examples = Examples(x_train=x[:1500], y_train=y[:1500], x_test=x[1500:], y_test=y[1500:])
    data = Images.from_arrays(x[:1500], y[:1500], x[1500:], y[1500:], 10)
    recipe, plan = Recipe(model="mlp-8", epochs=1), Plan(n=1500)
    result = run_trial(data, plan.mask(0), recipe, plan.seeds(0))
    with tempfile.TemporaryDirectory() as folder:
        study = Study(examples=examples, recipe=recipe, store=folder, trials=1)
        store: Store = study.open_store()
        about = {"study_hash": store.study()["hash"], "arithmetic": "", "device": "cpu"}

        def commit(trial: int) -> None:
            key = TrialKey(math.inf, trial)
            plan.mask(trial)
            store.commit(key, trial_table(key, plan.mask(0), result), about)

        times = [seconds(lambda t=t: commit(t)) for t in range(50 if quick else 300)]
        listing = seconds(store.done)
    return (
        f"mask, table and commit of a trial of 2,000 examples on local disk: "
        f"{1e3 * statistics.median(times):.1f} ms median; listing {len(times)}: "
        f"{1e3 * listing:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = [trial_against_plain_loop(quick), commit_overhead(quick)]
    page = [
        "# Benchmark results",
        "",
        f"`make bench{' QUICK=1' if quick else ''}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{platform.machine()}, one thread, torch {torch.__version__}. Medians of repeats.",
        "",
        *(f"- {row}" for row in rows),
    ]
    text = "\n".join(page) + "\n"
    (Path(__file__).parent / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
