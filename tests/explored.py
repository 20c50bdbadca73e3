"""A small store to explore."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np

import raymem
from raymem import CurvatureRule, Examples, Recipe, Study

EVIL = '<script>alert("x")</script>'


def trained(folder, trials=20):
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
        trials=trials,
        curvature=CurvatureRule(),
    )  # fmt: skip
    study.train(engine="serial")
    study.score()
    return study


@contextmanager
def served(study):
    """The explorer's server of a study, in a thread; its address ends in /TOKEN/."""
    import uvicorn

    from raymem.show.explorer_server import explorer_app, listening

    opened = raymem.open(study.store, data=study.examples)
    with listening(0) as server:
        port = server.getsockname()[1]
        app = explorer_app(opened, token="secret", port=port)
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [server]})
        thread.start()
        yield f"http://127.0.0.1:{port}/secret/"
        running.should_exit = True
        thread.join(timeout=10)
