"""One trial on one core: against the usual loop, and against what the core can multiply."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from benchmarks.rows import Row, seconds, side_by_side
from raymem import Plan, Recipe
from raymem.models import build_model
from raymem.training import Images, train
from raymem.training.images import gather

NETS = ("mlp-64", "mlp-512-256", "tiny-resnet", "small-resnet")


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
    model = build_model(recipe.model, n_classes=10, image_shape=(32, 32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(Plain(x, y), batch_size=recipe.batch_size, shuffle=True)
    for _ in range(recipe.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def our_loop(data: Images, recipe: Recipe) -> None:
    n = len(data.x_train)
    model = build_model(recipe.model, n_classes=10, image_shape=(32, 32, 3))
    train(model, data, np.ones(n, bool), recipe, Plan(n=n).seeds(0))


def against_the_plain_loop(quick: bool) -> Iterator[Row]:
    n, repeats = (512, 2) if quick else (2048, 5)
    x, y = images_like_cifar(n)
    data = Images.from_arrays(x, y, x[:1], y[:1], 10)
    for net in NETS:
        recipe = Recipe(model=net, epochs=2, crop_padding=4, flip=True, channels_last=True)
        ratio, ours, usual = side_by_side(
            lambda r=recipe: our_loop(data, r), lambda r=recipe: plain_loop(x, y, r), repeats
        )
        images = 2 * n
        yield Row(
            what=f"training {net} with crops and flips, against DataLoader + torchvision",
            result=f"{ratio:.1f}x ({images / ours:,.0f} against {images / usual:,.0f} images/s)",
            goal="3x",
            met=ratio >= 3,
            why="" if ratio >= 3 else "arithmetic of the net itself is most of the time",
        )


def flop_rates() -> tuple[float, float]:
    """Operations a second of this core: matrix product, 3x3 convolution (forward and backward)."""
    a = torch.randn(1024, 1024)
    matmul = 2 * 1024**3 / statistics.median(seconds(lambda: a @ a) for _ in range(20))
    convolution = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        convolution(x).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    rate = counter.get_total_flops() / statistics.median(seconds(step) for _ in range(10))
    return matmul, rate


def utilization(quick: bool) -> Iterator[Row]:
    n, repeats = (512, 2) if quick else (2048, 5)
    for net, shape in (("mlp-512-256", (28, 28, 1)), ("small-resnet", (32, 32, 3))):
        generator = np.random.default_rng(0)
        x = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
        data = Images.from_arrays(x, np.arange(n) % 10, x[:1], np.zeros(1, np.int64), 10)
        recipe = Recipe(model=net, epochs=2 if net == "small-resnet" else 20, channels_last=True)
        model = build_model(net, n_classes=10, image_shape=shape)
        with FlopCounterMode(display=False) as counter:
            batch = torch.rand(128, shape[2], *shape[:2])
            nn.functional.cross_entropy(model(batch), torch.zeros(128, dtype=torch.long)).backward()
        flops = counter.get_total_flops() / 128 * n * recipe.epochs
        shares = []
        for _ in range(repeats):
            matmul, convolution = flop_rates()
            fresh = build_model(net, n_classes=10, image_shape=shape)
            took = seconds(
                lambda m=fresh, d=data, r=recipe: train(
                    m, d, np.ones(n, bool), r, Plan(n=n).seeds(0)
                )
            )
            shares.append((flops / took / matmul, flops / took / convolution, matmul, convolution))
        of_matmul, of_convolution, matmul, convolution = np.median(shares, axis=0)
        yield Row(
            what=f"share of this core's matrix product rate that training {net} reaches",
            result=f"{of_matmul:.2f} of {matmul / 1e9:.0f} GFLOP/s ({of_convolution:.2f} of the "
            f"{convolution / 1e9:.0f} GFLOP/s of a 64-channel 3x3 convolution)",
            goal="0.5",
            met=bool(of_matmul >= 0.5),
        )


def gathering(quick: bool) -> Iterator[Row]:
    """Batches of pixels that do not fit the device, gathered from a mapped cache by one thread."""
    N, B, side = (1000, 256, 64) if quick else (8000, 1024, 128)
    draws = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.uint8, (N, side, side, 3))
        made[:] = np.random.default_rng(0).integers(0, 256, made.shape, np.uint8)
        x = torch.from_numpy(np.load(f"{folder}/x.npy", mmap_mode="c"))
        rows = [torch.randperm(N, generator=draws)[:B] for _ in range(9)]
        ratio, ours, _ = side_by_side(
            lambda: [gather(x, r) for r in rows], lambda: [x[r] for r in rows], 3 if quick else 7
        )
    yield Row(
        what=f"gathering {B:,} images of {side} pixels, mapped, against indexing the tensor",
        result=f"{ratio:.1f} times as fast, {len(rows) * B / ours:,.0f} images/s",
        goal="4 times",
        met=ratio >= 4,
    )
