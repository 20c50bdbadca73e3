"""The explorer's scatter plot as a Vega-Lite specification, for the page and for papers.

The page fills in its data and colours (assets/explorer_plot.js); `specification` does so here, and
vl-convert draws it without a browser.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np

from raymem.encoding import epsilon_name
from raymem.errors import RaymemError
from raymem.show.explorer_data import ExplorerTables, thinned
from raymem.show.figures import LIGHT
from raymem.store import Store

# Points of a figure for papers: more are a blot, and megabytes of SVG.
MOST_POINTS = 8_000
SUFFIXES = (".png", ".svg", ".pdf")

SCATTER: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
    "description": "Two measures of the examples.",
    "autosize": {"type": "fit", "contains": "padding"},
    "padding": {"left": 4, "top": 8, "right": 8, "bottom": 4},
    "data": {"values": []},
    "params": [{"name": "brush", "select": {"type": "interval"}}],
    "mark": {"type": "point", "filled": True, "size": 20, "opacity": 0.6},
    "encoding": {
        "x": {
            "field": "x", "type": "quantitative", "axis": {"tickCount": 8},
            "scale": {"zero": False, "nice": False, "padding": 8},
        },
        "y": {
            "field": "y", "type": "quantitative", "axis": {"tickCount": 6},
            "scale": {"zero": False, "nice": False, "padding": 8},
        },
        "color": {
            "field": "split", "type": "nominal", "legend": None,
            "scale": {"domain": ["training", "test"], "range": []},
        },
        "shape": {
            "field": "split", "type": "nominal", "legend": None,
            "scale": {"domain": ["training", "test"], "range": ["circle", "triangle-up"]},
        },
    },
    "config": {"view": {"stroke": None}},
}  # fmt: skip


class ExplorerError(RaymemError, ValueError):
    """The explorer was asked for a figure or measure that there is not."""


def specification(
    tables: ExplorerTables, epsilon: float, x: str, y: str, *, width: int = 480, height: int = 320
) -> dict[str, Any]:
    """The figure of measures `x` and `y` at `epsilon` with its points, as Vega-Lite.

    Of more than 8,000 points: half the most memorized, the rest evenly spread.
    Raises ExplorerError for a measure that the store does not have.
    """
    titles = {m.name: m.label for m in tables.measures}
    columns = {}
    for name in (x, y):
        values = tables.column(epsilon, name) if name in titles else None
        if values is None:
            raise ExplorerError(
                f"there is no measure {name}; take one of {', '.join(titles) or 'none'}"
            )
        columns[name] = values
    shown = np.flatnonzero(np.isfinite(columns[x]) & np.isfinite(columns[y]))
    memorization = tables.column(epsilon, "memorization")
    of_shown = None if memorization is None else memorization[shown]
    shown = shown[thinned(of_shown, len(shown), MOST_POINTS)]
    spec = copy.deepcopy(SCATTER)
    del spec["params"]
    spec["width"], spec["height"], spec["background"] = width, height, LIGHT["paper"]
    spec["data"] = {
        "values": [
            {
                "x": float(columns[x][row]),
                "y": float(columns[y][row]),
                "split": "training" if row < tables.n_train else "test",
            }
            for row in shown
        ]
    }
    for axis, name in (("x", x), ("y", y)):
        spec["encoding"][axis]["title"] = titles[name]
    spec["encoding"]["color"]["scale"]["range"] = [LIGHT["one"], LIGHT["two"]]
    if (shown >= tables.n_train).any():
        spec["encoding"]["color"]["legend"] = {"title": None, "orient": "top"}
        spec["encoding"]["shape"]["legend"] = {"title": None, "orient": "top"}
    return spec


def draw_figure(
    store: Store,
    path: str | os.PathLike[str],
    *,
    across: str = "memorization",
    up: str = "curvature_out",
    epsilon: float | None = None,
) -> None:
    """Write the plot of two columns of a store as PNG, SVG or PDF.

    `epsilon` is the largest if not given: inf if there are models that are not private.
    Raises StoreError without scores; ExplorerError as `specification` and `write_figure` do.
    """
    tables = ExplorerTables(store)
    at = tables.shown if epsilon is None else epsilon
    if at not in tables.epsilons:
        names = ", ".join(epsilon_name(e) for e in tables.epsilons)
        raise ExplorerError(
            f"there are no scores at epsilon {epsilon_name(at)}; take one of {names}"
        )
    write_figure(specification(tables, at, across, up), path)


def write_figure(spec: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a specification's figure as PNG, SVG or PDF, by the suffix of `path`.

    Raises ExplorerError for another suffix, and without vl-convert-python.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ExplorerError(f"{target} has no known suffix; take one of {', '.join(SUFFIXES)}")
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise ExplorerError(
            "figures of the explorer need vl-convert-python; pip install 'raymem[explore]'"
        ) from error
    if target.suffix == ".png":
        target.write_bytes(vl_convert.vegalite_to_png(spec, scale=3))
    elif target.suffix == ".pdf":
        target.write_bytes(vl_convert.vegalite_to_pdf(spec))
    else:
        target.write_text(vl_convert.vegalite_to_svg(spec))
