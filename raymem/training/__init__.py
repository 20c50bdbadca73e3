"""One trial on one device, no Ray: train a model on its subset, evaluate it on every example.

In:  `Images` (the whole set as tensors), a subset mask, a `Recipe`, `Seeds`.
Out: `TrialResult`: correct and margin for every train and test example, and what was collected
     on the way for the examples in the subset.

The set is one uint8 tensor that all trials of a process share. A batch is gathered, augmented and
scaled as one tensor on the device; there is no data loader and no Python per image.
"""

from raymem.models import margins
from raymem.training.batched_curvature import Measured, Meter, batch_of, measure
from raymem.training.calibrate import models_per_step
from raymem.training.checkpoint import Checkpoints
from raymem.training.group import Member, run_group
from raymem.training.history import SubsetHistory
from raymem.training.images import Images, as_input, augment, default_device
from raymem.training.loop import OnEpoch, train
from raymem.training.precision import fast_arithmetic
from raymem.training.private import check_private_recipe, private_recipe, train_privately
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe, Steps, learning_rate_factor
from raymem.training.trial import Evaluation, TrialResult, evaluate, run_trial

__all__ = [
    "ALONE",
    "Checkpoints",
    "Evaluation",
    "Images",
    "Measured",
    "Member",
    "Meter",
    "OnEpoch",
    "Ranks",
    "Recipe",
    "Steps",
    "SubsetHistory",
    "TrialResult",
    "as_input",
    "augment",
    "batch_of",
    "check_private_recipe",
    "default_device",
    "evaluate",
    "fast_arithmetic",
    "learning_rate_factor",
    "margins",
    "measure",
    "models_per_step",
    "private_recipe",
    "run_group",
    "run_trial",
    "train",
    "train_privately",
]
