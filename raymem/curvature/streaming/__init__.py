"""Curvature of large sets: Ray Data reads and decodes shards, actors that hold a model score them.

    ScoringModel       a model with its transform: of a store, of timm, or of a weights file
    stream_curvature   shards + a model -> curvature/MODEL/SHARD.parquet in a store
    stream_models      shards + several models -> the same, each image being decoded once
    measure_kept       shards + the models a study kept -> the same, for the study's own scores

Images are decoded by CPU workers, block by block, and scored by actors that hold the models; no
machine ever holds the set, or all pixels of a shard. The mathematics is in `raymem.curvature`,
which needs torch only and does not import this: it uses the store, and the fleet's progress line
and signals.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.curvature.streaming.gather import BadImage, StreamSummary
    from raymem.curvature.streaming.kept import StageSummary, measure_kept
    from raymem.curvature.streaming.scorer_options import ScorerOptions
    from raymem.curvature.streaming.scoring_model import ScoringModel
    from raymem.curvature.streaming.stream import stream_curvature, stream_models


__all__ = [
    "BadImage",
    "ScorerOptions",
    "ScoringModel",
    "StageSummary",
    "StreamSummary",
    "measure_kept",
    "stream_curvature",
    "stream_models",
]

__getattr__ = lazy_attributes(__name__, __file__)
