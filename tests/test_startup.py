"""Each process imports what it uses: torch takes seconds, and most commands never need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import raymem
from raymem import Plan, import_npz, score
from raymem.lazy import lazy_attributes

ROOT = Path(raymem.__file__).parent
HEAVY = {"torch", "ray", "scipy", "timm", "sklearn", "opacus", "matplotlib", "torchvision"}


def imported_by(code):
    """The modules that a new process has imported after `code`."""
    report = "\nfinally:\n    import sys\n    print('\\nMODULES', *sys.modules)"
    body = "try:\n" + "\n".join(f"    {line}" for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", body + report], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup")
    plan = Plan(n=30, subset_ratio=0.5, seed=1)
    masks = np.stack([plan.mask(trial) for trial in range(8)])
    np.savez(
        folder / "fleet.npz",
        masks=masks,
        correct_train=masks | (np.arange(30) % 2 == 0),
        correct_test=np.arange(8 * 5).reshape(8, 5) % 3 > 0,
    )
    made = import_npz(folder / "fleet.npz", folder / "store")
    score(made)
    return made


@pytest.mark.parametrize("command", ["--help", "scores --help", "links --help", "ingest --help"])
def test_help_imports_nothing_heavy(command):
    found = imported_by(f"from raymem.cli import main\nmain({command.split()})")
    assert "raymem.cli.read" in found
    assert not found & HEAVY


@pytest.mark.parametrize("command", ["scores", "status", "pairs", "example", "verify"])
def test_commands_that_read_tables_import_no_torch(store, command):
    arguments = [command, store.url, *(["train-00003"] if command == "example" else [])]
    found = imported_by(f"from raymem.cli import main\nmain({arguments})")
    assert "raymem.store.store" in found
    assert not found & HEAVY


def test_raymem_imports_nothing_until_it_is_used():
    found = imported_by("import raymem")
    assert {name for name in found if name.startswith("raymem.")} == {
        "raymem.lazy", "raymem.version",
    }  # fmt: skip
    assert not found & HEAVY


def test_arrays_are_scored_without_torch():
    found = imported_by(
        "import numpy as np, raymem\n"
        "rng = np.random.default_rng(0)\n"
        "raymem.memorization(rng.random((8, 3)) < 0.5, rng.random((8, 3)) < 0.5)"
    )
    assert not found & (HEAVY - {"scipy"})


def test_runners_and_workers_import_what_training_needs():
    """raymem.fleet.worker_groups is what every process of a fleet on Ray imports."""
    found = imported_by("import raymem.fleet.worker_groups")
    assert not found & (HEAVY - {"torch", "ray"})
    rooms = {".".join(name.split(".")[:2]) for name in found if name.startswith("raymem.")}
    assert not rooms & {f"raymem.{name}" for name in ("cli", "interop", "links", "scores", "show")}
    assert not {"raymem.data.shards", "raymem.curvature.streaming"} & found


def test_a_job_starts_without_what_only_its_last_stages_need():
    found = imported_by("from raymem import JobSettings, PrivateStudy, Recipe, Study, run_job")
    assert not found & (HEAVY - {"torch", "scipy"})
    assert not {"scipy.stats", "scipy.optimize", "raymem.links", "raymem.show.figures"} & found


def test_what_type_checkers_see_is_what_is_exported():
    lazy = [p for p in ROOT.rglob("__init__.py") if "lazy_attributes(__name__" in p.read_text()]
    assert len(lazy) >= 8
    for init in lazy:
        package = ".".join(init.parent.relative_to(ROOT.parent).parts)
        attribute_of = lazy_attributes(package, str(init))
        for node in ast.parse(init.read_text()).body:
            if isinstance(node, ast.If):
                for alias in (alias for found in node.body for alias in found.names):
                    name = alias.asname or alias.name
                    assert attribute_of(name) is getattr(sys.modules[package], name)
                    assert name in sys.modules[package].__all__, f"{package}.{name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'raymem' has no attribute 'memorisation'"):
        _ = raymem.memorisation
    assert not hasattr(raymem.scores, "memorisation")
