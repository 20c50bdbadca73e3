"""Packages that import a module when one of its names is first used.

torch takes seconds to import, and most commands never need it. A package lists what it exports in
the import statements of its `if TYPE_CHECKING:` block, once: type checkers read them, and so does
`lazy_attributes`.

    if TYPE_CHECKING:
        from raymem.show.report import write_report

    __getattr__ = lazy_attributes(__name__, __file__)
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_attributes(package: str, file: str) -> Callable[[str], Any]:
    """The `__getattr__` of `package`, whose source is `file`: imports what is asked for, once.

    >>> import raymem.privacy
    >>> attribute_of = lazy_attributes("raymem.privacy", raymem.privacy.__file__)
    >>> attribute_of("Mechanism").__module__
    'raymem.privacy.mechanism'
    """
    source_of = _imports_for_type_checkers(Path(file).read_text())

    def __getattr__(name: str) -> Any:
        if name not in source_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = source_of[name]
        value = getattr(importlib.import_module(module), attribute)
        return vars(sys.modules[package]).setdefault(name, value)

    return __getattr__


def _imports_for_type_checkers(source: str) -> dict[str, tuple[str, str]]:
    """Exported name -> (module, name there)."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
