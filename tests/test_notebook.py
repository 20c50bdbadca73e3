"""docs/notebook.ipynb is run from top to bottom, as a notebook does, and shows what it should."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from explored import EVIL, trained

import raymem
from raymem import CurvatureRule, Recipe, Study, load_examples
from raymem.show.explorer import explorer_section

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def shown_by(cells):
    """What each cell shows: the value of its last line, if that is an expression."""
    here = {"__name__": "notebook"}
    for cell in cells:
        *before, last = ast.parse(cell).body
        exec(compile(ast.Module(before, []), "docs/notebook.ipynb", "exec"), here)
        if isinstance(last, ast.Expr):
            yield eval(compile(ast.Expression(last.value), "docs/notebook.ipynb", "eval"), here)
        else:
            exec(compile(ast.Module([last], []), "docs/notebook.ipynb", "exec"), here)
            yield None


def run(store, monkeypatch, folder):
    """The notebook of another store, run in `folder`; what its cells show."""
    book = json.loads(NOTEBOOK.read_text())
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in book["cells"])
    assert 'store = "runs/feldman_digits"' in code[0]
    code[0] = code[0].replace('"runs/feldman_digits"', repr(str(store)))
    monkeypatch.chdir(folder)
    return list(shown_by(code))


def check(shown, folder):
    opened, explorer, table, image, pairs, links, figure = shown
    assert opened._repr_html_().count("<img ") == 10
    assert explorer._repr_html_().startswith("<iframe srcdoc=")
    assert table.memorization.is_monotonic_decreasing
    assert image.size == (160, 160)
    assert pairs.influence.is_monotonic_decreasing
    assert "curvature, out" in links._repr_html_()
    assert figure is None
    assert (folder / "memorization.pdf").read_bytes().startswith(b"%PDF")


def digits_study(folder, digits, n, trials, epochs):
    """A study of the first n training digits, whose images are where it says."""
    path = folder / "digits.npz"
    np.savez(
        path, x_train=digits.x_train[:n], y_train=digits.y_train[:n],
        x_test=digits.x_test[: n // 2], y_test=digits.y_test[: n // 2],
    )  # fmt: skip
    study = Study(
        examples=load_examples(path),
        recipe=Recipe(model="mlp-32", epochs=epochs, learning_rate=0.1),
        store=folder / "store",
        trials=trials,
        curvature=CurvatureRule(),
    )
    study.train(engine="serial")
    study.score()
    explorer_section(raymem.open(study.store))  # keeps the pictures, as the report does
    return study


def test_the_notebook_runs_on_a_small_study(tmp_path, monkeypatch, digits):
    study = digits_study(tmp_path, digits, n=120, trials=8, epochs=4)
    check(run(study.store, monkeypatch, tmp_path), tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_on_a_study_that_memorizes(tmp_path, monkeypatch, digits):
    study = digits_study(tmp_path, digits, n=1000, trials=40, epochs=20)
    shown = run(study.store, monkeypatch, tmp_path)
    check(shown, tmp_path)
    assert shown[2].memorization.max() > 0.5


def test_an_explorer_in_a_notebook_is_apart_and_writes_nothing(tmp_path):
    study = trained(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in study.store.rglob("*")}
    frame = raymem.open(study.store, data=study.examples).explore(height=700)
    assert {path: path.stat().st_mtime_ns for path in study.store.rglob("*")} == before
    shown = frame._repr_html_()
    assert 'sandbox="allow-scripts allow-downloads"' in shown
    assert 'height="700"' in shown
    # The page is one attribute: no quote of it ends it.
    assert re.fullmatch(r'<iframe srcdoc="[^"]*"( [a-z]+="[^"]*")+></iframe>', shown)
    assert EVIL not in shown
    assert frame.html.startswith("<!doctype html>")
