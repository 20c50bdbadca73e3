"""Curvature of large sets: Ray Data reads and decodes shards, actors that hold a model score them.

    ScoringModel       a model with its transform: of a store, of timm, or of a weights file
    stream_curvature   shards + a model -> curvature/MODEL/SHARD.parquet in a store
    measure_kept       shards + the models a study kept -> the same, for the study's own scores

Images are decoded by CPU workers and scored by actors that hold one model each; no machine ever
holds the set. The mathematics is in `raymem.curvature`, which needs torch only and does not import
this: it uses the store, and the fleet's progress line and signals.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.curvature.streaming.gather import BadImage, StreamSummary
    from raymem.curvature.streaming.kept import StageSummary, measure_kept
    from raymem.curvature.streaming.scoring_model import ScoringModel
    from raymem.curvature.streaming.stream import stream_curvature


__all__ = [
    "BadImage",
    "ScoringModel",
    "StageSummary",
    "StreamSummary",
    "measure_kept",
    "stream_curvature",
]

__getattr__ = lazy_attributes(__name__, __file__)
