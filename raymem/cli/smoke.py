"""--smoke: the whole chain of a job in minutes, on images made here, and a check of the result."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymem.cli.job_settings import CacheSettings, JobSettings
from raymem.errors import FleetError
from raymem.show.tables import where
from raymem.store import columns
from raymem.study import Study
from raymem.training import Recipe

WNIDS = ("n01440764", "n02102040", "n02979186", "n03000684")


@dataclass(frozen=True, kw_only=True)
class Smoke:
    """What --smoke asks for in place of the job's own settings."""

    recipe: Recipe
    trials: int = 20
    size: int = 32
    """Side of the cache's images."""
    train_per_class: int = 30
    test_per_class: int = 10

    def prepare(self, settings: JobSettings, *, keep: Collection[str]) -> JobSettings:
        """Make the images, as ImageNet's folders have them; `settings` for these, but for those in
        `keep`, which the user gave."""
        root = Path(tempfile.mkdtemp(prefix="raymem-smoke-"))
        write_images(root / "images", self.train_per_class, self.test_per_class, self.size)
        trials = settings.trials if "trials" in keep else self.trials
        return dataclasses.replace(
            settings,
            data=str(root / "images"),
            store=settings.store if "store" in keep else str(root / "store"),
            trials=trials,
            curvature_trials=trials,
            cache=CacheSettings(cache=str(root / "cache"), size=self.size),
        )


def write_images(root: Path, train_per_class: int, test_per_class: int, size: int) -> None:
    """JPEGs of four classes below root/train and root/val, named as ImageNet's are.

    Each class is a colour gradient of its own direction under noise; some labels are wrong, so that
    there is something to memorize.
    """
    rng = np.random.default_rng(0)
    number = 0
    for label, wnid in enumerate(WNIDS):
        for split, n in (("train", train_per_class), ("val", test_per_class)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                wrong = split == "train" and i % 10 == 9
                shown = (label + 1) % len(WNIDS) if wrong else label
                number += 1
                name = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{number:08d}"
                _picture(shown, size, rng).save(folder / f"{name}.JPEG", quality=95)


def _picture(label: int, size: int, rng: np.random.Generator) -> Image.Image:
    H, W = (int(side) for side in rng.integers(size, 2 * size, 2))
    angle = np.pi * label / len(WNIDS)
    y, x = np.mgrid[0:H, 0:W] / max(H, W)
    slope = np.cos(angle) * x + np.sin(angle) * y
    colour = rng.uniform(60, 160, 3)
    pixels: NDArray[np.float64] = slope[:, :, None] * colour + rng.normal(60, 25, (H, W, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def check_rows(study: Study) -> str:
    """Raise FleetError unless the scores have one row per example and epsilon, without gaps."""
    table, e = study.scores(), study.examples
    wanted = sorted((*e.train_ids, *e.test_ids))
    measured = ["curvature_in", "curvature_out"] if study.curvature is not None else []
    for epsilon in study.epsilons:
        here = where(table, f"epsilon == {epsilon}")
        if sorted(here["example_id"].to_pylist()) != wanted:
            raise FleetError("the scores do not have one row per example; report this as a bug")
        train = where(here, "split == train")
        for name in ("memorization", "memorization_stderr", "loss_out", *measured):
            missing = train[name].null_count
            if missing:
                raise FleetError(
                    f"{missing} training examples have no {name}; report this as a bug"
                )
    known = [name for name in table.column_names if name in columns.SCORES_CURVATURE]
    at = "" if study.privacy is None else f" at each of {len(study.epsilons)} epsilons"
    return (
        f"smoke test passed: {len(wanted)} examples, one row each{at}, memorization and "
        f"{len(known)} columns of curvature"
    )
