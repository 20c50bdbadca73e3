"""Tables and sentences for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import StoreError
from raymem.fleet import duration
from raymem.links import Audit, Coefficient, Correlation, Link2, Links
from raymem.scoring import EpsilonSummary
from raymem.shards import IngestSummary
from raymem.store import Store
from raymem.tables import TableError, top

SHOWN_REJECTS = 10


def for_people(table: pa.Table, *more: str) -> pa.Table:
    """Rows of scores/examples.parquet as people read them; `more` columns at the end."""
    rows = table.to_pylist()
    shown = {
        "example_id": table["example_id"],
        "label": table["label"],
        "in/out": [f"{row['n_in'] or 0}/{row['n_out']}" for row in rows],
        "accuracy in, out": [
            f"{_cell(row['accuracy_in'])}, {_cell(row['accuracy_out'])}" for row in rows
        ],
        "memorization": table["memorization"],
        "95% interval": [
            ""
            if row["memorization"] is None
            else f"[{row['memorization_low']:.3f}, {row['memorization_high']:.3f}]"
            for row in rows
        ],
        "soft": table["memorization_soft"],
    }
    same = ("example_id", "label", "memorization", "memorization_soft")
    if len(set(table["epsilon"].to_pylist())) > 1:
        more = ("epsilon", *more)
    return pa.table({**shown, **{name: table[name] for name in more if name not in same}})


def pairs_for_people(table: pa.Table) -> pa.Table:
    """Rows of scores/influence.parquet as people read them."""
    names = ["train_id", "train_label", "test_id", "test_label", "influence", "influence_stderr"]
    shown = {name: table[name] for name in [*names, "memorization"]}
    shown["strong"] = ["yes" if strong else "" for strong in table["strong"].to_pylist()]
    if len(set(table["epsilon"].to_pylist())) > 1:
        shown["epsilon"] = table["epsilon"]
    return pa.table(shown)


def ingest_text(summary: IngestSummary) -> str:
    """What a cache holds, what was left out, and what is unusual."""
    about = summary.about
    size = "x".join(map(str, about["image_shape"]))
    lines = [
        f"{about['name']}: {about['n_train']:,} train and {about['n_test']:,} test images, {size}, "
        f"{len(about['classes']):,} classes"
    ]
    if summary.images:
        lines.append(
            f"{summary.images:,} images decoded in {duration(summary.seconds)}, "
            f"{summary.images / summary.seconds:,.1f} a second"
        )
    if summary.left_out:
        lines.append(f"not read: {summary.left_out}")
    for split, sizes in about["class_sizes"].items():
        ends = (f"{sizes[end]['images']:,} ({sizes[end]['class']})" for end in sizes)
        lines.append(f"images of a class in {split}: {' to '.join(ends)}")
    copies = about["duplicates"]
    lines.append(
        f"exact duplicates: {copies['train']:,} in train, {copies['test']:,} in test, "
        f"{copies['across']:,} across"
    )
    lines += [f"NOTE: {finding}" for finding in about["findings"]]
    if summary.rejects:
        lines.append(f"{len(summary.rejects):,} images LEFT OUT, listed in rejects.parquet:")
        lines += [f"  {r.split} {r.example_id}: {r.error}" for r in summary.rejects[:SHOWN_REJECTS]]
        if len(summary.rejects) > SHOWN_REJECTS:
            lines.append(f"  and {len(summary.rejects) - SHOWN_REJECTS:,} more")
    lines.append(f"cache: {summary.cache}, fingerprint {about['fingerprint'][:16]}")
    return "\n".join(lines)


def example_text(store: Store, example_id: str, n: int) -> str:
    """Everything a store knows about one example, its n strongest relations at the end."""
    index = store.examples()
    found = index.filter(pc.equal(index["example_id"], example_id)).to_pylist()
    if not found:
        near = [i for i in index["example_id"].to_pylist() if example_id.lower() in i.lower()]
        hint = f"; did you mean {', '.join(near[:5])}?" if near else "; see `raymem scores STORE`"
        raise TableError(f"there is no example {example_id!r} in {store.url}{hint}")
    (me,) = found
    classes = store.study()["classes"]
    label = "none" if me["label"] is None else f"{me['label']} ({classes[me['label']]})"
    lines = [
        f"{example_id}: {me['split']} example {me['index']:,}, label {label}",
        f"content hash: {me['content_hash'] or 'not known, the images were not at hand'}",
        *_copies(index, me),
    ]
    scores = store.scores()
    train = scores.filter(pc.equal(scores["split"], "train"))
    for row in scores.filter(pc.equal(scores["example_id"], example_id)).to_pylist():
        same = train.filter(pc.equal(train["epsilon"], row["epsilon"]))
        lines += ["", f"epsilon {row['epsilon']:g}:", *_score_lines(row, same)]
    try:
        pairs = store.scores("influence")
    except StoreError as error:
        return "\n".join([*lines, "", f"no influence: {error}"])
    mine = pairs.filter(pc.equal(pairs[f"{me['split']}_id"], example_id))
    what = (
        "test examples that it makes right"
        if me["split"] == "train"
        else ("training examples that make it right")
    )
    lines += ["", f"{what}, by influence ({mine.num_rows} kept):"]
    if mine.num_rows:
        lines.append(as_text(pairs_for_people(top(mine, "influence", n))))
    return "\n".join(lines)


def _copies(index: pa.Table, me: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, what in (
        ("duplicate_group", "exact copies"), ("near_duplicate_group", "near duplicates"),
    ):  # fmt: skip
        if me.get(name) is not None:
            group = index.filter(pc.equal(index[name], me[name])).to_pylist()
            others = [
                f"{row['example_id']} ({row['split']}, label {row['label']})"
                for row in group
                if row["example_id"] != me["example_id"]
            ]
            lines.append(f"{what}: {', '.join(others)}")
    return lines


def _score_lines(row: Mapping[str, Any], train: pa.Table) -> list[str]:
    lines = []
    if row["memorization"] is not None:
        above = pc.sum(pc.greater(train["memorization"], row["memorization"])).as_py() or 0
        lines.append(f"  rank {above + 1:,} of {train.num_rows:,} by memorization")
    skip = ("example_id", "index", "split", "label", "epsilon", "duplicate_group")
    shown = {k: v for k, v in row.items() if k not in (*skip, "near_duplicate_group")}
    width = max(map(len, shown))
    lines += [f"  {k.ljust(width)}  {_cell(v)}" for k, v in shown.items() if v is not None]
    return lines


def as_text(table: pa.Table) -> str:
    """The table, aligned; numbers right, nulls empty.

    >>> print(as_text(pa.table({"id": ["a", "b"], "x": [0.5, None]})))
    id      x
    a   0.500
    b
    """
    rows = [list(table.column_names)]
    rows += [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [pa.types.is_string(field.type) for field in table.schema]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary_text(summaries: Sequence[EpsilonSummary]) -> str:
    """What the trials at each epsilon say together, a few lines each."""
    lines = []
    for s in summaries:
        at = "" if math.isinf(s.epsilon) else f"epsilon {s.epsilon:g}: "
        if s.trials == 0:
            lines.append(f"{at}no trial is done yet")
            continue
        lines.append(
            f"{at}{s.trials:,} trials; mean accuracy: {_percent(s.accuracy_in)} on examples they "
            f"trained on, {_percent(s.accuracy_out)} on held-out training examples, "
            f"{_percent(s.accuracy_test)} on the test set"
        )
        lines.append(_reliability(s))
        lines.append(
            f"memorized above 0.25: {s.memorized:,} training examples (a list with at most 5% "
            "false entries expected)"
        )
        lines.append(_pairs(s))
        if len(s.curvature_modes) > 1:
            lines.append(
                f"curvature was computed in {len(s.curvature_modes)} MODES "
                f"({', '.join(s.curvature_modes)}), which do not belong in one mean: force one "
                "with --curvature-mode in a new store"
            )
        lines += [f"no memorization for {n:,} examples: {why}" for why, n in s.null.items()]
    return "\n".join(lines)


def correlations_text(found: Mapping[float, Sequence[Correlation]]) -> str:
    """Memorization against curvature and its baselines, a table for each epsilon."""
    parts = []
    for epsilon, rows in found.items():
        at = "" if math.isinf(epsilon) else f" at epsilon {epsilon:g}"
        over = "blocks of trials and examples" if rows[0].folds > 1 else "examples only: one block"
        table = pa.table(
            {
                "memorization against": [row.measure for row in rows],
                "Spearman": [_coefficient(row.spearman) for row in rows],
                "Pearson": [_coefficient(row.pearson) for row in rows],
                "examples": [row.examples for row in rows],
            }
        )
        parts.append(
            f"Memorization and curvature over training examples{at} (95% bootstrap intervals over "
            f"{over}; loss and gradient are what curvature must be better than):\n{as_text(table)}"
        )
    return "\n\n".join(parts)


def bins_text(found: Mapping[float, pa.Table]) -> str:
    """Curvature and its baselines over bins of memorization, a table for each epsilon."""
    parts = []
    for epsilon, bins in found.items():
        at = "" if math.isinf(epsilon) else f" at epsilon {epsilon:g}"
        shown = pa.table(
            {
                "memorization": [
                    f"{low:.1f} to {high:.1f}"
                    for low, high in zip(
                        bins["from"].to_pylist(), bins["to"].to_pylist(), strict=True
                    )
                ],
                "examples": bins["examples"],
                **{
                    name: [_short(value) for value in bins[name].to_pylist()]
                    for name in bins.column_names
                    if name.endswith("_out")
                },
            }
        )
        parts.append(f"Means over out-models, by memorization{at}:\n{as_text(shown)}")
    return "\n\n".join(parts)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _coefficient(c: Coefficient) -> str:
    return "" if math.isnan(c.value) else f"{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]"


def _reliability(s: EpsilonSummary) -> str:
    if math.isnan(s.reliability):
        return "reliability: needs two blocks of trials, and examples that differ"
    text = (
        f"reliability of memorization: {s.reliability:.3f} (soft: {s.reliability_soft:.3f}), "
        f"expected correlation with the truth {math.sqrt(max(s.reliability, 0)):.3f}"
    )
    forecast = ", ".join(
        f"{target} at {math.ceil(trials):,}"
        for target, trials in s.forecast.items()
        if trials > s.trials
    )
    return f"{text}; forecast trials: {forecast}" if forecast else text


def _pairs(s: EpsilonSummary) -> str:
    text = (
        f"influence: {s.strong_pairs:,} strong pairs of {s.pairs_considered:,} (0.15 or more, and "
        f"{s.pairs_z:.1f} standard errors above zero), {s.pairs:,} kept"
    )
    return f"{text}, {s.pairs_dropped:,} DROPPED by --max-pairs" if s.pairs_dropped else text


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return str(dict(value))
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else str(value)


def links_text(links: Links) -> str:
    """The three links of a store."""
    parts = []
    if links.correlations:
        parts += [correlations_text(links.correlations), bins_text(links.bins)]
    if len(links.memorization) > 1 or any(audit.mechanism for audit in links.memorization):
        parts += [link2_text(links.curvature), link3_text(links.memorization), links.verdict]
    nothing = "no links: the study measures no curvature, and is not private"
    return "\n\n".join(parts or [nothing])


def link2_text(link: Link2) -> str:
    """Curvature against epsilon: means, fits, doubts."""
    rows = pa.table(
        {
            "epsilon": [f"{o.epsilon:g}" for o in link.observed],
            "trials": [o.trials for o in link.observed],
            "mean loss": [_plus_minus(o.loss, o.loss_stderr) for o in link.observed],
            "mean curvature": [
                "" if o.curvature is None else _plus_minus(o.curvature, o.curvature_stderr)
                for o in link.observed
            ],
        }
    )
    lines = [
        "Link 2, curvature and epsilon: means over all training examples and the trials that all "
        f"epsilons have (+- standard error over trials):\n{as_text(rows)}"
    ]
    if link.shape is not None:
        values = {**vars(link.shape), "slope": link.slope, "c2": link.c2}
        lines.append("fitted: L(eps) = a + b e^(-c eps), curvature = slope L(eps)(1 - e^-eps) + c2")
        for name, value in values.items():
            low, high = link.intervals.get(name, (math.nan, math.nan))
            lines.append(f"  {name:5} {value:.4g} [{low:.4g}, {high:.4g}]")
        lines.append(
            "  (slope stands where the theorem has m + 1, and is not m + 1: only the shape is "
            "tested)"
        )
    if link.fits:
        lines.append("error at epsilons left out of the fit, by law: " + ", ".join(
            f"{fit.law} {fit.loo_rmse:.3g}" for fit in link.fits
        ))  # fmt: skip
    lines += [f"NOTE: {warning}" for warning in link.warnings]
    return "\n".join(lines)


def link3_text(audits: Sequence[Audit]) -> str:
    """Memorization against epsilon: the pool's mean, bounds, what the data certify."""
    rows = []
    for audit in audits:
        bounds = {check.bound.name: check for check in audit.bounds}
        row = {
            "epsilon": f"{audit.epsilon:g}",
            "trials": audit.trials,
            "mean memorization": ""
            if audit.pool is None
            else f"{audit.pool.value:.3f} [{audit.pool.low:.3f}, {audit.pool.high:.3f}]",
        }
        for name, title in (
            ("paper", "1-e^-eps"),
            ("fixed-size", "fixed size"),
            ("sharp", "sharp"),
            ("total-variation", "TV"),
        ):
            row[title] = _bound(bounds.get(name))
        row["above"] = sum(c.violations for c in audit.bounds if c.bound.holds)
        row["certified eps"] = f"{audit.certified:.2f} of {audit.certifiable:.2f}"
        row["one-run eps"] = "" if audit.one_run is None else f"{audit.one_run:.2f}"
        rows.append(row)
    if not rows:
        return "Link 3: nothing is trained yet"
    if all(not row["fixed size"] or row["sharp"] for row in rows):
        rows = [{k: v for k, v in row.items() if k != "fixed size"} for row in rows]
    table = pa.Table.from_pylist(rows)
    pool = next((audit.pool for audit in audits if audit.pool is not None), None)
    over = "" if pool is None else f" of {pool.examples:,} examples ({pool.what})"
    return (
        f"Link 3, memorization and epsilon: mean{over} with its 95% interval over runs; upper "
        "bounds (- says nothing); examples above a bound that holds; the epsilon that the example "
        f"which says most certifies, of what it could:\n{as_text(table)}\n"
        f"one-run audit: {audits[-1].one_run_about}"
    )


def _bound(check: Any) -> str:
    if check is None:
        return ""
    return "-" if check.bound.vacuous else f"{check.bound.value:.3f}"


def _plus_minus(value: float, stderr: float | None) -> str:
    more = "" if stderr is None or math.isnan(stderr) else f" +- {stderr:.2g}"
    return f"{value:.4g}{more}"
