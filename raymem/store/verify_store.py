"""Reads every object of a store back, and lists those damaged, foreign or missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from raymem.data import fingerprint_of
from raymem.errors import DamagedObjectError, RaymemError
from raymem.plan import Plan
from raymem.store import columns, trials
from raymem.store.derived import Note
from raymem.store.lock import DriverLock
from raymem.store.store import Store
from raymem.store.study_record import StudyRecord
from raymem.store.trials import TrialKey

NOTES = "|".join(get_args(Note))
LAYOUT = re.compile(
    rf"(study|target|driver|{NOTES})\.json|examples\.parquet|report\.html"
    r"|privacy/eps-[^/]+\.json|(scores|figures|models|checkpoints|curvature|damaged)/.+"
    r"|trials/eps-[^/]+/\d+\.parquet|failed/eps-[^/]+/\d+\.\d+\.json"
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One object that is damaged, foreign or missing."""

    kind: Literal["damaged", "foreign", "missing"]
    key: str
    detail: str


def verify(store: Store, *, repair: bool = False) -> list[Problem]:
    """Read everything back, and compare with the plan and the recorded digests.

    Missing are trials that the target wants and nobody has trained yet. With `repair`, damaged
    objects are moved to damaged/ so that the next run makes them again; foreign ones are left.

    Raises StoreError if study.json itself is gone or damaged, StoreHeldError if a live driver has
    the store and `repair` is asked for.
    """
    if not repair:
        return list(_problems(store))
    with DriverLock(store.files):
        problems = list(_problems(store))
        for problem in problems:
            if problem.kind == "damaged":
                store.files.move(problem.key, f"damaged/{problem.key}")
        for temporary in store.files.temporaries():
            temporary.unlink(missing_ok=True)
    return problems


def _problems(store: Store) -> Iterator[Problem]:
    if not store.files.exists("study.json") and store.streamed_models():
        yield from _streamed_problems(store)
        return
    record = sound_study(store)
    plan = record.plan
    yield from _examples_problems(store, record)
    for key in store.files.list():
        trial = TrialKey.parse(key)
        numbered = key.startswith(("trials/", "failed/", "models/", "checkpoints/"))
        if not LAYOUT.fullmatch(key) or (numbered and trial is None):
            yield Problem(kind="foreign", key=key, detail="not part of a store")
        elif trial is not None and key.startswith("trials/"):
            yield from _damage(key, partial(_check_trial, store, trial, plan, record.hash))
        elif key.endswith(".json") and key != "driver.json" and not key.startswith("damaged/"):
            yield from _damage(key, partial(_check_json, store, key))
        elif trial is not None and key.startswith("models/"):
            yield from _damage(key, partial(store.weights, trial))
        elif key.startswith(("scores/", "curvature/")) and key.endswith(".parquet"):
            yield from _damage(key, partial(_check_table, store, key))
    done = store.done()
    try:
        target = store.target
    except DamagedObjectError:  # found above, with the other JSON
        return
    for wanted in target.wanted():
        if wanted not in done:
            detail = "not trained yet, or given up"
            yield Problem(kind="missing", key=wanted.object_key, detail=detail)


def _streamed_problems(store: Store) -> Iterator[Problem]:
    """Problems of a store that holds streamed curvature only."""
    for key in store.files.list():
        if not LAYOUT.fullmatch(key):
            yield Problem(kind="foreign", key=key, detail="not part of a store")
        elif key.startswith("curvature/"):
            check = _check_json if key.endswith(".json") else _check_table
            yield from _damage(key, partial(check, store, key))


def _damage(key: str, check: Callable[[], object]) -> Iterator[Problem]:
    try:
        check()
    except (RaymemError, ValueError) as error:
        yield Problem(kind="damaged", key=key, detail=str(error))


def _examples_problems(store: Store, record: StudyRecord) -> Iterator[Problem]:
    key = "examples.parquet"
    if not store.files.exists(key):
        yield Problem(kind="missing", key=key, detail="the next run writes it again")
    else:
        yield from _damage(key, lambda: check_index(store.files.read(key), record))


def _check_json(store: Store, key: str) -> None:
    json.loads(store.files.read(key))
    if key == "target.json":
        _ = store.target
    if key.startswith("failed/"):
        store.failure(key)


def _check_table(store: Store, key: str) -> None:
    check_table(store.files.read(key), key)


def _check_trial(store: Store, key: TrialKey, plan: Plan, study_hash: str) -> None:
    check_trial(store.files.read(key.object_key), key, plan, study_hash)


def sound_study(store: Store) -> StudyRecord:
    """study.json. Raises DamagedObjectError if its hash is not that of the study in it."""
    record = store.study()
    if not record.is_sound:
        raise DamagedObjectError(
            f"study.json in {store.url} was edited: its hash does not fit; restore it from a copy"
        )
    return record


def check_index(data: bytes, record: StudyRecord) -> None:
    """Raises DamagedObjectError if these bytes are not the index of the study's examples."""
    table = check_table(data, "examples.parquet")
    if fingerprint_of(table, record.image_shape, record.classes) != record.fingerprint:
        raise DamagedObjectError("does not match the study's data set")


def check_table(data: bytes, key: str) -> pa.Table:
    """The table in these bytes. Raises DamagedObjectError if they are not those written for it."""
    table = trials.decode(data, key)
    if not trials.is_as_written(data, table):
        raise DamagedObjectError("its bytes are not those that were written")
    return table


def check_trial(data: bytes, key: TrialKey, plan: Plan, study_hash: str) -> trials.Provenance:
    """What is recorded of the trial in these bytes. Raises DamagedObjectError if it is not sound,
    of another study, or not the trial that `key` names."""
    table = check_table(data, key.object_key)
    about: trials.Provenance = trials.metadata_of(table, key.object_key)
    if about.get("study_hash") != study_hash:
        raise DamagedObjectError("belongs to another study")
    if trials.digest(table) != about.get("digest"):
        raise DamagedObjectError("its columns do not have the recorded digest")
    if not set(columns.TRIAL) <= set(table.column_names):
        missing = sorted(set(columns.TRIAL) - set(table.column_names))
        raise DamagedObjectError(f"has no column {', '.join(missing)}")
    inside = trials.train_part(table, key)["in_subset"].to_numpy()
    if plan.is_known and not np.array_equal(inside, plan.mask(key.trial)):
        raise DamagedObjectError("its subset is not the plan's")
    named = (table["epsilon"][0].as_py(), table["trial"][0].as_py())
    if named != tuple(key):
        raise DamagedObjectError(f"holds {TrialKey(*named)}")
    return about
