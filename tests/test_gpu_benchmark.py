"""benchmarks/gpu.py at toy size: what a GPU is asked for in a few minutes runs here as well."""

from __future__ import annotations

import io
import time

import numpy as np
import torch
from PIL import Image

from benchmarks import gpu


def toy():
    return gpu.Bench(gpu.pictures(None, 40, torch.device("cpu"), side=8), toy=True)


def test_checks_and_rows_are_printed_as_they_come(capsys):
    assert gpu.run(toy(), ["groups", "waiting", "cpu", "auto"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("PASS") for line in lines) > 10
    assert "PASS  mlp-16 trains in groups: group of 4" in lines
    assert any("auto: 1 models" in line for line in lines)


def test_curvature_is_measured_beside_the_usual_loop(capsys):
    assert gpu.run(toy(), ["curvature"])
    out = capsys.readouterr().out
    assert "two gradients a probe, ten probes" in out
    assert "exact trace, auto: float32" in out
    assert out.count("PASS") == 3


def test_every_rate_is_a_row(capsys):
    assert gpu.run(toy(), ["mlp"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ROW")]
    for what in ("plain eager loop", "alone, eager", "alone, graph", "3 models in a step"):
        assert any(what in row and "images/s" in row for row in rows), what


def test_the_recipe_is_trained_on_the_whole_set(tmp_path, capsys):
    """From JPEGs as from arrays; every training image, and its own test images."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 8, 8, 3), np.uint8), np.arange(50) % 10
    files = [io.BytesIO() for _ in x]
    for image, file in zip(x, files, strict=True):
        Image.fromarray(image).save(file, "JPEG")
    jpeg = [file.getvalue() for file in files]
    offset = np.cumsum([0, *map(len, jpeg)])
    split = np.where(np.arange(50) < 40, "train", "test")
    path = tmp_path / "set.npz"
    whole = np.frombuffer(b"".join(jpeg), np.uint8)
    np.savez(path, jpeg=whole, offset=offset, label=y, split=split)
    images = gpu.pictures(str(path), 20, torch.device("cpu"))
    assert np.abs(images.x_train.numpy().astype(int) - x[:20]).mean() < 60
    assert gpu.run(gpu.Bench(images, toy=True, data=str(path)), ["accuracy"])
    out = capsys.readouterr().out
    assert "2 epochs of 40 images" in out
    assert "of 10 test images right" in out


def test_a_part_that_fails_or_hangs_leaves_the_others(monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no kernel image")

    def hanging(bench):
        time.sleep(60)

    def wrong(bench):
        bench.check("two and two", False, "five")

    def fine(bench):
        bench.check("one and one", True)

    parts = {"a": (broken, 9), "b": (hanging, 0.2), "c": (wrong, 9), "d": (fine, 9)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert not gpu.run(toy())
    out = capsys.readouterr().out
    for line in ("FAIL  a: RuntimeError: no kernel image", "FAIL  b: Late", "PASS  one and one"):
        assert line in out
    assert "FAIL  two and two: five" in out
    assert "FAIL  3 checks failed" in out
