"""Large sets in shards: WebDataset tar, Parquet with encoded images, folders; at any fsspec URL.

    list_shards   a URL -> the shards there
    read_shard    a shard -> its records, one by one, not decoded
    Transform     how a model wants its pixels: resize, crop, channels
    ingest        a set -> a cache of decoded pixels, for fleets and for streaming

It uses the store, and the fleet's progress line and signals; nothing else in `raymem.data` imports
it.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.data.shards.finish_cache import IngestSummary
    from raymem.data.shards.ingestion import ingest
    from raymem.data.shards.records import Record, Shard
    from raymem.data.shards.shard_readers import list_shards, read_shard
    from raymem.data.shards.transform import Transform


__all__ = [
    "IngestSummary",
    "Record",
    "Shard",
    "Transform",
    "ingest",
    "list_shards",
    "read_shard",
]

__getattr__ = lazy_attributes(__name__, __file__)
