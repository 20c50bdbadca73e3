"""Small pictures of the examples a report shows: figures/thumbnails.parquet in the store."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
from PIL import Image

from raymem.data import ABSENT, rows_of
from raymem.errors import RaymemError
from raymem.show.notebook import StudyResults, as_image
from raymem.store.derived import THUMBNAILS
from raymem.store.trials import encode

SIDE = 48
SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), metadata={"meaning": "the example's id", "unit": ""}),
        pa.field("content_hash", pa.string(), metadata={"meaning": "of its pixels", "unit": ""}),
        pa.field("image", pa.binary(), metadata={"meaning": "PNG or JPEG, small", "unit": ""}),
    ]
)


def thumbnails(
    opened: StudyResults, ids: Iterable[str], *, keep: bool = True
) -> tuple[dict[str, bytes], str]:
    """Pictures by example id, and why some are missing (empty: none is).

    Kept in the store, if `keep`: where the images are no longer at hand, the pictures of before
    are shown.
    """
    kept = opened.store.thumbnails()
    wanted = list(ids)
    missing = [example_id for example_id in wanted if example_id not in kept]
    if not missing:
        return kept, ""
    try:
        data = opened.data()
    except RaymemError as error:
        return kept, str(error)
    own, N = (*data.train_ids, *data.test_ids), len(data.train_ids)
    for example_id, row in zip(missing, rows_of(missing, own).tolist(), strict=True):
        if row != ABSENT:
            pixels = data.x_train[row] if row < N else data.x_test[row - N]
            kept[example_id] = encoded(as_image(pixels))
    if not keep:
        return kept, ""
    table = pa.table(
        {
            "example_id": list(kept),
            "content_hash": [
                None if row == ABSENT else data.content_hashes[row]
                for row in rows_of(list(kept), own).tolist()
            ],
            "image": list(kept.values()),
        },
        schema=SCHEMA,
    )
    opened.store.files.replace(THUMBNAILS, encode(table, {"side": SIDE}))
    return kept, ""


def encoded(image: Image.Image) -> bytes:
    """At most 48 pixels a side; PNG for small and grey ones, JPEG for photographs."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if image.mode == "RGB" and max(image.size) > 32:
        image.save(out, "JPEG", quality=80)
    else:
        image.save(out, "PNG", optimize=True)
    return out.getvalue()


def media_type(data: bytes) -> str:
    """The media type of a thumbnail.

    >>> media_type(bytes.fromhex("89") + b"PNG...")
    'image/png'
    """
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
