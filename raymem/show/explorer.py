"""The explorer: every example as a point, to hover, open, brush and copy, in one page.

In:  a scored store. Out: `explorer_section`, HTML that needs no network: the report has it, and
`explorer_page` alone. The server of `raymem explore` gives the same page its arrays as it asks.

A browser unpacks arrays (`packed`), not rows. A page has a budget: what does not fit is left out,
and the page says so.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymem.encoding import epsilon_name
from raymem.show.explorer_data import ExplorerTables, packed, packed_text, spread, thinned
from raymem.show.explorer_pictures import small_pictures
from raymem.show.explorer_spec import SCATTER
from raymem.show.notebook import StudyResults

MOST_EXAMPLES = 60_000
# Examples with their picture and the outcomes of their models.
MOST_DETAILS = 4_000
MOST_PAIRS = 100_000
# Bytes before base64, which adds a third; a page of 15 MB has room for the report beside them.
COLUMN_BYTES, PICTURE_BYTES, OUTCOME_BYTES = 4_000_000, 2_400_000, 800_000
SCRIPTS = ("explorer_source.js", "explorer_plot.js", "explorer.js")
VEGA = ("vega.min.js", "vega-lite.min.js")

Blobs = dict[str, bytes]


def explorer_section(opened: StudyResults, first: Iterable[str] = (), *, keep: bool = True) -> str:
    """The explorer of a store as HTML, at most about 9 MB; text of the data is escaped.

    Of more than 60,000 examples it has the most memorized and an even sample. Pictures are for at
    most 4,000: those of `first`, the most memorized, then others; they are kept in the store, if
    `keep`. Raises StoreError without scores.
    """
    tables = ExplorerTables(opened.store)
    rows = thinned(tables.column(tables.shown, "memorization"), tables.n_examples, MOST_EXAMPLES)
    page = _Page(tables, rows)
    page.add_columns()
    page.add_pairs()
    page.add_details(opened, first, keep)
    return section_html(page.about, page.blobs)


class _Page:
    """What one page holds: `blobs` by name, and `about`, which says what there is."""

    def __init__(self, tables: ExplorerTables, rows: NDArray[np.int64]) -> None:
        self.tables, self.rows = tables, rows
        self.about = about(tables)
        self.about["n"] = len(rows)
        self.about["n_train"] = int((rows < tables.n_train).sum())
        self.blobs: Blobs = {
            "ids": packed_text(json.dumps([tables.ids[row] for row in rows])),
            "labels": packed(tables.labels[rows]),
            "groups": packed(tables.groups[rows]),
            "vega": vega_code(),
        }
        if len(rows) < tables.n_examples:
            self._say(
                f"{len(rows):,} of {tables.n_examples:,} examples are on this page, half of them "
                "the most memorized, the rest evenly sampled; `raymem explore STORE` shows all."
            )

    def _say(self, text: str) -> None:
        self.about["sampled"].append(text)

    def add_columns(self) -> None:
        """Measures with their intervals, the first epsilon first, while there is room."""
        left, room = 0, COLUMN_BYTES
        self.about["columns"] = {epsilon_name(e): [] for e in self.tables.epsilons}
        for epsilon in self.tables.epsilons:
            for measure in self.tables.measures:
                values = {
                    n: self.tables.column(epsilon, n) for n in (measure.name, *measure.around)
                }
                if values[measure.name] is None:
                    continue
                found = {n: packed(v[self.rows]) for n, v in values.items() if v is not None}
                size = sum(map(len, found.values()))
                if size > room:
                    left += 1
                    continue
                room -= size
                self.about["columns"][epsilon_name(epsilon)] += found
                for name, data in found.items():
                    self.blobs[f"m/{epsilon_name(epsilon)}/{name}"] = data
        if left:
            self._say(
                f"Some measures at some epsilons ({left}) do not fit this page; `raymem explore "
                "STORE` has them."
            )

    def add_pairs(self) -> None:
        """The most influential relations among the examples that are here."""
        place = np.full(self.tables.n_examples, -1, np.int32)
        place[self.rows] = np.arange(len(self.rows))
        room = MOST_PAIRS
        for epsilon in self.tables.epsilons:
            pairs = self.tables.pairs(epsilon)
            train, test = place[pairs["train"]], place[pairs["test"]]
            here = np.flatnonzero((train >= 0) & (test >= 0))
            if len(here) > room:
                self._say(
                    f"Of the relations at epsilon {epsilon_name(epsilon)} the {room:,} most "
                    f"influential of {len(here):,} are on this page."
                )
            here = here[:room]
            room -= len(here)
            if len(here):
                name = epsilon_name(epsilon)
                self.about["pairs"].append(name)
                self.blobs |= pair_blobs(name, train[here], test[here], pairs["influence"][here])

    def add_details(self, opened: StudyResults, first: Iterable[str], keep: bool) -> None:
        """Pictures, and the outcome of each model, of some examples."""
        chosen = self._with_details(first)
        ids = [self.tables.ids[self.rows[row]] for row in chosen]
        images, missing = small_pictures(opened, ids, keep=keep)
        sizes = np.cumsum([len(image) for image in images])
        fit = int(np.searchsorted(sizes, PICTURE_BYTES, side="right"))
        chosen, images = chosen[:fit], images[:fit]
        self.blobs["detail"] = packed(np.array(chosen, np.int32))
        if any(images):
            self.about["pictures"] = True
            self.blobs["pictures/starts"] = packed(np.append(0, sizes[:fit]).astype(np.uint32))
            self.blobs["pictures/bytes"] = packed(np.frombuffer(b"".join(images), np.uint8))
        elif missing:
            self._say(f"Pictures are missing: {missing}.")
        if len(chosen) < len(self.rows):
            self._say(
                f"Pictures and outcomes of single models are here for {len(chosen):,} examples: "
                "the most memorized, their relations, and an even sample."
            )
        self._add_outcomes(chosen)

    def _with_details(self, first: Iterable[str]) -> list[int]:
        """Rows that get details, in order: `first`, the most memorized, their relations, others."""
        row_of = {self.tables.ids[row]: place for place, row in enumerate(self.rows)}
        wanted = [row_of[i] for i in first if i in row_of]
        memorization = self.tables.column(self.tables.shown, "memorization")
        if memorization is not None:
            values = np.nan_to_num(memorization[self.rows], nan=-np.inf)
            wanted += np.argsort(-values, kind="stable")[: MOST_DETAILS // 2].tolist()
        place = np.full(self.tables.n_examples, -1)
        place[self.rows] = np.arange(len(self.rows))
        pairs = self.tables.pairs(self.tables.shown)
        for split in ("test", "train"):
            related = place[pairs[split][: MOST_DETAILS // 4]]
            wanted += related[related >= 0].tolist()
        wanted = list(dict.fromkeys(wanted))[:MOST_DETAILS]
        others = np.setdiff1d(np.arange(len(self.rows)), wanted)
        return [*wanted, *spread(others, MOST_DETAILS - len(wanted)).tolist()]

    def _add_outcomes(self, chosen: Sequence[int]) -> None:
        room = OUTCOME_BYTES
        for epsilon in self.tables.epsilons:
            trials = len(self.tables.trials(epsilon))
            if not trials or len(chosen) * trials / 4 > room:
                continue
            room -= len(chosen) * trials // 4
            codes = self.tables.outcomes(epsilon)[:, self.rows[list(chosen)]].T
            name = epsilon_name(epsilon)
            self.blobs[f"outcomes/{name}"] = packed(four_in_a_byte(codes).ravel())
            self.about["trials"][name] = trials


def about(tables: ExplorerTables) -> dict[str, Any]:
    """What the page must know before it unpacks or asks for anything, as JSON-ready data."""
    return {
        **tables.about(),
        "spec": SCATTER,
        "served": False,
        "pictures": False,
        "columns": {},
        "pairs": [],
        "trials": {},
        "all_trials": {epsilon_name(e): tables.n_trials(e) for e in tables.epsilons},
        "sampled": [],
    }


def pair_blobs(
    epsilon: str,
    train: np.ndarray,
    test: np.ndarray,
    influence: np.ndarray,
) -> Blobs:
    """Relations at an epsilon as the page asks for them."""
    found = {"train": train.astype(np.int32), "test": test.astype(np.int32), "influence": influence}
    return {f"pairs/{epsilon}/{name}": packed(values) for name, values in found.items()}


def four_in_a_byte(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two-bit codes [D, T], four in a byte, the first in the lowest bits: uint8 [D, ceil(T / 4)].

    >>> four_in_a_byte(np.array([[3, 0, 1, 2, 1]], np.uint8)).tolist()
    [[147, 1]]
    """
    D, T = codes.shape
    whole = np.zeros((D, -(-T // 4) * 4), np.uint8)
    whole[:, :T] = codes
    first, second, third, fourth = (whole[:, k::4] for k in range(4))
    packed_codes: NDArray[np.uint8] = first | second << 2 | third << 4 | fourth << 6
    return packed_codes


def asset(name: str) -> str:
    """The text of a file that comes with the package."""
    return resources.files("raymem.show").joinpath("assets", name).read_text()


def vega_code() -> bytes:
    """Vega and Vega-Lite with their licences, packed."""
    code = "\n".join(asset(name).partition("\n//# sourceMappingURL")[0] for name in VEGA)
    return packed_text(f"/*\n{asset('LICENSES.txt').replace('*/', '* /')}\n*/\n{code}")


def section_html(about: dict[str, Any], blobs: Blobs) -> str:
    """The section with its data: nothing of it is markup."""
    # A script element ends at the first "</", whatever is in it.
    told = json.dumps(about, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    data = "".join(
        f'<script type="application/octet-stream" data-blob="{html.escape(name)}">'
        f"{base64.b64encode(blob).decode()}</script>\n"
        for name, blob in blobs.items()
    )
    scripts = "".join(map(asset, SCRIPTS))
    return (
        f"<style>\n{asset('explorer.css')}</style>\n"
        '<section id="explorer" aria-labelledby="explorer-title">\n'
        f'<h2 id="explorer-title">Explorer</h2>\n{asset("explorer.html")}'
        f'<script type="application/json" id="explorer-about">{told}</script>\n{data}'
        f'</section>\n<script>\n(function () {{\n"use strict";\n{scripts}}})();\n</script>\n'
    )


@dataclass(frozen=True)
class ExplorerFrame:
    """An explorer that a notebook shows inline; see `StudyResults.explore`."""

    html: str
    """The whole page: needs no network, and opens from disk once it is written there."""
    height: int
    """Pixels."""

    def _repr_html_(self) -> str:
        # Its own origin: names and scripts of the page reach nothing of the notebook's.
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="Explorer" width="100%" '
            f'height="{self.height}" style="border: 0" sandbox="allow-scripts allow-downloads" '
            'allow="clipboard-write"></iframe>'
        )


def explorer_frame(opened: StudyResults, height: int) -> ExplorerFrame:
    """The explorer of an opened store for a notebook; nothing is written to the store."""
    title = f"{opened.about.data_name}: explorer"
    return ExplorerFrame(explorer_page(explorer_section(opened, keep=False), title), height)


def explorer_page(section: str, title: str) -> str:
    """A page with nothing but an explorer."""
    css = resources.files("raymem.show").joinpath("page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{css}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n"
        f"{section}</main>\n</body>\n</html>\n"
    )
