"""A soak: a study of thousands of short trials through a stream of faults, one in five seconds.

    python -m benchmarks.soak --minutes 30 --seed 0         make soak
    python -m benchmarks.soak --minutes 5                   a short one, as in make test-all

Four nodes on this machine, a store on an S3 server, a driver that is run again whenever it has
ended. Kinds of faults, and their order, are drawn with the seed; what they hit depends on the
moment. When time is up nothing more is disturbed, and the study is trained to the end of a block
and scored. Exits with 1 unless its scores are those of the same study undisturbed, byte for byte,
every driver ended as it should, nothing that was committed has changed, and nothing is left behind:
no process, actor, placement group, lock or checkpoint. From half an hour on, what each kind of
fault cost goes to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from benchmarks import soak_job
from benchmarks.measured import processor
from benchmarks.soak_faults import Happened, stream
from benchmarks.soak_job import Start, let_the_clock_jump, starts
from benchmarks.soak_machines import NODES, URL, Machines, machines
from raymem import Store, Study, verify
from raymem.store import TrialKey

PAGE = Path(__file__).parent / "RESULTS.md"
FULL_LENGTH = 30.0
SECONDS_BETWEEN = (3.5, 6.0)
# Without a commit for so long, the study hangs.
LONGEST_PAUSE = 300.0
BATCH_SECONDS = 0.05
SCORES = "scores/examples.parquet"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the faults of one kind cost."""

    kind: str
    times: int
    trials_lost: int
    """Trials that were begun and not committed."""
    seconds: list[float]
    """After each, until a worker that it ended is replaced by one that trains; else until the next
    commit."""

    def row(self) -> str:
        known = self.seconds or [math.nan]
        most = f"{statistics.median(known):.1f}, {max(known):.1f}"
        return f"| {self.kind} | {self.times} | {self.trials_lost} | {most} |"


@dataclasses.dataclass
class Soaked:
    """What came of a soak."""

    minutes: float
    seed: int
    happened: list[Happened] = dataclasses.field(default_factory=list)
    costs: list[Cost] = dataclasses.field(default_factory=list)
    trials: int = 0
    begun: int = 0
    same: bool = False
    """Are the scores those of the study undisturbed?"""
    exits: Counter[int] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What must not be."""

    def text(self) -> str:
        """The tables, as Markdown."""
        exits = ", ".join(f"{code}: {n}" for code, n in sorted(self.exits.items()))
        return "\n".join(
            [
                f"A soak (`python -m benchmarks.soak --minutes {self.minutes:g} --seed {self.seed}`"
                f"), {datetime.now(UTC):%Y-%m-%d}, {processor()}: "
                f"{len(self.happened)} faults of {len(self.costs)} kinds in {self.minutes:g} "
                f"minutes, {NODES} nodes, a store on an S3 server. {self.trials:,} trials were "
                f"committed of {self.begun:,} that were begun; the driver was run "
                f"{sum(self.exits.values())} times (exit codes {exits}). The scores "
                f"are {'' if self.same else 'not '}those of the study undisturbed, byte for byte.",
                "",
                "| fault | times | trials lost | seconds until trials go on there: median, most |",
                "|---|---|---|---|",
                *(cost.row() for cost in self.costs),
            ]
        )


def soak(minutes: float, seed: int, folder: Path) -> Soaked:
    """Disturb a study for so long, let it end, and see what came of it."""
    found = Soaked(minutes, seed)
    let_the_clock_jump(folder)
    with machines(folder, BATCH_SECONDS) as on:
        on.start_driver()
        disturb(on, found)
        trials = finish(on, found)
        found.wrong += [*on.wrong, *left_behind(on)]
        scores = Store(URL).files.read(SCORES)
    found.exits = Counter(end.code for end in on.driver.exits)
    found.wrong += [
        f"a driver ended with {end.code}: {end.log[-2000:]}"
        for end in on.driver.exits
        if not end.excused or (end.code > 0 and "Traceback" in end.log)
    ]
    found.wrong += [f"{name} was committed, and is not there as it was" for name in on.changed]
    found.trials, begun = len(on.commits), starts(folder)
    found.begun = len(begun)
    found.costs = costs(found.happened, begun, commits_by_trial(on))
    found.same = scores == undisturbed(trials, folder / "undisturbed")
    if not found.same:
        found.wrong.append("the scores are not those of the study undisturbed")
    return found


def disturb(on: Machines, found: Soaked) -> None:
    """Fault after fault, until time is up or the study hangs."""
    start = next_at = time.monotonic()
    faults = stream(on, found.seed)
    gaps = Random(found.seed)
    while (now := time.monotonic()) < start + 60 * found.minutes:
        on.tend()
        if now - max(on.driver.started, *on.commits.values()) > LONGEST_PAUSE:
            found.wrong.append(f"no commit for {LONGEST_PAUSE:g} s: {on.driver.log}")
            break
        if now >= next_at:
            found.happened.append(next(faults))
            where = found.happened[-1].hit.node or ""
            print(
                f"{now - start:6.1f} s {len(on.commits):6,} {found.happened[-1].kind} {where[:6]}"
            )
            next_at = max(next_at, time.monotonic() - 5) + gaps.uniform(*SECONDS_BETWEEN)
        time.sleep(0.1)
    on.flush()


def finish(on: Machines, found: Soaked) -> int:
    """Train the blocks that were begun to their end, and score them; how many trials that are."""
    on.end_driver()
    block = found_study(URL, 1).plan.block
    last = max(trial.trial for trial in commits_by_trial(on))
    trials = math.ceil((last + 1) / block) * block
    for stage in ("train", "score"):
        code = on.driver.run(on.nodes.address, stage, trials)
        if code != 0:
            found.wrong.append(f"undisturbed, {stage} ended with {code}: {on.driver.log}")
    return trials


def left_behind(on: Machines) -> Iterator[str]:
    """What is left of a study that has ended."""
    store = Store(URL)
    names = [name for name in ("driver.json",) if store.files.exists(name)]
    names += [f"checkpoint of {key}" for key in store.checkpointed()]
    names += [f"{problem.kind} {problem.key}" for problem in verify(store)]
    if (held := on.held(30)) is not None:
        names.append(str(held))
    return (f"left behind: {name}" for name in names)


def found_study(store: str | Path, trials: int) -> Study:
    """The study of the soak in a store."""
    settings = dataclasses.replace(soak_job.SETTINGS, store=str(store), trials=trials)
    return settings.study(soak_job.RECIPE)


def undisturbed(trials: int, store: Path) -> bytes:
    """The scores of the same study, in this process."""
    study = found_study(store, trials)
    study.train(engine="serial")
    study.score()
    return Store(store).files.read(SCORES)


def commits_by_trial(on: Machines) -> dict[TrialKey, float]:
    """When each trial was committed."""
    found = {TrialKey.parse(name.partition("/")[2]): at for name, at in on.commits.items()}
    return {key: at for key, at in found.items() if key is not None}


def costs(
    happened: Sequence[Happened], begun: Sequence[Start], commits: dict[TrialKey, float]
) -> list[Cost]:
    """What the faults cost, by kind; the most expensive first."""
    lost, seconds = Counter[str](), defaultdict[str, list[float]](list)
    for start in lost_starts(begun, commits):
        lost[to_blame(start, happened)] += 1
    for fault in happened:
        after = until_trials_go_on(fault, begun, sorted(commits.values()))
        seconds[fault.kind] += [] if after is None else [after]
    times = Counter(fault.kind for fault in happened)
    found = [Cost(kind, times[kind], lost[kind], seconds[kind]) for kind in {*times, *lost}]
    return sorted(found, key=lambda cost: -sum(cost.seconds))


def lost_starts(begun: Sequence[Start], commits: dict[TrialKey, float]) -> Iterator[Start]:
    """Those that led to no commit: for each trial, all but the last before its commit."""
    plan = found_study("memory://soak", 1).plan
    by_seed = {plan.seeds(key.trial).init: at for key, at in commits.items()}
    by_trial = defaultdict[int, list[Start]](list)
    for start in sorted(begun):
        by_trial[start.seed].append(start)
    for seed, attempts in by_trial.items():
        useful = [start for start in attempts if start.at < by_seed.get(seed, 0.0)]
        yield from (start for start in attempts if start not in useful[-1:])


def to_blame(start: Start, happened: Sequence[Happened]) -> str:
    """The kind of the fault that ended this trial: that which ended its worker, else the latest."""
    for fault in happened:
        if start.pid in fault.hit.ended and fault.at > start.at - 1:
            return fault.kind
    before = [fault for fault in happened if fault.at < start.at + 1]
    return before[-1].kind if before else "none"


def until_trials_go_on(
    fault: Happened, begun: Sequence[Start], commits: Sequence[float]
) -> float | None:
    """Seconds until its victims are replaced, else until the next commit; None if they never are,
    because another fault hit the same place."""
    if fault.hit.node is None:
        after = [at for at in commits if at > fault.at]
    else:
        known = {start.pid for start in begun if start.at < fault.at} | fault.hit.ended
        after = [
            start.at for start in begun
            if start.at > fault.at and start.pid not in known
            and fault.hit.node in ("", start.node)
        ]  # fmt: skip
    return min(after) - fault.at if after else None


def main() -> int:
    parser = argparse.ArgumentParser(description="A study through a stream of faults.")
    parser.add_argument("--minutes", type=float, default=FULL_LENGTH)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raymem-soak-") as folder:
        found = soak(arguments.minutes, arguments.seed, Path(folder))
    print(found.text())
    for line in found.wrong:
        print(f"WRONG: {line}")
    if arguments.minutes >= FULL_LENGTH:
        place = re.compile(r"(<!-- soak -->\n).*?(<!-- end -->)", re.DOTALL)
        page = PAGE.read_text()
        assert place.search(page)
        PAGE.write_text(place.sub(lambda at: f"{at[1]}{found.text()}\n{at[2]}", page))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
