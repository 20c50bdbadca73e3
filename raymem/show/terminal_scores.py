"""Examples, pairs, caches and summaries for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from raymem.encoding import duration, epsilon_name
from raymem.errors import StoreError
from raymem.show.score_tables import pairs_table
from raymem.show.table import folded, format_table, percent, terminal_width
from raymem.show.tables import TableError, top
from raymem.store import Store
from raymem.store.columns import Row

if TYPE_CHECKING:
    from raymem.data.shards import IngestSummary
    from raymem.scores import EpsilonSummary

SHOWN_REJECTS = 10
# The list's rate was measured from so many trials on; with few, the largest of many noisy estimates
# are on it.
TRIALS_FOR_LISTS = 100
# Of accuracy in against out: training makes the difference the other way, but for chance in few
# models.
WORSE = 0.02


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
    classes = store.study().classes
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
        lines += ["", f"epsilon {epsilon_name(row['epsilon'])}:", *_score_lines(row, same)]
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
        lines.append(format_table(pairs_table(top(mine, "influence", n))))
    return "\n".join(lines)


def _copies(index: pa.Table, me: Row) -> list[str]:
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


def _score_lines(row: Row, train: pa.Table) -> list[str]:
    lines = []
    if row["memorization"] is not None:
        above = pc.sum(pc.greater(train["memorization"], row["memorization"])).as_py() or 0
        lines.append(f"  rank {above + 1:,} of {train.num_rows:,} by memorization")
        if row["n_in"] is not None:  # published scores have no models
            lines.append(f"  {_in_words(row)}")
    skip = ("example_id", "index", "split", "label", "epsilon", "duplicate_group")
    shown = {k: v for k, v in row.items() if k not in (*skip, "near_duplicate_group")}
    known = {name: _three_digits(value) for name, value in shown.items() if value is not None}
    width, wide = max(map(len, known)), max(map(len, known.values()))
    edge = terminal_width()
    for name, text in known.items():
        line = f"  {name.ljust(width)}  {text.rjust(wide)}  {_meaning(train.schema.field(name))}"
        lines += folded(line.rstrip(), edge, hang=width + wide + 6)
    return lines


def _in_words(row: Row) -> str:
    right = {arm: round(row[f"accuracy_{arm}"] * row[f"n_{arm}"]) for arm in ("in", "out")}
    text = (
        f"{right['in']:,} of {row['n_in']:,} models that trained on it get it right, "
        f"{right['out']:,} of {row['n_out']:,} that did not"
    )
    return f"{text}: it is on the list of memorized examples" if row["memorized"] else text


def _meaning(field: pa.Field) -> str:
    """What a column says of itself, up to where it goes into detail."""
    said = (field.metadata or {}).get(b"meaning", b"").decode()
    first, _, rest = re.sub(r" ?\(.*?\)", "", said).partition(";")[0].partition(": ")
    return f"{rest}, {first}" if rest and first.startswith("mean over") else first


def summary_text(summaries: Sequence[EpsilonSummary]) -> str:
    """What the trials at each epsilon say together, a few lines each."""
    lines = []
    for s in summaries:
        at = "" if len(summaries) == 1 else f"epsilon {epsilon_name(s.epsilon)}: "
        if s.trials == 0:
            lines.append(f"{at}no trial is done yet")
            continue
        lines.append(
            f"{at}{s.trials:,} trials; mean accuracy: {percent(s.accuracy_in)} on examples they "
            f"trained on, {percent(s.accuracy_out)} on held-out training examples, "
            f"{percent(s.accuracy_test)} on the test set"
        )
        if s.accuracy_in < s.accuracy_out - WORSE:
            lines.append(
                f"{at}WARNING: models are less often right on what they trained on than on what "
                "they did not: are masks or orders of an imported fleet others than they seem?"
            )
        lines.append(_reliability(s))
        lines.append(
            f"list of those memorized above 0.25: {s.memorized:,} training examples "
            + (
                "(at most 5% false entries expected)"
                if s.trials >= TRIALS_FOR_LISTS
                else f"(with fewer than {TRIALS_FOR_LISTS} trials, more than 5% of it may be false)"
            )
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
    if not s.pairs_considered:
        return "influence: no pairs of a memorized training and a test example"
    text = (
        f"influence: {s.strong_pairs:,} strong pairs of {s.pairs_considered:,} (0.15 or more, with "
        f"a p-value of at most {s.pairs_level:.1g}), {s.pairs:,} kept"
    )
    return f"{text}, {s.pairs_dropped:,} DROPPED by --max-pairs" if s.pairs_dropped else text


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return str(dict(value))
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _three_digits(value: object) -> str:
    """Small numbers with three digits of their own: curvatures are of any size."""
    small = isinstance(value, float) and 0 < abs(value) < 0.01
    return f"{value:.3g}" if small else _cell(value)
