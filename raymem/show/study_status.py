"""`StudyStatus`: how far a study is, who drives it, what fails, what it has cost, why it stalls."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from raymem.encoding import JsonObject, duration
from raymem.fleet import Snapshot
from raymem.fleet.progress import GroupProgress, by_node
from raymem.store import FailureCause, Store, TrialKey, failure_causes, is_alive, read_driver

SAMPLED_TRIALS = 50
# A driver without a heartbeat for so many of its intervals hangs, or its host is lost.
INTERVALS_MISSED, LEAST_MISSED_SECONDS = 6, 60.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the trials of a store took, from a sample of them."""

    trials: int
    sampled: int
    mean_seconds: float
    """Of one trial, on its device."""
    devices: tuple[str, ...]
    price: float | None = None
    """Of an hour of such a device."""

    @classmethod
    def of(cls, store: Store, done: Collection[TrialKey], price: float | None) -> Cost | None:
        """None without trials."""
        if not done:
            return None
        sample = [
            store.provenance(key) for key in sorted(done)[:: math.ceil(len(done) / SAMPLED_TRIALS)]
        ]
        seconds = [
            trial["seconds"]
            + ((trial["curvature"]["seconds"] or 0.0) if "curvature" in trial else 0.0)
            for trial in sample
        ]
        return cls(
            trials=len(done),
            sampled=len(sample),
            mean_seconds=math.fsum(seconds) / len(sample),
            devices=tuple(sorted({trial["device"] for trial in sample})),
            price=price,
        )

    def seconds(self, trials: int | None = None) -> float:
        """Device seconds of all trials so far, or of so many."""
        return self.mean_seconds * (self.trials if trials is None else trials)

    def priced(self, seconds: float) -> str:
        """The price of device seconds; empty if none is known."""
        return "" if self.price is None else f" ({seconds / 3600 * self.price:,.2f})"


@dataclass(frozen=True, kw_only=True)
class StudyStatus(JsonObject):
    """A study's status at one moment; `raymem status` prints it."""

    url: str
    study: str
    """Data set, plan and model."""
    done: int
    wanted: int
    beyond: int = 0
    """Trials that are done and not wanted."""
    part: str = ""
    """Which part of how many trials this store is to have; empty: all."""
    failed_attempts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Recorded failures of trials, by kind."""
    given_up: int = 0
    """Wanted trials with recorded failures and without a result."""
    causes: tuple[FailureCause, ...] = ()
    """What failed in all runs, the most frequent first."""
    driver: Mapping[str, Any] | None = None
    """driver.json, if a driver has the store."""
    driver_is: Literal["none", "alive", "silent", "dead"] = "none"
    silent_seconds: float = 0.0
    """Since the driver's last heartbeat."""
    quiet_seconds: float | None = None
    """Since the last commit of the fleet that runs, or its start; None without one."""
    cost: Cost | None = None

    @classmethod
    def read(
        cls, store: Store, *, price: float | None = None, now: datetime | None = None
    ) -> StudyStatus:
        """The status of a store that has a study."""
        now = now or datetime.now(UTC)
        study, target, done = store.study(), store.target, store.done()
        wanted = set(target.wanted())
        failures = store.failures()
        driver = read_driver(store.files)
        silent = _since(driver["heartbeat"], now) if driver and "heartbeat" in driver else 0.0
        quiet = None if driver is None else driver["progress"].get("quiet_since")
        return cls(
            url=store.url,
            study=f"{study.data_name}, {study.plan}, model {study.model}",
            done=len(done & wanted),
            wanted=len(wanted),
            beyond=len(done - wanted),
            part="" if target.part is None else f"part {target.part} of {target.trials:,} trials",
            failed_attempts=Counter(f.cause for f in failures),
            given_up=len({failure.key for failure in failures} & wanted - done),
            causes=tuple(failure_causes(store)),
            driver=driver,
            driver_is=_state(store, driver, silent),
            silent_seconds=silent,
            quiet_seconds=None if quiet is None else _since(quiet, now),
            cost=Cost.of(store, done, price),
        )

    @property
    def progress(self) -> Mapping[str, Any]:
        """What the driver says of its stage; empty without a driver."""
        return {} if self.driver is None else self.driver["progress"]

    @property
    def complete(self) -> bool:
        """Are all wanted trials done?"""
        return self.done >= self.wanted

    @property
    def over(self) -> bool:
        """Is nothing driven, and nothing left to train but trials that were given up?"""
        idle = self.driver_is in ("none", "dead")
        return idle and self.done + self.given_up >= self.wanted

    @property
    def groups(self) -> list[GroupProgress]:
        """Where the workers are, by node."""
        return by_node([GroupProgress(**group) for group in self.progress.get("groups", ())])

    @property
    def snapshot(self) -> Snapshot:
        """For a progress bar."""
        rate = self.progress.get("rate")
        notes = [f"{self.progress['running']} running"] if self.progress.get("running") else []
        if self.progress.get("starting"):
            notes.append(f"{self.progress['starting']} workers starting")
        if self.given_up:
            notes.append(f"{self.given_up} without result after failures")
        return Snapshot(
            what=str(self.progress.get("stage", "training")),
            unit="trials",
            done=self.done,
            total=self.wanted,
            rate=f"{duration(1 / rate)} per trial" if rate else "",
            seconds_left=self.progress.get("seconds_left"),
            notes=notes,
        )

    def stalled(self, after: float | None = None) -> str | None:
        """Why no trial is committed, in words; None if trials come, or none is missing.

        `after` so many seconds without a commit, by default what the driver was given.
        """
        if self.complete or "stage" in self.progress:
            return None
        if self.driver is None:
            if self.over:
                return None
            return "no driver: no job trains this study; run the job again"
        if self.driver_is == "dead":
            return "the driver died; run the job again"
        if self.driver_is == "silent":
            return (
                f"the driver on {self.driver['host']} (process {self.driver['pid']}) has sent no "
                f"heartbeat for {duration(self.silent_seconds)}: it hangs, or its host or the way "
                "to the store is lost; end it, and run the job again"
            )
        after = self.progress.get("stalled_seconds", math.inf) if after is None else after
        if self.quiet_seconds is None or self.quiet_seconds < after:
            return None
        why = self.progress.get("why_no_commit", "the driver does not say why")
        return f"no trial committed for {duration(self.quiet_seconds)}: {why}"

    def json_fields(self) -> Mapping[str, object]:
        """The fields, and `stalled`."""
        return {**vars(self), "stalled": self.stalled()}


def _since(time: str, now: datetime) -> float:
    # Clocks of two hosts differ.
    return max(0.0, (now - datetime.fromisoformat(time)).total_seconds())


def _state(
    store: Store, driver: Any, silent_seconds: float
) -> Literal["none", "alive", "silent", "dead"]:
    if driver is None:
        return "none"
    if not is_alive(driver, store.files, wait=False):
        return "dead"
    missed = max(LEAST_MISSED_SECONDS, INTERVALS_MISSED * driver["interval"])
    return "silent" if silent_seconds > missed else "alive"
