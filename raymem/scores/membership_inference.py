"""Membership inference from a scored store: every trial is a shadow model, some are targets too.

In:  a scored store with margins. Out: `Membership`: what attacks reached at each epsilon, and how
     far apart each example's margins are with it and without.

Trials are read one at a time, in passes: sums over all of them; for each target the sums of the
trials whose subsets depend on its subset, which are left out; for each target the first few of its
references; sums over two halves. Memory is a few numbers per example, and 52 bytes per example and
target.

Shapes: N training and M test examples. Rows of a trial are N train, then M test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.encoding import JsonObject, epsilon_name, from_json
from raymem.errors import DamagedObjectError, StoreError
from raymem.scores.attack_scores import ByExample, TargetScores, by_example
from raymem.scores.few_references import WithReferences, by_references
from raymem.scores.lira import Moments, vulnerability, with_some_variance
from raymem.scores.rmia import population
from raymem.scores.roc import LOW_FPR, Attack
from raymem.scores.running_sums import IN, OUT, RunningSums
from raymem.scores.trial_margins import AHEAD, TrialMargins
from raymem.scores.vulnerability_correlation import Half, RankCorrelation, crossed
from raymem.store import Store, TrialKey, columns, read_ahead
from raymem.store.columns import Row

TARGETS = 20
MOST_VULNERABLE = 10
# A rate at 0.1% that rests on fewer false positives is a guess.
FEW_FALSE_POSITIVES = 10


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What membership inference reached on the trials at one epsilon."""

    epsilon: float
    trials: int
    """Scored trials."""
    targets: int
    """Of these, trials that were attacked with the others."""
    references: int
    """The fewest trials that a target was attacked with."""
    examples: int
    """Training examples that some reference trials saw and others did not."""
    members: int
    """Scores of examples that their target saw, over all targets."""
    others: int
    """Scores of examples that their target did not see."""
    own_variances: float
    """Share of scores with variances of the example's own, from 32 trials in each arm on; the rest
    have one for each arm."""
    attacks: list[Attack]
    """With all reference trials: LiRA online and offline, the global threshold on the loss, RMIA
    online and offline, the margin above its mean."""
    population: int = 0
    """Examples that RMIA compares with: drawn from the training examples, the same every time."""
    by_references: list[WithReferences] = field(default_factory=list)
    """The attacks with 2, 4, 8, ... reference trials, as far as there are so many."""
    best_attacks: list[str] = field(default_factory=list)
    """The attack with the highest AUC on either half of the examples, which `attack_auc` of the
    other half's examples is of."""
    correlation: RankCorrelation
    most_vulnerable: list[Row]
    """example_id, label, vulnerability, vulnerability_stderr, attack_auc, memorization, n_in,
    n_out."""
    notes: list[str]
    """What to mind when reading the numbers."""


@dataclass(frozen=True, kw_only=True)
class Membership(JsonObject):
    """Membership inference at each epsilon of a store."""

    attacked: dict[float, Attacked]
    """By epsilon, rising."""
    refused: dict[float, str]
    """Epsilons at which nothing could be attacked, and why."""
    table: pa.Table
    """scores/membership.parquet: one row for each epsilon and training example."""

    def json_fields(self) -> Mapping[str, object]:
        """membership.json."""
        return {"epsilons": list(self.attacked.values()), "not_attacked": self.refused}

    def write(self, store: Store) -> None:
        """Replace the store's scores/membership.parquet and membership.json."""
        store.write_scores("membership", self.table, {"study_hash": store.study().hash})
        store.write_note("membership", self)


def membership(store: Store, *, targets: int = TARGETS) -> Membership:
    """Attack some of a store's scored trials with the others: LiRA (Carlini et al. 2022), RMIA
    (Zarifzadeh et al. 2024), and the margin above its mean, with all other trials and with few.

    `targets` trials, evenly spaced, are targets at each epsilon (all, if there are fewer). Each is
    attacked with the trials whose subsets are independent of its own: in balanced and
    candidate-pool plans those of other blocks, because the other trials of its block tell its
    subset exactly (see `raymem.scores.lira.scores`); else all others. The baseline is one threshold
    on the loss for all examples (Yeom et al. 2018), which needs no reference.

    Scores of all targets are pooled; standard errors are over targets. Nothing is written: see
    `Membership.write`.

    Raises StoreError without scores, and if no epsilon can be attacked: without margins, with every
    example in every trial, with a single block of trials. ValueError if targets is not positive.
    """
    if targets < 1:
        raise ValueError(f"targets must be 1 or more, got {targets}")
    scored, plan = store.scores(), store.plan()
    attacked: dict[float, Attacked] = {}
    refused: dict[float, str] = {}
    tables = [columns.schema(columns.MEMBERSHIP).empty_table()]
    for epsilon in sorted(set(scored["epsilon"].to_pylist())):
        here = pc.and_(pc.equal(scored["split"], "train"), pc.equal(scored["epsilon"], epsilon))
        try:
            trials = TrialMargins(store, plan, epsilon)
            attacked[epsilon], table = _attacked(trials, targets, scored.filter(here))
            tables.append(table)
        except DamagedObjectError:
            raise
        except StoreError as error:
            refused[epsilon] = str(error)
    if not attacked:
        raise StoreError(next(iter(refused.values()), f"{store.url} has no trials; run its job"))
    table = pa.concat_tables(tables).combine_chunks()
    return Membership(attacked=attacked, refused=refused, table=table)


def read_membership(store: Store) -> list[Attacked]:
    """What membership.json has; empty if it was never written, or is damaged."""
    try:
        return from_json(list[Attacked], (store.note("membership") or {})["epsilons"])
    except (KeyError, TypeError, ValueError):
        return []


def _attacked(trials: TrialMargins, targets: int, scored: pa.Table) -> tuple[Attacked, pa.Table]:
    """What was found, and rows of scores/membership.parquet for `scored`, the training examples."""
    keys = trials.keys
    chosen = [keys[k] for k in np.linspace(0, len(keys) - 1, min(targets, len(keys))).astype(int)]
    sample = population(trials.plan.n)
    scores, references, own = _with_all_references(trials, chosen, sample)
    members, others = scores.counts
    if not members or not others:
        raise StoreError(
            f"{trials.store.url} has no training example at epsilon "
            f"{epsilon_name(trials.epsilon)} that trials of several blocks saw and others "
            "did not; train more trials, and score them"
        )
    on_each = by_example(_across_halves(trials, chosen, sample), trials.plan.n)
    table = _table(scored, trials.sums, on_each)
    here = Attacked(
        epsilon=trials.epsilon,
        trials=len(keys),
        targets=len(chosen),
        references=references,
        examples=int(scores.attackable.sum()),
        members=members,
        others=others,
        own_variances=own / (members + others),
        attacks=scores.attacks(),
        population=len(sample),
        by_references=by_references(trials, chosen, sample),
        best_attacks=sorted({name for name in on_each.attack if name is not None}),
        correlation=_correlation(trials),
        most_vulnerable=_most_vulnerable(table),
        notes=[],
    )
    here.notes.extend(_notes(here, trials))
    return here, table


def _with_all_references(
    trials: TrialMargins, targets: Sequence[TrialKey], sample: NDArray[np.int64]
) -> tuple[TargetScores, int, int]:
    """The second pass: scores, the fewest references of a target, and how many scores have
    variances of the example's own."""
    scores, references, own = TargetScores(sample), len(trials.keys), 0
    for group in sorted({trials.group(key) for key in targets}):
        together = [key for key in trials.keys if trials.group(key) == group]
        moments = Moments.of(trials.sums - trials.sum(together))
        references = min(references, len(trials.keys) - len(together))
        for _, margins, inside in trials.read([key for key in together if key in targets]):
            try:
                scores.add(margins, inside, moments)
            except ValueError as error:
                raise StoreError(f"{trials.store.url}: {error}; train more trials") from error
            own += int(moments.own_variance[moments.known].sum())
    return scores, references, own


def _across_halves(
    trials: TrialMargins, targets: Sequence[TrialKey], sample: NDArray[np.int64]
) -> list[TargetScores]:
    """Scores of the targets in either half of the trials, every other group, from the other half;
    without a half that has no references for the population."""
    place = {group: n % 2 for n, group in enumerate(sorted({*map(trials.group, trials.keys)}))}
    found = []
    for half in (0, 1):
        moments = Moments.of(trials.sum(k for k in trials.keys if place[trials.group(k)] != half))
        here = [key for key in targets if place[trials.group(key)] == half]
        if here and moments.known[sample].any():
            found.append(TargetScores(sample))
            for _, margins, inside in trials.read(here):
                found[-1].add(margins, inside, with_some_variance(moments))
    return found


def _notes(here: Attacked, trials: TrialMargins) -> Iterator[str]:
    """What a reader must know about the numbers."""
    if here.own_variances < 1:
        own = f" for {1 - here.own_variances:.0%} of the scores" if here.own_variances else ""
        yield (
            f"one variance for each arm{own}: fewer than 32 reference trials in an arm (there are "
            f"{here.references:,} or more in all)"
        )
    if here.targets < TARGETS:
        yield f"{here.targets:,} target trials: standard errors over so few are rough"
    false = LOW_FPR * here.others
    if false < FEW_FALSE_POSITIVES:
        yield (
            f"at a false-positive rate of 0.1% there are {false:.1f} false positives among "
            f"{here.others:,} scores of non-members: the rate there is a guess"
        )
    n_in = trials.sums.n[IN]
    if not trials.plan.is_known and np.ptp(n_in) == 0:
        yield (
            f"every example is in exactly {n_in[0]:,} of the {here.trials:,} imported trials, so "
            "the other trials tell a target's subset; with few trials that leaks into the attack"
        )


def _table(here: pa.Table, sums: RunningSums, on_each: ByExample) -> pa.Table:
    """Rows of scores/membership.parquet; `here` are the training examples' scores, in order."""
    moments = Moments.of(sums)
    apart, error = vulnerability(moments)
    spread = np.sqrt(moments.variance)
    values: dict[str, object] = {
        **{name: here[name] for name in ("example_id", "index", "label", "epsilon")},
        "n_in": moments.n[IN],
        "n_out": moments.n[OUT],
        "margin_in": moments.mean[IN],
        "margin_out": moments.mean[OUT],
        "margin_in_stdev": spread[IN],
        "margin_out_stdev": spread[OUT],
        "vulnerability": apart,
        "vulnerability_stderr": error,
        "attack": pa.array(on_each.attack, pa.string()),
        "attack_auc": on_each.auc,
        "attack_auc_stderr": on_each.stderr,
        "n_targets_in": on_each.n_in,
        "n_targets_out": on_each.n_out,
        "memorization": here["memorization"],
    }
    arrays = {name: pa.array(v, from_pandas=True) if isinstance(v, np.ndarray) else v
              for name, v in values.items()}  # fmt: skip
    return pa.table(arrays).cast(columns.schema(columns.MEMBERSHIP)).combine_chunks()


def _most_vulnerable(table: pa.Table) -> list[Row]:
    known = table.filter(pc.is_valid(table["vulnerability"]))
    order = [("vulnerability", "descending"), ("index", "ascending")]
    rows = known.take(pc.sort_indices(known, order)).slice(0, MOST_VULNERABLE)
    names = ["example_id", "label", "vulnerability", "vulnerability_stderr", "attack_auc",
             "memorization"]  # fmt: skip
    return list(rows.select([*names, "n_in", "n_out"]).to_pylist())


def _correlation(trials: TrialMargins) -> RankCorrelation:
    """A third pass: every other group of trials is one half."""
    halves = [Half(trials.sums.origin["margin"]) for _ in range(2)]
    place = {group: n for n, group in enumerate(sorted({trials.group(k) for k in trials.keys}))}
    correct = partial(trials.store.train_rows, names=["correct"])
    rows = read_ahead(trials.keys, correct, AHEAD)
    for (key, margins, inside), (_, table) in zip(trials.read(trials.keys), rows, strict=True):
        half = halves[place[trials.group(key)] % 2]
        half.add(margins, inside, table["correct"].to_numpy().astype(bool))
    return crossed(*halves)
