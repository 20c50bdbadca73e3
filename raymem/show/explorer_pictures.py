"""Small pictures of the explorer, as few bytes as they can be."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from raymem.show.notebook import StudyResults
from raymem.show.thumbnails import thumbnails

# A coloured PNG of more bytes is smaller as WebP; small grey ones are not.
LARGE_PNG = 500
QUALITY = 75


def small_pictures(
    opened: StudyResults, ids: Sequence[str], *, keep: bool
) -> tuple[list[bytes], str]:
    """Thumbnails by id, in order, empty where there is none; and why some are missing.

    They are kept in the store, as the report's are, if `keep`.
    """
    kept, missing = thumbnails(opened, ids, keep=keep)
    return [_smaller(kept[i]) if i in kept else b"" for i in ids], missing


def _smaller(data: bytes) -> bytes:
    if len(data) <= LARGE_PNG:
        return data
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("RGB", "L"):
            return data
        image.save(out, "WEBP", quality=QUALITY)
    return min(data, out.getvalue(), key=len)
