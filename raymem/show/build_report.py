"""`raymem report`: the page people read, its figures, and what it shows.

In:  a scored store, its images if they are at hand, its membership.json if there is one.
Out: report.html, figures/*.png and *.pdf, figures/thumbnails.parquet, links.json in the store.
"""

from __future__ import annotations

import os

from raymem.data import Examples
from raymem.errors import StoreError
from raymem.links import (
    LeftOut,
    Links,
    find_leave_one_out,
    find_links,
    privacy_links,
    with_private,
)
from raymem.scores import read_membership
from raymem.show.choose import choose
from raymem.show.explorer import explorer_section
from raymem.show.figures import figures, leave_one_out_figure
from raymem.show.notebook import StudyResults
from raymem.show.page import TWINS, page
from raymem.show.story import main_epsilon, tell
from raymem.show.terminal_membership import stale_text
from raymem.show.thumbnails import thumbnails
from raymem.store import Store

__all__ = ["write_report"]


def write_report(
    store: str | os.PathLike[str],
    data: Examples | str | None = None,
    *,
    private: str | os.PathLike[str] | None = None,
    leave_one_out: str | os.PathLike[str] | None = None,
    links: Links | None = None,
) -> str:
    """Write the page of a scored store and everything it is made of; returns where it is.

    Pictures come from `data`, or from where the study had its images; without them the page has
    none. `private` is another store of the same examples, whose trials at several epsilons give
    links 2 and 3. `leave_one_out` is a leave-one-out experiment on this store's scores. `links` are
    those of both stores, if they are known already: they take seconds to hours.

    Raises StoreError without scores, if the private store is not of the same examples, and if the
    experiment is on other scores.
    """
    opened = StudyResults(store, data)
    store_ = opened.store
    epsilons = sorted(set(store_.scores()["epsilon"].to_pylist()))
    shown = main_epsilon(store_.scores())
    if links is None:
        links = find_links(store_)
        if private is not None:
            other = Store(private)
            links = with_private(links, privacy_links(other), store_, other)
    store_.write_note("links", links)
    chosen = choose(store_, shown)
    attacked = read_membership(store_)
    left_out = None if leave_one_out is None else _left_out(store_, Store(leave_one_out))
    charts = list(figures(store_, links, shown, attacked))
    if left_out is not None:
        charts.append(leave_one_out_figure(left_out))
    for chart in charts:
        chart.keep(store_)
    twins = links.twins[shown].rows[:TWINS]
    ids = [*chosen.ids(), *(row[side] for row in twins for side in ("example_id", "twin_id"))]
    pictures, without = thumbnails(opened, list(dict.fromkeys(ids)))
    text = page(
        opened.about,
        tell(store_, links, shown, attacked),
        chosen,
        links,
        charts,
        pictures,
        location=store_.files.path("").rstrip("/"),
        command=(store_.note("command") or {}).get("command", ""),
        without_pictures=without,
        attacked=attacked,
        stale=stale_text(attacked, {e: len(store_.scored(e)) for e in epsilons}),
        left_out=left_out,
        sections=[explorer_section(opened, ids)],
    )
    store_.files.replace("report.html", text.encode())
    return store_.files.path("report.html")


def _left_out(scored: Store, experiment: Store) -> LeftOut:
    found = find_leave_one_out(experiment)
    if found.experiment.scored_study != scored.study().hash:
        raise StoreError(
            f"the leave-one-out experiment in {experiment.url} is on the scores of study "
            f"{found.experiment.scored_study[:16]}, not on those in {scored.url}; take the store "
            "that it was run with"
        )
    return found
