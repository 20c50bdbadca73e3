"""study.json as a typed record: what makes the trials of a store comparable, and its names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from raymem.data import Examples
from raymem.encoding import json_bytes
from raymem.errors import DamagedObjectError, StoreError
from raymem.plan import Plan
from raymem.version import VERSION

FORMAT = 1
SHOWN = 5
REQUIRED = ("format", "study", "hash", "classes", "data_name")
Difference = tuple[str, object, object]


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What study.json holds.

    >>> identity = {"data": {"n_train": 3}, "plan": Plan(n=3).as_dict(), "recipe": {}}
    >>> record = StudyRecord.create(identity, data_name="three", classes=["a", "b"])
    >>> StudyRecord.decode(record.encode(), "memory://example") == record, record.plan.n
    (True, 3)
    """

    identity: Mapping[str, Any]
    """All that makes trials comparable, as JSON-ready data: data, plan, recipe, and curvature and
    privacy where the study has them. `hash` covers it."""
    hash: str
    """SHA-256 of the identity's canonical JSON."""
    data_name: str
    """Name of the data set."""
    classes: tuple[str, ...]
    """Names of the classes."""
    data_source: str
    """Where the images are; empty if the study does not know."""
    created: str
    """When the store was made, ISO 8601."""
    raymem: str
    """The version of raymem that made it."""

    @classmethod
    def create(
        cls,
        identity: Mapping[str, Any],
        *,
        data_name: str,
        classes: Sequence[str],
        data_source: str = "",
    ) -> StudyRecord:
        """The record of a new study."""
        return cls(
            identity=json.loads(json.dumps(identity)),
            hash=study_hash(identity),
            data_name=data_name,
            classes=tuple(classes),
            data_source=data_source,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            raymem=VERSION,
        )

    def encode(self) -> bytes:
        """The bytes of study.json."""
        body = {
            "format": FORMAT,
            "hash": self.hash,
            "study": self.identity,
            "data_name": self.data_name,
            "data_source": self.data_source,
            "classes": list(self.classes),
            "created": self.created,
            "raymem": self.raymem,
        }
        return json_bytes(body)

    @classmethod
    def decode(cls, data: bytes, url: str) -> StudyRecord:
        """The record in the bytes of a store's study.json; errors name the store at `url`.

        Raises DamagedObjectError for other bytes, StoreError for the format of a newer raymem.
        """
        try:
            body = json.loads(data)
        except ValueError as error:
            raise _damaged(url, error) from error
        if not isinstance(body, dict):
            raise _damaged(url, "not a JSON object")
        missing = [name for name in REQUIRED if name not in body]
        if missing:
            raise _damaged(url, f"{', '.join(missing)} missing")
        if body["format"] != FORMAT:
            raise StoreError(
                f"{url} has format {body['format']}, this raymem reads {FORMAT}; install raymem "
                f"{body.get('raymem')}"
            )
        return cls(
            identity=body["study"],
            hash=body["hash"],
            data_name=body["data_name"],
            classes=tuple(body["classes"]),
            data_source=body.get("data_source", ""),
            created=body.get("created", ""),
            raymem=body.get("raymem", ""),
        )

    @property
    def is_sound(self) -> bool:
        """Is `hash` the hash of the identity? False if study.json was edited."""
        return study_hash(self.identity) == self.hash

    @property
    def plan(self) -> Plan:
        """The plan: which example is in which trial."""
        return Plan.from_dict(self.identity["plan"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe's settings; of an imported fleet, the model's name only."""
        recipe: Mapping[str, Any] = self.identity["recipe"]
        return recipe

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.recipe["model"]["name"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data set: ids, labels and pixels."""
        return str(self.identity["data"]["fingerprint"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels); zeros for a fleet that was imported without images."""
        height, width, channels = self.identity["data"]["image_shape"]
        return height, width, channels

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return int(self.identity["data"]["n_train"])

    @property
    def n_test(self) -> int:
        """Number of test examples."""
        return int(self.identity["data"]["n_test"])

    @property
    def flipped(self) -> tuple[int, ...]:
        """Indices of the training examples whose labels were flipped on purpose."""
        return tuple(self.identity["data"].get("planted", ()))

    @property
    def canaries(self) -> tuple[int, ...]:
        """Indices of the training examples that were made for an audit of privacy."""
        return tuple(self.identity["data"].get("canaries", ()))

    @property
    def curvature(self) -> Mapping[str, Any] | None:
        """The curvature rule's settings; None if the study measures no curvature."""
        return self.identity.get("curvature")

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        """The privacy settings; None if no trial is private."""
        return self.identity.get("privacy")


def _damaged(url: str, cause: object) -> DamagedObjectError:
    return DamagedObjectError(f"study.json in {url} is damaged ({cause}); restore it from a copy")


def study_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what makes trials comparable."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(first: object, second: object, name: str = "") -> list[Difference]:
    """(name, value in the first, value in the second) of all that differs in JSON-ready data."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            difference
            for key in sorted({*first, *second})
            for difference in differences(
                first.get(key), second.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if first == second else [(name, first, second)]


def brief(value: object) -> str:
    """A value in a message: the start of a long list.

    >>> brief([5, 3, 9]), brief(list(range(80)))
    ('[5, 3, 9]', '[0, 1, 2, 3, 4, ...] (80)')
    """
    if not isinstance(value, list) or len(value) <= 2 * SHOWN:
        return str(value)
    return f"[{', '.join(map(str, value[:SHOWN]))}, ...] ({len(value):,})"


def changed_examples(index: pa.Table, examples: Examples) -> list[Difference]:
    """The first differences between a store's index and the examples at hand."""
    before, now = index.to_pylist(), examples.index_table().to_pylist()
    found: list[Difference] = []
    if len(before) != len(now):
        found.append(("examples", len(before), len(now)))
    for one, other in zip(before, now, strict=False):
        for name in ("example_id", "label", "content_hash"):
            if one[name] != other[name]:
                found.append((f"{one['example_id']}.{name}", one[name], other[name]))
    more = [("further examples", len(found) - SHOWN, "others")] if len(found) > SHOWN else []
    return found[:SHOWN] + more
