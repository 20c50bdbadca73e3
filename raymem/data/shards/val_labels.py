"""Labels of validation images that lie in one flat folder, from the maps that come with ILSVRC.

LOC_val_solution.csv            ImageId,PredictionString: the class is the latter's first word
lines of NAME CLASS             a class number from 0, or the class's name
lines of CLASS                  line k is image k
..._ground_truth.txt            lines of ILSVRC ids 1..1000; meta.mat beside it knows the class
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Mapping, Sequence

import fsspec
from fsspec import AbstractFileSystem

from raymem.data.array_checks import some
from raymem.data.pixels import example_id
from raymem.errors import ExamplesError, first_line

# Names of files that are tried beside a set, in this order.
NAMES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_synset_labels.txt",
    "val_labels.txt",
    "val_annotations.txt",
    "val.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_labels(
    url: str, images: Sequence[str], classes: Sequence[str]
) -> tuple[list[int | None], bytes]:
    """The class number of each image by the map at `url`, None where it has none; and its bytes.

    `images` are paths, sorted. Raises ExamplesError if the map cannot be understood.
    """
    fs, path = fsspec.core.url_to_fs(url)
    try:
        data: bytes = fs.cat_file(path)
        lines = [line.replace(",", " ").split() for line in data.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExamplesError(
            f"the validation labels {url} cannot be read ({first_line(error)}); give --val-labels "
            "a text file"
        ) from error
    if lines and lines[0] and lines[0][0].lower() == "imageid":
        lines = lines[1:]
    while lines and not lines[-1]:
        lines.pop()
    lengths = {min(len(line), 2) for line in lines}
    if lengths == {2}:
        return _by_name(url, lines, images, _Classes(url, classes)), data
    if lengths == {1}:
        words = [line[0] for line in lines]
        return _by_position(fs, path, url, words, images, classes), data
    raise ExamplesError(
        f"{url} is no map of validation labels: its lines should be `IMAGE CLASS`, or all a class"
    )


class _Classes:
    """Class numbers by the names in maps."""

    def __init__(self, url: str, classes: Sequence[str]) -> None:
        self.url, self.n = url, len(classes)
        self.numbers = {name: number for number, name in enumerate(classes)}

    def __getitem__(self, word: str) -> int:
        if word in self.numbers:
            return self.numbers[word]
        if word.isdigit() and int(word) < self.n:
            return int(word)
        raise ExamplesError(
            f"{self.url} has the class {word}, which is none of the {self.n} of the training set, "
            f"such as {some(list(self.numbers)[:3])}; give the map that belongs to this set"
        )


def _key(image: str) -> str:
    return posixpath.splitext(example_id(posixpath.basename(image)))[0]


def _by_name(
    url: str, lines: Sequence[Sequence[str]], images: Sequence[str], classes: _Classes
) -> list[int | None]:
    labels: dict[str, int] = {}
    for line in lines:
        key, label = _key(line[0]), classes[line[1]]
        if labels.setdefault(key, label) != label:
            raise ExamplesError(f"{url} gives {line[0]} two classes; repair it")
    found = [labels.get(_key(image)) for image in images]
    if found and all(label is None for label in found):
        raise ExamplesError(
            f"{url} names none of the validation images, such as {images[0]}, but {lines[0][0]}; "
            "give the map that belongs to this set"
        )
    return found


def _by_position(
    fs: AbstractFileSystem,
    path: str,
    url: str,
    words: Sequence[str],
    images: Sequence[str],
    classes: Sequence[str],
) -> list[int | None]:
    known = _Classes(url, classes)
    if all(word.isdigit() for word in words) and not set(words) <= set(classes):
        by_id = _synsets(fs, path, url)
        strange = [word for word in words if int(word) not in by_id]
        if strange:
            raise ExamplesError(f"{url} has the ids {some(strange)}, which meta.mat has not")
        words = [by_id[int(word)] for word in words]
    matches = [NUMBERED.match(posixpath.basename(image)) for image in images]
    if all(matches):
        numbers = [int(match[1]) for match in matches if match]
    elif len(images) == len(words):
        numbers = list(range(1, len(images) + 1))
    else:
        raise ExamplesError(
            f"{url} has {len(words):,} lines and there are {len(images):,} validation images; give "
            "a map with lines `IMAGE CLASS`"
        )
    return [known[words[k - 1]] if 0 < k <= len(words) else None for k in numbers]


def _synsets(fs: AbstractFileSystem, path: str, url: str) -> Mapping[int, str]:
    """ILSVRC id -> WordNet id, from meta.mat in the folder of `path`."""
    from scipy.io import loadmat

    at = f"{posixpath.dirname(path)}/meta.mat"
    try:
        synsets = loadmat(io.BytesIO(fs.cat_file(at)), squeeze_me=True)["synsets"]
        return {
            int(number): str(wnid)
            for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except FileNotFoundError as error:
        raise ExamplesError(
            f"{url} has ILSVRC ids, and there is no meta.mat beside it to say which classes they "
            "are; put the devkit's meta.mat there"
        ) from error
    except Exception as error:  # scipy raises many kinds for other files
        raise ExamplesError(
            f"{at} cannot be read ({first_line(error)}); take the devkit's meta.mat"
        ) from error
