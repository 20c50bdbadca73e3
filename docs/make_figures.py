"""The figures of the concept pages, light and dark: python docs/make_figures.py

Trains 100 small networks on the digits (a minute or two, in a temporary store) for the first
two. The third shows the bounds beside the table of docs/privacy.md.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

import raymem
from raymem.models import build_model
from raymem.plan import Seeds
from raymem.privacy.bounds import paper_bound, sharp_bound
from raymem.show.figures import DARK, LIGHT
from raymem.show.tables import where
from raymem.training import Images, run_trial

FIGURES = Path(__file__).parent / "figures"
TRIALS = 100
RECIPE = raymem.Recipe(model="mlp-128", epochs=30, batch_size=64, learning_rate=0.1)
DIRECTIONS = 30
Colors = dict[str, str]


def save(name: str, draw: Callable[[Any, Colors], None]) -> None:
    """One drawing as two SVG files, for light and for dark pages."""
    for theme, colors in (("light", LIGHT), ("dark", DARK)):
        ink = colors["ink"]
        style = {
            "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
            "text.color": ink, "svg.hashsalt": "raymem", "axes.spines.top": False,
            "axes.spines.right": False, "font.size": 10,
        }  # fmt: skip
        with plt.rc_context(style):
            figure, axis = plt.subplots(figsize=(6.4, 3.8))
            draw(axis, colors)
            figure.tight_layout()
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
        lines = (line.rstrip() for line in drawn.getvalue().splitlines())
        (FIGURES / f"{name}-{theme}.svg").write_text("\n".join(lines) + "\n")


def memorization(axis: Any, colors: Colors, out: NDArray[Any], inside: NDArray[Any]) -> None:
    """Accuracy of in-models against that of out-models; a little spread, so that points show."""
    random = np.random.default_rng(0)
    x, y = (np.clip(v + random.normal(0, 0.008, len(v)), -0.03, 1.03) for v in (out, inside))
    axis.plot([0, 1], [0, 1], color=colors["grid"], zorder=0)
    axis.scatter(x, y, s=9, alpha=0.5, color=colors["one"], linewidths=0)
    most = int(np.argmax(inside - out))
    axis.annotate(
        "", (out[most], inside[most] - 0.02), (out[most], out[most] + 0.02),
        arrowprops={"arrowstyle": "<->", "color": colors["two"]},
    )  # fmt: skip
    axis.text(out[most] + 0.03, 0.5, "memorization", color=colors["two"])
    axis.set_xlabel("accuracy of models that did not train on the example")
    axis.set_ylabel("accuracy of models that did")


def losses(model: torch.nn.Module, image: NDArray[Any], label: int, steps: torch.Tensor) -> Any:
    """The loss of image + step * direction, [directions, steps]: random directions of signs."""
    x = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) / 255
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (DIRECTIONS, 1, *x.shape), generator=generator) * 2 - 1
    moved = (x + steps[:, None, None, None] * signs).flatten(0, 1)
    labels = torch.full((len(moved),), label)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(moved), labels, reduction="none")
    return loss.view(DIRECTIONS, len(steps)).numpy()


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    digits = raymem.load_examples("digits")
    with tempfile.TemporaryDirectory() as folder:
        study = raymem.Study(examples=digits, recipe=RECIPE, store=folder, trials=TRIALS)
        study.train(engine="serial")
        study.score()
        scores = where(study.scores(), "split == train").to_pandas()
    out, inside = scores["accuracy_out"].to_numpy(), scores["accuracy_in"].to_numpy()
    save("memorization", lambda axis, colors: memorization(axis, colors, out, inside))
    save("curvature", curves(digits, int((inside - out).argmax()), scores["p_true_out"].argmax()))
    save("privacy", privacy)


def curves(digits: raymem.Examples, memorized: int, ordinary: int) -> Callable[..., None]:
    """Losses around both examples, under a network that trained on neither."""
    mask = np.random.default_rng(0).random(len(digits.y_train)) < 0.7
    mask[[memorized, ordinary]] = False
    images = Images.from_arrays(
        digits.x_train, digits.y_train, digits.x_test, digits.y_test, len(digits.classes)
    )
    seeds = Seeds(init=0, order=0, augment=0)
    weights = run_trial(images, mask, RECIPE, seeds, keep_weights=True).weights
    # Normalization is the model's first layer: it takes pixels in [0, 1].
    model = build_model(
        RECIPE.model, n_classes=len(digits.classes), image_shape=digits.x_train.shape[1:]
    )
    model.load_state_dict(weights)
    model.eval()

    steps = torch.linspace(-0.15, 0.15, 61)

    def draw(axis: Any, colors: Colors) -> None:
        shown = ((memorized, "two", "memorized digit"), (ordinary, "one", "ordinary digit"))
        for example, color, text in shown:
            values = losses(model, digits.x_train[example], int(digits.y_train[example]), steps)
            axis.plot(steps, values.T, color=colors[color], alpha=0.25, linewidth=0.8)
            axis.plot(steps, values.mean(0), color=colors[color], linewidth=2, label=text)
        axis.set_xlabel("step along the direction, pixels in [0, 1]")
        axis.set_ylabel("loss, nats")
        axis.legend(frameon=False)

    return draw


def privacy(axis: Any, colors: Colors) -> None:
    """Bounds on memorization, and what the digits gave."""
    page = (FIGURES.parent / "privacy.md").read_text()
    number, interval = r"([\d.]+|-)", r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]"
    row = rf"^\| {number} \| [\d.]+ \| [\d.]+ \| {interval} \| {number} \|"
    found = [[x if x != "-" else "nan" for x in r] for r in re.findall(row, page, re.MULTILINE)]
    epsilon, mean, low, high, variation = np.array(found, float).T
    grid = np.geomspace(0.5, 64, 200)
    for bound, dash, text in (
        (paper_bound, "--", "1 - e^-eps (the paper's)"),
        (lambda e: sharp_bound(e, 1e-5), ":", "sharpest from (eps, delta) alone"),
    ):
        axis.plot(grid, [bound(e) for e in grid], dash, color=colors["ink"], label=text)
    axis.plot(
        epsilon, variation, "o-", color=colors["one"], label="total variation of the mechanism"
    )
    error = np.array([mean - low, high - mean])
    axis.errorbar(
        epsilon,
        mean,
        error,
        fmt="s",
        color=colors["two"],
        label="measured, wrong labels, 95% interval",
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(epsilon, [f"{e:g}" for e in epsilon])
    axis.set_xlabel("epsilon")
    axis.set_ylabel("memorization")
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.47, 1))


if __name__ == "__main__":
    main()
