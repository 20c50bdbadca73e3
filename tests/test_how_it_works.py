"""docs/how-it-works.md against the code: its files, its functions, their order, its example."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import numpy as np

from raymem import Plan, load_examples

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-it-works.md").read_text()
SECTIONS = re.findall(
    r"^## (\d+)\. [^`\n]*`([^`]+)`\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE
)
FILES = [file for _, file, _ in SECTIONS]


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def defined(path: Path) -> set[str]:
    """Names of a file's functions, classes and methods."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in nodes(path) if isinstance(node, kinds)}


@functools.cache
def imported(path: Path) -> set[Path]:
    """Files from which a file imports names, also by way of their packages."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raymem"):
            for alias in node.names:
                found |= sources(node.module, alias.name)
    return found


def sources(module: str, name: str) -> set[Path]:
    """The file that `from module import name` leads to, and those on the way."""
    path = ROOT / module.replace(".", "/")
    if (path / f"{name}.py").exists():
        return {path / f"{name}.py"}
    if path.with_suffix(".py").exists():
        return {path.with_suffix(".py")}
    found = {path / "__init__.py"}
    for node in nodes(path / "__init__.py"):
        if isinstance(node, ast.ImportFrom) and node.module != module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    found |= sources(node.module, alias.name)
    return found


def test_fifteen_files_are_each_met_once():
    assert [int(number) for number, _, _ in SECTIONS] == list(range(1, len(SECTIONS) + 1))
    assert 10 <= len(FILES) <= 15
    assert len(set(FILES)) == len(FILES)
    for file in FILES:
        assert (ROOT / file).is_file(), file


def test_each_file_is_imported_by_one_before_it():
    """By way of one other file at most: options load the images, a trial measures curvature."""
    for place, file in enumerate(FILES[1:], 1):
        before = set().union(*(imported(ROOT / earlier) for earlier in FILES[:place]))
        beyond = set().union(*map(imported, before))
        assert ROOT / file in before | beyond, file


def test_every_function_named_is_in_its_file():
    everywhere = set().union(*(defined(path) for path in (ROOT / "raymem").rglob("*.py")))
    columns = set(re.findall(r"\w+", (ROOT / "docs" / "columns.md").read_text()))
    for _, file, text in SECTIONS:
        names = re.findall(r"`(?:[A-Z]\w+\.)?([A-Za-z]\w*)(?:\([^`]*\))?`", text)
        there = defined(ROOT / file)
        if file.startswith("jobs/"):
            there |= {"run_job", "Study"}
        assert there & set(names), file
        for name in names:
            assert name in there | everywhere | columns, f"{file}: {name}"


def test_example_17_is_what_the_page_says():
    digits = load_examples("digits")
    assert (digits.train_ids[17], digits.y_train[17]) == ("digit-0024", 4)
    masks = Plan(n=1200).masks(range(400))[:, 17]
    out = re.search(r"example 17 is out of trials ([\d, and]+) of the first block", PAGE)[1]
    assert np.flatnonzero(~masks[:20]).tolist() == [int(x) for x in re.findall(r"\d+", out)]
    assert (masks.sum(), (~masks).sum()) == (280, 120)
