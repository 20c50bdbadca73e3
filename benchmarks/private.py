"""A private step against the same step without clipping and noise: same net, same batch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.rows import Row, seconds
from raymem.models import build_model
from raymem.privacy import Privacy, PrivateSteps, mechanism_for
from raymem.privacy.per_example import exact_modes

GOAL = 4.0
# Name, image shape, batch, repeats.
NETS = (
    ("mlp-512-256", (28, 28, 1), 64, 15),
    ("small-resnet-gn", (8, 8, 1), 128, 7),
    ("tiny-resnet-gn", (32, 32, 3), 64, 7),
    ("small-resnet-gn", (32, 32, 3), 64, 5),
    ("cifar-resnet18-gn", (32, 32, 3), 32, 3),
)


def step(
    name: str, shape: tuple[int, int, int], batch: int, mode: str | None
) -> Callable[[], None]:
    """One step of training on a batch; mode None: epsilon inf."""
    torch.manual_seed(0)
    H, W, C = shape
    model = build_model(name, n_classes=10, image_shape=shape).train()
    x, y = torch.rand(batch, C, H, W), torch.randint(0, 10, (batch,))
    m = mechanism_for(Privacy(), math.inf, subset_size=batch, batch_size=batch, epochs=1)
    if mode is not None:
        m = dataclasses.replace(m, max_grad_norm=1.0, noise_multiplier=1.0, accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    private = PrivateSteps(model, optimizer, m, 0, mode=mode)  # type: ignore[arg-type]

    def once() -> None:
        private.add(x, y)
        private.step()

    return once


def against_plain_steps(quick: bool) -> Iterator[Row]:
    for name, shape, batch, repeats in NETS[:2] if quick else NETS:
        net = build_model(name, n_classes=10, image_shape=shape)
        modes = list(exact_modes(net.train(), shape))
        calls = {None: step(name, shape, batch, None)}
        calls |= {mode: step(name, shape, batch, mode) for mode in modes}  # type: ignore[misc]
        for call in calls.values():
            call()
        rounds = [{mode: seconds(call) for mode, call in calls.items()} for _ in range(repeats)]
        ratio = {m: statistics.median(r[m] / r[None] for r in rounds) for m in modes}
        plain = statistics.median(r[None] for r in rounds)
        others = ", ".join(f"{m} {ratio[m]:.1f}x" for m in modes[1:])
        yield Row(
            what=f"private step of {name}, {shape[0]}x{shape[1]}x{shape[2]}, batch {batch}, "
            "against the same without clipping and noise",
            result=f"{ratio[modes[0]]:.1f}x by {modes[0]} ({1e3 * plain:.0f} ms plain"
            + (f"; {others})" if others else ")"),
            goal=f"{GOAL:g}x",
            met=ratio[modes[0]] <= GOAL,
        )
