"""Trials that say where they run and wait at a gate, so that faults can be timed to the trial.

The gate is a folder, RAYMEM_TEST_GATE: each trial appends "node pid" to its file `log` when it
starts to train, and waits until there is a file `open`.

    python gated.py --store PATH
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray
from torch import Tensor, nn

from raymem import JobSettings, Recipe, run_job


class Gated(nn.Module):
    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_inputs, n_classes)
        self.waited = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.waited:
            self.wait()
            self.waited = True
        return self.linear(x.flatten(1))

    def wait(self) -> None:
        folder = Path(os.environ["RAYMEM_TEST_GATE"])
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "-"
        where = f"{node} {os.getpid()}"
        with open(folder / "log", "a") as log:
            log.write(where + "\n")
        while not (folder / "open").exists():
            time.sleep(0.05)
        time.sleep(0.2)


def model(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    H, W, C = image_shape
    return Gated(H * W * C, n_classes)


SETTINGS = JobSettings(data="digits", store="runs/gated", trials=60)
RECIPE = Recipe(model="gated:model", epochs=2)

if __name__ == "__main__":
    run_job(SETTINGS, RECIPE)
