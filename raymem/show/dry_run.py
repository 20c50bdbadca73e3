"""What a study would take and tell, before it is paid for: `planned`.

In:  a study, and the machines it is to run on.
Out: text: a pilot's measurements here, the forecast there, errors, power, warnings.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch

from raymem.data import CachedExamples
from raymem.encoding import duration, epsilon_name
from raymem.errors import StoreError
from raymem.fleet import estimated_trial, group_size, timed_group, timed_trial
from raymem.privacy import Mechanism, bounds_on_memorization, tightest
from raymem.scores import (
    PairRule,
    expected_stderr,
    expected_width,
    of_one_class,
    pairs_per_class,
    power_of_pairs,
    power_to_list,
    trials_for,
)
from raymem.settings import Setting
from raymem.show.table import format_table
from raymem.store import Store
from raymem.study import Study
from raymem.training import default_device

# Kinds of examples, by accuracy in and out: the last has the largest error there is.
KINDS = (
    ("easy", 0.999, 0.95),
    ("memorized 0.7", 0.98, 0.28),
    ("memorized 0.5", 0.99, 0.49),
    ("worst case", 0.5, 0.5),
)
TRIALS = (40, 100, 200, 400, 1000, 2000, 4000)
RATIOS = (0.5, 0.7, 0.9)
# A pilot ends after so many trials or seconds.
PILOT_TRIALS, PILOT_SECONDS = 3, 20.0
ENOUGH = 0.8
LISTED, PAIR = (0.99, 0.49), 0.3


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that `plan` plans for, by default this one."""

    machines: Annotated[int, Setting(least=1)] = 1
    """Number of machines to plan for."""
    at_once: Annotated[int | None, Setting(option="trials-at-once", least=1)] = None
    """Trials at once on each machine; None: one for each core of this machine."""
    times_faster: Annotated[float, Setting(least=0, above_least=True)] = 1.0
    """Speed-up of a trial over this machine."""
    price: Annotated[float | None, Setting(least=0)] = None
    """Price per machine-hour, in any currency; None: no price is shown."""


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """A few trials, trained here and not kept."""

    seconds: list[float]
    """Of each trial; empty if they were counted up from a few images."""
    mean_seconds: float
    n_bytes: int
    """Of a trial's object."""
    together: int = 1
    """Trials that were trained in one step; a trial's seconds are its share."""


def planned(
    study: Study,
    where: Cluster | None = None,
    *,
    threads: int = 1,
    models_per_step: int | None = None,
) -> str:
    """What training would do, take and give, from a pilot of up to three trials that are not kept.

    The pilot is one group where trials are trained in groups: `models_per_step` at once, by itself
    as many as this device is faster with. Of sets in a cache no trial is run: a few images of
    their size are, and the rest is counted.
    """
    where = where or Cluster()
    mechanisms = study.mechanisms(None)
    return "\n".join(
        [
            study.examples.describe(),
            _subsets(study),
            *_curvature(study),
            *_privacy(study, mechanisms),
            *_time(study, where, threads, models_per_step),
            _store(study),
            *_precision(study),
            *_power(study),
            *(f"WARNING: {text}" for text in warnings(study, mechanisms)),
        ]
    )


def _time(study: Study, where: Cluster, threads: int, models_per_step: int | None) -> list[str]:
    here = torch.cuda.device_count() if _on_gpu() else (os.cpu_count() or 1) // threads
    at_once = where.at_once or max(1, here)
    slots = where.machines * at_once
    lines, total, n_bytes = [], 0.0, 0
    # Noise costs the same, however much of it: one pilot stands for all finite epsilons.
    for epsilons in ([e for e in study.epsilons if e < math.inf], [math.inf]):
        alike = [epsilon for epsilon in epsilons if epsilon in study.epsilons]
        if not alike:
            continue
        pilot = _pilot(study, threads, alike[0], models_per_step)
        total += pilot.mean_seconds * len(alike)
        n_bytes = max(n_bytes, pilot.n_bytes)
        lines.append(_pilot_text(study, pilot, threads, alike[0]))
    trials = len(study.target.wanted())
    each = trials // len(study.epsilons)
    busy = total * each / where.times_faster
    hours = busy / slots / 3600
    there = "this machine" if where.machines == 1 else f"{where.machines:,} machines"
    faster = "" if where.times_faster == 1 else f", {where.times_faster:g} times as fast as here"
    training = total / where.times_faster * math.ceil(each / slots)
    lines.append(
        f"time: {trials:,} trials on {there}, {at_once:,} at once on each{faster}, would take "
        f"{duration(training) if training >= 60 else 'less than a minute'}, half a minute to "
        f"start; {_busy(busy)} of {'a GPU' if _on_gpu() else 'a core'} in all"
    )
    if where.price is not None:
        lines.append(
            f"price: {hours * where.machines * where.price:,.2f} at {where.price:g} a machine and "
            "hour, if no machine idles"
        )
    lines.append(f"disk: {n_bytes / 1e3:,.0f} kB per trial, {n_bytes * trials / 1e6:,.1f} MB")
    return lines


def _busy(seconds: float) -> str:
    """Hours are what machines are paid by."""
    return duration(seconds) if seconds < 3600 else f"{seconds / 3600:,.3g} hours"


def _pilot(study: Study, threads: int, epsilon: float, models_per_step: int | None) -> Pilot:
    what = (study.examples, study.plan, study.recipe, study.trial_options())
    if isinstance(study.examples, CachedExamples):
        seconds, n_bytes = estimated_trial(*what, threads=threads, epsilon=epsilon)
        return Pilot(seconds=[], mean_seconds=seconds, n_bytes=n_bytes)
    together = group_size(*what, threads=threads, asked=models_per_step)
    together = min(together, len(study.target.wanted()))
    if together > 1:
        seconds, n_bytes = timed_group(*what, threads=threads, models=together)
        return Pilot(seconds=[seconds], mean_seconds=seconds, n_bytes=n_bytes, together=together)
    times: list[float] = []
    n_bytes = 0
    while len(times) < PILOT_TRIALS and sum(times) < PILOT_SECONDS:
        seconds, n_bytes = timed_trial(*what, threads=threads, epsilon=epsilon)
        times.append(seconds)
    return Pilot(seconds=times, mean_seconds=sum(times) / len(times), n_bytes=n_bytes)


def _pilot_text(study: Study, pilot: Pilot, threads: int, epsilon: float) -> str:
    kind = "a trial"
    if study.privacy is not None:
        kind = "a trial at epsilon inf" if math.isinf(epsilon) else "a private trial"
    here = f"({default_device().type}, {threads} threads)"
    if not pilot.seconds:
        return f"pilot: {kind} would take {duration(pilot.mean_seconds)} here {here}"
    spread = (
        f" ({duration(min(pilot.seconds))} to {duration(max(pilot.seconds))})"
        if len(pilot.seconds) > 1
        else ""
    )
    of = f"mean of {len(pilot.seconds)}"
    if pilot.together > 1:
        whole = duration(pilot.mean_seconds * pilot.together)
        of = f"its share of one group of {pilot.together} that took {whole}"
    return (
        f"pilot: {kind} took {duration(pilot.mean_seconds)}{spread} here {here}, {of}; the "
        f"process had {_peak_memory() / 1e9:.2f} GB at its peak"
    )


def _peak_memory() -> float:
    """Bytes; Linux counts them in kilobytes, macOS does not."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _on_gpu() -> bool:
    return default_device().type != "cpu"


def _precision(study: Study) -> list[str]:
    """Standard error and 95% width by trials and ratio, of several kinds of examples."""
    if study.plan.experiment is not None:
        return []
    if study.subset_ratio == 1:
        return ["memorization: not defined, nothing is ever out"]
    stderr = study.plan.worst_case_stderr(study.trials)
    lines = [
        f"{study.trials:,} trials: standard error of an example's memorization {stderr:.3f} at "
        "worst, less for examples that are mostly right or mostly wrong"
    ]
    rows = []
    for ratio in sorted({*RATIOS, study.subset_ratio}):
        for trials in sorted({*TRIALS, study.trials}):
            asked = ratio == study.subset_ratio and trials == study.trials
            if not asked and ratio != study.subset_ratio and trials not in (100, 400, 2000):
                continue
            rows.append(
                {
                    "": "this" if asked else "",
                    "ratio": f"{ratio:g}",
                    "trials": f"{trials:,}",
                    **{
                        name: f"{expected_stderr(p_in, p_out, trials, ratio):.3f} "
                        f"({expected_width(p_in, p_out, trials, ratio):.2f})"
                        for name, p_in, p_out in KINDS
                    },
                }
            )
    return [*lines, "expected standard error (width of the 95% interval) of memorization:",
            format_table(pa.Table.from_pylist(rows))]  # fmt: skip


def _pairs(study: Study) -> int:
    e = study.examples
    if of_one_class(PairRule(), e.y_train, e.y_test):
        return pairs_per_class(e.y_train, e.y_test)
    return len(e.train_ids) * len(e.test_ids)


def _power(study: Study) -> list[str]:
    """Chances of finding what is there."""
    if study.subset_ratio == 1:
        return []
    t, r, pairs = study.trials, study.subset_ratio, _pairs(study)
    listed = ", ".join(
        f"{power_to_list(0.99, 0.99 - mem, t, r):.0%} of those at {mem:g}"
        for mem in (0.4, 0.5, 0.7, 0.9)
    )
    found = ", ".join(
        f"{power_of_pairs(infl, 0.3, t, r, pairs):.0%} of those of {infl:g}"
        for infl in (0.2, 0.3, 0.5)
    )
    return [
        f"the list of examples memorized above 0.25 would have about {listed}",
        f"of {pairs:,} pairs the strong ones would have about {found}",
    ]


def warnings(study: Study, mechanisms: Mapping[float, Mechanism]) -> list[str]:
    """What the plan cannot answer, and what could; with its mechanism at each epsilon."""
    t, r, block = study.trials, study.subset_ratio, study.plan.block
    if r == 1:
        return []
    found = []
    if t < 2 * block:
        found.append(
            f"{t:,} trials are fewer than two blocks of {block}: reliability, intervals of the "
            f"links and split halves need {2 * block}"
        )
    if power_to_list(*LISTED, t, r) < ENOUGH:
        needed = trials_for(lambda n: power_to_list(*LISTED, n, r) >= ENOUGH, block)
        found.append(
            "most examples memorized 0.5 would not be on the list; "
            + _would_take(needed, "to list four in five of them")
        )
    pairs = _pairs(study)
    if power_of_pairs(PAIR, 0.3, t, r, pairs) < ENOUGH:
        needed = trials_for(lambda n: power_of_pairs(PAIR, 0.3, n, r, pairs) >= ENOUGH, block)
        found.append(
            f"most pairs of influence {PAIR:g} would not be strong; "
            + _would_take(needed, "to find four in five of them")
        )
    beyond = [
        epsilon for epsilon in mechanisms if not _could_be_refuted(study, mechanisms[epsilon])
    ]
    if beyond:
        found.append(
            f"with {t:,} trials even guesses of membership without error could not refute the "
            f"claim at epsilon {', '.join(map(epsilon_name, beyond))}: its audit can say nothing"
        )
    return found


def _could_be_refuted(study: Study, mechanism: Mechanism) -> bool:
    from raymem.links.audit import ALPHA, TESTS
    from raymem.links.membership_guesses import could_be_refuted

    if math.isinf(mechanism.epsilon):
        return True  # nothing is claimed
    drawn = len(study.pool or ()) or study.plan.n
    candidates = len(study.examples.canaries) or len(study.examples.planted) or drawn
    level = ALPHA / TESTS / sum(map(math.isfinite, study.epsilons))
    return could_be_refuted(mechanism, study.plan, study.trials, candidates, level=level)


def _would_take(needed: int | None, what: str) -> str:
    if needed is None:
        return f"no number of trials up to a million would be enough {what}"
    return f"{needed:,} trials would be enough {what}"


def _privacy(study: Study, mechanisms: Mapping[float, Mechanism]) -> list[str]:
    lines = []
    for m in mechanisms.values():
        if m.accountant == "none":
            lines.append(
                f"epsilon inf: {m.steps:,} steps, Poisson batches of {m.expected_batch} "
                "expected, no noise" + ("" if m.clips else ", no clipping")
            )
            continue
        bound = tightest(bounds_on_memorization(m, study.kind))
        assert bound is not None
        lines.append(
            f"epsilon {epsilon_name(m.epsilon)} (spends {m.spent_epsilon:.3f} at delta "
            f"{m.delta:g}, by {m.accountant}): noise {m.noise_multiplier:.3f} x "
            f"{m.max_grad_norm:g}, {m.steps:,} steps, rate {m.sample_rate:.4f}; memorization at "
            f"most {bound.value:.3f}"
        )
    return lines


def _subsets(study: Study) -> str:
    plan = study.plan
    per_class = np.bincount(
        study.examples.y_train[plan.mask(0)], minlength=study.examples.n_classes
    )
    text = f"{plan.kind} subsets of {plan.subset_size:,} examples (ratio {plan.subset_ratio:g}"
    text += f", {plan.rest_ratio:g} of the others)" if plan.rest_ratio < 1 else ")"
    if plan.experiment is not None:
        repeats = study.trials / plan.block
        return f"{plan}; {repeats:g} repeats of {plan.block} trials"
    if plan.subset_ratio == 1:
        return f"{text}: all examples in every trial, only seeds differ; nothing is ever out"
    if plan.kind != "fixed-size":
        members = round(plan.subset_ratio * plan.block)
        what = "candidate" if plan.rest_ratio < 1 else "drawn example"
        text += f", blocks of {plan.block} trials: each {what} is in {members} of them"
    if study.trials % plan.block and plan.kind != "fixed-size":
        whole = math.ceil(study.trials / plan.block) * plan.block
        text += f"; {study.trials:,} trials are not whole blocks, {whole:,} would be"
    if study.target.part is not None:
        n = len(study.target.wanted()) // len(study.epsilons)
        text += f"; part {study.target.part} of {study.trials:,} trials: {n:,}"
    return f"{text}; the smallest class has {per_class.min()} examples in the first subset"


def _curvature(study: Study) -> list[str]:
    if study.curvature is None:
        return []
    limit = study.curvature_trials
    which = "every trial" if limit is None else f"the first {limit:,} trials"
    paper = ", and the paper's score" if study.curvature.paper else ""
    when = "at the end of" if study.curvature_at == "trial" else "after training, under those of"
    every = study.curvature.every_epochs
    epochs = "" if every is None else f", averaged over every {'' if every == 1 else every} epoch"
    return [
        f"curvature: of every training example, {when} {which} ({study.curvature.mode}{paper}"
        f"{epochs})"
    ]


def _store(study: Study) -> str:
    store = Store(study.store)
    try:
        store.study()
    except StoreError:
        return f"store: {store.url}, not made yet"
    study.open_store()  # refuses another study's
    wanted = set(study.target.wanted())
    part = "" if study.target.part is None else f" of part {study.target.part}"
    return (
        f"store: {store.url}, {len(store.done() & wanted):,} of {len(wanted):,} trials{part} are "
        "done"
    )
