"""Whether to trust a run: what was trained, how well it is known, and what is suspicious.

In:  a scored store. Out: `Finding`s, each with its value, its limit, and if it is red.

Shapes: N training examples, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from raymem.encoding import epsilon_name
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.twins import Twins, find_twins
from raymem.plan import Plan
from raymem.scores import LEAST_FIT, fit_of_hard, ratio
from raymem.store import Store, TrialKey
from raymem.store.columns import Row
from raymem.store.trials import metadata_of

# Of training accuracy, in median absolute deviations.
OUTLIER = 4.0
# Diverged trials are not a random sample of models.
MOST_DIVERGED = 0.02
# Standard deviation of memorization over its standard error under permuted masks.
PLACEBO_LOW, PLACEBO_HIGH = 0.9, 1.1
LEAST_RELIABILITY = 0.8
# The placebo needs a part of the trials and examples only.
PLACEBO_TRIALS, PLACEBO_EXAMPLES = 400, 20_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number that decides whether to trust a run."""

    name: str
    value: float
    text: str
    """The number as people read it, with its counts."""
    limit: str = ""
    """What it should be; empty: nothing."""
    red: bool = False
    """Is it outside?"""


def diagnostics(
    store: Store, twins: Mapping[float, Twins] | None = None
) -> dict[float, list[Finding]]:
    """The findings of each epsilon; `twins` if they are found already.

    Raises StoreError without scores.
    """
    twins = find_twins(store) if twins is None else twins
    scores, trials, plan = store.scores(), store.scores("trials"), store.plan()
    rows = trials.to_pylist()
    found = {}
    for epsilon in sorted(set(scores["epsilon"].to_pylist())):
        here = train_at(scores, epsilon)
        done = [r for r in rows if r["epsilon"] == epsilon and r["status"] == "done"]
        lost = [r for r in rows if r["epsilon"] == epsilon and r["status"] != "done"]
        if not done:
            continue
        keys = [TrialKey(epsilon, row["trial"]) for row in sorted(done, key=lambda r: r["trial"])]
        found[epsilon] = [
            *_fit(here, done, math.isinf(epsilon)),
            *_trials(done, lost),
            *_unscored(store, keys),
            *_counts(here),
            *_precision(here, scores, epsilon),
            *_placebo(store, plan, keys),
            *_classes(here, plan),
            *_copies(store),
            *_explained(twins.get(epsilon)),
            *_size_of_subsets(done, plan),
            *_repeated(store, epsilon),
            *_assumptions(here, done),
        ]
    return found


def red(found: Mapping[float, Sequence[Finding]]) -> list[tuple[float, Finding]]:
    """The findings that are red."""
    return [(e, finding) for e, findings in found.items() for finding in findings if finding.red]


def _fit(here: pa.Table, done: Sequence[Row], plainly: bool) -> list[Finding]:
    """How well models fit their own subsets. Private models need not."""
    accuracy = _column(done, "accuracy_in")
    if not np.isfinite(accuracy).any():
        return []
    mean = float(np.nanmean(accuracy))
    p_in = floats(here, "accuracy_in")
    low = float(np.mean(p_in[np.isfinite(p_in)] < 0.9)) if np.isfinite(p_in).any() else math.nan
    median = float(np.nanmedian(accuracy))
    spread = max(float(np.nanmedian(np.abs(accuracy - median))), 1e-4)
    low_ones = np.flatnonzero(accuracy < median - OUTLIER * spread)
    outliers = [done[int(k)]["trial"] for k in low_ones]
    return [
        Finding(
            name="training accuracy (mean over models)",
            value=mean,
            text=f"{100 * mean:.1f}%, of {len(done):,} models",
            limit=f"{100 * LEAST_FIT:.0f}% or more" if plainly else "",
            red=plainly and mean < LEAST_FIT,
        ),
        Finding(
            name="examples that models do not fit",
            value=low,
            text=f"{100 * low:.1f}% are right in fewer than 90% of the models that saw them",
        ),
        *_fit_of_hard(here, plainly),
        Finding(
            name="training-accuracy outliers",
            value=len(outliers),
            text=f"{len(outliers):,}"
            + (f", such as trial {outliers[0]}" if outliers else "")
            + f" (below the median by {OUTLIER:g} median deviations)",
            limit="5% or fewer",
            red=len(outliers) > 0.05 * len(done),
        ),
    ]


def _fit_of_hard(here: pa.Table, plainly: bool) -> list[Finding]:
    """How well models fit what they can only memorize."""
    fit, number = fit_of_hard(floats(here, "accuracy_in"), floats(here, "accuracy_out"))
    if math.isnan(fit):
        return []
    red = plainly and fit < LEAST_FIT
    return [
        Finding(
            name="training accuracy on hard examples",
            value=fit,
            text=f"{100 * fit:.1f}% on the {number:,} that most models trained without them get "
            "wrong"
            + (
                "; models do not fit, so memorization is underestimated: train them longer, at a "
                "higher learning rate, or wider"
                if red
                else ""
            ),
            limit=f"{100 * LEAST_FIT:.0f}% or more" if plainly else "",
            red=red,
        )
    ]


def _trials(done: Sequence[Row], lost: Sequence[Row]) -> list[Finding]:
    share = len(lost) / (len(done) + len(lost))
    again = sum(row["attempt"] > 1 for row in done)
    return [
        Finding(
            name="trials without a result",
            value=share,
            text=f"{len(lost):,} of {len(done) + len(lost):,}; {again:,} took a second attempt",
            limit=f"{100 * MOST_DIVERGED:.0f}% or fewer: those that end well are no random sample",
            red=share > MOST_DIVERGED,
        )
    ]


def _unscored(store: Store, keys: Sequence[TrialKey]) -> list[Finding]:
    """Trials that came after the scores: nothing here knows of them."""
    later = {key for key in store.done() if key.epsilon == keys[0].epsilon} - {*keys}
    if not later:
        return []
    return [
        Finding(
            name="trials that are not scored yet",
            value=len(later),
            text=f"{len(later):,}; all numbers are of the {len(keys):,} before: run `score`",
            limit="none",
            red=True,
        )
    ]


def _counts(here: pa.Table) -> list[Finding]:
    n_in, n_out = floats(here, "n_in"), floats(here, "n_out")
    return [
        Finding(
            name="models per example",
            value=float(np.median(n_out)),
            text=f"in: {n_in.min():.0f} to {n_in.max():.0f}, out: {n_out.min():.0f} to "
            f"{n_out.max():.0f}",
            limit="some of both",
            red=bool((n_in == 0).all() or (n_out == 0).all()),
        )
    ]


def _precision(here: pa.Table, scores: pa.Table, epsilon: float) -> list[Finding]:
    width = floats(here, "memorization_high") - floats(here, "memorization_low")
    width = width[np.isfinite(width)]
    summary = metadata_of(scores, "scores/examples.parquet")["summary"][
        f"eps-{epsilon_name(epsilon)}"
    ]
    reliability = math.nan if summary["reliability"] is None else float(summary["reliability"])
    return [
        Finding(
            name="reliability of memorization",
            value=reliability,
            text="not known with fewer than two blocks"
            if math.isnan(reliability)
            else f"{reliability:.3f}: expected correlation with the truth "
            f"{math.sqrt(max(reliability, 0)):.3f}",
            limit=f"{LEAST_RELIABILITY:g} or more",
            # Where nothing is memorized nothing varies, and reliability says nothing.
            red=math.isinf(epsilon) and not reliability >= LEAST_RELIABILITY,
        ),
        Finding(
            name="width of 95% intervals",
            value=float(np.median(width)) if len(width) else math.nan,
            text="none"
            if not len(width)
            else f"median {np.median(width):.3f}, 90th percentile {np.quantile(width, 0.9):.3f}",
        ),
    ]


def _placebo(store: Store, plan: Plan, keys: Sequence[TrialKey]) -> list[Finding]:
    """Memorization where there is none: every trial's outcome with another trial's subset."""
    if not plan.is_known or plan.subset_ratio == 1 or len(keys) < 2 * plan.block:
        return []
    keys = keys[: PLACEBO_TRIALS // plan.block * plan.block]
    rows = np.arange(0, plan.n, math.ceil(plan.n / PLACEBO_EXAMPLES))
    inside, right = [], []
    for key in keys:
        table = store.train_rows(key, ["in_subset", "correct"]).take(pa.array(rows))
        inside.append(table["in_subset"].to_numpy())
        right.append(table["correct"].to_numpy())
    # A block and one further: another subset, drawn independently. A whole block would pair two
    # blocks with each other twice.
    masks = np.roll(np.array(inside, bool), plan.block + 1, axis=0)
    hits = np.array(right, bool)
    n_in, n_out = masks.sum(0), (~masks).sum(0)
    share = hits.mean(0)
    varies = (share > 0) & (share < 1)
    if varies.sum() < 20:
        return []
    value = ratio((hits & masks).sum(0), n_in) - ratio((hits & ~masks).sum(0), n_out)
    # Where nothing is memorized both arms have one proportion: its variance is the null's.
    T = len(hits)
    variance = share * (1 - share) * T / (T - 1) * (1 / n_in + 1 / n_out)
    z = value[varies] / np.sqrt(variance[varies])
    spread, above = float(z.std()), float(np.mean(np.abs(z) > 1.96))
    known = 2 / math.sqrt(2 * len(z))
    return [
        Finding(
            name="placebo: memorization under permuted subsets, over its standard error",
            value=spread,
            text=f"standard deviation {spread:.2f}, {100 * above:.1f}% beyond 1.96, of "
            f"{varies.sum():,} examples",
            limit=f"{PLACEBO_LOW:g} to {PLACEBO_HIGH:g}, and about 5%",
            # Of few examples the spread itself is not known better.
            red=not PLACEBO_LOW - known <= spread <= PLACEBO_HIGH + known,
        )
    ]


def _classes(here: pa.Table, plan: Plan) -> list[Finding]:
    labels = floats(here, "label")
    if not plan.is_known or not np.isfinite(labels).all():
        return []
    smallest = min(
        int(np.bincount(labels[plan.mask(t)].astype(int), minlength=int(labels.max()) + 1).min())
        for t in range(min(plan.block, 20))
    )
    return [
        Finding(
            name="examples of the smallest class in a subset",
            value=smallest,
            text=f"{smallest:,}, in the first block",
            limit="1 or more",
            red=smallest < 1,
        )
    ]


def _copies(store: Store) -> list[Finding]:
    index = store.examples()
    rows = index.filter(pc.is_valid(index["duplicate_group"])).select(["split", "duplicate_group"])
    groups: dict[int, set[str]] = {}
    for row in rows.to_pylist():
        groups.setdefault(row["duplicate_group"], set()).add(row["split"])
    across = sum(len(splits) == 2 for splits in groups.values())
    train = sum(split == "train" for split in rows["split"].to_pylist())
    return [
        Finding(
            name="exact duplicates",
            value=len(groups),
            text=f"{train:,} training examples have a copy; {across:,} groups are in train and "
            "test. Copies hide each other's memorization: see group_memorization",
        )
    ]


def _explained(twins: Twins | None) -> list[Finding]:
    """Memorized examples whose memorization is that of a twin: false positives of the estimator."""
    if twins is None or not twins.targets:
        return []
    text = f"{len(twins.rows):,} of {twins.targets:,} candidates ({twins.pairs:,} pairs tried)"
    if twins.rows:
        row = twins.rows[0]
        text += (
            f", such as {row['example_id']} with {row['twin_id']}: models without it are right "
            f"{100 * row['right_with_twin']:.0f}% of the time with the twin, "
            f"{100 * row['right_without_twin']:.0f}% without; memorization of both together "
            f"{row['group_memorization']:.2f}"
        )
    return [
        Finding(name="memorized examples that a twin explains", value=len(twins.rows), text=text)
    ]


def _size_of_subsets(done: Sequence[Row], plan: Plan) -> list[Finding]:
    """Memorization at ratio r is not memorization by leaving one out: what do more examples do?"""
    name, r = "accuracy on held-out examples for 1% more of the set", plan.subset_ratio
    said = f"memorization is that at ratio {r:g}, not by leaving one out"
    size, out = _column(done, "subset_size"), _column(done, "accuracy_out")
    known = np.isfinite(out)
    if not plan.is_known or known.sum() < 10 or np.ptp(size[known]) == 0:
        return [Finding(name=name, value=math.nan, text=f"not known; {said}")]
    fit = stats.linregress(size[known] / plan.n, out[known])
    half = float(stats.t.ppf(0.975, known.sum() - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return [
        Finding(
            name=name,
            value=slope,
            text=f"{slope:+.2f} [{slope - half:+.2f}, {slope + half:+.2f}] points, over subsets of "
            f"{size.min():,.0f} to {size.max():,.0f}; {said}, which is lower where more examples "
            "help",
        )
    ]


def _repeated(store: Store, epsilon: float) -> list[Finding]:
    """Was a trial trained again, and did it give the same?"""
    note = store.note("repeat")
    if note is None or float(note["epsilon"]) != epsilon:
        return []
    return [
        Finding(
            name="a trial trained again",
            value=float(note["changed"]),
            text=note["text"],
            limit="the same on the same CPU",
            red=note["comparable"] and not note["identical"],
        )
    ]


def _assumptions(here: pa.Table, done: Sequence[Row]) -> list[Finding]:
    """How far the theorems' assumptions hold: a bounded loss, models that generalize."""
    out, inside = floats(here, "loss_out"), floats(here, "loss_in")
    gaps = _column(done, "accuracy_in") - _column(done, "accuracy_test")
    gap = float(np.nanmean(gaps)) if np.isfinite(gaps).any() else math.nan
    largest = float(np.nanmax(out)) if np.isfinite(out).any() else math.nan
    return [
        Finding(
            name="largest mean loss of an example, out of the subset",
            value=largest,
            text="not known"
            if math.isnan(largest)
            else f"{largest:.2f} nats; the theorems want a bound L on the loss, and cross entropy "
            "has none",
        ),
        Finding(
            name="mean loss in and out of the subset",
            value=float(np.nanmean(out)) - float(np.nanmean(inside))
            if np.isfinite(out).any()
            else math.nan,
            text=f"{np.nanmean(inside):.3f} and {np.nanmean(out):.3f} nats"
            if np.isfinite(out).any() and np.isfinite(inside).any()
            else "not known",
        ),
        Finding(
            name="generalization gap",
            value=gap,
            text="not known"
            if math.isnan(gap)
            else f"{100 * gap:.1f} points of accuracy between the own subset and the test set",
        ),
    ]


def _column(rows: Sequence[Row], name: str) -> Floats:
    """A column of scores/trials.parquet; imported fleets may lack it."""
    return np.array([row[name] for row in rows], np.float64)
