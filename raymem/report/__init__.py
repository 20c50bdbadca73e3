"""`raymem report`: the page people read, its figures, and what it shows.

In:  a scored store, and its images if they are at hand.
Out: report.html, figures/*.png and *.pdf, figures/thumbnails.parquet, links.json in the store.
"""

from __future__ import annotations

import math
import os

from raymem.examples import Examples
from raymem.links import find_links
from raymem.opened import Opened
from raymem.report.choose import choose
from raymem.report.figures import figures
from raymem.report.page import page
from raymem.report.thumbnails import thumbnails

__all__ = ["write_report"]


def write_report(
    store: str | os.PathLike[str], data: Examples | str | None = None, *, command: str = ""
) -> str:
    """Write the page of a scored store and everything it is made of; returns where it is.

    Pictures come from `data`, or from where the study had its images; without them the page has
    none. `command` is what ran the study, for people who want to run it again.

    Raises StoreError without scores.
    """
    opened = Opened(store, data)
    store_ = opened.store
    epsilons = sorted(set(store_.scores()["epsilon"].to_pylist()))
    shown = math.inf if math.inf in epsilons else epsilons[-1]
    links = find_links(store_)
    store_.write_links(links.as_dict())
    chosen = choose(store_, shown)
    charts = list(figures(store_, links, shown))
    for chart in charts:
        store_.files.replace(f"figures/{chart.name}.png", chart.light)
        store_.files.replace(f"figures/{chart.name}.pdf", chart.pdf)
    pictures, without = thumbnails(opened, chosen.ids())
    text = page(
        opened.about,
        chosen,
        links,
        charts,
        pictures,
        location=store_.files.path("").rstrip("/"),
        command=command,
        without_pictures=without,
    )
    store_.files.replace("report.html", text.encode())
    return store_.files.path("report.html")
