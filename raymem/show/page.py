"""One self-contained HTML page: opens from disk, needs no network; text of the data is escaped."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from raymem.encoding import epsilon_name
from raymem.links import Finding, LeftOut, Links
from raymem.scores import Attacked
from raymem.show.choose import Chosen, Row
from raymem.show.figures import Figure
from raymem.show.page_sections import compared_section, leave_one_out_section, membership_section
from raymem.show.terminal_links import links_text
from raymem.store import StudyRecord
from raymem.version import VERSION

COLUMNS = (
    "example_id", "class", "memorization", "memorization_low", "memorization_high",
    "memorization_soft", "n_in", "n_out", "accuracy_in", "accuracy_out", "loss_out",
    "curvature_out", "forgetting_count",
)  # fmt: skip
MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
# More classes than these are folded, so that a browser draws them when they are asked for.
OPEN_CLASSES = 12
TWINS = 24


def page(
    study: StudyRecord,
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
    leave-one-out experiment found, `sections` the HTML of other sections."""
    show = _Show(chosen.classes, pictures)
    rows = links.correlations.get(chosen.epsilon, ())
    compared = compared_section(rows, attacked, chosen.epsilon, stale)
    parts = [
        _head(study, location, command, bool(attacked), bool(compared), left_out is not None),
        _trust(links.diagnostics, links.private_diagnostics),
        _figures(charts, ("memorization",), "Memorization", "memorization"),
        _links(links, charts),
        compared,
        membership_section(attacked, _charts(charts, "membership"), stale),
        leave_one_out_section(left_out, _charts(charts, "leave-one-out")),
        *sections,
        _gallery(chosen, show, without_pictures),
        _pairs(chosen, show),
        _suspicious(chosen, show),
        _curvature(chosen, show),
        _copies(chosen, show),
        _twins(links, chosen, show),
        _table(chosen),
        _load(location),
    ]
    title = _t(f"{study.data_name}: what was memorized")
    css, js = (
        resources.files("raymem.show").joinpath(n).read_text() for n in ("page.css", "page.js")
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{css}</style>\n'
        "</head>\n"
        f"<body>\n{''.join(parts)}\n<script>\n{js}</script>\n</body>\n</html>\n"
    )


class _Show:
    """Pictures and captions of examples."""

    def __init__(self, classes: Sequence[str], pictures: Mapping[str, bytes]) -> None:
        self.classes, self.pictures = classes, pictures

    def label(self, number: int | None) -> str:
        """A class by name, escaped."""
        return "no label" if number is None else _t(self.classes[number])

    def picture(self, example_id: str, label: int | None, what: str) -> str:
        """An image element with its alternative text."""
        data = self.pictures.get(example_id)
        if data is None:
            return (
                f'<span class="none" role="img" aria-label="{_t(example_id)}: no picture"></span>'
            )
        media = next(m for start, m in MEDIA.items() if data.startswith(start))
        source = f"data:{media};base64,{base64.b64encode(data).decode()}"
        alt = f"{what} {_t(example_id)}, labelled {self.label(label)}"
        return f'<img src="{source}" alt="{alt}" loading="lazy">'

    def card(self, row: Row, text: str) -> str:
        """An example with its best relation beside it."""
        relation = row.get("relation")
        pictures = self.picture(row["example_id"], row["label"], "training example")
        more = ""
        if relation:
            pictures += self.picture(relation["test_id"], relation["test_label"], "test example")
            more = (
                f"<br>props up {_t(relation['test_id'])} ({self.label(relation['test_label'])}): "
                f"{relation['influence']:.2f}"
            )
        return (
            f'<figure class="card"><div class="pictures">{pictures}</div>'
            f"<figcaption><b>{self.label(row['label'])}</b> {_t(row['example_id'])}<br>{text}{more}"
            "</figcaption></figure>"
        )


def _head(
    study: StudyRecord,
    location: str,
    command: str,
    attacked: bool,
    compared: bool,
    left_out: bool,
) -> str:
    plan, recipe = study.plan, study.recipe
    privacy = ", ".join(f"{k} {_plain(v)}" for k, v in (study.privacy or {}).items())
    rows = [
        ("data", f"{study.data_name}: {study.n_train:,} training and "
                 f"{study.n_test:,} test examples, {len(study.classes):,} classes"),
        ("plan", f"{plan}, seed {plan.seed}" if plan.is_known else str(plan)),
        ("recipe", ", ".join(f"{k} {_plain(v)}" for k, v in recipe.items())),
        ("privacy", privacy or "none"),
        ("curvature", "measured" if study.curvature is not None else "not measured"),
        ("store", location),
        ("made by", f"raymem {VERSION}, study {study.hash[:16]}"),
    ]  # fmt: skip
    table = "".join(f"<tr><th scope='row'>{_t(k)}</th><td>{_t(v)}</td></tr>" for k, v in rows)
    again = f"<h3>Run it again</h3><pre>{_t(command)}</pre>" if command else ""
    names = (
        ("trust", "Trust"), ("memorization", "Memorization"), ("links", "Links"),
        *([("compared", "Compared")] if compared else []),
        *([("membership", "Membership")] if attacked else []),
        *([("leave-one-out", "Leaving one out")] if left_out else []), ("gallery", "Gallery"),
        ("errors", "Label errors"), ("table", "Table"), ("load", "Load"),
    )  # fmt: skip
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in names)
    return (
        f"<h1>{_t(study.data_name)}: what was memorized</h1>\n<nav>{nav}</nav>\n"
        f'<div class="scroll"><table>{table}</table></div>{again}\n'
    )


def _trust(
    found: Mapping[float, Sequence[Finding]], private: Mapping[float, Sequence[Finding]]
) -> str:
    lines = ['<h2 id="trust">Can this run be trusted?</h2>\n']
    reds = [f for findings in (*found.values(), *private.values()) for f in findings if f.red]
    if reds:
        lines.append(
            f'<p class="red-note">{len(reds)} {"number is" if len(reds) == 1 else "numbers are"} '
            "outside what they should be (red lines).</p>"
        )
    shown = [(epsilon, findings, "") for epsilon, findings in sorted(found.items(), reverse=True)]
    shown += [
        (epsilon, findings, "of the private study, ")
        for epsilon, findings in sorted(private.items(), reverse=True)
    ]
    for k, (epsilon, findings, of) in enumerate(shown):
        body = "".join(
            f"<tr{' class=red' if f.red else ''}><td>{_t(f.name)}</td><td>{_t(f.text)}</td>"
            f"<td>{_t(f.limit)}{' (red)' if f.red else ''}</td></tr>"
            for f in findings
        )
        table = (
            '<div class="scroll"><table><thead><tr><th>what</th><th>found</th><th>should be</th>'
            f"</tr></thead><tbody>{body}</tbody></table></div>"
        )
        if len(shown) == 1:
            lines.append(table)
            continue
        is_open = " open" if k == 0 or any(f.red for f in findings) else ""
        lines.append(
            f"<details{is_open}><summary>{of}epsilon {epsilon_name(epsilon)}</summary>"
            f"{table}</details>"
        )
    return "".join(lines)


def _figures(charts: Iterable[Figure], starts: tuple[str, ...], title: str, anchor: str) -> str:
    shown = "".join(_charts(charts, start) for start in starts)
    return f'<h2 id="{anchor}">{title}</h2>\n{shown}' if shown else ""


def _charts(charts: Iterable[Figure], start: str) -> str:
    """The figures whose names start so."""
    return "".join(_chart(chart) for chart in charts if chart.name.startswith(start))


def _chart(chart: Figure) -> str:
    light, dark = (base64.b64encode(data).decode() for data in (chart.light, chart.dark))
    return (
        '<figure class="chart"><picture>'
        f'<source srcset="data:image/png;base64,{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="data:image/png;base64,{light}" alt="{_t(chart.alt)}"></picture>'
        f"<figcaption>{_t(chart.title)}. {_t(chart.alt)}</figcaption></figure>\n"
    )


def _links(links: Links, charts: Sequence[Figure]) -> str:
    shown = _charts(charts, "link")
    verdicts = "".join(f"<li>{_t(text)}</li>" for text in links.verdicts)
    source = (
        ""
        if links.private_store is None
        else f'<p class="small">Links 2 and 3 are those of {_t(links.private_store)}.</p>'
    )
    return (
        f'<h2 id="links">The three links</h2>\n<ul>{verdicts}</ul>{source}{shown}'
        f"<details><summary>All numbers</summary><pre>{_t(links_text(links))}</pre></details>\n"
    )


def _interval(row: Row) -> str:
    if row["memorization"] is None:
        return "memorization not known"
    if row["memorization_low"] is None:  # published scores have no intervals
        return f"memorization {row['memorization']:.2f}"
    return (
        f"memorization {row['memorization']:.2f} "
        f"[{row['memorization_low']:.2f}, {row['memorization_high']:.2f}]"
    )


def _gallery(chosen: Chosen, show: _Show, without: str) -> str:
    lines = [
        '<h2 id="gallery">The most memorized of each class</h2>\n'
        "<p>Beside each training example the test example that it makes right most often.</p>"
    ]
    if without:
        lines.append(f'<p class="small">Some pictures are missing: {_t(without)}.</p>')
    if not chosen.gallery:
        lines.append("<p>No example is memorized above 0.25.</p>")
    for k, (label, rows) in enumerate(chosen.gallery.items()):
        cards = "".join(show.card(row, _interval(row) + _elsewhere(row)) for row in rows)
        lines.append(
            f"<details{' open' if k < OPEN_CLASSES else ''}><summary>{show.label(label)}</summary>"
            f'<div class="cards">{cards}</div></details>'
        )
    return "".join(lines)


def _elsewhere(row: Row) -> str:
    """What the same example is at other epsilons."""
    values = ", ".join(f"{value:.2f} at {epsilon_name(e)}" for e, value in row["elsewhere"].items())
    return f"<br>with privacy, by epsilon: {values}" if values else ""


def _pairs(chosen: Chosen, show: _Show) -> str:
    if not chosen.pairs:
        return ""
    cards = "".join(
        show.card(
            {"example_id": p["train_id"], "label": p["train_label"], "relation": p},
            f"memorization {p['memorization']:.2f}",
        )
        for p in chosen.pairs
    )
    return f'<h2>The strongest pairs</h2>\n<div class="cards">{cards}</div>'


def _suspicious(chosen: Chosen, show: _Show) -> str:
    if not chosen.suspicious:
        return ""
    cards = "".join(
        show.card({**r, "relation": None}, f"{_interval(r)}<br>loss without it {r['loss_out']:.1f}")
        for r in chosen.suspicious
        if r["loss_out"] is not None
    )
    return (
        '<h2 id="errors">Probable label errors</h2>\n'
        "<p>Models that did not see them give their label less than 10%; first those that they are "
        "surest are of another class. <code>raymem errors</code> lists all.</p>"
        f'<div class="cards">{cards}</div>'
    )


def _curvature(chosen: Chosen, show: _Show) -> str:
    if not chosen.highest:
        return ""
    lines = ["<h2>Lowest and highest curvature</h2>\n"]
    for label, rows in chosen.highest.items():
        cards = "".join(
            show.card({**r, "relation": None}, f"curvature {r['curvature_out']:.3g}")
            for r in (*chosen.lowest.get(label, []), *rows)
        )
        lines.append(
            f"<details><summary>{show.label(label)}: lowest, then highest</summary>"
            f'<div class="cards">{cards}</div></details>'
        )
    return "".join(lines)


def _copies(chosen: Chosen, show: _Show) -> str:
    if not chosen.copies:
        return ""
    groups = "".join(
        '<div class="cards">'
        + "".join(show.card({**r, "relation": None}, _t(r["split"])) for r in group)
        + "</div><br>"
        for group in chosen.copies
    )
    return f"<h2>Near duplicates</h2>\n<p>Those with different labels first.</p>{groups}"


def _twins(links: Links, chosen: Chosen, show: _Show) -> str:
    twins = links.twins.get(chosen.epsilon)
    if twins is None or not twins.rows:
        return ""
    cards = "".join(
        f'<figure class="card"><div class="pictures">'
        f"{show.picture(r['example_id'], r['label'], 'training example')}"
        f"{show.picture(r['twin_id'], r['label'], 'its twin')}</div>"
        f"<figcaption><b>{show.label(r['label'])}</b> {_t(r['example_id'])}<br>"
        f"memorization {r['memorization']:.2f}, with its twin {_t(r['twin_id'])} "
        f"{r['group_memorization']:.2f}<br>models without it are right {r['right_with_twin']:.2f} "
        f"with the twin, {r['right_without_twin']:.2f} without</figcaption></figure>"
        for r in twins.rows[:TWINS]
    )
    return (
        "<h2>Twins</h2>\n<p>Examples whose memorization is another's doing: models that did not "
        "see them are right if they saw the twin. The number for both together is that against "
        f'models that saw neither.</p><div class="cards">{cards}</div>'
    )


def _table(chosen: Chosen) -> str:
    names = [n for n in COLUMNS if n == "class" or (chosen.table and n in chosen.table[0])]
    rows = [
        [
            chosen.classes[row["label"]]
            if name == "class" and row["label"] is not None
            else _number(row.get(name))
            for name in names
        ]
        for row in chosen.table
    ]
    data = json.dumps({"columns": names, "rows": rows}, allow_nan=False, separators=(",", ":"))
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{_t(n)}</button></th>'
        for n in names
    )
    return (
        '<h2 id="table">The most memorized training examples</h2>\n'
        '<p><label for="search">Search ids and classes</label><br>'
        '<input type="search" id="search" autocomplete="off"></p>'
        '<p class="small" id="count" aria-live="polite"></p>'
        f'<div class="scroll"><table id="examples"><thead><tr>{head}</tr></thead><tbody></tbody>'
        "</table></div>"
        # A script element ends at the first "</", whatever is in it.
        f'<script type="application/json" id="rows">{data.replace("<", chr(92) + "u003c")}</script>'
    )


def _load(location: str) -> str:
    path = f"{location.rstrip('/')}/scores/examples.parquet"
    lines = (
        f"import pandas; table = pandas.read_parquet({path!r})",
        f"import polars; table = polars.read_parquet({path!r})",
        f"import duckdb; table = duckdb.sql(\"select * from '{path}'\")",
        f"import raymem; study = raymem.open({location!r})",
    )
    return (
        '<h2 id="load">Load the tables</h2>\n<pre>' + _t("\n".join(lines)) + "</pre>"
        "<p>One row per example and epsilon; test examples too. docs/columns.md says what the "
        "columns mean, and so does the metadata of the file. In a notebook the study has "
        ".examples, .pairs, .links() and .image(id).</p>"
    )


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name", value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _t(value: object) -> str:
    """Text, safe in elements and attributes."""
    return html.escape(str(value), quote=True)
