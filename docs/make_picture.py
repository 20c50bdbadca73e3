"""The picture in the README: the most and the least memorized digits of a store.

python docs/make_picture.py runs/feldman_digits docs/most_memorized.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from raymem import Store, load_examples
from raymem.show.tables import top, where

COLUMNS = 10


def main(store: str, target: str) -> None:
    digits = load_examples("digits")
    scores = where(Store(store).scores(), "split == train")
    rows = [
        ("most memorized", top(scores, "memorization", COLUMNS)),
        ("least", top(scores, "p_true_out", COLUMNS)),
    ]
    figure, axes = plt.subplots(2, COLUMNS, figsize=(10, 2.9))
    for (title, table), line in zip(rows, axes, strict=True):
        for example, axis in zip(table.to_pylist(), line, strict=True):
            axis.imshow(digits.x_train[example["index"]][..., 0], cmap="gray_r")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"“{example['label']}”  {example['memorization']:.2f}", fontsize=9)
        line[0].set_ylabel(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
