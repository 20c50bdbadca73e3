"""How numbers are written: epsilons, counts, times, and numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def epsilon_name(epsilon: float) -> str:
    """The name of an epsilon in file names, keys and text: twelve digits, "inf" if not private.

    >>> epsilon_name(2.0), epsilon_name(0.1 + 0.2), epsilon_name(2.0000001), epsilon_name(math.inf)
    ('2', '0.3', '2.0000001', 'inf')
    """
    return f"{epsilon:.12g}"


def at_epsilon(epsilon: float) -> str:
    """For a sentence: " at epsilon 2"; nothing for models that are not private.

    >>> at_epsilon(2.0), at_epsilon(math.inf)
    (' at epsilon 2', '')
    """
    return "" if math.isinf(epsilon) else f" at epsilon {epsilon_name(epsilon)}"


def counted(n: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "shard"), counted(1200, "shard")
    ('1 shard', '1,200 shards')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """A length of time a person reads.

    >>> duration(0.25), duration(59), duration(61), duration(7300), duration(200_000)
    ('0.25 s', '59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second} s"
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minute} min"
    return f"{hours // 24} d {hours % 24} h"


def json_ready(value: Any) -> Any:
    """A copy of nested mappings and sequences that JSON can hold: NaN is null, inf is "inf".

    >>> json_ready({"low": math.nan, "epsilons": (0.5, math.inf)})
    {'low': None, 'epsilons': [0.5, 'inf']}
    """
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value


def as_json(body: Mapping[str, object]) -> bytes:
    """A JSON object as stores write it, indented."""
    return json.dumps(body, indent=1, allow_nan=False).encode() + b"\n"


def from_json(value: float | str | None) -> float:
    """The number that `json_ready` was given: null is NaN.

    >>> from_json(None), from_json("inf"), from_json(0.5)
    (nan, inf, 0.5)
    """
    return math.nan if value is None else float(value)
