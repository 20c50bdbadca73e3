"""Large sets in shards: WebDataset tar, Parquet with encoded images, folders; at any fsspec URL.

    list_shards        a URL -> the shards there
    Transform          how a model wants its pixels: resize, crop, channels
    ScoringModel       a model with its transform: of a store, of timm, or of a weights file
    stream_curvature   shards + models -> curvature/MODEL/SHARD.parquet in a store, with Ray Data
    measure_kept       shards + the models a study kept -> the same, for the study's own scores
    join_curvature     those, beside a table of scores
    ingest             a set -> a cache of decoded pixels, for fleets and for streaming

Images are decoded by CPU workers and scored by actors that hold one model each; no machine ever
holds the set.
"""

from raymem.shards.finish import IngestSummary
from raymem.shards.gather import BadImage, StreamSummary
from raymem.shards.ingest import ingest
from raymem.shards.join import join_curvature
from raymem.shards.kept import StageSummary, measure_kept
from raymem.shards.models import ScoringModel
from raymem.shards.readers import list_shards
from raymem.shards.records import Shard
from raymem.shards.stream import stream_curvature
from raymem.shards.transform import Transform

__all__ = [
    "BadImage",
    "IngestSummary",
    "ScoringModel",
    "Shard",
    "StageSummary",
    "StreamSummary",
    "Transform",
    "ingest",
    "join_curvature",
    "list_shards",
    "measure_kept",
    "stream_curvature",
]
