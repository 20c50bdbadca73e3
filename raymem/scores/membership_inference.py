"""Membership inference from a scored store: every trial is a shadow model, some are targets too.

In:  a scored store with margins. Out: `Membership`: what attacks reached at each epsilon, and how
     far apart each example's margins are with it and without.

Trials are read one at a time, in three passes: sums over all of them; for each target the sums of
the trials whose subsets depend on its subset, which are left out; sums over two halves. Memory is a
few numbers per example, and 12 bytes per example and target.

Shapes: N training and M test examples. Rows of a trial are N train, then M test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.encoding import epsilon_name, from_json, json_ready
from raymem.errors import DamagedObjectError, StoreError
from raymem.plan import Plan
from raymem.scores.lira import IN, OUT, Floats, Sums, offline, online, vulnerability
from raymem.scores.roc import LOW_FPR, Attack, attack
from raymem.scores.vulnerability_correlation import Half, RankCorrelation, crossed
from raymem.store import Store, TrialKey, columns, read_ahead

Truths = NDArray[np.bool_]
ATTACKS = ("LiRA online", "LiRA offline", "loss threshold")
TARGETS = 20
MOST_VULNERABLE = 10
AHEAD = 4
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
    """LiRA online, LiRA offline, and the global threshold on the loss."""
    correlation: RankCorrelation
    most_vulnerable: list[dict[str, Any]]
    """example_id, label, vulnerability, vulnerability_stderr, memorization, n_in, n_out."""
    notes: list[str]
    """What to mind when reading the numbers."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; undefined numbers are null, epsilon inf is the word."""
        return {
            **vars(self),
            "epsilon": epsilon_name(self.epsilon),
            "attacks": [found.as_dict() for found in self.attacks],
            "correlation": json_ready(vars(self.correlation)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Attacked:
        """The inverse of `as_dict`. Raises KeyError, TypeError or ValueError for other data."""
        rho = data["correlation"]
        names = ("value", "low", "high", "ceiling", "tied", "tied_at")
        values = {name: from_json(rho[name]) for name in names}
        return cls(**{
            **data,
            "epsilon": float(data["epsilon"]),
            "attacks": [Attack.from_dict(found) for found in data["attacks"]],
            "correlation": RankCorrelation(examples=int(rho["examples"]), **values),
        })  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Membership inference at each epsilon of a store."""

    attacked: dict[float, Attacked]
    """By epsilon, rising."""
    refused: dict[float, str]
    """Epsilons at which nothing could be attacked, and why."""
    table: pa.Table
    """scores/membership.parquet: one row for each epsilon and training example."""

    def as_dict(self) -> dict[str, Any]:
        """membership.json."""
        return {
            "epsilons": [found.as_dict() for found in self.attacked.values()],
            "not_attacked": {epsilon_name(epsilon): why for epsilon, why in self.refused.items()},
        }

    def write(self, store: Store) -> None:
        """Replace the store's scores/membership.parquet and membership.json."""
        store.write_scores("membership", self.table, {"study_hash": store.study()["hash"]})
        store.write_note("membership", self.as_dict())


def membership(store: Store, *, targets: int = TARGETS) -> Membership:
    """Attack some of a store's scored trials with the others (Carlini et al. 2022, LiRA).

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
            fleet = _Fleet(store, plan, epsilon)
            table = _table(scored.filter(here), fleet.sums)
            attacked[epsilon] = _attacked(fleet, targets, table)
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
        return [Attacked.from_dict(d) for d in (store.note("membership") or {})["epsilons"]]
    except (KeyError, TypeError, ValueError):
        return []


class _Fleet:
    """The scored trials at one epsilon, and sums over all of them: the first pass."""

    def __init__(self, store: Store, plan: Plan, epsilon: float) -> None:
        self.store, self.plan, self.epsilon = store, plan, epsilon
        self.keys = store.scored(epsilon)
        if plan.kind == "published":
            raise StoreError(
                f"{store.url} has published scores without trials, and membership inference needs "
                "trials with margins"
            )
        if plan.subset_ratio == 1:
            raise StoreError(
                f"every example is in every trial of {store.url} (subset ratio 1), so no model is "
                "without it; train a study with --subset-ratio 0.5"
            )
        blocks = {self.group(key) for key in self.keys}
        if len(blocks) < 2:
            single = "a single trial" if len(self.keys) == 1 else "a single block of trials"
            more = f"train {2 * plan.block} trials or more, and score them"
            if not plan.is_known:
                more = "import a fleet of more trials, into another store"
            raise StoreError(
                f"{store.url} has {single if self.keys else 'no trial'} scored at epsilon "
                f"{epsilon_name(epsilon)}, whose subsets depend on each other, so none can be "
                f"attacked with the others; {more}"
            )
        self.sums = self.sum(self.keys)

    def group(self, key: TrialKey) -> int:
        """Trials of one group have dependent subsets; groups are independent of each other."""
        in_blocks = self.plan.kind in ("balanced", "candidate-pool")
        return key.trial // self.plan.block if in_blocks else key.trial

    def sum(self, keys: Sequence[TrialKey]) -> Sums:
        """Sums over some trials, about the first trial of all that was read."""
        sums = None
        for _, margins, inside in self.read(keys):
            sums = sums or Sums(self.sums.first if hasattr(self, "sums") else margins)
            sums.add(margins, inside)
        assert sums is not None
        return sums

    def read(self, keys: Sequence[TrialKey]) -> Iterator[tuple[TrialKey, Floats, Truths]]:
        """Margins and subsets, [N] each, in order; the next few are read ahead."""
        for key, (margins, inside) in read_ahead(keys, self.one, AHEAD):
            yield key, margins, inside

    def one(self, key: TrialKey) -> tuple[Floats, Truths]:
        """Margins and subset of one trial. Raises StoreError if it has no margins."""
        table = self.store.train_rows(key, ["in_subset", "margin"])
        if table.num_rows != self.plan.n:
            raise DamagedObjectError(
                f"{key.object_key} has {table.num_rows:,} training examples instead of "
                f"{self.plan.n:,}; run `raymem verify STORE --repair`"
            )
        if table["margin"].null_count:
            raise StoreError(
                f"{self.store.url} has no margins, which membership inference needs; import the "
                "fleet again, into another store, with margins_train and margins_test"
            )
        margins = table["margin"].to_numpy().astype(np.float64)
        if not np.isfinite(margins).all():
            raise DamagedObjectError(
                f"{key.object_key} has margins that are not finite; run `raymem verify STORE "
                "--repair`, then the job"
            )
        return margins, table["in_subset"].to_numpy()


def _attacked(fleet: _Fleet, targets: int, table: pa.Table) -> Attacked:
    """The second pass, and what it found."""
    keys, store = fleet.keys, fleet.store
    chosen = {keys[k] for k in np.linspace(0, len(keys) - 1, min(targets, len(keys))).astype(int)}
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ATTACKS}
    members: list[Truths] = []
    own, references, attackable = 0, len(keys), np.zeros(fleet.plan.n, bool)
    for group in sorted({fleet.group(key) for key in chosen}):
        together = [key for key in keys if fleet.group(key) == group]
        moments = fleet.sums.without(fleet.sum(together)).moments()
        known = moments.known
        references = min(references, len(keys) - len(together))
        for _, margins, inside in fleet.read([key for key in together if key in chosen]):
            try:
                scores = (online(margins, moments), offline(margins, moments), margins)
            except ValueError as error:
                raise StoreError(f"{store.url}: {error}; train more trials") from error
            for name, values in zip(ATTACKS, scores, strict=True):
                found[name].append(values[known].astype(np.float32))
            members.append(inside[known])
            own += int(moments.own_variance[known].sum())
            attackable |= known
    who = np.concatenate(members)
    if who.all() or not who.any():
        raise StoreError(
            f"{store.url} has no training example at epsilon {epsilon_name(fleet.epsilon)} that "
            "trials of several blocks saw and others did not; train more trials, and score them"
        )
    of = np.repeat(np.arange(len(members)), [len(inside) for inside in members])
    here = Attacked(
        epsilon=fleet.epsilon,
        trials=len(keys),
        targets=len(members),
        references=references,
        examples=int(attackable.sum()),
        members=int(who.sum()),
        others=int((~who).sum()),
        own_variances=own / len(who),
        attacks=[attack(name, np.concatenate(found.pop(name)), who, of) for name in ATTACKS],
        correlation=_correlation(fleet),
        most_vulnerable=_most_vulnerable(table),
        notes=[],
    )
    here.notes.extend(_notes(here, fleet))
    return here


def _notes(here: Attacked, fleet: _Fleet) -> Iterator[str]:
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
    n_in = fleet.sums.n[IN]
    if not fleet.plan.is_known and np.ptp(n_in) == 0:
        yield (
            f"every example is in exactly {n_in[0]:,} of the {here.trials:,} imported trials, so "
            "the other trials tell a target's subset; with few trials that leaks into the attack"
        )


def _table(here: pa.Table, sums: Sums) -> pa.Table:
    """Rows of scores/membership.parquet; `here` are the training examples' scores, in order."""
    moments = sums.moments()
    apart, error = vulnerability(moments)
    spread = np.sqrt(moments.variance)
    values: dict[str, Any] = {
        **{name: here[name] for name in ("example_id", "index", "label", "epsilon")},
        "n_in": moments.n[IN],
        "n_out": moments.n[OUT],
        "margin_in": moments.mean[IN],
        "margin_out": moments.mean[OUT],
        "margin_in_stdev": spread[IN],
        "margin_out_stdev": spread[OUT],
        "vulnerability": apart,
        "vulnerability_stderr": error,
        "memorization": here["memorization"],
    }
    arrays = {name: pa.array(v, from_pandas=True) if isinstance(v, np.ndarray) else v
              for name, v in values.items()}  # fmt: skip
    return pa.table(arrays).cast(columns.schema(columns.MEMBERSHIP)).combine_chunks()


def _most_vulnerable(table: pa.Table) -> list[dict[str, Any]]:
    known = table.filter(pc.is_valid(table["vulnerability"]))
    order = [("vulnerability", "descending"), ("index", "ascending")]
    rows = known.take(pc.sort_indices(known, order)).slice(0, MOST_VULNERABLE)
    names = ["example_id", "label", "vulnerability", "vulnerability_stderr", "memorization"]
    return list(rows.select([*names, "n_in", "n_out"]).to_pylist())


def _correlation(fleet: _Fleet) -> RankCorrelation:
    """A third pass: every other group of trials is one half."""
    halves = [Half(fleet.sums.first) for _ in range(2)]
    place = {group: n for n, group in enumerate(sorted({fleet.group(k) for k in fleet.keys}))}
    correct = partial(fleet.store.train_rows, names=["correct"])
    rows = read_ahead(fleet.keys, correct, AHEAD)
    for (key, margins, inside), (_, table) in zip(fleet.read(fleet.keys), rows, strict=True):
        half = halves[place[fleet.group(key)] % 2]
        half.add(margins, inside, table["correct"].to_numpy().astype(bool))
    return crossed(*halves)
