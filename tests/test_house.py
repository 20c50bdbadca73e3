"""The house itself: its public door, its layers, its documents."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import raymem
from raymem.store import columns

ROOT = Path(__file__).parents[1]
# A module imports from its own layer and from those to its left. data.shards and
# curvature.streaming use the store and the fleet: they come later than their parent packages.
LAYERS = [
    "version", "lazy", "settings", "encoding", "errors", "retry", "data", "experiments", "plan",
    "models", "curvature", "privacy", "training", "store", "fleet", "scores", "links",
    "data.shards", "curvature.streaming", "interop", "study", "show", "cli",
]  # fmt: skip
ONLY_HERE = {
    "ray": {"fleet", "scores", "data.shards", "curvature.streaming"},
    "torchvision": {"data"},
    "sklearn": {"data"},
    "opacus": {"privacy"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    """The layer of a dotted name below raymem: "data" of "data.cache", but "data.shards"."""
    return max((x for x in LAYERS if f"{name}.".startswith(f"{x}.")), key=len)


def modules():
    for path in sorted((ROOT / "raymem").rglob("*.py")):
        if path != ROOT / "raymem" / "__init__.py":
            name = ".".join(path.relative_to(ROOT / "raymem").with_suffix("").parts)
            yield path, layer_of(name.removesuffix(".__init__"))


def test_imports_point_left():
    for path, layer in modules():
        for name in imports_of(path):
            if name.startswith("raymem."):
                there = layer_of(name.removeprefix("raymem."))
                assert LAYERS.index(there) <= LAYERS.index(layer), f"{path}: {name}"


def test_heavy_packages_stay_in_their_rooms():
    for path, layer in modules():
        for name in imports_of(path):
            rooms = ONLY_HERE.get(name.split(".")[0])
            assert rooms is None or layer in rooms, f"{path} imports {name}"


def test_names_of_files_are_unique():
    names = Counter(path.name for path, _ in modules() if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_function_hides_a_module():
    """`from package import name` gives the same thing whatever was imported before."""
    hidden = set()
    for init in (ROOT / "raymem").rglob("__init__.py"):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        beside = {path.stem for path in init.parent.iterdir() if path.suffix in ("", ".py")}
        for node in ast.walk(ast.parse(init.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != package:
                names = {alias.asname or alias.name for alias in node.names}
                hidden |= {f"{package}.{name}" for name in names & beside}
    assert not hidden


def test_the_public_door_is_this_wide():
    assert set(raymem.__all__) == {
        "CurvatureRule", "Examples", "JobSettings", "Plan", "Privacy", "PrivateStudy",
        "RaymemError", "Recipe", "Store", "Study", "__version__", "add_canaries", "export",
        "find_links", "find_removal", "flip_labels", "import_fleet", "import_npz",
        "import_scores", "influence", "ingest", "input_curvature", "load_examples",
        "membership", "memorization", "merge", "open", "paper_score", "run_job", "score",
        "stream_curvature", "verify",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in raymem.__all__ if n != "__version__"])
def test_everything_public_is_documented(name):
    thing = getattr(raymem, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if inspect.isfunction(value) and not attribute.startswith("_"):
                assert inspect.getdoc(value), f"{name}.{attribute}"


def test_the_columns_page_is_the_code():
    assert (ROOT / "docs" / "columns.md").read_text() == columns.as_markdown()


def test_links_in_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
