"""Other people's formats: in and out again, checked orders, and files that are not trusted."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from raymem import (
    Examples,
    Store,
    export,
    import_fleet,
    import_npz,
    import_scores,
    memorization,
    score,
)
from raymem.cli import main
from raymem.errors import ImportFileError
from raymem.interop import layouts
from raymem.interop.safe import array_of
from raymem.links import correlations_across, find_links
from raymem.show import write_report
from raymem.show.terminal_status import describe_store
from raymem.store import verify

T, N, M, K = 30, 24, 9, 3


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    return Examples(
        name="small",
        x_train=rng.integers(0, 256, (N, 4, 4, 1), np.uint8),
        y_train=np.arange(N) % K,
        x_test=rng.integers(0, 256, (M, 4, 4, 1), np.uint8),
        y_test=np.arange(M) % K,
        train_ids=[f"pic/{k}.png" for k in range(N)],
        test_ids=[f"test/{k}.png" for k in range(M)],
    )


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    masks = rng.random((T, N)) < 0.7
    margins = rng.normal(np.where(masks, 4, 0), 1).astype(np.float32)
    test = rng.normal(1, 1, (T, M)).astype(np.float32)
    return {
        "masks": masks, "correct_train": margins > 0, "correct_test": test > 0,
        "margins_train": margins, "margins_test": test,
        "y_train": np.arange(N) % K, "y_test": np.arange(M) % K,
    }  # fmt: skip


@pytest.fixture(scope="module")
def fleet(arrays, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    np.savez(folder / "fleet.npz", **arrays)
    store = import_fleet("npz", folder / "fleet.npz", folder / "store", data=data)
    score(store)
    return store


def mem(store):
    table = store.scores()
    return dict(
        zip(table["example_id"].to_pylist(), table["memorization"].to_pylist(), strict=True)
    )


def same(one, other):
    ours, theirs = mem(one), mem(other)
    assert ours == theirs
    assert sum(value is not None for value in ours.values()) == N


def test_rows_get_the_sets_ids_and_hashes(fleet, arrays, data):
    index = fleet.examples()
    assert index["example_id"].to_pylist() == [*data.train_ids, *data.test_ids]
    assert index["content_hash"].to_pylist() == list(data.content_hashes)
    expected = memorization(arrays["masks"], arrays["correct_train"]).value
    assert [mem(fleet)[name] for name in data.train_ids] == pytest.approx(list(expected))
    assert verify(fleet) == []


def test_npz_goes_out_and_comes_back_with_everything(fleet, tmp_path):
    path = export("npz", fleet.url, tmp_path / "out.npz")
    again = import_npz(path, tmp_path / "again")
    score(again)
    same(fleet, again)
    one, two = (s.trial(sorted(s.done())[3]) for s in (fleet, again))
    assert one.equals(two)


def test_runs_of_feldman_and_zhang_go_out_and_come_back(fleet, data, tmp_path):
    path = export("fz", fleet.url, tmp_path / "fz")
    assert len(list(path.rglob("aux_arrays.npz"))) == T
    plain = import_fleet("fz", path, tmp_path / "plain")
    score(plain)
    by_row = [v for v in mem(plain).values() if v is not None]
    assert by_row == [mem(fleet)[name] for name in data.train_ids]
    # Nothing in it says which row is which: with a data set, ids are asked for.
    with pytest.raises(ImportFileError, match="nothing says which row is which train example"):
        import_fleet("fz", path, tmp_path / "no", data=data)
    # Another order, told by file names or by hashes, is undone.
    rng = np.random.default_rng(1)
    for name, ids, tests in (
        ("names", data.train_ids, data.test_ids),
        ("hashes", data.content_hashes[:N], data.content_hashes[N:]),
    ):
        order, test_order = rng.permutation(N), rng.permutation(M)
        for file in path.rglob("aux_arrays.npz"):
            with np.load(file) as loaded:
                a = dict(loaded)
            for part in ("train", "removed"):
                a[f"index_{part}"] = np.argsort(order)[a[f"index_{part}"]]
            a["index_test"] = np.argsort(test_order)[a["index_test"]]
            del a["subsample_idx"]
            copy = tmp_path / name / file.relative_to(path)
            copy.parent.mkdir(parents=True)
            np.savez(copy, **a)
        (tmp_path / f"{name}.txt").write_text("\n".join(np.array(ids)[order]))
        np.save(tmp_path / f"{name}.npy", np.array(tests)[test_order])
        joined = import_fleet(
            "fz", tmp_path / name, tmp_path / f"{name}-store", data=data,
            ids=tmp_path / f"{name}.txt", test_ids=tmp_path / f"{name}.npy",
        )  # fmt: skip
        score(joined)
        same(fleet, joined)


def test_damaged_runs_are_refused(fleet, tmp_path):
    path = export("fz", fleet.url, tmp_path / "fz")
    first = min(path.rglob("aux_arrays.npz"))
    whole = dict(np.load(first))
    for change, says in (
        ({"index_train": whole["index_train"][1:]}, "not each of"),
        ({"correctness_train": whole["correctness_train"] * 2}, "must be 0 or 1"),
        ({"subsample_idx": whole["index_removed"]}, "which was trained on"),
        ({"index_test": whole["index_test"] + 1}, "index_test is not"),
    ):
        np.savez(first, **{**whole, **change})
        with pytest.raises(ImportFileError, match=says):
            import_fleet("fz", path, tmp_path / "store")
    del whole["index_test"]
    np.savez(first, **whole)
    with pytest.raises(ImportFileError, match="lacks index_test"):
        import_fleet("fz", path, tmp_path / "store")
    (path / "0.3" / "run").mkdir(parents=True)
    os.rename(first, path / "0.3" / "run" / "aux_arrays.npz")
    with pytest.raises(ImportFileError, match="2 subset ratios"):
        import_fleet("fz", path, tmp_path / "store")


def lira_folder(tmp_path, arrays, labels):
    rng = np.random.default_rng(2)
    for t in range(T):
        logits = rng.normal(0, 1, (N, 2, K))
        logits[np.arange(N), :, labels] += 4 * arrays["masks"][t][:, None]
        z = logits[:, 0]
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        own = p[np.arange(N), labels]
        folder = tmp_path / f"exp-{t}"
        folder.mkdir()
        np.save(folder / "keep.npy", arrays["masks"][t])
        np.save(folder / "logits.npy", logits.astype(np.float32))
        both = np.stack([np.log(own) - np.log(1 - own + 1e-45)] * 2, 1)
        np.save(folder / "scores.npy", both)
    return logits


def test_lira_folders_and_their_labels(arrays, data, tmp_path):
    source = tmp_path / "lira"
    source.mkdir()
    last = lira_folder(source, arrays, data.y_train)
    store = import_fleet("lira", source, tmp_path / "store", data=data)
    score(store)
    right = store.trial(max(store.done()))["correct"].to_numpy()
    assert (right == (last[:, 0].argmax(1) == data.y_train)).all()
    margin = store.trial(max(store.done()))["margin"].to_numpy()
    assert margin == pytest.approx(np.load(source / f"exp-{T - 1}" / "scores.npy")[:, 0], abs=1e-3)
    wrong = Examples(**{**vars_of(data), "y_train": np.roll(data.y_train, 1)})
    with pytest.raises(ImportFileError, match="the order of the labels is another one"):
        import_fleet("lira", source, tmp_path / "no", data=wrong)
    with pytest.raises(ImportFileError, match=r"no y_train\.npy; give --data, or --labels"):
        import_fleet("lira", source, tmp_path / "no")
    np.save(tmp_path / "labels.npy", data.y_train)
    by_labels = import_fleet("lira", source, tmp_path / "by", labels=tmp_path / "labels.npy")
    score(by_labels)
    assert list(mem(by_labels).values()) == [mem(store)[n] for n in data.train_ids]
    out = export("lira", store.url, tmp_path / "out")
    assert (np.load(out / "y_train.npy") == data.y_train).all()
    again = import_fleet("lira", out, tmp_path / "again")
    score(again)
    assert list(mem(again).values()) == list(mem(by_labels).values())


def test_lira_labels_that_nothing_checks_are_not_assumed(arrays, data, tmp_path):
    source = tmp_path / "lira"
    source.mkdir()
    lira_folder(source, arrays, data.y_train)
    plain = {"data": data}
    # The labels beside the models are theirs, and must be those of the set, row by row.
    np.save(source / "y_train.npy", data.y_train)
    ours = import_fleet("lira", source, tmp_path / "ours", **plain)
    score(ours)
    assert list(mem(ours)) == list(data.train_ids)
    other = Examples(**{**vars_of(data), "y_train": np.roll(data.y_train, 1)})
    with pytest.raises(ImportFileError, match="labels are not those of"):
        import_fleet("lira", source, tmp_path / "no", data=other)
    os.remove(source / "y_train.npy")
    assert len(import_fleet("lira", source, tmp_path / "by-scores", **plain).done()) == T
    # Without scores the logits fit any labels; without logits nothing says what they are.
    os.remove(source / "exp-3" / "scores.npy")
    with pytest.raises(ImportFileError, match="nothing says which row is which"):
        import_fleet("lira", source, tmp_path / "no", **plain)
    for folder in source.iterdir():
        np.save(folder / "correct.npy", arrays["correct_train"][int(folder.name[4:])])
        os.remove(folder / "logits.npy")
    with pytest.raises(ImportFileError, match="nothing says which row is which"):
        import_fleet("lira", source, tmp_path / "no", **plain)
    assert len(import_fleet("lira", source, tmp_path / "numbered").done()) == T


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("keep", lambda a: np.where(np.arange(len(a)) == 3, np.nan, a), "keep.npy must be true or"),
        ("correct", lambda a: a + 0.5, "correct.npy must be true or false"),
        ("correct", lambda a: a[:-1], "correct.npy has"),
        ("keep", lambda a: a[:-1], "differ in size"),
        ("scores", lambda a: a[:-1], "scores.npy has"),
        ("keep", None, "exp-2 has no keep.npy"),
    ],
)
def test_damaged_lira_folders_are_refused(arrays, data, tmp_path, name, change, says):
    lira_folder(tmp_path, arrays, data.y_train)
    for t in range(T):
        os.remove(tmp_path / f"exp-{t}" / "logits.npy")
        np.save(tmp_path / f"exp-{t}" / "correct.npy", arrays["correct_train"][t])
    path = tmp_path / "exp-2" / f"{name}.npy"
    array = np.load(path)
    os.remove(path)
    if change is not None:
        np.save(path, change(array))
    with pytest.raises(ImportFileError, match=says):
        import_fleet("lira", tmp_path, tmp_path / "store")


def vars_of(data):
    return {
        name: getattr(data, name)
        for name in ("name", "x_train", "y_train", "x_test", "y_test", "train_ids", "test_ids")
    }


def test_datamodels_take_outcomes_of_completed_models(arrays, tmp_path):
    done = np.arange(T) != 4
    margins = np.where(arrays["correct_train"], 1.5, -0.5).astype(np.float16)
    margins[4] = np.nan
    np.save(tmp_path / "masks.npy", arrays["masks"])
    np.save(tmp_path / "_completed.npy", done)
    with pytest.raises(ImportFileError, match=r"no train_margins\.npy: memorization"):
        import_fleet("datamodels", tmp_path, tmp_path / "store")
    np.save(tmp_path / "train_margins.npy", margins)
    np.save(tmp_path / "test_margins.npy", np.where(arrays["correct_test"], 1, -1))
    store = import_fleet("datamodels", tmp_path, tmp_path / "store")
    assert len(store.done()) == T - 1
    score(store)
    expected = memorization(arrays["masks"][done], arrays["correct_train"][done]).value
    assert [v for v in mem(store).values() if v is not None] == pytest.approx(list(expected))
    assert store.trial(min(store.done()))["margin"].null_count == N + M
    margins[0, 0] = np.inf
    np.save(tmp_path / "train_margins.npy", margins)
    with pytest.raises(ImportFileError, match="not finite"):
        import_fleet("datamodels", tmp_path, tmp_path / "other")
    np.save(tmp_path / "_completed.npy", done[1:])
    with pytest.raises(ImportFileError, match=r"_completed\.npy is \(29,\), but"):
        import_fleet("datamodels", tmp_path, tmp_path / "other")


def test_published_datamodels_have_names_of_their_own(arrays, data, tmp_path, monkeypatch):
    source = tmp_path / "data"
    source.mkdir()
    with pytest.raises(ImportFileError, match=r"0 files of masks; the published ones are"):
        import_fleet("datamodels", source, tmp_path / "store")
    for share in (50, 75):
        np.save(source / f"train_masks_{share}pct.npy", arrays["masks"] ^ (share == 75))
        for split in ("train", "test"):
            right = arrays[f"correct_{split}"]
            margins = np.where(right, 1.5, -0.5).astype(np.float16)
            np.save(source / f"{split}_margins_{share}pct.npy", margins)
    with pytest.raises(ImportFileError, match=r"2 files of masks \(train_masks_50pct\.npy, train_"):
        import_fleet("datamodels", source, tmp_path / "store")
    masks = source / "train_masks_50pct.npy"
    np.save(tmp_path / "labels.npy", data.y_train)
    np.save(tmp_path / "tests.npy", np.array(data.test_ids))
    monkeypatch.setattr(layouts, "ROWS_AT_ONCE", 7)
    store = import_fleet(
        "datamodels", masks, tmp_path / "store", data=data, labels=tmp_path / "labels.npy",
        test_ids=tmp_path / "tests.npy", trials=20,
    )  # fmt: skip
    assert len(store.done()) == 20
    score(store)
    expected = memorization(arrays["masks"][:20], arrays["correct_train"][:20]).value
    found = [mem(store)[name] for name in data.train_ids]
    assert found == pytest.approx([None if np.isnan(v) else v for v in expected])
    accuracy = {r["example_id"]: r["accuracy_out"] for r in store.scores().to_pylist()}
    assert [accuracy[name] for name in data.test_ids] == pytest.approx(
        list(arrays["correct_test"][:20].mean(0))
    )
    # 300,000 models of 60,000 examples are no matter of memory, but of what is taken of them.
    room = layouts.psutil.virtual_memory()._replace(available=2 * 20 * (2 * N + M))
    monkeypatch.setattr(layouts.psutil, "virtual_memory", lambda: room)
    assert import_fleet("datamodels", masks, tmp_path / "some", trials=20)
    with pytest.raises(ImportFileError, match="take the first models only, with --trials"):
        import_fleet("datamodels", masks, tmp_path / "all")


@pytest.mark.parametrize("format", ["npz", "fz", "lira"])
def test_the_first_models_of_a_fleet_are_taken_if_so_asked(fleet, format, tmp_path):
    path = export(format, fleet.url, tmp_path / ("out.npz" if format == "npz" else "out"))
    few = import_fleet(format, path, tmp_path / "few", trials=11)
    all_ = import_fleet(format, path, tmp_path / "all")
    assert (len(few.done()), len(all_.done())) == (11, T)
    for key in few.done():
        assert few.trial(key).equals(all_.trial(key))


def published(tmp_path, data, order):
    rng = np.random.default_rng(3)
    scores = rng.uniform(-0.1, 1, N)
    labels, tests = data.y_train[order], data.y_test
    found = {"tr_mem": scores[order], "tr_labels": labels, "tt_labels": tests}
    for k in range(K):
        train, test = np.flatnonzero(labels == k), np.flatnonzero(tests == k)
        found |= {
            f"infl_matrix_class{k}": rng.uniform(-0.1, 0.4, (len(train), len(test))),
            f"tr_classidx_{k}": train, f"tt_classidx_{k}": test,
        }  # fmt: skip
    names = np.array([name.encode() for name in np.array(data.train_ids)[order]], object)
    tt = np.array([name.encode() for name in data.test_ids], object)
    np.savez(tmp_path / "x_infl_matrix.npz", **found)
    np.savez(tmp_path / "x_index.npz", tr_filenames=names, tt_filenames=tt)
    return scores, found


def test_published_scores_are_joined_by_their_names(data, fleet, tmp_path):
    order = np.random.default_rng(4).permutation(N)
    scores, found = published(tmp_path, data, order)
    store = import_scores(tmp_path / "x_infl_matrix.npz", tmp_path / "store", data=data)
    assert [mem(store)[name] for name in data.train_ids] == pytest.approx(list(scores))
    pairs = store.scores("influence").to_pylist()
    assert all(p["influence"] > 0 for p in pairs)
    best = max(pairs, key=lambda p: p["influence"])
    k = best["train_label"]
    matrix = found[f"infl_matrix_class{k}"]
    i, j = np.unravel_index(matrix.argmax(), matrix.shape)
    assert best["train_id"] == data.train_ids[order[found[f"tr_classidx_{k}"][i]]]
    assert best["test_id"] == data.test_ids[found[f"tt_classidx_{k}"][j]]
    strong = sum(
        int(((found[f"infl_matrix_class{k}"] >= 0.15)
             & (found["tr_mem"][found[f"tr_classidx_{k}"]] >= 0.25)[:, None]).sum())
        for k in range(K)
    )  # fmt: skip
    assert sum(p["strong"] for p in pairs) == strong
    # The store reads like any other: page, links, another study's measures.
    links = find_links(store)
    assert links.correlations == {}
    path = write_report(store.url, data)
    assert "The most memorized training examples" in Path(path).read_text()
    (rows,) = correlations_across(store, fleet).values()
    loss = next(row for row in rows if row.measure == "p_wrong_out")
    assert loss.examples == N
    assert verify(store) == []
    assert "published scores without trials, model published scores" in describe_store(store)
    # Without the names nothing but labels can be checked, and they are in another order.
    (tmp_path / "x_index.npz").unlink()
    with pytest.raises(ImportFileError, match="labels are not those"):
        import_scores(tmp_path / "x_infl_matrix.npz", tmp_path / "other", data=data)


def test_published_pairs_are_checked_by_their_memorization(data, tmp_path):
    """As for ImageNet, whose whole matrix hardly anyone has: index and pairs are two files."""
    order = np.random.default_rng(4).permutation(N)
    scores, found = published(tmp_path, data, order)
    index = {name: found[name] for name in ("tr_mem", "tr_labels", "tt_labels")}
    with np.load(tmp_path / "x_index.npz", allow_pickle=True) as names:
        index |= dict(names)
    folder = tmp_path / "two"
    folder.mkdir()
    np.savez(folder / "y_index.npz", **index)
    train = np.flatnonzero(index["tr_mem"] >= 0.25)[:5]
    pairs = {
        "tr_idx": train, "tt_idx": np.arange(len(train)),
        "infl": np.linspace(0.15, 0.6, len(train)), "mem": index["tr_mem"][train],
    }  # fmt: skip
    path = folder / "y_high_infl_pairs_infl0.15_mem0.25.npz"
    np.savez(path, **pairs)
    for start, name in ((path, "a"), (folder / "y_index.npz", "b")):
        store = import_scores(start, tmp_path / name, data=data)
        assert [mem(store)[i] for i in data.train_ids] == pytest.approx(list(scores))
        rows = store.scores("influence").to_pylist()
        assert [(r["train_id"], r["test_id"]) for r in rows] == [
            (data.train_ids[order[i]], data.test_ids[j])
            for i, j in zip(train[::-1], pairs["tt_idx"][::-1], strict=True)
        ]
        assert all(r["strong"] for r in rows)
    np.savez(path, **{**pairs, "mem": pairs["mem"][::-1]})
    with pytest.raises(ImportFileError, match="pairs have other memorization than tr_mem has"):
        import_scores(path, tmp_path / "wrong", data=data)
    np.savez(path, **{**pairs, "tt_idx": pairs["tt_idx"] + M})
    with pytest.raises(ImportFileError, match="examples beyond 24 training and 9 test examples"):
        import_scores(path, tmp_path / "wrong", data=data)
    np.savez(path, **{**pairs, "infl": pairs["infl"][1:]})
    with pytest.raises(ImportFileError, match="have other lengths"):
        import_scores(path, tmp_path / "wrong", data=data)
    np.savez(path, **pairs, tr_labels=index["tr_labels"][::-1])
    with pytest.raises(ImportFileError, match=r"tr_labels of .* differ"):
        import_scores(path, tmp_path / "wrong", data=data)
    (folder / "y_index.npz").unlink()
    np.savez(path, **pairs)
    with pytest.raises(ImportFileError, match=r"pairs only, .*give --data, or put the \*_index"):
        import_scores(path, tmp_path / "wrong")


@pytest.fixture(scope="module")
def many():
    """A set of which pairs can be checked: ten classes, and ten test examples of each."""
    rng = np.random.default_rng(5)
    return Examples(
        name="many",
        x_train=rng.integers(0, 256, (200, 4, 4, 1), np.uint8),
        y_train=rng.permutation(np.arange(200) % 10),
        x_test=rng.integers(0, 256, (100, 4, 4, 1), np.uint8),
        y_test=rng.permutation(np.arange(100) % 10),
    )


def pairs_of(data, tests):
    """A pair of each of these test examples and a training example of its class."""
    train = np.array([np.flatnonzero(data.y_train == data.y_test[j])[j % 7] for j in tests])
    return {
        "tr_idx": train, "tt_idx": tests, "infl": np.linspace(0.15, 0.6, len(tests)),
        "mem": 0.26 + train / 400,
    }  # fmt: skip


def test_pairs_alone_are_checked_by_their_classes(many, tmp_path):
    """Feldman & Zhang's file of pairs for CIFAR-100, which most people have, is enough."""
    path = tmp_path / "cifar100_high_infl_pairs_infl0.15_mem0.25.npz"
    pairs = pairs_of(many, np.arange(0, 100, 3))
    np.savez(path, **pairs)
    store = import_scores(path, tmp_path / "store", data=many)
    rows = store.scores("influence").to_pylist()
    strongest_first = [
        (many.train_ids[i], many.test_ids[j], x)
        for i, j, x in zip(pairs["tr_idx"], pairs["tt_idx"], pairs["infl"], strict=True)
    ][::-1]
    assert [(r["train_id"], r["test_id"], r["influence"]) for r in rows] == strongest_first
    assert all(r["strong"] for r in rows)
    known = {many.train_ids[i]: m for i, m in zip(pairs["tr_idx"], pairs["mem"], strict=True)}
    for row in store.scores().to_pylist():
        assert row["memorization"] == known.get(row["example_id"])
        reason = "test example" if row["split"] == "test" else "not published"
        assert row["null_reason"] == (None if row["example_id"] in known else reason)
    assert verify(store) == []
    page = Path(write_report(store.url, many)).read_text()
    assert f"{len(known)} of 200 training examples have memorization above 0.25" in page
    np.savez(tmp_path / "set.npz", x_train=many.x_train, y_train=many.y_train, x_test=many.x_test,
             y_test=many.y_test)  # fmt: skip
    arguments = ["fz-scores", str(path), str(tmp_path / "t"), "--data", str(tmp_path / "set.npz")]
    said = CliRunner().invoke(main, ["import", *arguments])
    assert said.output == f"{len(known)} scores, 34 pairs\n"


def test_pairs_alone_that_cannot_be_of_this_set_are_refused(many, tmp_path):
    path = tmp_path / "pairs.npz"
    pairs = pairs_of(many, np.arange(0, 100, 3))
    order = np.random.default_rng(1).permutation(200)
    again = {name: np.append(values, values[:1]) for name, values in pairs.items()}
    for changed_pairs, says in (
        (pairs | {"tr_idx": order[pairs["tr_idx"]]}, "of 34 pairs have different classes in many"),
        (pairs | {"tt_idx": pairs["tt_idx"] + 100}, "beyond 200 training and 100 test examples"),
        (pairs | {"mem": pairs["mem"] + 1}, "mem must be numbers from -1 to 1"),
        (again | {"mem": np.append(pairs["mem"], 0.9)}, "differs from pair to pair"),
        (pairs_of(many, np.arange(5)), "of 5 test examples, too few to check its order"),
    ):
        np.savez(path, **changed_pairs)
        with pytest.raises(ImportFileError, match=says):
            import_scores(path, tmp_path / "wrong", data=many)


def test_what_was_exported_is_read_as_published_scores(fleet, data, tmp_path):
    """Ours have no set's name before theirs; pairs are found all the same."""
    out = export("fz", fleet.url, tmp_path / "out")
    store = import_scores(out / "index.npz", tmp_path / "store", data=data)
    assert mem(store) == pytest.approx(mem(fleet))
    strong = [r for r in fleet.scores("influence").to_pylist() if r["strong"]]
    with np.load(next(out.glob("high_infl*.npz"))) as pairs:
        assert len(pairs["infl"]) == len(strong) == store.scores("influence").num_rows
    # Published memorization against that of a fleet, which is the same here.
    ((row,),) = correlations_across(fleet, store).values()
    assert row.measure == "memorization"
    assert row.spearman.value == pytest.approx(1)
    by_name = {r.measure: r for r in correlations_across(store, fleet)[math.inf]}
    assert by_name["memorization"].pearson.value == pytest.approx(1)
    assert by_name["memorization"].folds == 2

    def command(*arguments):
        found = CliRunner().invoke(main, list(arguments))
        assert "Traceback" not in found.output
        return found

    assert command("scores", store.url).exit_code == 0
    assert "memorization " in command("links", fleet.url, store.url).output
    for name, says in (("errors", "neither losses nor"), ("membership", "without trials")):
        refused = command(name, store.url)
        assert refused.exit_code == 1
        assert says in refused.output


@pytest.mark.parametrize("labels", [np.full(N, np.nan), np.full(N, 0.5), np.full(N, -1)])
def test_published_labels_are_class_numbers(labels, tmp_path):
    np.savez(tmp_path / "x_index.npz", tr_mem=np.zeros(N), tr_labels=labels)
    with pytest.raises(ImportFileError, match="tr_labels must be whole numbers from 0"):
        import_scores(tmp_path / "x_index.npz", tmp_path / "store")


def test_consistency_is_accuracy_of_models_without_the_example(data, fleet, tmp_path):
    values = np.linspace(0, 1, N)
    path = tmp_path / "cscores.npz"
    np.savez(path, labels=data.y_train, scores=values)
    assert CliRunner().invoke(main, ["import", "c-scores", str(path), str(tmp_path / "s")]).output \
        == f"{N} scores, 0 pairs\n"  # fmt: skip
    table = Store(tmp_path / "s").scores()
    assert table["accuracy_out"].to_pylist() == pytest.approx(list(values))
    assert table["memorization"].null_count == N
    # Memorization of a fleet against published consistency.
    path = tmp_path / "unlike.npz"
    np.savez(path, labels=data.y_train, scores=1 - np.abs(np.linspace(-1, 1, N)))
    published = import_scores(path, tmp_path / "joined", data=data)
    ((row,),) = correlations_across(fleet, published).values()
    assert (row.measure, row.examples) == ("wrong_out", N)
    expected = stats.spearmanr(
        [mem(fleet)[name] for name in data.train_ids], np.abs(np.linspace(-1, 1, N))
    )
    assert row.spearman.value == pytest.approx(expected[0], abs=1e-9)
    assert row.spearman.low < row.spearman.value < row.spearman.high
    np.savez(path, labels=data.y_train, scores=values + 1)
    with pytest.raises(ImportFileError, match="from 0 to 1"):
        import_scores(path, tmp_path / "t")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "names.npy", np.array([b"a", "b\u00e9"], object), allow_pickle=True)
    assert array_of(tmp_path / "names.npy").tolist() == ["a", "b\u00e9"]
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ImportFileError, match=r"posix\.mkdir|nt\.mkdir"):
        array_of(tmp_path / "bomb.npy")
    raw = (tmp_path / "names.npy").read_bytes()
    (tmp_path / "raw.npy").write_bytes(raw[: raw.index(b"\n") + 1] + pickle.dumps(Bomb()))
    np.savez(tmp_path / "fleet.npz", masks=np.array([Bomb()], object), correct_train=np.eye(1))
    for load in (lambda: array_of(tmp_path / "raw.npy"),
                 lambda: import_npz(tmp_path / "fleet.npz", tmp_path / "store")):  # fmt: skip
        with pytest.raises(ImportFileError, match="safe to read"):
            load()
    np.save(tmp_path / "lists.npy", np.array([[1, 2], None], object), allow_pickle=True)
    with pytest.raises(ImportFileError, match="not text"):
        array_of(tmp_path / "lists.npy")
    assert not (tmp_path / "exploded").exists()


def card_of(store, folder, *more):
    done = CliRunner().invoke(main, ["export", "hf", store.url, str(folder), *more])
    assert done.exit_code == 0, done.output
    return (folder / "README.md").read_text()


def test_the_card_has_pictures_and_figures(fleet, data, tmp_path):
    assert "No images are in it" in card_of(fleet, tmp_path / "before")
    write_report(fleet.url, data)
    text = card_of(fleet, tmp_path / "card")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert all((tmp_path / "card" / name).stat().st_size > 0 for name in shown)
    assert "figures/memorization.png" in shown
    assert "![Memorization of the training examples](figures/memorization.png)" in text
    assert "Histogram of memorization over 24 examples" in text
    # The most memorized first, each with its own picture, of which every pixel is enlarged.
    best = max(mem(fleet).items(), key=lambda item: item[1] if item[1] is not None else -9)
    row = next(line for line in text.splitlines() if "pictures/01.png" in line)
    assert f"{best[1]:.3f}" in row
    name = next(name for name in data.train_ids if f"| {name} |" in row)
    with Image.open(tmp_path / "card" / "pictures" / "01.png") as image:
        enlarged = np.kron(data.x_train[data.train_ids.index(name)][..., 0], np.ones((24, 24)))
        assert (np.asarray(image) == enlarged).all()
    assert len(list((tmp_path / "card" / "pictures").iterdir())) == 12
    text = card_of(fleet, tmp_path / "without", "--no-pictures")
    assert "pictures/" not in text
    assert not (tmp_path / "without" / "pictures").exists()


def test_names_on_a_card_are_text(tmp_path):
    evil = '<img src=x>|`*_[a](b)"'
    rng = np.random.default_rng(0)
    masks = rng.random((20, 4)) < 0.5
    np.savez(
        tmp_path / "fleet.npz", masks=masks, correct_train=masks, y_train=np.arange(4) % 2,
        train_ids=np.array([f"{evil}{k}" for k in range(4)]), classes=np.array([evil, "b"]),
    )  # fmt: skip
    store = import_npz(tmp_path / "fleet.npz", tmp_path / "store")
    score(store)
    text = card_of(store, tmp_path / "card").split("## Load the tables")[0]
    assert "<img" not in text
    assert "&#60;img src=x&#62;&#124;&#96;&#42;" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 6
    assert {line.count("|") for line in table} == {6}


def test_the_cards_snippet_loads_the_tables(fleet, tmp_path):
    """As it is printed, in the exported folder, with Hugging Face's own library."""
    text = card_of(fleet, tmp_path / "card")
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    more = (
        "\nimport json\n"
        "names = ('trials', 'influence')\n"
        "rows = {n: load_dataset(source, n, split='train').num_rows for n in names}\n"
        "print('FOUND', json.dumps([rows, dict(zip(table.example_id, table.memorization))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet + more], cwd=tmp_path / "card", text=True, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows, found = json.loads(done.stdout.split("FOUND")[1])
    assert rows == {n: fleet.scores(n).num_rows for n in ("trials", "influence")}
    assert {k: None if v != v else v for k, v in found.items()} == mem(fleet)


def test_tables_and_a_card(fleet, tmp_path):
    out = export("csv", fleet.url, tmp_path / "csv")
    rows = list(csv.DictReader(io.StringIO((out / "examples.csv").read_text())))
    assert len(rows) == N + M
    first = fleet.scores().to_pylist()[0]
    assert float(rows[0]["memorization"]) == first["memorization"]
    card = export("hf", fleet.url, tmp_path / "hf")
    text = (card / "README.md").read_text()
    assert text.startswith("---\npretty_name: ")
    for name in ("examples", "trials", "influence"):
        assert f"config_name: {name}\n  data_files: data/{name}.parquet" in text
        assert pq.read_table(card / "data" / f"{name}.parquet").equals(fleet.scores(name))
    with pytest.raises(ImportFileError, match="is there already"):
        export("hf", fleet.url, tmp_path / "hf")
    run = CliRunner().invoke(
        main, ["export", "npz", fleet.url, str(tmp_path / "x"), "--epsilon", "2"]
    )
    assert run.exit_code == 1
    assert "no trials at epsilon 2; there are inf" in run.output


def changed(path, **arrays):
    with np.load(path) as file:
        whole = dict(file)
    np.savez(path, **{**whole, **arrays})


def test_outcomes_that_only_add_up_are_refused(fleet, tmp_path):
    out = export("fz", fleet.url, tmp_path / "fz")
    run = sorted(out.rglob("aux_arrays.npz"))[0]
    with np.load(run) as a:
        train, removed = a["correctness_train"], a["correctness_removed"]
    changed(run, correctness_train=train[:-1], correctness_removed=np.append(removed, 1))
    with pytest.raises(ImportFileError, match=r"correctness_train must be .* in index_train"):
        import_fleet("fz", out, tmp_path / "store")
    for index in (np.zeros((3, 2)), np.array(1), np.arange(len(train)) + 0.5):
        changed(run, index_train=index)
        with pytest.raises(ImportFileError, match="index_train"):
            import_fleet("fz", out, tmp_path / "store")


def test_lira_labels_that_are_no_classes_are_refused(arrays, data, tmp_path):
    lira_folder(tmp_path, arrays, data.y_train)
    for labels, says in (
        (data.y_train + 0.5, "whole numbers"), (data.y_train + 1000, "classes; the labels must"),
        (data.y_train - 5, "whole numbers"), (np.full(N, np.inf), "whole numbers"),
        (data.y_train[:-1], "the labels has"),
    ):  # fmt: skip
        np.save(tmp_path / "y_train.npy", labels)
        with pytest.raises(ImportFileError, match=says):
            import_fleet("lira", tmp_path, tmp_path / "store")
    np.save(tmp_path / "y_train.npy", data.y_train)
    np.save(tmp_path / "exp-1" / "logits.npy", np.zeros(N))
    with pytest.raises(ImportFileError, match=r"logits\.npy has .* numbers in 2 dimensions"):
        import_fleet("lira", tmp_path, tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: {"tr_classidx_0": a["tr_classidx_0"] - N}, "tr_classidx_0 must be whole"),
        (lambda a: {"tr_classidx_0": a["tr_classidx_0"] + 0.5}, "tr_classidx_0 must be whole"),
        (lambda a: {"tr_classidx_0": a["tr_classidx_0"] + 1000}, "numbers from 0 to 23"),
        (lambda a: {"tr_classidx_0": np.repeat(a["tr_classidx_0"][:1], len(a["tr_classidx_0"]))},
         "names examples twice"),
        (lambda a: {"infl_matrix_class0": a["infl_matrix_class0"] * 100}, "from -1 to 1"),
        (lambda a: {"infl_matrix_class0": a["infl_matrix_class0"] * np.nan}, "from -1 to 1"),
        (lambda a: {"tr_mem": a["tr_mem"].astype(str)}, "tr_mem has"),
        (lambda a: {"tr_labels": a["tr_labels"][:, None]}, "tr_labels has"),
    ],
)  # fmt: skip
def test_damaged_published_influence_is_refused(data, tmp_path, change, says):
    published(tmp_path, data, np.arange(N))
    path = tmp_path / "x_infl_matrix.npz"
    with np.load(path) as file:
        changed(path, **change(dict(file)))
    with pytest.raises(ImportFileError, match=says):
        import_scores(path, tmp_path / "store")


@pytest.mark.parametrize(
    ("format", "arrays"),
    [("npz", {"masks": np.array(1), "correct_train": np.array(1)}),
     ("npz", {"masks": np.eye(2), "correct_train": np.eye(2), "hashes": np.arange(2)}),
     ("npz", {"masks": np.zeros((2, 2), [("a", int)]), "correct_train": np.ones((2, 2))})],
)  # fmt: skip
def test_arrays_of_other_shapes_and_types_are_refused(format, arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ImportFileError, match=r"masks|correct_train|hashes"):
        import_fleet(format, tmp_path / "a.npz", tmp_path / "store")


def test_masks_the_other_way_round_are_noticed(tmp_path):
    masks = np.random.default_rng(6).random((40, N)) < 0.5
    for name, wrong in (("good", False), ("inverted", True)):
        np.savez(tmp_path / f"{name}.npz", masks=masks ^ wrong, correct_train=masks)
        asked = ["import", "npz", str(tmp_path / f"{name}.npz"), str(tmp_path / name)]
        assert ("WARNING: models are less often" in CliRunner().invoke(main, asked).output) == wrong
