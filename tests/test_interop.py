"""Fleets trained elsewhere become stores; what cannot be checked is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference

from raymem import Store, import_npz, score, verify
from raymem.errors import ImportFileError, PlanError, StudyMismatchError

T, N, M = 40, 30, 8


def arrays(**more):
    generator = np.random.default_rng(1)
    masks = generator.random((T, N)) < 0.6
    correct = masks | (generator.random((T, N)) < 0.4)
    test = generator.random((T, M)) < 0.5
    test[:, 3] = masks[:, 7]
    return {"masks": masks, "correct_train": correct, "correct_test": test, **more}


def write(folder, **changes):
    data = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
    np.savez(folder / "fleet.npz", **data)
    return folder / "fleet.npz"


def test_masks_and_correctness_become_a_store_that_scores(tmp_path):
    y = np.arange(N) % 3
    path = write(
        tmp_path, y_train=y, y_test=np.arange(M) % 3, train_ids=[f"img{i}" for i in range(N)]
    )
    store = import_npz(path, tmp_path / "store")
    (summary,) = score(store)
    data = arrays()
    expected = reference.memorization(data["masks"].tolist(), data["correct_train"].tolist())
    rows = store.scores().to_pylist()
    assert [row["memorization"] for row in rows[:N]] == pytest.approx(expected)
    assert rows[4]["example_id"] == "img4"
    assert [row["label"] for row in rows[:N]] == y.tolist()
    for name in ("memorization_soft", "loss_in", "p_true_out", "cumulative_loss", "learning_epoch",
                 "forgetting_count"):  # fmt: skip
        assert {row[name] for row in rows} == {None}, name
    assert summary.trials == T
    first = store.scores("influence").to_pylist()[0]
    assert (first["train_id"], first["test_id"]) == ("img7", "test-00003")
    assert first["influence"] == 1
    assert verify(store) == []
    # Again: nothing is added, nothing is refused.
    assert import_npz(path, tmp_path / "store").done() == store.done()
    with pytest.raises(PlanError, match="cannot grow"):
        store.plan().mask(0)


def test_margins_give_soft_memorization(tmp_path):
    data = arrays()
    generator = np.random.default_rng(2)
    margins = {
        f"margins_{s}": np.where(data[f"correct_{s}"], 1, -1)
        * generator.uniform(0.1, 3, data[f"correct_{s}"].shape)
        for s in ("train", "test")
    }
    store = import_npz(write(tmp_path, **margins), tmp_path / "store")
    score(store)
    p = 1 / (1 + np.exp(-margins["margins_train"]))
    expected = reference.memorization(data["masks"].tolist(), p.tolist())
    found = store.scores()["memorization_soft"].to_pylist()[:N]
    assert found == pytest.approx(expected, abs=1e-6)


def test_without_test_examples_and_labels(tmp_path):
    store = import_npz(write(tmp_path, correct_test=None), tmp_path / "store")
    score(store)
    assert store.scores().num_rows == N
    assert store.scores()["label"].null_count == N
    assert store.scores("influence").num_rows == 0
    assert Store(tmp_path / "store").target.trials == T


WRONG = {
    "lacks masks": {"masks": None},
    "has extra": {"extra": np.zeros(3)},
    "correct_train is": {"correct_train": np.zeros((T, N - 1), bool)},
    "correct_test is": {"correct_test": np.zeros((T - 1, M), bool)},
    "true or false": {"masks": np.full((T, N), 2)},
    "must be": {"masks": np.zeros(N, bool)},
    "y_train is": {"y_train": np.zeros(N - 1, int)},
    "class numbers from 0": {"y_train": np.full(N, -1)},
    "class numbers": {"y_train": np.zeros(N)},
    "repeated: a": {"train_ids": np.array(["a"] * N)},
    "give margins_train and margins_test": {"margins_train": np.zeros((T, N))},
    "is above 0 where": {
        "margins_train": np.full((T, N), 9.0),
        "margins_test": np.zeros((T, M)),
    },
    "must be numbers": {
        "margins_train": np.full((T, N), "a"),
        "margins_test": np.full((T, M), "a"),
    },
    "list of names": {"classes": np.array("one")},
    "printable": {"train_ids": np.array([f"a\n{i}" for i in range(N)])},
    "all false": {"masks": np.zeros((T, N), bool)},
    "class numbers from": {"y_train": np.full(N, 2**63, np.uint64)},
    "too low": {
        "margins_train": np.full((T, N), -9.0),
        "margins_test": np.full((T, M), -9.0),
        "classes": np.array(["a", "b"]),
    },
    "not finite": {"margins_train": np.full((T, N), np.nan), "margins_test": np.zeros((T, M))},
    "names 1 classes": {"classes": np.array(["one"]), "y_train": np.arange(N) % 3},
    "no fleet": {
        "masks": np.zeros((0, N), bool),
        "correct_train": np.zeros((0, N), bool),
        "correct_test": None,
    },
}


@pytest.mark.parametrize(("message", "changes"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_right_is_refused(tmp_path, message, changes):
    with pytest.raises(ImportFileError, match=message):
        import_npz(write(tmp_path, **changes), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_pickles_truncated_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "pickle.npz", masks=np.array([{}], object), allow_pickle=True)
    whole = write(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("pickle", "cut", "missing"):
        with pytest.raises(ImportFileError, match=r"cannot be read|no file|safe to read"):
            import_npz(tmp_path / f"{name}.npz", tmp_path / "store")


def test_another_fleet_does_not_mix_into_a_store(tmp_path):
    import_npz(write(tmp_path), tmp_path / "store")
    other = arrays()["correct_train"].copy()
    other[0, 0] ^= True
    with pytest.raises(StudyMismatchError, match="another study"):
        import_npz(write(tmp_path, correct_train=other), tmp_path / "store")
    assert len(Store(tmp_path / "store").done()) == T
    assert math.isinf(next(iter(Store(tmp_path / "store").done())).epsilon)
