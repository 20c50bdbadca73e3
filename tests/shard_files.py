"""Images as JPEGs of mixed sizes, written as WebDataset tars, as Parquet, and as folders."""

from __future__ import annotations

import io
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
    return [
        records[k * len(records) // n_shards :][: -(-len(records) // n_shards)]
        for k in range(n_shards)
    ]


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


def write_parquet(path, records):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": f"{key}.jpg"} for key, _, data in records]
    labels = [label for _, label, _ in records]
    pq.write_table(pa.table({"image": images, "label": labels}), path)


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
