"""Input curvature averaged over training: measured at the ends of epochs, while a model trains.

Garg et al. 2024, "Memorization Through the Lens of Curvature of Loss Function Around Samples"
(ICML): the mean over epochs of one model's curvature goes with memorization better than that of the
trained model alone. Here it is the mean of tr H, of every training example, in the subset or not.

Shapes: N training examples.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from raymem.curvature import CurvatureRule
from raymem.errors import DivergedError
from raymem.training.batched_curvature import Measured, measure_images
from raymem.training.images import Images
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe


class EpochCurvature:
    """Sums of one trial's curvature over the epochs that are due before the last.

    Training is not touched: it is measured under a copy of the model, which takes its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        rule: CurvatureRule,
        recipe: Recipe,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """`model` is fresh; `rule.every_epochs` is given."""
        assert rule.every_epochs is not None
        self.images, self.recipe, self.seed, self.ranks = images, recipe, seed, ranks
        self.every = rule.every_epochs
        self.rule = dataclasses.replace(rule, paper=None, every_epochs=None)
        self._copy = copy.deepcopy(model).eval()
        self.total = torch.zeros(len(images.y_train), dtype=torch.float64)
        """[N] Sum of tr H, on the CPU."""
        self.measured = 0
        """Epochs in the sum."""
        self.seconds = 0.0
        """Wall time of measuring, earlier workers' too."""

    @classmethod
    def of(
        cls, model: nn.Module, images: Images, rule: CurvatureRule | None, recipe: Recipe,
        *, seed: int, ranks: Ranks = ALONE,
    ) -> EpochCurvature | None:  # fmt: skip
        """None unless the rule averages over epochs."""
        if rule is None or rule.every_epochs is None:
            return None
        return cls(model, images, rule, recipe, seed=seed, ranks=ranks)

    def due(self, epoch: int) -> bool:
        """Is curvature measured after `epoch`, from 1? After the last it is in any case."""
        left = self.recipe.epochs - epoch
        return left > 0 and left % self.every == 0

    def measure(self, model: nn.Module, epoch: int) -> None:
        """Add curvature under the weights that `model` has now, after `epoch`.

        Each epoch has probes of its own. Raises DivergedError if a weight is not finite.
        """
        self._copy.load_state_dict(model.state_dict())
        finite = [p.isfinite().all() for p in self._copy.parameters()]
        if finite and not bool(torch.stack(finite).all()):
            raise DivergedError(
                f"a weight was not finite after epoch {epoch} of {self.recipe.epochs}; a smaller "
                "learning_rate or a warmup may help"
            )
        found = measure_images(
            self._copy, self.images, self.rule, self.recipe,
            seed=self.seed + epoch, ranks=self.ranks,
        )  # fmt: skip
        self.total += torch.from_numpy(found.values["curvature"]).double()
        self.measured += 1
        self.seconds += found.seconds

    def with_last(self, last: Measured) -> Measured:
        """What was measured of the trained model, with the mean over epochs beside it."""
        total = self.total + torch.from_numpy(last.values["curvature"]).double()
        mean = (total / (self.measured + 1)).float().numpy()
        return dataclasses.replace(
            last,
            values={**last.values, "curvature_over_training": mean},
            epochs=self.measured + 1,
            epochs_seconds=self.seconds,
        )

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"total": self.total, "measured": self.measured, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises ValueError if it has another number of examples."""
        self.total.copy_(state["total"])
        self.measured, self.seconds = int(state["measured"]), float(state["seconds"])
