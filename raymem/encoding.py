"""How results are written: epsilons, counts and times in text, and JSON in both directions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import numpy as np
import pyarrow as pa

T = TypeVar("T")
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


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


class JsonObject:
    """A dataclass that is a JSON object of its fields, or of what `json_fields` gives instead."""

    def json_fields(self) -> Mapping[str, object]:
        """Key -> value; values may be anything that `to_json` takes."""
        return vars(self)

    def as_dict(self) -> dict[str, Json]:
        """JSON-ready."""
        return json_object(self.json_fields())


def to_json(value: object) -> Json:
    """A copy that JSON can hold; the only place that says how results are written.

    Dataclasses are objects of their fields, arrays and tuples are lists, Arrow tables are lists of
    rows; NaN is null, inf is "inf", and a key that is an epsilon is its name. Raises TypeError for
    anything else.

    >>> to_json({"low": math.nan, math.inf: (0.5, math.inf), 2.0: np.arange(2)})
    {'low': None, 'inf': [0.5, 'inf'], '2': [0, 1]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return json_object(value)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, pa.Table):
        return to_json(value.to_pylist())
    if isinstance(value, JsonObject):
        return value.as_dict()
    if dataclasses.is_dataclass(value):
        return json_object(vars(value))
    raise TypeError(f"{type(value).__name__} has no JSON")


def json_object(fields: Mapping[Any, object]) -> dict[str, Json]:
    """`to_json` of a mapping."""
    return {
        epsilon_name(key) if isinstance(key, float) else str(key): to_json(value)
        for key, value in fields.items()
    }


def json_bytes(value: object) -> bytes:
    """A result as stores write it, indented."""
    return json.dumps(to_json(value), indent=1, allow_nan=False).encode() + b"\n"


@overload
def from_json(kind: type[T], data: object) -> T: ...


@overload
def from_json(kind: object, data: object) -> Any: ...


def from_json(kind: Any, data: Any) -> Any:
    """The value of type `kind` that `to_json` made `data` of: null is NaN where a float is wanted.

    `kind` is a dataclass of such, float, int, bool, str, a Literal, an optional, or a list, tuple
    or dict of such. Raises TypeError or ValueError for data of another form.

    >>> from_json(dict[float, list[float]], {"inf": [0.5, None, "inf"]})
    {inf: [0.5, nan, inf]}
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return from_json(arguments[0], data)
    if kind is Any:
        return data
    if kind is float:
        return math.nan if data is None else float(data)
    if origin in (Union, UnionType):
        if data is None and NoneType in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return from_json(kind, data)
    if origin is list:
        return [from_json(arguments[0], item) for item in _expect(list, data)]
    if origin is tuple:
        items = _expect(list, data)
        kinds = [arguments[0]] * len(items) if arguments[1:] == (...,) else arguments
        return tuple(from_json(k, item) for k, item in zip(kinds, items, strict=True))
    if origin in (dict, Mapping):
        key, of = arguments
        pairs = _expect(dict, data).items()
        return {from_json(key, name): from_json(of, item) for name, item in pairs}
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{data!r} is not one of {arguments}")
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass_from(kind, _expect(dict, data))
    return _expect(kind, data)


def _dataclass_from(kind: Any, data: Mapping[str, object]) -> Any:
    """Keys that the dataclass lacks are an error, as are fields without a default that are not
    there."""
    hints = get_type_hints(kind, include_extras=True)
    unknown = data.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: from_json(hints[name], value) for name, value in data.items()})


def _expect(kind: type[T], data: object) -> T:
    if type(data) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(data).__name__}")
    return data
