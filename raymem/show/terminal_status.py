"""How far a store is, for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from raymem.encoding import counted
from raymem.fleet import duration
from raymem.store import MergeSummary, Store, TrialKey, is_alive, read_driver

SAMPLED_TRIALS = 50


def describe_store(store: Store) -> str:
    """What `raymem status` prints."""
    streamed = [
        f"curvature of {model}: {counted(len(shards), 'shard')}"
        for model, shards in sorted(store.streamed().items())
    ]
    if streamed and not store.files.exists("study.json"):
        return "\n".join([f"{store.url}: no study, only curvature of shards", *streamed])
    study, target, done = store.study(), store.target, store.done()
    wanted = set(target.wanted())
    lines = [
        f"{store.url}: {study.data_name}, {study.plan}, model {study.model}",
        f"trials: {len(done & wanted):,} of {len(wanted):,} done"
        + ("" if target.part is None else f" of part {target.part} of {target.trials:,} trials")
        + (f", and {len(done - wanted):,} more" if done - wanted else ""),
    ]
    failures = store.failures()
    if failures:
        causes = ", ".join(
            f"{n} {cause}" for cause, n in Counter(f.cause for f in failures).items()
        )
        lost = {failure.key for failure in failures} - done
        lines.append(f"failed attempts: {causes}; {len(lost)} trials have no result")
    driver = read_driver(store.files)
    if driver is None:
        lines.append("driver: none")
    elif not is_alive(driver, store.files, wait=False):
        lines.append(f"driver: died (process {driver['pid']} on {driver['host']}); rerun the job")
    else:
        lines.append(
            f"driver: process {driver['pid']} on {driver['host']} since {driver['started']}"
        )
        lines.append(_rate(driver["progress"]))
        lines += driver["progress"].get("notices", [])
    lines += [*streamed, _until(store)]
    if done:
        lines.append(_cost(store, sorted(done)))
    return "\n".join(line for line in lines if line)


def _rate(progress: dict[str, Any]) -> str:
    if "stage" in progress:
        return f"running: {progress['stage']}, {progress['left']:,} parts left"
    if not progress.get("rate"):
        return f"running: {progress.get('running', 0)}"
    left = progress.get("seconds_left")
    return (
        f"running: {progress['running']}, {duration(1 / progress['rate'])} per trial, "
        f"{duration(left or 0)} left"
    )


def _until(store: Store) -> str:
    """What a stopping rule has seen, and where it expects to stop."""
    note = store.note("until")
    if note is None:
        return ""
    seen = note["interim"][-1]
    value = "?" if seen["value"] is None else f"{seen['value']:.3f}"
    forecast = (
        "no forecast" if seen["forecast"] is None else f"forecast: {seen['forecast']:,} trials"
    )
    return (
        f"until {note['rule']}: {value} at {seen['trials']:,} trials, {forecast}, at most "
        f"{note['most_trials']:,}"
    )


def _cost(store: Store, done: Sequence[TrialKey]) -> str:
    step = math.ceil(len(done) / SAMPLED_TRIALS)
    sample = [store.provenance(key) for key in done[::step]]
    seconds = [
        trial["seconds"] + ((trial["curvature"]["seconds"] or 0.0) if "curvature" in trial else 0.0)
        for trial in sample
    ]
    mean = math.fsum(seconds) / len(sample)
    devices = " and ".join(sorted({trial["device"] for trial in sample}))
    about = "" if len(sample) == len(done) else f", from {len(sample)} of them"
    return (
        f"cost so far: {duration(mean * len(done))} of {devices}, {duration(mean)} a trial{about}"
    )


def merge_text(summary: MergeSummary) -> str:
    """What `raymem merge` prints."""
    s = summary
    lines = [
        f"{s.url}: {counted(s.trials, 'trial')}, {s.missing:,} more are wanted",
        f"copied: {counted(s.copied, 'trial')}, weights of {counted(s.weights, 'model')}, "
        f"{counted(s.failures, 'failed attempt')}, {counted(s.shards, 'shard')} of curvature; "
        f"{counted(s.there, 'trial')} already there",
        f"in both: {counted(s.in_both, 'trial')}",
    ]
    if s.drift:
        lines.append(
            f"drift: {s.drift:,} trials have two results, of other hardware or a GPU; the first "
            "store's stay"
        )
    plan = Store(s.url).plan()
    if not plan.is_known:
        then = f"import the file into it once more, which scores: raymem import npz FILE {s.url}"
    elif s.missing:
        then = f"run its job with --store {s.url}, which trains what is missing and scores"
    elif plan.experiment is not None:
        then = f"raymem {plan.kind} {s.url}"
    else:
        then = f"score, the job's `score` stage: python jobs/NAME.py score --store {s.url}"
    return "\n".join([*lines, f"not copied: scores, links, report; next, {then}"])
