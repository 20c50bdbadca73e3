"""Finishes a cache whose shards are decoded: decides which records are examples.

Shapes: K classes.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.data.array_checks import some
from raymem.data.cache import FORMAT, INDEX, REJECTS, SPLITS, WHOLE, CacheAbout
from raymem.data.examples import fingerprint_of
from raymem.data.join import repeated
from raymem.data.pixels import ILSVRC, WNID, example_id
from raymem.data.shards.pieces import shard_key, shard_rows
from raymem.data.shards.records import Shard
from raymem.data.shards.splits import Splits
from raymem.data.shards.transform import Transform, label_error
from raymem.errors import DamagedObjectError, ExamplesError
from raymem.store import Files, columns
from raymem.store.trials import decode, encode
from raymem.version import VERSION

READERS = 8
# ILSVRC 2012: images of each split, and the least and the most of a class.
IMAGENET = {"train": (1_281_167, 732, 1300), "test": (50_000, 50, 50)}
WORDS = {"train": "training", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An image that was left out of the set."""

    split: str
    example_id: str
    error: str


@dataclass(kw_only=True)
class IngestSummary:
    """What is in a cache, and what one run did to make it."""

    cache: str
    """URL of the cache."""
    about: CacheAbout
    """The contents of cache.json."""
    shards: int = 0
    """Shards of the set."""
    done_before: int = 0
    """Shards decoded by earlier runs."""
    images: int = 0
    """Images decoded by this run."""
    seconds: float = 0.0
    """Wall time of decoding, including the start of workers."""
    left_out: str = ""
    """What is in the set but was not read."""
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    """Images that were left out, by this run or the one that finished the cache."""


def summary_of(files: Files) -> IngestSummary:
    """The summary of a finished cache."""
    table = decode(files.read(REJECTS), REJECTS).select(["split", "example_id", "error"])
    return IngestSummary(
        cache=files.url,
        about=json.loads(files.read(WHOLE)),
        rejects=[Reject(**row) for row in table.to_pylist()],
    )


def finish(
    files: Files, splits: Splits, transform: Transform, name: str, quarantine: bool
) -> IngestSummary:
    """Write index.parquet, rejects.parquet and last cache.json.

    Raises ExamplesError for images that cannot be used, unless `quarantine`, for repeated ids, and
    for classes without training examples.
    """
    found = _records(files, splits)
    _check_ids(found, files)
    classes = _classes(found, splits)
    errors = _errors(found, len(classes))
    rejects = found.append_column("why", pa.array(errors, pa.string()))
    rejects = rejects.filter(pc.is_valid(rejects["why"]))
    if rejects.num_rows and not quarantine:
        raise ExamplesError(_refusal(rejects, found.num_rows, files.url))
    index = _index(found.filter(pa.array([error is None for error in errors])), classes)
    rejects = _rejects(rejects)
    H, W = transform.size
    shape = (H, W, 1 if transform.grey else 3)
    about = _about(index, rejects, classes, shape, name)
    words = {"fingerprint": about["fingerprint"], "name": name}
    files.replace(INDEX, encode(index, words))
    files.replace(REJECTS, encode(rejects, words))
    files.create(WHOLE, json.dumps(about, indent=1).encode() + b"\n")
    summary = summary_of(files)
    summary.shards = len(splits.train) + len(splits.test)
    summary.left_out = splits.left_out
    return summary


def _records(files: Files, splits: Splits) -> pa.Table:
    """The records of all shards, with `split` and `shard`, the key of the shard's object."""
    of = [(split, s) for split in SPLITS for s in getattr(splits, split)]

    def read(at: tuple[str, Shard]) -> pa.Table:
        split, shard = at
        key = shard_key(split, shard.name)
        table = shard_rows(files, key).replace_schema_metadata()
        _check_files(table, shard, files, key)
        n = table.num_rows
        table = table.append_column("split", pa.array([split] * n, pa.string()))
        return table.append_column("shard", pa.array([key] * n, pa.string()))

    with ThreadPoolExecutor(READERS) as pool:
        return pa.concat_tables(list(pool.map(read, of)))


def _check_files(table: pa.Table, shard: Shard, files: Files, key: str) -> None:
    """Raises DamagedObjectError if a folder had other files when it was decoded."""
    if shard.kind != "folder":
        return
    at = shard.url.removeprefix(shard.root).lstrip("/")
    if table["example_id"].to_pylist() != [example_id(f"{at}/{name}") for name in shard.files]:
        raise DamagedObjectError(
            f"{files.url}/{key} was decoded when the folder had other images than now; run "
            f"{_deletion(files, {key})}, then the same command again"
        )


def _check_ids(found: pa.Table, files: Files) -> None:
    twice = repeated(found["example_id"])
    if not twice:
        return
    rows = found.filter(pc.is_in(found["example_id"], pa.array(twice)))
    rows = rows.select(["example_id", "shard"])
    at: dict[str, list[str]] = {}
    for row in rows.to_pylist():
        at.setdefault(row["example_id"], []).append(row["shard"])
    shown = (f"{id_} in {' and '.join(dict.fromkeys(keys))}" for id_, keys in sorted(at.items()))
    command = _deletion(files, {key for keys in at.values() for key in keys})
    raise ExamplesError(
        f"{len(at):,} ids are not unique over both splits: {some(shown)}; rename or remove those "
        f"images, forget what was decoded of them with {command}, and run the same command again"
    )


def _deletion(files: Files, keys: Set[str]) -> str:
    """The command that deletes objects of a cache."""
    if files.local:
        return f"`rm {' '.join(shlex.quote(files.path(key)) for key in sorted(keys))}`"
    deleted = "".join(f"files.delete({key!r}); " for key in sorted(keys)).removesuffix("; ")
    code = f"from raymem.store import Files; files = Files({files.url!r}); {deleted}"
    return f"`python -c {shlex.quote(code)}`"


def _classes(found: pa.Table, splits: Splits) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers."""
    if splits.folders:
        return splits.folders
    train = found.filter(pc.equal(found["split"], "train"))
    train = train.filter(pc.and_kleene(train["ok"], pc.greater_equal(train["label"], 0)))
    if train.num_rows == 0:
        raise ExamplesError(
            "no training image can be read and has a label" + _first_error(found) + "; check DATA"
        )
    labels = train["label"].to_numpy()
    K = len(splits.names) if splits.names else int(labels.max()) + 1
    by_ids = _wnids(train["example_id"].to_pylist(), labels, K)
    return by_ids or splits.names or tuple(map(str, range(K)))


def _first_error(found: pa.Table) -> str:
    errors = pc.drop_null(found["error"])
    return f" ({found['example_id'][0]}: {errors[0]})" if len(errors) else ""


def _wnids(ids: Sequence[str], labels: NDArray[np.int64], K: int) -> tuple[str, ...] | None:
    """The WordNet id of each class, if every training id says the same of it."""
    found: dict[int, str] = {}
    for id_, label in zip(ids, labels.tolist(), strict=True):
        wnid = id_.partition("_")[0]
        if not ILSVRC.fullmatch(id_) or not WNID.fullmatch(wnid):
            return None
        if found.setdefault(label, wnid) != wnid:
            return None
    names = tuple(found.get(label, "") for label in range(K))
    return names if all(names) and len(set(names)) == K == len(found) else None


def _errors(found: pa.Table, K: int) -> list[str | None]:
    """Why each record is left out; None for examples."""
    errors: list[str | None] = found["error"].to_pylist()
    labels = found["label"].to_pylist()
    return [error or label_error(y, K) or None for error, y in zip(errors, labels, strict=True)]


def _refusal(rejects: pa.Table, total: int, url: str) -> str:
    shown = (f"{r['split']} {r['example_id']} ({r['why']})" for r in rejects.to_pylist())
    objects = sorted(set(rejects["shard"].to_pylist()))
    return (
        f"{rejects.num_rows:,} of {total:,} images cannot be used: {some(shown)}; run again with "
        f"--on-bad quarantine to leave them out, or repair them, delete {some(objects)} in {url}, "
        "and run again"
    )


def _index(good: pa.Table, classes: Sequence[str]) -> pa.Table:
    tables = []
    for split in SPLITS:
        part = good.filter(pc.equal(good["split"], split)).sort_by("example_id")
        if part.num_rows == 0:
            raise ExamplesError(
                f"the {split} set is empty; memorization needs both splits: check DATA, or give "
                "--train and --val"
            )
        tables.append(part.append_column("index", pa.array(np.arange(part.num_rows))))
    whole = pa.concat_tables(tables).combine_chunks()
    labels = whole["label"].to_numpy()
    is_wnid = all(WNID.fullmatch(name) for name in classes)
    wnids = pa.array(list(classes) if is_wnid else [None] * len(classes), pa.string())
    whole = whole.append_column("wnid", wnids.take(pa.array(labels)))
    empty = sorted(set(range(len(classes))) - set(labels[: tables[0].num_rows].tolist()))
    if len(classes) < 2:
        raise ExamplesError("there is only one class; a classifier needs two or more")
    if empty:
        raise ExamplesError(
            f"{len(empty):,} classes have no training image: {some(classes[k] for k in empty)}; "
            "add some, or number the classes without them"
        )
    return whole.select(list(columns.CACHE_INDEX)).cast(columns.schema(columns.CACHE_INDEX))


def _rejects(rejects: pa.Table) -> pa.Table:
    table = rejects.drop_columns(["error"]).rename_columns({"why": "error"})
    table = table.select(list(columns.CACHE_REJECTS))
    order = [("split", "ascending"), ("example_id", "ascending")]
    return table.sort_by(order).cast(columns.schema(columns.CACHE_REJECTS))


def _about(
    index: pa.Table,
    rejects: pa.Table,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    name: str,
) -> CacheAbout:
    """cache.json."""
    n = {split: pc.sum(pc.equal(index["split"], split)).as_py() for split in SPLITS}
    labels = index["label"].to_numpy()
    parts = {"train": labels[: n["train"]], "test": labels[n["train"] :]}
    sizes = {split: np.bincount(parts[split], minlength=len(classes)) for split in SPLITS}
    left_out = {split: pc.sum(pc.equal(rejects["split"], split)).as_py() or 0 for split in SPLITS}
    copies = _copies(index["content_hash"].to_pylist(), n["train"])
    return {
        "format": FORMAT,
        "name": name,
        "image_shape": shape,
        "classes": list(classes),
        "n_train": n["train"],
        "n_test": n["test"],
        "fingerprint": fingerprint_of(index, shape, classes),
        "n_rejects": rejects.num_rows,
        "rejects": left_out,
        "class_sizes": {split: _extremes(sizes[split], classes) for split in SPLITS},
        "duplicates": copies,
        "findings": _findings(sizes, left_out, copies, classes),
        "raymem": VERSION,
    }


def _extremes(sizes: NDArray[np.int64], classes: Sequence[str]) -> dict[str, object]:
    small, large = int(sizes.argmin()), int(sizes.argmax())
    return {
        "smallest": {"class": classes[small], "images": int(sizes[small])},
        "largest": {"class": classes[large], "images": int(sizes[large])},
    }


def _copies(hashes: Sequence[str], n_train: int) -> dict[str, int]:
    """Images beyond the first of equal ones in each split, and test images that train has too."""
    train, test = hashes[:n_train], hashes[n_train:]
    there = set(train)
    return {
        "train": len(train) - len(there),
        "test": len(test) - len(set(test)),
        "across": sum(digest in there for digest in test),
    }


def _findings(
    sizes: Mapping[str, NDArray[np.int64]],
    left_out: Mapping[str, int],
    copies: Mapping[str, int],
    classes: Sequence[str],
) -> list[str]:
    """What is unusual about the set, in sentences."""
    found = []
    empty = [classes[k] for k in np.flatnonzero(sizes["test"] == 0).tolist()]
    if empty:
        found.append(f"{len(empty):,} classes have no test image: {some(empty)}")
    if copies["across"]:
        found.append(f"{copies['across']:,} test images are exact copies of training images")
    if len(classes) == 1000 and all(WNID.fullmatch(name) for name in classes):
        for split, (total, least, most) in IMAGENET.items():
            found += _against(split, sizes[split], left_out[split], classes, total, least, most)
    return found


def _against(
    split: str,
    sizes: NDArray[np.int64],
    left_out: int,
    classes: Sequence[str],
    total: int,
    least: int,
    most: int,
) -> list[str]:
    """Where one split differs from that of ILSVRC 2012."""
    found, n = [], int(sizes.sum())
    beside = f", and {left_out:,} were left out" if left_out else ""
    if n != total:
        found.append(
            f"{n:,} {WORDS[split]} images, where ILSVRC 2012 has {total:,} ({n - total:+,}){beside}"
        )
    odd = np.flatnonzero((sizes < least) | (sizes > most)).tolist()
    if odd:
        usual = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        shown = some(f"{classes[k]} has {sizes[k]:,}" for k in odd)
        found.append(
            f"{len(odd):,} classes do not have {usual} {WORDS[split]} images{beside}: {shown}"
        )
    return found
