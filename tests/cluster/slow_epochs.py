"""Trials of many short batches: long enough to be drained, killed and resumed in the middle.

Each trial appends "start TRIAL_SEED node" to GATE/log (RAYMEM_TEST_GATE) at its first batch of a
process, and takes RAYMEM_TEST_BATCH_SECONDS longer for each batch than it needs.

    python slow_epochs.py --store PATH
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray
import torch
from torch import Tensor, nn

from raymem import Examples, JobSettings, Recipe, load_examples, run_job

EPOCHS, BATCHES = 40, 5


class Slow(nn.Module):
    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_inputs, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, n_classes)
        )
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if not self.started:
                self.started = True
                node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "-"
                with open(Path(os.environ["RAYMEM_TEST_GATE"]) / "log", "a") as log:
                    log.write(f"{node} {os.getpid()}\n")
            time.sleep(float(os.environ.get("RAYMEM_TEST_BATCH_SECONDS", "0")))
        return self.layers(x.flatten(1))


def model(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    H, W, C = image_shape
    return Slow(H * W * C, n_classes)


def settings(store: str, trials: int) -> JobSettings:
    digits = load_examples("digits")
    few = Examples(
        x_train=digits.x_train[:100], y_train=digits.y_train[:100],
        x_test=digits.x_test[:40], y_test=digits.y_test[:40],
    )  # fmt: skip
    return JobSettings(data=few, store=store, trials=trials)


RECIPE = Recipe(model="slow_epochs:model", epochs=EPOCHS, batch_size=14, learning_rate=0.02)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_job(settings("runs/slow_epochs", 3), RECIPE)
