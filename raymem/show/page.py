"""The report as one self-contained HTML page: opens from disk, needs no network.

In:  a `Story`, links, chosen examples with pictures, figures. Out: HTML. Templates escape all text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from raymem.encoding import at_epsilon, epsilon_name
from raymem.links import LeftOut, Links
from raymem.links.verdicts import verdict_on_link1, verdicts_on_costs
from raymem.scores import Attacked
from raymem.show.choose import Chosen
from raymem.show.figures import Figure
from raymem.show.result_tables import (
    attacks_table,
    bins_table,
    correlations_table,
    curvature_by_epsilon_table,
    equal_loss_table,
    findings_table,
    fits_table,
    memorization_by_epsilon_table,
    memorized_by_epsilon_table,
    one_model_table,
    references_table,
)
from raymem.show.score_tables import column_of, memorization_of
from raymem.show.story import Story
from raymem.show.table import Cell, Table, environment, from_arrow
from raymem.show.terminal_leave_one_out import bias_table, example_table, sources_text
from raymem.show.terminal_links import costs_text, link2_lines, paper_bins_text
from raymem.show.terminal_membership import best_text, correlation_text
from raymem.store import StudyRecord
from raymem.store.columns import Row
from raymem.store.measures import MEASURES, unit_of
from raymem.version import VERSION

# What a part of the template is given, by name.
Context = dict[str, object]

COLUMNS = (
    "example_id", "class", "memorization", "memorization_low", "memorization_high",
    "memorization_soft", "n_in", "n_out", "accuracy_in", "accuracy_out", "loss_out",
    "curvature_out", "forgetting_count",
)  # fmt: skip
MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
TWINS = 24
# An interval stays on one line of a card.
NO_BREAK = "\u00a0"


def page(
    study: StudyRecord,
    story: Story,
    chosen: Chosen,
    links: Links,
    charts: Sequence[Figure],
    pictures: Mapping[str, bytes],
    *,
    location: str,
    command: str = "",
    without_pictures: str = "",
    attacked: Sequence[Attacked] = (),
    stale: str = "",
    left_out: LeftOut | None = None,
    sections: Sequence[str] = (),
) -> str:
    """The page. `study` is study.json, `command` what ran it, `without_pictures` why some lack,
    `attacked` what membership.json has, `stale` what is wrong with it, `left_out` what a
    leave-one-out experiment found. `sections` are HTML that follows the answers; they must be safe
    already."""
    show = _Cards(chosen.classes, pictures)
    values = {
        "title": f"{study.data_name}: what was memorized",
        "subtitle": f"{study.n_train:,} training and {study.n_test:,} test examples; {study.plan}; "
        f"raymem {VERSION}",
        "story": story,
        "nav": _nav(
            story, bool(links.correlations.get(chosen.epsilon)), bool(left_out), bool(sections)
        ),
        "without_pictures": without_pictures,
        "first": [show.memorized(row) for row in chosen.first],
        "gallery": [
            (show.label(k), [show.memorized(row) for row in rows])
            for k, rows in chosen.gallery.items()
        ],
        "pairs": [show.pair(pair) for pair in chosen.pairs],
        "suspicious": [show.suspicious(row) for row in chosen.suspicious],
        "extremes": _extremes(chosen, show),
        "copies": [[show.copy(row) for row in group] for group in chosen.copies],
        "twins": _twins(links, chosen, show),
        "charts": lambda start: [_chart(c) for c in charts if c.name.startswith(start)],
        **_curvature(links, chosen.epsilon),
        **_privacy(links),
        "memorized": memorized_by_epsilon_table(links.memorized) if links.memorized else None,
        **_membership(attacked, stale),
        "left_out": _left_out(left_out),
        "checks": _checks(links),
        "settings": _settings(study, location),
        "sections": sections,
        "location": location,
        "command": command,
        "load": _load(location),
        **_examples(chosen),
        **{kind: _resource(f"page.{kind}") for kind in ("css", "js")},
    }
    return environment().get_template("report.html").render(values)


def _resource(name: str) -> str:
    return resources.files("raymem.show").joinpath(name).read_text()


def _nav(story: Story, compared: bool, left_out: bool, sections: bool) -> list[tuple[str, str]]:
    shown = {
        "found": "Found",
        "memorization": "Memorization",
        "influence": "Influence" if story.influence else "",
        "errors": "Label errors" if story.label_errors else "",
        "curvature": "Curvature" if compared else "",
        "privacy": "Privacy",
        "membership": "Membership",
        "leave-one-out": "Leaving one out" if left_out else "",
        "explorer": "Explorer" if sections else "",
        "table": "Table",
        "trust": "Trust",
        "settings": "Settings",
    }
    return [(anchor, name) for anchor, name in shown.items() if name]


class _Cards:
    """Examples with their pictures and lines of text, as the template's `cards` takes them."""

    def __init__(self, classes: Sequence[str], pictures: Mapping[str, bytes]) -> None:
        self.classes, self.pictures = classes, pictures

    def label(self, number: int | None) -> str:
        """A class by name."""
        return "no label" if number is None else self.classes[number]

    def picture(self, example_id: str, label: int | None, what: str) -> dict[str, str]:
        """An image's source, empty if there is none, and its alternative text."""
        data = self.pictures.get(example_id)
        if data is None:
            return {"source": "", "alt": example_id}
        media = next(media for start, media in MEDIA.items() if data.startswith(start))
        return {
            "source": f"data:{media};base64,{base64.b64encode(data).decode()}",
            "alt": f"{what} {example_id}, labelled {self.label(label)}",
        }

    def card(self, row: Row, lines: Sequence[str], helps: str = "most helps") -> Context:
        """An example, with a test example that it `helps` beside it."""
        shown = [self.picture(row["example_id"], row["label"], "training example")]
        lines = list(lines)
        if helped := row.get("relation"):
            shown.append(self.picture(helped["test_id"], helped["test_label"], "test example"))
            lines.append(
                f"{helps} {helped['test_id']} ({self.label(helped['test_label'])}): influence "
                f"{helped['influence']:.2f}"
            )
        return {
            "example_id": row["example_id"],
            "label": self.label(row["label"]),
            "pictures": shown,
            "lines": lines,
        }

    def memorized(self, row: Row) -> Context:
        """A memorized example."""
        elsewhere = ", ".join(
            f"{value:.2f} at {epsilon_name(epsilon)}" for epsilon, value in row["elsewhere"].items()
        )
        more = [f"with privacy, by epsilon: {elsewhere}"] if elsewhere else []
        return self.card(row, [_memorization(row), *more])

    def pair(self, pair: Row) -> Context:
        """A pair of high influence."""
        row = {"example_id": pair["train_id"], "label": pair["train_label"], "relation": pair}
        return self.card(row, [f"memorization {pair['memorization']:.2f}"], "helps")

    def suspicious(self, row: Row) -> Context:
        """A probable label error."""
        lines = [_memorization(row)]
        if row["loss_out"] is not None:
            lines.append(f"loss without it {row['loss_out']:.1f} nats")
        return self.card({**row, "relation": None}, lines)

    def copy(self, row: Row) -> Context:
        """One of several near duplicates."""
        return self.card({**row, "relation": None}, [row["split"]])


def _memorization(row: Row) -> str:
    found = memorization_of(row)
    return (
        "memorization not known"
        if found is None
        else f"memorization {found.text('.2f').replace(' ', NO_BREAK)}"
    )


def _chart(chart: Figure) -> dict[str, str]:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for data in (chart.light, chart.dark)
    )
    return {"title": chart.title, "alt": chart.alt, "light": light, "dark": dark}


def _extremes(chosen: Chosen, show: _Cards) -> list[tuple[str, list[Context]]]:
    unit = unit_of("curvature_out")
    return [
        (
            show.label(label),
            [
                show.card({**r, "relation": None}, [f"curvature {r['curvature_out']:.3g} {unit}"])
                for r in (*chosen.lowest.get(label, []), *rows)
            ],
        )
        for label, rows in chosen.highest.items()
    ]


def _twins(links: Links, chosen: Chosen, show: _Cards) -> list[Context]:
    twins = links.twins.get(chosen.epsilon)
    return [
        {
            "example_id": row["example_id"],
            "label": show.label(row["label"]),
            "pictures": [
                show.picture(row["example_id"], row["label"], "training example"),
                show.picture(row["twin_id"], row["label"], "its twin"),
            ],
            "lines": [
                f"memorization {row['memorization']:.2f}, with its twin {row['twin_id']} "
                f"{row['group_memorization']:.2f}",
                f"models trained without it are right {100 * row['right_with_twin']:.0f}% of the "
                f"time with the twin, {100 * row['right_without_twin']:.0f}% without",
            ],
        }
        for row in (twins.rows[:TWINS] if twins else [])
    ]


def _curvature(links: Links, epsilon: float) -> Context:
    rows = links.correlations.get(epsilon, [])
    equal = equal_loss_table(rows)
    bins = links.bins.get(epsilon)
    tables = [
        *([fits_table(rows)] if rows else []),
        *([] if equal is None else [equal]),
        *([] if bins is None else [bins_table(epsilon, bins)]),
        *(
            [one_model_table(epsilon, links.one_model[epsilon])]
            if epsilon in links.one_model
            else []
        ),
    ]
    costs = {e: found for e, found in links.costs.items() if e == epsilon}
    here = {epsilon}
    lines = [
        *paper_bins_text({e: v for e, v in links.paper.items() if e in here}).splitlines(),
        *costs_text(costs).splitlines(),
    ]
    return {
        "compared": correlations_table(rows) if rows else None,
        "compared_examples": f"{rows[0].examples:,}" if rows else "",
        "at": at_epsilon(epsilon),
        "measures": [MEASURES[row.measure] for row in rows],
        "link1": [verdict_on_link1(epsilon, rows), *verdicts_on_costs(costs, links.one_model)],
        "more_tables": tables,
        "more_lines": lines,
    }


def _privacy(links: Links) -> Context:
    private = any(audit.mechanism for audit in links.memorization)
    tables = [
        memorization_by_epsilon_table(links.memorization),
        curvature_by_epsilon_table(links.curvature),
    ]
    return {
        "private_store": links.private_store,
        "privacy_tables": tables if private else [],
        "privacy_lines": link2_lines(links.curvature),
        "privacy_verdicts": links.verdicts[-2:],
    }


def _membership(attacked: Sequence[Attacked], stale: str) -> Context:
    sentences = [text(here) for here in attacked for text in (best_text, correlation_text)]
    notes = [
        f"Epsilon {epsilon_name(here.epsilon)}: {note}." for here in attacked for note in here.notes
    ]
    return {
        "attacked": bool(attacked),
        "stale": stale,
        "attacks": attacks_table(attacked),
        "references": references_table(attacked)
        if any(here.by_references for here in attacked)
        else None,
        "membership_lines": [*sentences, *notes],
    }


def _left_out(found: LeftOut | None) -> Context | None:
    if found is None:
        return None
    return {
        "bias": from_arrow(bias_table(found)),
        "examples": from_arrow(example_table(found)),
        "verdict": found.verdict,
        "sources": sources_text(found),
    }


def _checks(links: Links) -> list[tuple[str, Table]]:
    shown = [("", e, f) for e, f in sorted(links.diagnostics.items(), reverse=True)]
    shown += [
        ("the private study, ", e, f)
        for e, f in sorted(links.private_diagnostics.items(), reverse=True)
    ]
    return [
        (f"All checks: {of}epsilon {epsilon_name(epsilon)}", findings_table(findings))
        for of, epsilon, findings in shown
    ]


def _settings(study: StudyRecord, location: str) -> list[tuple[str, str]]:
    plan = study.plan
    privacy = ", ".join(f"{k} {_words(v)}" for k, v in (study.privacy or {}).items())
    return [
        ("data", f"{study.data_name}: {study.n_train:,} training and {study.n_test:,} test "
                 f"examples, {len(study.classes):,} classes"),
        ("plan", f"{plan}, seed {plan.seed}" if plan.is_known else str(plan)),
        ("recipe", ", ".join(f"{k} {_words(v)}" for k, v in study.recipe.items())),
        ("privacy", privacy or "none"),
        ("curvature", "measured" if study.curvature is not None else "not measured"),
        ("store", location),
        ("made by", f"raymem {VERSION}, study {study.hash[:16]}"),
    ]  # fmt: skip


def _words(value: object) -> str:
    if isinstance(value, dict):
        return str(value.get("name", value))
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _examples(chosen: Chosen) -> Context:
    """The searchable table: its columns, and its rows as JSON for the page's script."""
    names = [n for n in COLUMNS if n == "class" or (chosen.table and n in chosen.table[0])]
    rows: list[list[Cell]] = [
        [_cell(row, name, chosen.classes) for name in names] for row in chosen.table
    ]
    table = Table(columns=[column_of(name) for name in names], rows=rows)
    data = json.dumps(table.as_dict(), allow_nan=False, separators=(",", ":"))
    # A script element ends at the first "</", whatever is in it.
    return {"examples": table, "examples_json": data.replace("<", chr(92) + "u003c")}


def _cell(row: Row, name: str, classes: Sequence[str]) -> Cell:
    if name == "class":
        return None if row["label"] is None else classes[row["label"]]
    value: Cell = row.get(name)
    return round(value, 4) if isinstance(value, float) else value


def _load(location: str) -> str:
    path = f"{location.rstrip('/')}/scores/examples.parquet"
    return "\n".join(
        (
            f"import pandas; table = pandas.read_parquet({path!r})",
            f"import polars; table = polars.read_parquet({path!r})",
            f"import duckdb; table = duckdb.sql(\"select * from '{path}'\")",
            f"import raymem; study = raymem.open({location!r})",
        )
    )
