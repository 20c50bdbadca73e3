"""The study of a soak: thousands of trials that take half a second each, and say that they started.

    python -m benchmarks.soak_job train --store URL --trials N

What a soak needs of it is in the environment: RAYMEM_SOAK_FOLDER, a folder to write to, and
RAYMEM_SOAK_BATCH_SECONDS, how long each batch takes beyond what it needs. Without them trials are
as short as they can be, and their results are the same.
"""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import ray
import torch
from torch import Tensor, nn

from raymem import Examples, JobSettings, Recipe, run_job

FOLDER, BATCH_SECONDS = "RAYMEM_SOAK_FOLDER", "RAYMEM_SOAK_BATCH_SECONDS"
CLOCK_SECONDS = 0.5


class Start(NamedTuple):
    """One worker begins to train one trial."""

    at: float
    """Of the monotonic clock, which all processes of a machine share."""
    pid: int
    node: str
    seed: int
    """The trial's `Seeds.init`."""


def log_start(folder: Path) -> None:
    """Append a Start to the folder's log, in one write."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "-"
    line = f"{time.monotonic()} {os.getpid()} {node} {torch.initial_seed()}\n"
    with open(folder / "starts", "a") as log:
        log.write(line)


def starts(folder: Path) -> list[Start]:
    """All that the folder's log has."""
    log = folder / "starts"
    lines = log.read_text().splitlines() if log.exists() else []
    found = [line.split() for line in lines]
    return [Start(float(at), int(pid), node, int(seed)) for at, pid, node, seed in found]


class _Clock:
    """The wall clock of this process, set by as many seconds as FOLDER/clock says."""

    def __init__(self, folder: Path) -> None:
        self._file, self._time = folder / "clock", time.time
        self._boot = psutil._psplatform.boot_time
        self._offset, self._read_at = 0.0, -CLOCK_SECONDS

    def offset(self) -> float:
        now = time.monotonic()
        if now - self._read_at > CLOCK_SECONDS:
            self._read_at = now
            self._offset = float(self._file.read_text()) if self._file.exists() else 0.0
        return self._offset

    def time(self) -> float:
        return self._time() + self.offset()

    def boot_time(self) -> float:
        return float(self._boot()) + self.offset()


def let_the_clock_jump(folder: Path) -> None:
    """What Python code of this process sees when somebody sets the machine's clock.

    The kernel keeps when processes started as a time since the boot, and moves the time of the boot
    with the clock. Ray's own C++ and datetime go on with the true clock.
    """
    clock = _Clock(folder)
    time.time = clock.time
    psutil._psplatform.boot_time = clock.boot_time


# A script's module is imported a second time, under its own name, for its model.
if FOLDER in os.environ and not inspect.ismethod(time.time):
    let_the_clock_jump(Path(os.environ[FOLDER]))


class Slow(nn.Module):
    """A small net, each of whose batches takes a while."""

    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_inputs, 16), nn.ReLU(), nn.Linear(16, n_classes))
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and FOLDER in os.environ:
            if not self.started:
                self.started = True
                log_start(Path(os.environ[FOLDER]))
            time.sleep(float(os.environ[BATCH_SECONDS]))
        out: Tensor = self.layers(x.flatten(1))
        return out


def model(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    H, W, C = image_shape
    return Slow(H * W * C, n_classes)


def examples() -> Examples:
    """Noise with random labels: what is right without having been trained on, is so by chance."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8)
    y = generator.integers(0, 4, 80)
    y[:4], y[60:64] = np.arange(4), np.arange(4)
    return Examples(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])


SETTINGS = JobSettings(data=examples(), store="runs/soak", trials=20)
RECIPE = Recipe(model="benchmarks.soak_job:model", epochs=3, batch_size=20, learning_rate=0.1)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_job(SETTINGS, RECIPE)
