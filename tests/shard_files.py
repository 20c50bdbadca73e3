"""Images as JPEGs of mixed sizes, written as WebDataset tars, as Parquet, and as folders.

`ilsvrc` makes sets with ILSVRC's names and layouts, `odd` and `bad` images as they occur in it.
Records are (id, label, bytes).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(examples, n, seed=0):
    """[(key, label, JPEG bytes)]: RGB, sides of 12 to 40 pixels."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        size = tuple(int(side) for side in rng.integers(12, 41, 2))
        image = Image.fromarray(examples.x_train[i, :, :, 0]).convert("RGB").resize(size)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        found.append((f"digit{i:04d}", int(examples.y_train[i]), file.getvalue()))
    return found


def parts(records, n_shards):
    edges = [k * len(records) // n_shards for k in range(n_shards + 1)]
    return [records[edges[k] : edges[k + 1]] for k in range(n_shards)]


def write_tar(path, records, labels=True):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as tar:
        for key, label, data in records:
            members = [("jpg", data)]
            if labels and label is not None:
                members.append(("cls", str(label).encode()))
            for extension, content in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_parquet(path, records, names=None):
    """With `names` of classes in the metadata, as Hugging Face has them."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": f"{key}.jpg"} for key, _, data in records]
    labels = [label for _, label, _ in records]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
        about = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path)


def write_folders(root, records):
    for key, label, data in records:
        folder = Path(root) / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(data)


def write_all(root, records, n_shards=3):
    """tar/, parquet/ and folders/ below `root`, of the same images."""
    for number, part in enumerate(parts(records, n_shards)):
        write_tar(root / "tar" / f"part-{number}.tar", part)
        write_parquet(root / "parquet" / f"part-{number}.parquet", part)
    write_folders(root / "folders", records)


WNIDS = tuple(f"n{1440000 + 764 * k:08d}" for k in range(10))


def saved(image, kind="JPEG", **options):
    """An image as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def textured(n, seed=0):
    """n RGB images of mixed sizes: those of RAYMEM_TEST_IMAGES (.npz, x_train), or made up."""
    rng = np.random.default_rng(seed)
    path = os.environ.get("RAYMEM_TEST_IMAGES")
    if path:
        with np.load(path) as file:
            rows = file["x_train"][rng.choice(len(file["x_train"]), n, replace=False)]
    else:
        rows = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    for row in rows:
        size = tuple(int(side) for side in rng.integers(24, 97, 2))
        yield Image.fromarray(row).resize(size, Image.Resampling.BICUBIC)


def ilsvrc(n_train, n_val, seed=0, n_classes=10):
    """Train and validation records under ILSVRC's ids; some are PNGs, whatever their names say."""
    images = textured(n_train + n_val, seed)
    kinds = [saved(image, "PNG" if i % 17 == 3 else "JPEG") for i, image in enumerate(images)]
    train = [(f"{WNIDS[i % n_classes]}_{7 * i}", i % n_classes, kinds[i]) for i in range(n_train)]
    val = [
        (f"ILSVRC2012_val_{i + 1:08d}", (3 * i) % n_classes, kinds[n_train + i])
        for i in range(n_val)
    ]
    return train, val


def odd():
    """Images that are right, and unusual: {name: bytes}."""
    rgb = next(textured(1, seed=5)).resize((60, 44))
    grey, exif = rgb.convert("L"), Image.Exif()
    exif[0x0112] = 6
    adobe = saved(rgb.convert("CMYK"), quality=90)
    palette = rgb.quantize(64)
    found = {
        "cmyk": saved(rgb.convert("CMYK").transpose(Image.Transpose.ROTATE_90)),
        "adobe": adobe,
        "grey": saved(grey),
        "grey-alpha": saved(Image.merge("LA", (grey, grey.rotate(180))), "PNG"),
        "alpha": saved(Image.merge("RGBA", (*rgb.split(), grey)), "PNG"),
        "palette": saved(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "rotated": saved(rgb, exif=exif, quality=95),
        "broken-exif": saved(grey.convert("RGB"), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"),
        "deep-rgb": _deep_rgb(),
        "strip": saved(rgb.resize((700, 3)), "PNG"),
        "one-pixel": saved(rgb.resize((1, 1)), "PNG"),
        "bmp": saved(rgb.resize((20, 31)), "BMP"),
        "gif": saved(rgb.resize((21, 31)), "GIF"),
        "webp": saved(rgb.resize((22, 31)), "WEBP"),
    }
    assert b"Adobe" in adobe
    return found


def _deep_rgb():
    """A PNG of 16 bits per channel, which Pillow cannot write."""
    import struct
    import zlib

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 65536, (9, 7 * 3)).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 7, 9, 16, 2, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def bad(side):
    """Images that are none: {name: (bytes, what the error says)}; `side` makes one too huge."""
    rgb = next(textured(1, seed=6)).resize((80, 70))
    jpeg, png = saved(rgb, quality=95), saved(rgb, "PNG")
    deep = saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG")
    return {
        "truncated-jpeg": (jpeg[: len(jpeg) // 2], "image file is truncated"),
        "truncated-png": (png[: len(png) // 2], "image file is truncated"),
        "empty": (b"", "its image is empty"),
        "text": (b"this is no picture", "no image format that Pillow knows"),
        "deep": (deep, "more than 8 bits per channel"),
        "header": (jpeg[:200], ""),
        "huge": (saved(Image.new("RGB", (side, side)), "PNG"), "decompression bomb"),
    }


def write_ilsvrc(root, form, train, val, n_shards=4, wnids=WNIDS):
    """The records as folders with flat val and a map, as shuffled tars, or as Parquet."""
    root, rng = Path(root), np.random.default_rng(1)
    if form == "folders":
        for key, label, data in train:
            (root / "train" / wnids[label]).mkdir(parents=True, exist_ok=True)
            (root / "train" / wnids[label] / f"{key}.JPEG").write_bytes(data)
        (root / "val").mkdir()
        for key, _, data in val:
            (root / "val" / f"{key}.JPEG").write_bytes(data)
        lines = [f"{key}.JPEG {wnids[label]}" for key, label, _ in val if label is not None]
        (root / "val_labels.txt").write_text("\n".join(lines) + "\n")
        return
    for split, records in (("train", train), ("val", val)):
        for number, rows in enumerate(parts(records, n_shards)):
            if form == "tar":
                shuffled = [rows[k] for k in rng.permutation(len(rows))]
                write_tar(root / f"imagenet-{split}-{number:04d}.tar", shuffled)
            else:
                name = {"train": "train", "val": "validation"}[split]
                path = root / "data" / f"{name}-{number:05d}-of-{n_shards:05d}.parquet"
                named = [(f"{key}_{wnids[label or 0]}", label, data) for key, label, data in rows]
                write_parquet(path, named, names=[f"word {wnid}" for wnid in wnids])
    if form == "parquet":
        hidden = [(f"ILSVRC2012_test_{k:08d}", -1, train[k][2]) for k in range(3)]
        write_parquet(root / "data" / "test-00000-of-00001.parquet", hidden, wnids)
