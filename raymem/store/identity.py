"""What makes a study that study: its hash, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from raymem.data import Examples

SHOWN = 5
Difference = tuple[str, object, object]


def study_hash(study: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what makes trials comparable."""
    return hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()


def differences(there: object, here: object, name: str = "") -> list[Difference]:
    """(name, there, here) of all that differs between two JSON-ready things."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            difference
            for key in sorted({*there, *here})
            for difference in differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if there == here else [(name, there, here)]


def brief(value: object) -> str:
    """A value in a message: of a long list, its start.

    >>> brief([5, 3, 9]), brief(list(range(80)))
    ('[5, 3, 9]', '[0, 1, 2, 3, 4, ...] (80)')
    """
    if not isinstance(value, list) or len(value) <= 2 * SHOWN:
        return str(value)
    return f"[{', '.join(map(str, value[:SHOWN]))}, ...] ({len(value):,})"


def changed_examples(index: pa.Table, examples: Examples) -> list[Difference]:
    """The same of the examples of a store's index and those at hand: the first few."""
    old, new = index.to_pylist(), examples.index_table().to_pylist()
    found: list[Difference] = []
    if len(old) != len(new):
        found.append(("examples", len(old), len(new)))
    for before, now in zip(old, new, strict=False):
        for name in ("example_id", "label", "content_hash"):
            if before[name] != now[name]:
                found.append((f"{before['example_id']}.{name}", before[name], now[name]))
    more = [("further examples", len(found) - SHOWN, "others")] if len(found) > SHOWN else []
    return found[:SHOWN] + more
