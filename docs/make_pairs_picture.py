"""The strongest pairs of a store as a picture: python docs/make_pairs_picture.py STORE DATA OUT.

Each column is one strong pair: below the test example, above the training example that makes it
right.
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from raymem import Store, load_examples
from raymem.show.tables import top, where

SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--data-root", default="data")
    arguments = parser.parse_args()
    examples = load_examples(arguments.data, data_root=arguments.data_root)
    pairs = where(Store(arguments.store).scores("influence"), "strong == true")
    rows = top(pairs, "influence", SHOWN).to_pylist()
    figure, axes = plt.subplots(2, len(rows), figsize=(1.25 * len(rows), 3.4), squeeze=False)
    for column, row in enumerate(rows):
        shown = (
            (
                examples.x_train[row["train_index"]],
                row["train_label"],
                f"mem {row['memorization']:.2f}",
            ),
            (examples.x_test[row["test_index"]], row["test_label"], f"infl {row['influence']:.2f}"),
        )
        for axis, (image, label, text) in zip(axes[:, column], shown, strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"{examples.classes[label]}\n{text}", fontsize=7)
            axis.axis("off")
    figure.text(0.01, 0.7, "train", rotation=90, fontsize=9)
    figure.text(0.01, 0.25, "test", rotation=90, fontsize=9)
    figure.tight_layout(rect=(0.02, 0, 1, 1))
    figure.savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
