"""Readers: a name, an .npz file or a folder of images -> Examples."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymem.data.array_checks import arrays_of_npz, some
from raymem.data.cache import CachedExamples, holds_cache
from raymem.data.examples import Examples
from raymem.data.pixels import IMAGE_SUFFIXES, example_id, fit, open_image
from raymem.errors import ExamplesError

NAMED = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100")
IDX = ("mnist", "fashion-mnist")
IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
UNSIGNED_BYTES = b"\x00\x00\x08"
TEST_FOLDERS = ("test", "val", "valid", "validation")


def load_examples(
    data: str | Path,
    *,
    data_root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
) -> Examples:
    """A set by name, `.npz` path, class-per-folder path, or the URL of a cache (`raymem ingest`).

    `data_root` is where torchvision's readers look for named sets, `download` lets them fetch one;
    MNIST's and Fashion-MNIST's published files are also read as they are, from DATA_ROOT/NAME (as
    Debian's package dataset-fashion-mnist has them in /usr/share/datasets).
    `image_size` resizes folder images (short side, antialiased, then centre square). Of a cache,
    pixels are fetched when they are first asked for.

    Folders are ROOT/train/CLASS/* with ROOT/test/CLASS/* (or val), or ROOT/CLASS/* where one in
    five images of each class, chosen by a hash of its path, is held out as test.

    Raises ExamplesError with the way out if there is no such set.

    >>> load_examples("digits").describe()
    'digits: 1,200 train and 597 test images, 8x8x1, 10 classes'
    """
    if str(data) == "digits":
        return dataclasses.replace(_digits(), source="digits")
    if str(data) in NAMED:
        named = _torchvision(str(data), Path(data_root), download)
        return dataclasses.replace(named, source=str(data))
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        return dataclasses.replace(_npz(path), source=str(path.absolute()))
    if holds_cache(data):
        return _cached(str(data), image_size)
    if path.is_dir():
        return dataclasses.replace(_folders(path, image_size), source=str(path.absolute()))
    raise ExamplesError(
        f"no data set at {str(data)!r}; give one of {', '.join(NAMED)}, an .npz file with x_train, "
        "y_train, x_test, y_test, a folder with one folder per class, or a cache of `raymem ingest`"
    )


def draw_training(examples: Examples, n: int) -> Examples:
    """The set with `n` of its training examples, and all test examples.

    Which follows from their ids alone: the same in every run, and all of them are in a larger draw.

    Raises ExamplesError if there are fewer, and for sets in a cache, which every node reads whole.

    >>> draw_training(load_examples("digits"), 300).describe()
    'digits, 300 of 1,200 training examples: 300 train and 597 test images, 8x8x1, 10 classes'
    """
    N = len(examples.train_ids)
    if not 1 <= n <= N:
        raise ExamplesError(f"{n:,} training examples were asked for, and there are {N:,}")
    if isinstance(examples, CachedExamples):
        raise ExamplesError(
            "a cache is trained on whole; ingest fewer images into another cache instead"
        )
    keys = [hashlib.sha256(f"raymem draw {i}".encode()).digest() for i in examples.train_ids]
    rows = np.sort(sorted(range(N), key=keys.__getitem__)[:n])
    place = {int(row): k for k, row in enumerate(rows)}
    return dataclasses.replace(
        examples,
        x_train=examples.x_train[rows],
        y_train=examples.y_train[rows],
        train_ids=tuple(examples.train_ids[row] for row in rows),
        planted=tuple(place[row] for row in examples.planted if row in place),
        name=f"{examples.name}, {n:,} of {N:,} training examples",
        source="",
    )


def _cached(url: str, image_size: int | None) -> CachedExamples:
    examples = CachedExamples(url)
    H, W, _ = examples.image_shape
    if image_size is not None and (image_size, image_size) != (H, W):
        raise ExamplesError(
            f"the images of the cache at {url} are {H}x{W}; ingest the set again into another "
            f"cache with --size {image_size}, or leave --image-size away"
        )
    return examples


def _digits() -> Examples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Intensities are 0..16; the file is sorted by writer, so the split is drawn, by a fixed hash.
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)
    key = [hashlib.sha256(f"raymem digits {row}".encode()).digest() for row in range(len(x))]
    order = sorted(range(len(x)), key=key.__getitem__)
    train, test = np.sort(order[:1200]), np.sort(order[1200:])
    return Examples(
        x_train=x[train],
        y_train=digits.target[train].astype(np.int64),
        x_test=x[test],
        y_test=digits.target[test].astype(np.int64),
        train_ids=tuple(f"digit-{row:04d}" for row in train),
        test_ids=tuple(f"digit-{row:04d}" for row in test),
        name="digits",
    )


def _torchvision(name: str, root: Path, download: bool) -> Examples:
    from torchvision import datasets

    reader, folder = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }[name]
    if name in IDX and (root / name).is_dir() and not (root / folder).exists():
        return _idx(name, root / name, tuple(reader.classes))
    try:
        train, test = (reader(str(root), train=t, download=download) for t in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, downloads raise many kinds
        raise ExamplesError(
            f"{name} is not in {root} ({error}); add --download, or put torchvision's files into "
            f"{root / folder}, or point --data-root at a folder that has {folder}"
        ) from error
    return Examples(
        x_train=np.asarray(train.data),
        y_train=np.asarray(train.targets, dtype=np.int64),
        x_test=np.asarray(test.data),
        y_test=np.asarray(test.targets, dtype=np.int64),
        classes=tuple(train.classes),
        name=name,
    )


def _idx(name: str, folder: Path, classes: tuple[str, ...]) -> Examples:
    """MNIST's file format (LeCun): two zero bytes, type, number of axes, their lengths, values."""
    arrays = []
    for stem in IDX_FILES:
        path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.exists()), None)
        if path is None:
            raise ExamplesError(
                f"{folder} has no {stem} or {stem}.gz; put the four published files of {name} there"
            )
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
            axes = data[3]
            shape = np.frombuffer(data, ">i4", axes, offset=4)
            if data[:3] != UNSIGNED_BYTES:
                raise ValueError("not an IDX file of unsigned bytes")
            arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape))
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
            raise ExamplesError(
                f"{path} cannot be read ({error}); restore it from a copy"
            ) from error
    x_train, y_train, x_test, y_test = arrays
    return Examples(
        x_train=x_train,
        y_train=y_train.astype(np.int64),
        x_test=x_test,
        y_test=y_test.astype(np.int64),
        classes=classes,
        name=name,
    )


def _npz(path: Path) -> Examples:
    needed = ("x_train", "y_train", "x_test", "y_test")
    arrays = arrays_of_npz(path, ExamplesError)
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise ExamplesError(
            f"{path} has {', '.join(arrays) or 'no arrays'}, but not {', '.join(missing)}; "
            f"an image set is an .npz with {', '.join(needed)}, and classes, train_ids, test_ids "
            "if you like"
        )
    names = {key: tuple(arrays.get(key, ())) for key in ("classes", "train_ids", "test_ids")}
    return Examples(
        x_train=arrays["x_train"],
        y_train=arrays["y_train"],
        x_test=arrays["x_test"],
        y_test=arrays["y_test"],
        classes=names["classes"],
        train_ids=names["train_ids"],
        test_ids=names["test_ids"],
        name=path.stem,
    )


def _folders(root: Path, image_size: int | None) -> Examples:
    if (root / "train").is_dir():
        held_out = [root / folder for folder in TEST_FOLDERS if (root / folder).is_dir()]
        if len(held_out) != 1:
            raise ExamplesError(
                f"{root} has train/ and {len(held_out)} of {', '.join(TEST_FOLDERS)}; keep one"
            )
        train, test = _list_classes(root / "train"), _list_classes(held_out[0])
    else:
        train, test = _hold_out(_list_classes(root), root)
    classes = tuple(sorted(train))
    unknown = sorted(set(test) - set(classes))
    if unknown:
        raise ExamplesError(f"test has classes that train has not: {some(unknown)}")
    read = functools.partial(_read_folder_split, root=root, classes=classes, image_size=image_size)
    grey = all(_is_grey(p) for files in (*train.values(), *test.values()) for p in files)
    x_train, y_train, train_ids = read(train, grey=grey)
    x_test, y_test, test_ids = read(test, grey=grey)
    return Examples(
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=classes,
        train_ids=train_ids,
        test_ids=test_ids,
        name=root.name,
    )


def _list_classes(root: Path) -> dict[str, list[Path]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {
        folder.name: sorted(
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        for folder in folders
    }
    empty = [name for name, paths in files.items() if not paths]
    if not files or empty:
        what = f"its folders {some(empty)} have none" if files else "it has no folders"
        raise ExamplesError(f"{root} should have one folder of images per class, but {what}")
    return files


def _hold_out(
    files: Mapping[str, list[Path]], root: Path
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for name, paths in files.items():

        def key(path: Path) -> bytes:
            return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

        held = set(sorted(paths, key=key)[: len(paths) // 5])
        train[name] = [p for p in paths if p not in held]
        test[name] = [p for p in paths if p in held]
    return train, test


def _is_grey(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L")
    except Exception:  # named with the other unreadable images when pixels are read
        return True


def _read_folder_split(
    files: Mapping[str, list[Path]],
    *,
    root: Path,
    classes: Sequence[str],
    image_size: int | None,
    grey: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    paths = [(p, label) for label, name in enumerate(classes) for p in files.get(name, ())]
    if not paths:
        raise ExamplesError(f"{root} leaves an empty split; add images, or a test/ folder")
    images, unreadable = [], []
    for path, _ in paths:
        try:
            images.append(_read_image(path, image_size, grey))
        except Exception as error:  # Pillow raises many kinds; the file's name is what matters
            unreadable.append(f"{path.relative_to(root)} ({error})")
    if unreadable:
        raise ExamplesError(
            f"{len(unreadable)} of {len(paths)} images cannot be read: {some(unreadable)}; "
            "repair or remove them"
        )
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        odd = [
            f"{p.relative_to(root)} {i.shape[:2]}" for (p, _), i in zip(paths, images, strict=True)
        ]
        raise ExamplesError(
            f"images have {len(sizes)} different sizes, as {some(odd)}; give --image-size"
        )
    ids = tuple(example_id(p.relative_to(root).as_posix()) for p, _ in paths)
    return np.stack(images), np.array([label for _, label in paths], np.int64), ids


def _read_image(path: Path, image_size: int | None, grey: bool) -> NDArray[np.uint8]:
    image = open_image(path, grey=grey)
    if image_size is not None:
        image = fit(image, (image_size, image_size))
    pixels: NDArray[np.uint8] = np.asarray(image, np.uint8)
    return pixels
