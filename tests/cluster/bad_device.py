"""A study on three workers, in one of which every trial fails, as on a GPU with a fault.

The first worker that starts a trial makes GATE/bad (RAYMEM_TEST_GATE) with its node and process;
from then on each of its trials raises. Each trial of a good worker takes a while. With
RAYMEM_TEST_ALL_BAD every worker's trials raise.

    python bad_device.py --store PATH
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from torch import Tensor, nn

from raymem import Examples, JobSettings, Recipe, load_examples, run_job


def is_bad() -> bool:
    """Is this process the one with the bad device?"""
    if os.environ.get("RAYMEM_TEST_ALL_BAD"):
        return True
    marker = Path(os.environ["RAYMEM_TEST_GATE"]) / "bad"
    with contextlib.suppress(FileExistsError), open(marker, "x") as file:
        file.write(str(os.getpid()))
    return marker.read_text() == str(os.getpid())


class OnADevice(nn.Module):
    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_inputs, n_classes)
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.started:
            self.started = True
            if is_bad():
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            time.sleep(0.3)
        return self.linear(x.flatten(1))


def model(n_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    H, W, C = image_shape
    return OnADevice(H * W * C, n_classes)


if __name__ == "__main__":
    digits = load_examples("digits")
    few = Examples(
        x_train=digits.x_train[:100], y_train=digits.y_train[:100],
        x_test=digits.x_test[:40], y_test=digits.y_test[:40],
    )  # fmt: skip
    run_job(
        JobSettings(data=few, store="runs/bad_device", trials=20),
        Recipe(model="bad_device:model", epochs=1, batch_size=50),
    )
