"""A small store to explore."""

from __future__ import annotations

import numpy as np

from raymem import CurvatureRule, Examples, Recipe, Study

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
