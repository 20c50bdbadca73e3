"""Checks that stores of one study agree on what they share. Read-only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from raymem.errors import (
    DamagedObjectError,
    PlanError,
    ResultMismatchError,
    StudyMismatchError,
    first_line,
)
from raymem.privacy import Mechanism
from raymem.store.store import READERS, Store
from raymem.store.study_record import SHOWN, differences
from raymem.store.trials import Provenance, TrialKey, may_differ

COMPARED = ("digest", "arithmetic", "device")


def describe_differences(first: Store, one: object, second: Store, other: object) -> str:
    """The differences between two values of two stores, on one line."""
    found = differences(one, other)
    shown = [f"{name}: {first.url} has {a}, {second.url} has {b}" for name, a, b in found[:SHOWN]]
    return "; ".join(shown + [f"{len(found) - SHOWN} more"] * (len(found) > SHOWN))


@contextmanager
def named(store: Store, key: str) -> Iterator[None]:
    """Errors about a damaged object name its store, and the command that repairs it."""
    try:
        yield
    except (DamagedObjectError, PlanError, ValueError, KeyError, TypeError) as error:
        cause = first_line(error).partition("; ")[0].removeprefix(f"{key} ")
        raise DamagedObjectError(
            f"{key} in {store.url} is damaged ({cause}); run `raymem verify {store.url} "
            "--repair`, then merge again; its job makes again what nobody else has"
        ) from error


class Agreement:
    """The contents of several stores of one study, in order of precedence.

    The first store is the one that is written to; its objects are never replaced.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores, self.into = list(stores), stores[0]
        self.done = {store: store.done() for store in stores}
        self.kept = {store: store.kept() for store in stores}
        self.every = sorted(set().union(*self.done.values()))
        """All trials that any store has."""

    def having(self, key: TrialKey) -> list[Store]:
        """The stores that have a trial, in order."""
        return [store for store in self.stores if key in self.done[store]]

    def about(self, store: Store, key: TrialKey) -> Provenance:
        """The provenance of a trial in one store. Raises DamagedObjectError."""
        with named(store, key.object_key):
            about = store.provenance(key)
            lacks = [name for name in COMPARED if name not in about]
            if lacks:
                raise DamagedObjectError(f"does not record {', '.join(lacks)}")
        return about

    def drift(self) -> int:
        """Number of trials whose results differ because of other hardware, or a GPU.

        Raises ResultMismatchError naming the trials that differ on the same hardware.
        """
        shared = [key for key in self.every if len(self.having(key)) > 1]
        with ThreadPoolExecutor(READERS, thread_name_prefix="raymem-read") as pool:
            differ = dict(zip(shared, pool.map(self._differ, shared), strict=True))
        wrong = [(key, pair) for key, pairs in differ.items() for pair, may in pairs if not may]
        if wrong:
            names = list(dict.fromkeys(str(key) for key, _ in wrong))
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            one, other = wrong[0][1]
            raise ResultMismatchError(
                f"{', '.join(names[:SHOWN])}{more}: {one.url} and {other.url} have two results of "
                "the same hardware, so the model draws randomness that raymem does not seed, or "
                "the code changed; find out which is right, and remove these trials from the other"
            )
        return sum(bool(pairs) for pairs in differ.values())

    def _differ(self, key: TrialKey) -> list[tuple[tuple[Store, Store], bool]]:
        """Pairs of stores whose results of a trial differ, and whether they may."""
        found = [(store, self.about(store, key)) for store in self.having(key)]
        return [
            ((one, other), may_differ(a, b))
            for (one, a), (other, b) in itertools.combinations(found, 2)
            if a["digest"] != b["digest"]
        ]

    def lead(self, key: TrialKey) -> tuple[Store, Provenance]:
        """The store whose result is kept, and its provenance: the first store, or of equal results
        the first with kept weights."""
        found = [(store, self.about(store, key)) for store in self.having(key)]
        lead, about = found[0]
        for store, its in found[1:]:
            better = self._keeps(store, key, its) and not self._keeps(lead, key, about)
            if better and lead is not self.into and its["digest"] == about["digest"]:
                lead, about = store, its
        return lead, about

    def _keeps(self, store: Store, key: TrialKey, about: Provenance) -> bool:
        return key in self.kept[store] and about.get("weights") is not None

    def _json(self, store: Store, key: str) -> dict[str, object]:
        with named(store, key):
            body = json.loads(store.files.read(key))
            if not isinstance(body, dict):
                raise ValueError("is no object")
            return body

    def mechanisms(self) -> dict[str, Store]:
        """The store of each mechanism. Raises StudyMismatchError if two stores disagree."""
        found: dict[str, tuple[Store, Mapping[str, object]]] = {}
        for store in self.stores:
            for key in store.files.list("privacy"):
                body = self._json(store, key)
                with named(store, key):
                    mechanism = Mechanism.from_dict(body).as_dict()
                holder, before = found.setdefault(key, (store, mechanism))
                if before != mechanism:
                    raise StudyMismatchError(
                        f"{key} is not one mechanism "
                        f"({describe_differences(holder, before, store, mechanism)}); its trials "
                        "belong apart: merge neither, or train that epsilon again in one of the two"
                    )
        return {key: store for key, (store, _) in found.items()}

    def curvature(self) -> list[tuple[Store, str]]:
        """The objects in curvature/ that are to be copied, and the stores that have them.

        Scores under a model whose trial is not kept are left out. Raises StudyMismatchError if the
        shards of one model were scored with different settings.
        """
        trials = {key.name: key for key in self.every}
        streamed = {store: store.streamed() for store in self.stores}
        found = []
        for model in sorted(set().union(*streamed.values())):
            about = f"curvature/{model}/_about.json"
            records = {s: self._record(s, about) for s in self.stores if model in streamed[s]}
            if model in trials:
                weights = self.lead(trials[model])[1].get("weights")
                ours = {s: r for s, r in records.items() if r.get("weights") == weights}
                records = {} if self.into in records and self.into not in ours else ours
            for (one, first), (two, second) in itertools.pairwise(records.items()):
                if first != second:
                    raise StudyMismatchError(
                        f"curvature/{model} was made in two ways "
                        f"({describe_differences(one, first, two, second)}); move that folder out "
                        "of one of the two stores, then merge again"
                    )
            for store in [store for store in records if store is not self.into]:
                shards = (f"curvature/{model}/{shard}.parquet" for shard in streamed[store][model])
                found += [(store, key) for key in ([about] if records[store] else [])]
                found += [(store, key) for key in sorted(shards)]
        return found

    def _record(self, store: Store, key: str) -> dict[str, object]:
        """The settings of the shards beside `key`, without the version; empty if unknown."""
        if not store.files.exists(key):
            return {}
        return {**self._json(store, key), "raymem": None}
