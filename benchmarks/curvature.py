"""Curvature against the usual loop, on one core: exact, stratified, and the paper's score."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row, side_by_side
from raymem import CurvatureRule, Plan, Recipe, input_curvature, paper_score
from raymem.curvature import PaperRule
from raymem.curvature.fold_batchnorm import folded
from raymem.curvature.paper import PAPER_STREAM
from raymem.curvature.probes import image_signs, keys_of
from raymem.data import load_examples
from raymem.models import build_model
from raymem.training import Images, train

H = 1e-3
PROBES = 10
BATCH = 32


def digits_like_cifar(n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """sklearn's digits, enlarged to 32x32 and three channels; above ten classes, in colours.

    A class is a digit in one of n_classes / 10 colours, which differ in how much red and green
    they have: neighbours are hard to tell apart, as fine-grained classes are.
    """
    digits = load_examples("digits")
    x = np.kron(digits.x_train[:n], np.ones((1, 4, 4, 3), np.uint8))
    colours = n_classes // 10
    colour = np.random.default_rng(0).integers(0, colours, n)
    shades = round(colours**0.5) if colours > 10 else colours
    red, green = colour % shades, colour // shades
    strength = np.stack(
        [0.3 + 0.7 * red / max(shades - 1, 1), 0.3 + 0.7 * green / max(shades - 1, 1), red * 0 + 1],
        axis=1,
    )
    coloured = np.round(x * strength[:, None, None, :]).astype(np.uint8)
    return (x if colours == 1 else coloured), digits.y_train[:n] + 10 * colour


def trained(name: str, n_classes: int, n: int, epochs: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net trained on n images, in eval mode; images in [0, 1] and labels."""
    x, y = digits_like_cifar(n, n_classes)
    images = Images.from_arrays(x, y, x[:1], y[:1], n_classes)
    torch.manual_seed(0)
    net = build_model(name, n_classes=n_classes, image_shape=(32, 32, 3))
    recipe = Recipe(model=name, epochs=epochs, batch_size=64, learning_rate=0.05)
    train(net, images, np.ones(n, bool), recipe, Plan(n=n).seeds(0))
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return net.eval(), pixels, torch.from_numpy(y)


def usual_loop(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """As published: for each probe both gradients anew, and the norm of their difference."""
    total = torch.zeros(len(x), dtype=x.dtype)
    keys = keys_of(x, 0)
    for k in range(PROBES):
        v = image_signs(keys, PAPER_STREAM + k, x)
        moved, here = (x + H * v).requires_grad_(), x.clone().requires_grad_()
        (a,) = torch.autograd.grad(F.cross_entropy(net(moved), y, reduction="sum"), moved)
        (b,) = torch.autograd.grad(F.cross_entropy(net(here), y, reduction="sum"), here)
        total += (a - b).flatten(1).square().sum(1)
    return total / PROBES


def hutchinson(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Ten Rademacher probes of v'Hv, two gradients each as in the usual loop, at the same cost.

    The difference is taken at a step small enough for float64 to see no kink, so that what is left
    is the error of the probes alone.
    """
    h = 1e-9
    total = torch.zeros(len(x), dtype=x.dtype)
    keys = keys_of(x, seed)
    for k in range(PROBES):
        v = image_signs(keys, k, x)
        moved, here = (x + h * v).requires_grad_(), x.clone().requires_grad_()
        (a,) = torch.autograd.grad(F.cross_entropy(net(moved), y, reduction="sum"), moved)
        (b,) = torch.autograd.grad(F.cross_entropy(net(here), y, reduction="sum"), here)
        total += (v * (a - b)).flatten(1).sum(1) / h
    return total / PROBES


def error(estimate: Callable[[int], Tensor], truth: Tensor, repeats: int) -> float:
    """Root mean square over seeds of the relative error; the median over examples."""
    off = torch.stack([(estimate(seed) - truth) / truth for seed in range(repeats)])
    return float(off.square().mean(0).sqrt().median())


def fast(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """As fleets and streams hold a model: BatchNorm folded, channels last."""
    layout = torch.channels_last
    return folded(net, x[:8]).to(memory_format=layout), x.to(memory_format=layout)


def exact_trace(quick: bool) -> Iterator[Row]:
    repeats, epochs = (2, 2) if quick else (5, 10)
    net, x, y = trained("cifar-resnet18", 10, 256, epochs)
    x, y = x[:BATCH], y[:BATCH]
    quick_net, quick_x = fast(net, x)
    rule = CurvatureRule(mode="gauss-newton", paper=None)
    ratio, ours, usual = side_by_side(
        lambda: input_curvature(quick_net, quick_x, y, rule), lambda: usual_loop(net, x, y), repeats
    )
    passes = input_curvature(quick_net, quick_x, y, rule).backward_passes
    assert passes <= 10, passes
    net, few, labels = net.double(), x[:16].double(), y[:16]
    truth = input_curvature(net, few, labels, rule).trace
    left = error(lambda seed: hutchinson(net, few, labels, seed), truth, 4)
    yield Row(
        what="exact trace, ResNet-18, K=10, against ten probes of two gradients",
        result=f"{ratio:.1f}x ({BATCH / ours:.1f} against {BATCH / usual:.1f} examples/s); "
        f"{passes} backward passes; ten probes leave {100 * left:.0f}% error",
        goal="4x",
        met=ratio >= 4,
    )
    net.float()
    yield from paper(net, x, y, repeats)


def paper(net: nn.Module, x: Tensor, y: Tensor, repeats: int) -> Iterator[Row]:
    rule = PaperRule(step=H, probes=PROBES)
    x64 = x[:16].double()
    same = paper_score(net.double(), x64, y[:16], rule)
    expected = usual_loop(net, x64, y[:16])
    off = float(((same - expected) / expected).abs().max())
    single = net.float()
    quick_net, quick_x = fast(single, x)
    ratio, ours, usual = side_by_side(
        lambda: paper_score(quick_net, quick_x, y, rule), lambda: usual_loop(single, x, y), repeats
    )
    yield Row(
        what="the paper's score, ResNet-18, against the usual loop",
        result=f"{ratio:.1f}x ({BATCH / ours:.1f} against {BATCH / usual:.1f} examples/s); same "
        f"numbers to {off:.0e} (float64)",
        goal="about 2x",
        met=ratio >= 1.8 and off < 1e-5,
    )


def stratified(quick: bool) -> Iterator[Row]:
    repeats, epochs = (2, 3) if quick else (5, 25)
    for K, n in ((100, 16), (1000, 8)):
        net, x, y = trained("tiny-resnet", K, 1200, epochs)
        x, y = x[:n], y[:n]
        rule = CurvatureRule(mode="gauss-newton", paper=None)
        ratio, _, _ = side_by_side(
            lambda m=net, a=x, b=y, r=rule: input_curvature(m, a, b, r),
            lambda m=net, a=x, b=y: usual_loop(m, a, b),
            repeats,
        )
        net, x = net.double(), x.double()
        exact = CurvatureRule(mode="gauss-newton", exact_classes=K, paper=None)
        truth = input_curvature(net, x, y, exact).trace
        ours = error(
            lambda seed, m=net, a=x, b=y, r=rule: input_curvature(m, a, b, r, seed=seed).trace,
            truth,
            8,
        )
        probes = error(lambda seed, m=net, a=x, b=y: hutchinson(m, a, b, seed), truth, 4)
        gain = ratio * (probes / ours) ** 2
        yield Row(
            what=f"stratified trace, tiny-resnet, K={K}, against ten probes, at equal error",
            result=f"{gain:.0f}x (errors {100 * ours:.1f}% in 11 passes against "
            f"{100 * probes:.0f}%, time {ratio:.1f}x; the median image's likeliest class has p = "
            f"{float(net(x).softmax(1).max(1).values.median()):.2f})",
            goal="10x" if K == 100 else "",
            met=gain >= 10 if K == 100 else None,
        )
