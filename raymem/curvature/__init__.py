"""Input loss curvature: model, images [B, C, H, W] and labels [B] in, one number per example out.

    input_curvature   tr H, tr H^2, gradient norm and loss; H: Hessian of the loss in the pixels
    paper_score       Ravikumar et al. 2024, eq. 14: a finite difference, another quantity
    pick_mode         is H the Gauss-Newton matrix (piecewise linear nets), or has it a second part?

Everything is per example of the *summed* loss: the batch an example sits in does not matter, nor
do the random probes, which are a function of the seed and the example's pixels.

**Units.** Nats per squared pixel unit, pixels in [0, 1]. A model with its normalization inside
(`build_model`'s) is differentiated through it: per unit of normalized pixels the trace is smaller
by std^2, and a step h of the normalized image is a step h * std here. Published scripts perturb
normalized images; to do as they do, pass the inner net and normalized x.
"""

from raymem.curvature.lower_precision import COMPARED, PrecisionChoice, pick_precision
from raymem.curvature.paper import PaperRule, paper_score
from raymem.curvature.trace import (
    CHECKED,
    PRECISIONS,
    Curvature,
    CurvatureRule,
    Mode,
    input_curvature,
    pick_mode,
)

__all__ = [
    "CHECKED",
    "COMPARED",
    "PRECISIONS",
    "Curvature",
    "CurvatureRule",
    "Mode",
    "PaperRule",
    "PrecisionChoice",
    "input_curvature",
    "paper_score",
    "pick_mode",
    "pick_precision",
]
