"""Merges two stores of one study, such as two clusters trained.

In:  two stores of one study, whose trials are disjoint, or the same where both have them.
Out: a store that has what either has, byte for byte. Scores, links and the report are made of all
     trials, so they are not copied: score it next.

Objects are created if absent, one at a time, so a merge that was killed goes on where it was.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raymem.errors import DamagedObjectError, StoreError, StudyMismatchError
from raymem.store.agreement import Agreement, describe_differences, named
from raymem.store.files import Files
from raymem.store.lock import DriverLock
from raymem.store.store import Store
from raymem.store.study_record import StudyRecord
from raymem.store.target import Target
from raymem.store.trials import Provenance, TrialKey
from raymem.store.verify_store import check_index, check_table, check_trial, sound_study

Place = Store | str | os.PathLike[str]
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class MergeSummary:
    """What one merge did, and what the merged store has now."""

    url: str
    """Where the merged store is."""
    trials: int
    """Trials that it has now."""
    missing: int
    """Trials of either target that are not trained yet."""
    there: int
    """Trials that it had before."""
    copied: int
    """Trials that were copied."""
    in_both: int
    """Trials that both stores have."""
    drift: int
    """Trials with different results on other hardware or a GPU; the first result was kept."""
    weights: int
    """Models whose weights were copied."""
    failures: int
    """Records of failed attempts that were copied."""
    shards: int
    """Shards of streamed curvature that were copied."""


def merge(
    first: Place,
    second: Place,
    out: Place,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeSummary:
    """Copy into `out` what `first` and `second` have of one study; `score` it next.

    `out` is new, a store of the same study whose own results stay, or `first` itself. Copied are
    trials, failures, kept weights, mechanisms and streamed curvature; the target becomes the larger
    number of trials and all epsilons. Of two equal results the first store's is taken, except that
    the one with kept weights is. Every trial of `first` and `second` is read back, one at a time,
    unless a third store `out` has it. Run it again after a kill: it goes on.

    `progress` is told how many of how many parts are done.

    Raises StudyMismatchError with the differences if these are not of one study or one mechanism,
    ResultMismatchError naming the trials of which the same hardware gave two results,
    DamagedObjectError naming what does not read back, StoreHeldError if a live driver has `out`,
    StoreError if the three places cannot be merged so.

    >>> import raymem
    >>> digits, recipe = raymem.load_examples("digits"), raymem.Recipe(model="mlp-8", epochs=1)
    >>> for url, other in (("memory://merge-a", 1), ("memory://merge-b", 0)):
    ...     study = raymem.Study(examples=digits, recipe=recipe, store=url, trials=2)
    ...     _ = study.train(engine="serial")
    ...     Store(url).files.delete(TrialKey(float("inf"), other).object_key)
    >>> merge("memory://merge-a", "memory://merge-b", "memory://merge-out").trials
    2
    """
    a, b, into = (x if isinstance(x, Store) else Store(x) for x in (first, second, out))
    if _where(into.files) == _where(a.files):
        into = a
    _check_places(a, b, into)
    # Checked again under the lock, when nobody else can create a study in `out`.
    record = _check_studies(a, b, into)
    work = _Merge(a, b, into, record)
    with DriverLock(into.files, progress=lambda: {"stage": "merge", "left": work.left}) as lock:
        _check_studies(a, b, into)
        return work.run(lock, progress)


def _where(files: Files) -> str:
    return str(Path(files.root).resolve()) if files.local else files.url


def _check_places(first: Store, second: Store, out: Store) -> None:
    a, b, into = (_where(store.files) for store in (first, second, out))
    if a == b:
        raise StoreError(f"{first.url} is given twice; give two stores")
    if into == b:
        raise StoreError(
            f"{out.url} is the second store, but where results differ the first store's are kept; "
            f"give it first: `raymem merge {out.url} {first.url} {out.url}`"
        )
    for inner, outer in itertools.permutations((a, b, into), 2):
        if inner.startswith(outer.rstrip("/") + "/"):
            raise StoreError(f"{inner} is inside {outer}; choose places that are not")


def _check_studies(first: Store, second: Store, out: Store) -> StudyRecord:
    """The study of all three stores. Raises StudyMismatchError if they differ."""
    record = sound_study(first)
    others = [second]
    if out is not first and out.files.exists("study.json"):
        others.append(out)
    elif out is not first and out.done():
        raise StoreError(f"{out.url} has trials but no study.json; choose another OUT")
    for other in others:
        there = sound_study(other)
        if there.hash != record.hash:
            shown = describe_differences(first, record.identity, other, there.identity)
            raise StudyMismatchError(
                f"{first.url} and {other.url} are of two studies ({shown}); merge stores of one"
            )
    return record


class _Merge:
    """One merge; `out` is `first` itself, or another store."""

    def __init__(self, first: Store, second: Store, out: Store, record: StudyRecord) -> None:
        self.first, self.second, self.out, self.record = first, second, out, record
        self.plan = record.plan
        self.others = [store for store in (first, second) if store is not out]
        self.counts: Counter[str] = Counter()
        self.left = 0
        """Parts that are not copied yet."""

    def run(self, lock: DriverLock, progress: Callable[[int, int], None]) -> MergeSummary:
        """Compare what can be compared without reading whole trials, then copy."""
        self.both = both = Agreement([self.out, *self.others])
        drift, mechanisms, curvature = both.drift(), both.mechanisms(), both.curvature()
        self._write_study(mechanisms)
        steps: list[Step] = [partial(self._copy_trial, key) for key in both.every]
        steps += self._failures()
        steps += [partial(self._copy_shard, store, key) for store, key in curvature]
        self.left = len(steps)
        for step in steps:
            lock.check()
            step()
            self.left -= 1
            progress(len(steps) - self.left, len(steps))
        return MergeSummary(
            url=self.out.url,
            trials=len(both.every),
            missing=len(set(self.out.target.wanted()) - set(both.every)),
            there=len(both.done[self.out]),
            copied=self.counts["trials"],
            in_both=len(both.done[self.first] & both.done[self.second]),
            drift=drift,
            weights=self.counts["weights"],
            failures=self.counts["failed"],
            shards=self.counts["shards"],
        )

    def _write_study(self, mechanisms: Mapping[str, Store]) -> None:
        """study.json first: without it a store is none. The target tells what is still missing."""
        files = self.out.files
        files.create("study.json", self.first.files.read("study.json"))
        for store in self.others:
            if not files.exists("examples.parquet") and store.files.exists("examples.parquet"):
                data = store.files.read("examples.parquet")
                with named(store, "examples.parquet"):
                    check_index(data, self.record)
                files.create("examples.parquet", data)
        for key, store in mechanisms.items():
            files.create(key, store.files.read(key))
        targets = []
        for store in self.both.stores:
            if store.files.exists("target.json"):
                with named(store, "target.json"):
                    targets.append(store.target)
        if targets:
            epsilons = sorted({epsilon for target in targets for epsilon in target.epsilons})
            trials = max(target.trials for target in targets)
            parts = {target.part for target in targets}
            self.out.target = Target(
                trials=trials,
                epsilons=tuple(epsilons),
                part=parts.pop() if len(parts) == 1 else None,
            )

    def _copy_trial(self, key: TrialKey) -> None:
        """Weights first: once the trial is there, it is complete."""
        if self.out is not self.first and key in self.both.done[self.out]:
            if any(key in self.both.kept[store] for store in self.others):
                self._copy_weights(key, self.both.about(self.out, key))
            return
        lead, about = self.both.lead(key)
        data = b""
        for store in self.both.having(key):
            read = store.files.read(key.object_key)
            with named(store, key.object_key):
                check_trial(read, key, self.plan, self.record.hash)
            data = read if store is lead else data
        self._copy_weights(key, about)
        if lead is not self.out:
            self.counts["trials"] += self.out.files.create(key.object_key, data)

    def _copy_weights(self, key: TrialKey, about: Provenance) -> None:
        """Copy the weights that `about` names, if any store keeps them."""
        from raymem.store.weights import decode_weights

        name, committed = key.weights_key, key in self.both.done[self.out]
        if about.get("weights") is None or (committed and key in self.both.kept[self.out]):
            return
        for store in self.others:
            if key not in self.both.kept[store] or key not in self.both.done[store]:
                continue
            if self.both.about(store, key).get("weights") != about["weights"]:
                continue
            data = store.files.read(name)
            with named(store, name):
                if decode_weights(data, name)[1]["digest"] != about["weights"]:
                    raise DamagedObjectError(f"is of another run of {key}")
            created = self.out.files.create(name, data)
            if not created and not committed and self.out.files.read(name) != data:
                # Another run was killed before it committed the trial, and left its weights.
                self.out.files.replace(name, data)
                created = True
            self.counts["weights"] += created
            return

    def _failures(self) -> Iterator[Step]:
        there = set(self.out.files.list("failed"))
        for store in self.others:
            for key in store.files.list("failed"):
                if TrialKey.parse(key) is not None and key not in there:
                    there.add(key)
                    yield partial(self._copy_failure, store, key)

    def _copy_failure(self, store: Store, key: str) -> None:
        with named(store, key):
            store.failure(key)
        self.counts["failed"] += self.out.files.create(key, store.files.read(key))

    def _copy_shard(self, store: Store, key: str) -> None:
        """One object of curvature/, unless it is there."""
        if self.out.files.exists(key):
            return
        data = store.files.read(key)
        if key.endswith(".parquet"):
            with named(store, key):
                check_table(data, key)
        created = self.out.files.create(key, data)
        self.counts["shards"] += created and key.endswith(".parquet")
