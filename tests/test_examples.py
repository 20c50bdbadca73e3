from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest
from PIL import Image

from raymem import Examples, load_examples
from raymem.data import draw_training, flip_labels
from raymem.errors import ExamplesError


def arrays(n=6, m=3, classes=2, shape=(4, 4, 1), seed=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (n + m, *shape), dtype=np.uint8)
    y = np.arange(n + m) % classes
    return {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}


def test_digits_come_in_one_fixed_order(digits):
    assert digits.x_train.shape == (1200, 8, 8, 1)
    assert digits.x_test.shape == (597, 8, 8, 1)
    assert digits.x_train.max() == 255
    assert set(digits.train_ids).isdisjoint(digits.test_ids)
    # The identity of the set: a change here makes every store of digits foreign.
    assert digits.fingerprint.startswith("ca20b11815b4062e")


def test_content_hashes_are_over_shape_and_pixels(digits):
    pixels = digits.x_train[0].tobytes()
    expected = hashlib.sha256(b"(8, 8, 1)" + pixels).hexdigest()[:32]
    assert digits.content_hashes[0] == expected


def test_everything_that_matters_moves_the_fingerprint():
    base = Examples(**arrays())
    assert Examples(**arrays(), name="other").fingerprint == base.fingerprint
    changed = []
    for key in ("x_train", "y_train", "x_test", "y_test"):
        data = arrays()
        data[key] = data[key].copy()
        data[key].flat[-1] ^= 1
        changed.append(Examples(**data).fingerprint)
    changed.append(Examples(**arrays(), train_ids=tuple("abcdef")).fingerprint)
    changed.append(Examples(**arrays(), classes=("cat", "dog")).fingerprint)
    backwards = {k: v[::-1] if k.endswith("train") else v for k, v in arrays().items()}
    changed.append(Examples(**backwards).fingerprint)
    assert len({base.fingerprint, *changed}) == 8


def test_duplicates_are_found_within_and_across_splits():
    data = arrays()
    data["x_train"][4] = data["x_train"][0]
    data["x_test"][1] = data["x_train"][1]
    examples = Examples(**data)
    assert [g.tolist() for g in examples.duplicate_groups()] == [[0, 4], [1, 7]]
    # 0 and 4 have label 0; train 1 and test 1 (row 7) have label 1.
    assert examples.label_conflicts() == []
    data["y_train"][4] = 1
    conflicted = Examples(**data)
    assert [g.tolist() for g in conflicted.label_conflicts()] == [[0, 4]]
    assert "train-00000 = train-00004" in conflicted.describe()
    groups = conflicted.index_table()["duplicate_group"].to_pylist()
    assert groups == [0, 1, None, None, 0, None, None, 1, None]


def test_grey_images_get_a_channel_and_floats_become_bytes():
    data = arrays()
    floats = {**data, "x_train": data["x_train"][..., 0] / 255.0}
    assert np.array_equal(Examples(**floats).x_train, data["x_train"])


def broken(**changes):
    return lambda: Examples(**{**arrays(), **changes})


def nan_images():
    x = arrays()["x_train"] / 255.0
    x[2, 1, 1] = np.nan
    return x


REFUSED = {
    "labels beyond the classes": (
        broken(y_train=np.array([0, 1, 0, 1, 5, 1]), classes=("a", "b")),
        "train-00004 has 5",
    ),
    "test label never trained": (broken(y_test=np.array([0, 1, 3])), "label 2, 3"),
    "negative label": (broken(y_test=np.array([0, -1, 1])), "test-00001 has -1"),
    "gap in labels": (broken(y_train=np.array([0, 2] * 3)), "no training example has label 1"),
    "soft labels": (broken(y_train=np.eye(6)), "soft or one-hot"),
    "float labels": (broken(y_train=np.array([0, 1, 0, 1, np.nan, 1])), "train-00004"),
    "missing label": (broken(y_train=np.array([0, 1, 0, 1, 0, None])), "train-00005"),
    "one class": (broken(y_train=np.zeros(6, int), y_test=np.zeros(3, int)), "only one class"),
    "NaN image": (broken(x_train=nan_images()), "NaN or infinite pixels: train-00002"),
    "normalized image": (broken(x_train=np.full((6, 4, 4, 1), 0.1234)), "not 8-bit"),
    "floats to 255": (broken(x_train=np.full((6, 4, 4, 1), 200.0)), r"outside \[0, 1\]"),
    "integers beyond 255": (broken(x_train=np.full((6, 4, 4, 1), 256)), "outside 0..255"),
    "channels first": (broken(x_train=np.zeros((6, 3, 8, 8), np.uint8)), "transpose"),
    "unequal lengths": (broken(y_train=np.array([0, 1])), "6 train images but 2 train labels"),
    "unequal shapes": (broken(x_test=np.zeros((3, 5, 5, 1), np.uint8)), "resize"),
    "empty test": (
        broken(x_test=np.zeros((0, 4, 4, 1), np.uint8), y_test=np.zeros(0, int)),
        "test set is empty",
    ),
    "repeated ids": (broken(train_ids=tuple("aabcde")), "repeated: a"),
    "id in both splits": (broken(train_ids=tuple("abcdef"), test_ids=tuple("xyf")), "f"),
    "too few ids": (broken(train_ids=("a",)), "6 train images but 1 train ids"),
    "ragged images": (broken(x_train=[np.zeros((2, 2)), np.zeros((3, 3))] * 3), "shapes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sets_are_refused_with_the_ids(case):
    make, message = REFUSED[case]
    with pytest.raises(ExamplesError, match=message):
        make()


def test_an_empty_class_is_legal_if_named():
    examples = Examples(**arrays(), classes=("a", "b", "never seen"))
    assert examples.n_classes == 3


def test_npz_round_trip(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays(), classes=["cat", "dog"], train_ids=list("abcdef"))
    examples = load_examples(tmp_path / "set.npz")
    assert examples.classes == ("cat", "dog")
    assert examples.train_ids == tuple("abcdef")
    assert np.array_equal(examples.x_train, arrays()["x_train"])


def test_bad_files_are_refused_with_the_way_out(tmp_path):
    np.savez(tmp_path / "part.npz", x_train=arrays()["x_train"])
    with pytest.raises(ExamplesError, match="not y_train, x_test, y_test"):
        load_examples(tmp_path / "part.npz")
    np.savez(tmp_path / "pickle.npz", **{**arrays(), "y_train": np.array([{}] * 6)})
    with pytest.raises(ExamplesError, match="without object arrays"):
        load_examples(tmp_path / "pickle.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ExamplesError, match="cannot be read"):
        load_examples(tmp_path / "torn.npz")
    with pytest.raises(ExamplesError, match="no file"):
        load_examples(tmp_path / "absent.npz")
    with pytest.raises(ExamplesError, match="give one of digits, mnist"):
        load_examples("imaginary")
    with pytest.raises(ExamplesError, match="add --download"):
        load_examples("cifar10", data_root=tmp_path)


def picture(path, seed, size=(6, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folders_with_train_and_test(tmp_path):
    kept = picture(tmp_path / "train/cat/b.png", 1)
    for n, name in enumerate(("train/cat/a.png", "train/dog/c.png", "val/dog/d.png")):
        picture(tmp_path / name, 2 + n)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    examples = load_examples(tmp_path)
    assert examples.train_ids == ("train/cat/a.png", "train/cat/b.png", "train/dog/c.png")
    assert examples.test_ids == ("val/dog/d.png",)
    assert examples.classes == ("cat", "dog")
    assert np.array_equal(examples.x_train[1], kept)
    assert examples.y_test.tolist() == [1]


def test_flat_folders_hold_out_one_in_five_for_ever(tmp_path):
    for name in ("cat", "dog"):
        for n in range(10):
            picture(tmp_path / name / f"{n}.png", hash((name, n)) % 1000, mode="L")
    examples = load_examples(tmp_path)
    assert (len(examples.train_ids), len(examples.test_ids)) == (16, 4)
    assert examples.image_shape == (6, 6, 1)
    (tmp_path / "dog" / "10.png").write_bytes((tmp_path / "dog" / "9.png").read_bytes())
    assert set(load_examples(tmp_path).test_ids) >= {i for i in examples.test_ids if "cat" in i}


def test_bad_folders_are_refused_by_name(tmp_path):
    for n, split in enumerate(("train", "test")):
        picture(tmp_path / split / "cat" / "a.png", n)
        picture(tmp_path / split / "dog" / "a.png", 9 + n)
    torn = tmp_path / "train/dog/torn.jpg"
    torn.write_bytes(b"\xff\xd8\xff torn")
    with pytest.raises(ExamplesError, match=r"train/dog/torn\.jpg"):
        load_examples(tmp_path)
    torn.unlink()
    picture(tmp_path / "train/dog/large.png", 5, size=(9, 7))
    with pytest.raises(ExamplesError, match="--image-size"):
        load_examples(tmp_path)
    assert load_examples(tmp_path, image_size=5).image_shape == (5, 5, 3)
    picture(tmp_path / "test/horse/a.png", 6)
    with pytest.raises(ExamplesError, match="classes that train has not: horse"):
        load_examples(tmp_path, image_size=5)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(ExamplesError, match="empty"):
        load_examples(tmp_path, image_size=5)


def test_images_of_more_than_eight_bits_are_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "a.png", 1)
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(tmp_path / "train/cat/deep.png")
    with pytest.raises(ExamplesError, match=r"deep\.png.*more than 8 bits"):
        load_examples(tmp_path)


def test_a_draw_of_training_examples_is_the_same_again_and_part_of_a_larger_one(digits):
    few, more = draw_training(digits, 100), draw_training(digits, 300)
    assert set(few.train_ids) < set(more.train_ids) < set(digits.train_ids)
    assert few.fingerprint == draw_training(digits, 100).fingerprint
    assert few.test_ids == digits.test_ids
    rows = [digits.train_ids.index(example_id) for example_id in few.train_ids]
    assert rows == sorted(rows)
    assert np.array_equal(few.x_train, digits.x_train[rows])
    flipped = draw_training(flip_labels(digits, 0.1), 300)
    wrong = flipped.y_train != more.y_train
    assert flipped.planted == tuple(np.flatnonzero(wrong))
    assert 10 < wrong.sum() < 60
    with pytest.raises(ExamplesError, match="there are 1,200"):
        draw_training(digits, 1201)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist_is_read_from_its_published_files(tmp_path, folder, zipped):
    """As torchvision unpacks them, and as Debian's package has them."""
    raw = tmp_path / folder
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for prefix in ("train", "t10k"):
        images = struct.pack(">IIII", 2051, 20, 28, 28) + pixels.tobytes()
        packed_labels = struct.pack(">II", 2049, 20) + labels.tobytes()
        for name, data in (("images-idx3", images), ("labels-idx1", packed_labels)):
            if not zipped or folder == "FashionMNIST/raw":
                (raw / f"{prefix}-{name}-ubyte").write_bytes(data)
            if zipped:
                (raw / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    examples = load_examples("fashion-mnist", data_root=tmp_path)
    assert np.array_equal(examples.x_train[..., 0], pixels)
    assert examples.classes[0] == "T-shirt/top"


def test_published_files_that_are_not_whole_are_named(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    with pytest.raises(ExamplesError, match="has no train-images-idx3-ubyte or"):
        load_examples("mnist", data_root=tmp_path)
    whole = gzip.compress(struct.pack(">IIII", 2051, 2, 4, 4) + bytes(32))
    for data in (whole[:-9], whole[:12], gzip.compress(b"abc"), gzip.compress(whole)):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(data)
        with pytest.raises(ExamplesError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load_examples("mnist", data_root=tmp_path)
