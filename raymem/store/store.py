"""`Store`: what is in a study's folder or bucket prefix, and the only code that writes there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from raymem.data import Examples, group_column
from raymem.encoding import epsilon_name, json_bytes
from raymem.errors import (
    DamagedObjectError,
    PlanError,
    ResultMismatchError,
    StoreError,
    StudyMismatchError,
)
from raymem.plan import Plan
from raymem.privacy import Mechanism
from raymem.store import columns, trials
from raymem.store.derived import Derived
from raymem.store.study_record import (
    SHOWN,
    StudyRecord,
    brief,
    changed_examples,
    differences,
)
from raymem.store.target import Failure, Part, Target
from raymem.store.trials import TrialKey

if TYPE_CHECKING:
    from torch import Tensor

READERS = 8


class Store(Derived):
    """One study's store at any fsspec URL.

    >>> store = Store("memory://doctest-store")
    >>> store.done()
    set()
    """

    def open_study(self, identity: Mapping[str, object], examples: Examples) -> None:
        """Create the study in this store, or check that it is the one that is there.

        `identity` is JSON-ready data: all that makes trials comparable. Raises StudyMismatchError
        with the differences if the store has another one.
        """
        record = StudyRecord.create(
            identity,
            data_name=examples.name,
            classes=examples.classes,
            data_source=examples.source,
        )
        if not self.files.exists("study.json"):
            self.files.create("study.json", record.encode())
        self._check_study(record, examples)
        if not self.files.exists("examples.parquet"):
            near = group_column(examples.near_duplicate_groups(), examples.n_examples)
            index = examples.index_table().append_column("near_duplicate_group", near)
            self.create_index(index, record)

    def import_study(self, record: StudyRecord, index: pa.Table) -> None:
        """Create or check the study of a fleet whose images are not at hand, only their index.

        Raises StudyMismatchError if the store has another study.
        """
        if not self.files.exists("study.json"):
            self.files.create("study.json", record.encode())
        there = self.study()
        if there.hash != record.hash:
            raise StudyMismatchError(
                f"{self.url} belongs to another study ({there.data_name}); choose another STORE"
            )
        self.create_index(index, record)

    def create_index(self, index: pa.Table, record: StudyRecord) -> None:
        """Write examples.parquet, if it is not there."""
        table = index.select(list(columns.EXAMPLES)).cast(columns.schema(columns.EXAMPLES))
        metadata = {"fingerprint": record.fingerprint, "name": record.data_name}
        self.files.create("examples.parquet", trials.encode(table, metadata))

    def _check_study(self, record: StudyRecord, examples: Examples) -> None:
        there = self.study()
        if there.hash == record.hash:
            return
        found = differences(there.identity, record.identity)
        if any(name.startswith("data.") for name, _, _ in found) and self.files.exists(
            "examples.parquet"
        ):
            found += changed_examples(self.examples(), examples)
        shown = "; ".join(
            f"{name}: store has {brief(a)}, this run has {brief(b)}" for name, a, b in found
        )
        raise StudyMismatchError(
            f"{self.url} belongs to another study ({shown}); choose another --store, or go back to "
            "the settings of the store"
        )

    def plan(self) -> Plan:
        """The study's plan."""
        return self.study().plan

    def examples(self) -> pa.Table:
        """The set's index, examples.parquet: train first."""
        return self._table("examples.parquet", "run the study's job, which writes it")

    @property
    def target(self) -> Target:
        """The target of the study; zero trials before the first run."""
        try:
            body = json.loads(self.files.read("target.json"))
            epsilons = tuple(float(epsilon) for epsilon in body["epsilons"])
            part = Part(**body["part"]) if "part" in body else None
            return Target(trials=int(body["trials"]), epsilons=epsilons, part=part)
        except FileNotFoundError:
            return Target(trials=0)
        except (ValueError, KeyError, TypeError, PlanError) as error:
            raise DamagedObjectError(
                f"target.json is damaged ({error}); run `raymem verify STORE --repair`, then the "
                "job"
            ) from error

    @target.setter
    def target(self, target: Target) -> None:
        if target == self.target and self.files.exists("target.json"):
            return
        epsilons = [epsilon_name(epsilon) for epsilon in target.epsilons]
        body: dict[str, object] = {"trials": target.trials, "epsilons": epsilons}
        if target.part is not None:
            body["part"] = vars(target.part)
        self.files.replace("target.json", json_bytes(body))

    def mechanism(self, epsilon: float) -> Mechanism | None:
        """The mechanism of all private trials at `epsilon`; None if it is not fixed yet."""
        try:
            return Mechanism.from_dict(json.loads(self.files.read(_mechanism_key(epsilon))))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise DamagedObjectError(
                f"{_mechanism_key(epsilon)} is damaged ({error}); restore it from a copy, or from "
                "the metadata of a trial at that epsilon"
            ) from error

    def fix_mechanism(self, mechanism: Mechanism) -> Mechanism:
        """Fix the mechanism of an epsilon for the life of the store; returns the fixed one.

        Another version of an accountant may find another noise for the same epsilon.
        """
        self.files.create(_mechanism_key(mechanism.epsilon), json_bytes(mechanism.as_dict()))
        fixed = self.mechanism(mechanism.epsilon)
        assert fixed is not None
        return fixed

    def done(self) -> set[TrialKey]:
        """The trials that are committed: a listing, nothing is read."""
        found = (TrialKey.parse(key) for key in self.files.list("trials"))
        return {key for key in found if key is not None}

    def failures(self) -> list[Failure]:
        """All recorded failures, in order of trial and attempt."""
        keys = [key for key in self.files.list("failed") if TrialKey.parse(key)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="raymem-read") as pool:
            found = list(pool.map(self.failure, keys))
        return sorted(found, key=lambda f: (f.key, f.attempt))

    def failure(self, key: str) -> Failure:
        """The recorded failure at `key`. Raises DamagedObjectError."""
        trial = TrialKey.parse(key)
        assert trial is not None
        try:
            body = json.loads(self.files.read(key))
            return Failure(key=trial, attempt=body["attempt"], cause=body["cause"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedObjectError(
                f"{key} is damaged ({error}); run `raymem verify STORE --repair`"
            ) from error

    def commit(self, key: TrialKey, table: pa.Table, provenance: Mapping[str, object]) -> str:
        """Commit one trial, once. Returns "committed", or "duplicate" if the same result is there,
        or "drift" if a result from other hardware is there and differs; the first one stays.

        Raises ResultMismatchError if the same arithmetic gave two results.
        """
        metadata = {**provenance, "digest": trials.digest(table)}
        if self.files.create(key.object_key, trials.encode(table, metadata)):
            return "committed"
        first = self.provenance(key)
        if first["digest"] == metadata["digest"]:
            return "duplicate"
        if trials.may_differ(first, metadata):
            return "drift"
        raise ResultMismatchError(
            f"{key} was trained twice on {metadata['arithmetic']} and gave two results; its model "
            "draws randomness that raymem does not seed, or the code changed; fix that and start a "
            "new store"
        )

    def keep_weights(
        self, key: TrialKey, weights: Mapping[str, Tensor], provenance: Mapping[str, object]
    ) -> None:
        """Keep a trial's weights, before it is committed with their digest."""
        from raymem.store.weights import encode_weights  # torch, which readers of tables never need

        self.files.replace(key.weights_key, encode_weights(weights, provenance))

    def kept(self) -> set[TrialKey]:
        """The trials whose weights are kept."""
        found = (TrialKey.parse(key) for key in self.files.list("models"))
        return {key for key in found if key is not None}

    def weights(self, key: TrialKey) -> dict[str, Tensor]:
        """A trial's state dict. Raises StoreError if it was not kept."""
        from raymem.store.weights import decode_weights

        try:
            data = self.files.read(key.weights_key)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{self.url} keeps no weights of {key}; train its study with --keep-models, or "
                "choose one of "
                + (", ".join(str(k.trial) for k in sorted(self.kept())[:SHOWN]) or "none")
            ) from error
        weights, about = decode_weights(data, key.weights_key)
        if about["study_hash"] != self.study().hash:
            raise StudyMismatchError(f"{key.weights_key} belongs to another study; remove it")
        if (
            self.files.exists(key.object_key)
            and self.provenance(key).get("weights") != about["digest"]
        ):
            raise DamagedObjectError(
                f"{key.weights_key} is not the model of {key}, but of another run of it; run "
                "`raymem verify STORE --repair`, and take another trial"
            )
        return weights

    def write_checkpoint(self, key: TrialKey, data: bytes) -> None:
        """Replace the checkpoint of a trial."""
        self.files.replace(key.checkpoint_key, data)

    def read_checkpoint(self, key: TrialKey) -> bytes | None:
        """The checkpoint of a trial, or None."""
        try:
            return self.files.read(key.checkpoint_key)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete_checkpoint(self, key: TrialKey) -> None:
        """Delete the checkpoint of a trial."""
        self.files.delete(key.checkpoint_key)

    def checkpointed(self) -> set[TrialKey]:
        """The trials that have a checkpoint: a listing, nothing is read."""
        found = (TrialKey.parse(key) for key in self.files.list("checkpoints"))
        return {key for key in found if key is not None}

    def record_failure(self, key: TrialKey, attempt: int, cause: str, message: str) -> None:
        """Record that an attempt at a trial failed; it is never counted as a trial."""
        body = {"trial": key.trial, "attempt": attempt, "cause": cause, "message": message}
        self.files.create(key.failed_key(attempt), json_bytes(body))

    def trial(self, key: TrialKey, names: Sequence[str] | None = None) -> pa.Table:
        """One trial's table (all columns, or `names`), with its metadata."""
        with self._trial_named(key):
            data = self.files.read(key.object_key)
        return trials.decode(data, key.object_key, None if names is None else list(names))

    def train_rows(self, key: TrialKey, names: Sequence[str]) -> pa.Table:
        """Columns of one trial's N training examples, in their order.

        Memorization, twins and attacks concern training examples only.
        """
        asked = [*names, *([] if "in_subset" in names else ["in_subset"])]
        table = self.trial(key, asked)
        return trials.train_part(table, key).select(list(names))

    def provenance(self, key: TrialKey) -> trials.Provenance:
        """The provenance of one trial; reads the footer of its object only."""
        name = key.object_key
        with self._trial_named(key):
            about: trials.Provenance = trials.metadata_at_end(
                lambda size: self.files.read_end(name, size), name
            )
        return about

    @contextmanager
    def _trial_named(self, key: TrialKey) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{key} is not in {self.url}; run the study's job, which trains what is missing "
                "and scores again"
            ) from error


def _mechanism_key(epsilon: float) -> str:
    return f"privacy/{TrialKey(epsilon, 0).folder}.json"
