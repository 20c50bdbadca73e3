"""What a study found, one sentence a question, with its numbers: for the report and a job's end.

In:  a scored store, its links, its membership inference. Out: `Story`.

A sentence claims no more than the verdicts of `raymem.links`. The strongest pair is the largest of
many, so that its interval is simultaneous over all pairs that were considered (Bonferroni).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from scipy import special

from raymem.encoding import epsilon_name
from raymem.errors import StoreError
from raymem.links import (
    Audit,
    Coefficient,
    Correlation,
    Finding,
    Links,
    Memorized,
    PoolMean,
    label_errors,
    red,
)
from raymem.links.column_arrays import train_at
from raymem.scores import Attacked
from raymem.show.table import terminal_width
from raymem.show.terminal_scores import TRIALS_FOR_LISTS
from raymem.store import Store
from raymem.store.trials import metadata_of

CONFIDENCE = 0.95
NOT_REFUTED = "No example is significantly above a bound that the claimed privacy implies"
LEADS = {
    "memorization": "Memorization",
    "influence": "Influence",
    "label_errors": "Label errors",
    "curvature": "Curvature",
    "privacy": "Privacy",
    "membership": "Membership",
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """The answers of one study at one epsilon, a sentence each; empty where nothing is known."""

    epsilon: float
    memorization: str
    influence: str
    label_errors: str
    curvature: str
    privacy: str
    membership: str
    trust: str
    """One line: are all checks within their limits?"""
    outside: list[str]
    """The checks that are not."""

    @property
    def sentences(self) -> list[str]:
        """The three that come first: what is memorized, what depends on it, and what privacy
        changes, or what curvature says where nothing is private."""
        return [s for s in (self.memorization, self.influence, self.privacy or self.curvature) if s]

    @property
    def answers(self) -> list[tuple[str, str]]:
        """All answers under their questions' short names."""
        return [(lead, getattr(self, name)) for name, lead in LEADS.items() if getattr(self, name)]


def tell(
    store: Store,
    links: Links,
    epsilon: float | None = None,
    attacked: Sequence[Attacked] = (),
) -> Story:
    """The answers that the trials at `epsilon` give (`main_epsilon` by default), and links over
    epsilons.

    Raises StoreError without scores.
    """
    scores = store.scores()
    epsilon = main_epsilon(scores) if epsilon is None else epsilon
    summary = metadata_of(scores, "scores/examples.parquet").get("summary") or {}
    here = summary.get(f"eps-{epsilon_name(epsilon)}", {})
    found = links.private_diagnostics
    return Story(
        epsilon=epsilon,
        memorization=_memorization(store, epsilon, here, links.mean_memorization.get(epsilon)),
        influence=_influence(store, epsilon, here),
        label_errors=_label_errors(store, epsilon),
        curvature=_curvature(links.correlations.get(epsilon, ())),
        privacy=_privacy(links.memorization, links.memorized),
        membership=_membership([a for a in attacked if a.epsilon == epsilon]),
        trust=_trust(links.diagnostics, found),
        outside=[
            f"{finding.name}: {finding.text} (should be {finding.limit})"
            for _, finding in [*red(links.diagnostics), *red(found)]
        ],
    )


def story_text(story: Story) -> str:
    """The answers for a terminal, and whether to trust them."""
    width = min(terminal_width() or 120, 120)
    answers = [*story.answers, ("Trust", story.trust), *(("", line) for line in story.outside)]
    indent = max(len(lead) for lead, _ in answers) + 2
    return "\n".join(
        textwrap.fill(
            text,
            width,
            initial_indent=lead.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for lead, text in answers
    )


def main_epsilon(scores: pa.Table) -> float:
    """What reports show first: epsilon inf, or the largest where every trial is private."""
    epsilons = set(scores["epsilon"].to_pylist())
    return math.inf if math.inf in epsilons else max(epsilons)


def _memorization(
    store: Store, epsilon: float, summary: Mapping[str, Any], mean: PoolMean | None
) -> str:
    table = train_at(store.scores(), epsilon)
    known = table.num_rows - table["memorization"].null_count
    if not known:
        return ""
    if not summary:  # published scores have no list
        above = pc.sum(pc.greater(table["memorization"], 0.25)).as_py() or 0
        of = f"{above:,} of {table.num_rows:,} training examples have memorization above 0.25"
        unknown = table.num_rows - known
        return f"{of}; that of {unknown:,} is not published." if unknown else f"{of}."
    listed, trials = summary["memorized"], summary["trials"]
    rate = (
        "at most 5% of this list is expected to be false"
        if trials >= TRIALS_FOR_LISTS
        else f"with fewer than {TRIALS_FOR_LISTS} models more than 5% of this list may be false"
    )
    text = (
        f"{listed:,} of {known:,} training examples ({100 * listed / known:.1f}%) are memorized "
        f"(score very likely above 0.25, over {trials:,} models; {rate})"
    )
    if mean is None:
        return f"{text}."
    return (
        f"{text}; averaged over {mean.what}, models are right {_points(mean)} percentage points "
        "more often on an example that they trained on."
    )


def _points(pool: PoolMean) -> str:
    return f"{100 * pool.value:.1f} [{100 * pool.low:.1f}, {100 * pool.high:.1f}]"


def _influence(store: Store, epsilon: float, summary: Mapping[str, Any]) -> str:
    considered = summary.get("pairs_considered", 0)
    if not considered:
        return ""
    level = f"{summary['pairs_level']:.1g}"
    try:
        pairs = store.scores("influence")
    except StoreError:
        return ""
    strong = pairs.filter(pc.and_(pc.equal(pairs["epsilon"], epsilon), pairs["strong"]))
    if not strong.num_rows:
        return (
            "No test prediction depends strongly on a single memorized example: of "
            f"{considered:,} pairs none has influence of 0.15 or more with a p-value of at most "
            f"{level}."
        )
    first = strong.take(pc.sort_indices(strong, [("influence", "descending")])[:1]).to_pylist()[0]
    z = float(special.ndtri(1 - (1 - CONFIDENCE) / 2 / considered))
    half = z * first["influence_stderr"]
    low, high = (max(-1.0, min(1.0, first["influence"] + side * half)) for side in (-1, 1))
    tests = len(set(strong["test_id"].to_pylist()))
    return (
        f"{tests:,} test {'prediction depends' if tests == 1 else 'predictions depend'} strongly "
        f"on a single memorized example ({strong.num_rows:,} of {considered:,} pairs have "
        f"influence of 0.15 or more, p at most {level}); the strongest: models that trained on "
        f"{first['train_id']} are right on {first['test_id']} {100 * first['influence']:.0f} "
        f"[{100 * low:.0f}, {100 * high:.0f}] percentage points more often (95%, simultaneous over "
        "all pairs)."
    )


def _label_errors(store: Store, epsilon: float) -> str:
    found = label_errors(store, epsilon)
    if not found.known:
        return ""
    text = (
        f"{len(found.rows):,} training examples may be mislabelled: models trained without them "
        "give their label a probability below 10%"
    )
    if found.planted:
        text += (
            f"; of {found.planted:,} labels flipped on purpose {100 * found.recall:.0f}% are among "
            "them"
        )
    return f"{text}."


def _curvature(rows: Sequence[Correlation]) -> str:
    by_name = {row.measure: row for row in rows}
    curved, loss = by_name.get("curvature_out"), by_name.get("loss_out")
    if curved is None or math.isnan(curved.auc.value):
        return ""
    text = (
        "Input loss curvature under models trained without an example ranks a memorized one "
        f"(above 0.25) over another with probability {_auc(curved.auc)}"
    )
    if loss is not None and not math.isnan(loss.auc.value):
        text += (
            f", the plain loss of the same models with probability {_auc(loss.auc)}; whether "
            "curvature adds to the loss cannot be told from these data"
        )
    return f"{text}."


def _auc(found: Coefficient) -> str:
    return found.format(3)


def _privacy(audits: Sequence[Audit], memorized: Sequence[Memorized]) -> str:
    private = [a for a in audits if a.mechanism is not None and a.pool is not None]
    if not private:
        return ""
    refuted = [epsilon_name(a.epsilon) for a in private if a.refuted]
    if refuted:
        return (
            f"The claimed differential privacy is refuted at epsilon {', '.join(refuted)} (see the "
            "audit)."
        )
    if memorized and math.isinf(memorized[-1].epsilon):
        return f"{_privacy_of_memorized(memorized)} {NOT_REFUTED}."
    shown = private if len(private) <= 3 else [private[0], private[-1]]
    what = next(a.pool.what for a in private if a.pool)
    means = ", ".join(
        f"{_points(a.pool)} at epsilon {epsilon_name(a.epsilon)}" for a in shown if a.pool
    )
    free = next((a for a in audits if math.isinf(a.epsilon) and a.pool), None)
    against = (
        ""
        if free is None or free.pool is None
        else f", against {_points(free.pool)} without privacy"
    )
    return (
        f"With differential privacy the mean memorization of {what} is {means}{against} "
        f"(percentage points of accuracy). {NOT_REFUTED}."
    )


def _privacy_of_memorized(found: Sequence[Memorized]) -> str:
    """What privacy changes for the examples that are memorized without it."""
    *private, free = found
    shown = private if len(private) <= 3 else [private[0], private[-1]]
    means = ", ".join(
        f"{_points(at.memorized)} at epsilon {epsilon_name(at.epsilon)}" for at in reversed(shown)
    )
    return (
        f"The {free.memorized.examples:,} memorized examples: models are right on them "
        f"{_points(free.memorized)} percentage points more often if they trained on them; with "
        f"differential privacy {means}."
    )


def _membership(attacked: Sequence[Attacked]) -> str:
    known = [one for here in attacked for one in here.attacks if not math.isnan(one.auc.value)]
    if not known:
        return ""
    best = max(known, key=lambda one: one.auc.value)
    half = 1.96 * best.auc.stderr
    interval = ""
    if not math.isnan(half):
        low, high = max(0.0, best.auc.value - half), min(1.0, best.auc.value + half)
        interval = f" [{low:.2f}, {high:.2f}]"
    return (
        f"The strongest of {len(known)} attacks ({best.name}) tells a model's training examples "
        f"from others with AUC {best.auc.value:.2f}{interval}, and finds "
        f"{100 * best.tpr_at_fpr.value:.1f}% of them at 1% false positives."
    )


def _trust(
    found: Mapping[float, Sequence[Finding]], private: Mapping[float, Sequence[Finding]]
) -> str:
    checks = [f for part in (found, private) for rows in part.values() for f in rows if f.limit]
    outside = sum(f.red for f in checks)
    if not checks:
        return "There are no checks: no trial is in the store."
    if not outside:
        return f"Yes, as far as {len(checks)} checks can tell: all are within their limits."
    return (
        f"With care: {outside} of {len(checks)} checks {'is' if outside == 1 else 'are'} outside "
        "their limits."
    )
