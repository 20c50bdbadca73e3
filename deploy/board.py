"""The Grafana dashboard, made of its panels: `python deploy/board.py` writes deploy/grafana.json.

Each panel's expressions name metrics of raymem.fleet.metrics.METRICS; a test holds both, and the
file, together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("grafana.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PER_ROW, WIDTH, HEIGHT = 3, 8, 8
STALLED_SECONDS = 1800
ONE = '{study=~"$study"}'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: its title, unit, and the legend and expression of each line."""

    title: str
    lines: Sequence[tuple[str, str]]
    unit: str = "short"
    red_above: float | None = None


PANELS = (
    Panel(
        title="Trials",
        lines=[
            ("wanted", f"sum(ray_raymem_trials_wanted{ONE})"),
            ("done", f"sum(ray_raymem_trials_done{ONE})"),
            ("running", f"sum(ray_raymem_trials_running{ONE})"),
            ("given up", f"sum(ray_raymem_trials_failed_total{ONE})"),
        ],
    ),
    Panel(
        title="Trials an hour",
        lines=[("committed", f"3600 * sum(rate(ray_raymem_trials_committed_total{ONE}[15m]))")],
    ),
    Panel(title="Time left", unit="s", lines=[("left", f"max(ray_raymem_seconds_left{ONE})")]),
    Panel(
        title="Since the last commit",
        unit="s",
        red_above=STALLED_SECONDS,
        lines=[
            ("since the last commit", f"max(ray_raymem_seconds_since_commit{ONE})"),
            ("a trial takes", f"max(ray_raymem_trial_seconds{ONE})"),
        ],
    ),
    Panel(
        title="Attempts in an hour, by outcome",
        lines=[("{{outcome}}", f"sum by (outcome) (increase(ray_raymem_attempts_total{ONE}[1h]))")],
    ),
    Panel(
        title="Images a second",
        unit="cps",
        lines=[("images", f"sum(rate(ray_raymem_images_total{ONE}[5m]))")],
    ),
    Panel(
        title="Workers by node",
        lines=[("{{host}}", f"sum by (host) (ray_raymem_workers{ONE}) > 0")],
    ),
    Panel(
        title="Workers that do not train",
        lines=[
            ("starting", f"sum(ray_raymem_workers_starting{ONE})"),
            ("silent", f"sum(ray_raymem_workers_silent{ONE})"),
            ("retired", f"sum(ray_raymem_workers_retired{ONE})"),
            ("asked of the autoscaler", f"sum(ray_raymem_workers_asked{ONE})"),
        ],
    ),
    Panel(
        title="Nodes and cost",
        lines=[
            ("nodes", f"max(ray_raymem_nodes{ONE})"),
            ("nodes retired", f"sum(ray_raymem_nodes_retired{ONE})"),
            ("device hours so far", f"sum(ray_raymem_device_seconds_total{ONE}) / 3600"),
        ],
    ),
)


def panel_json(number: int, panel: Panel) -> dict[str, Any]:
    """A panel as Grafana reads it, at its place in the grid."""
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.red_above is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.red_above}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["custom"] = {"thresholdsStyle": {"mode": "line"}}
    return {
        "id": number + 1,
        "title": panel.title,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {
            "h": HEIGHT,
            "w": WIDTH,
            "x": number % PER_ROW * WIDTH,
            "y": number // PER_ROW * HEIGHT,
        },
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
            for n, (legend, expr) in enumerate(panel.lines)
        ],
    }


def board() -> dict[str, Any]:
    """The dashboard, for one study or several, chosen from a menu."""
    study = {
        "name": "study",
        "label": "Study",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(ray_raymem_trials_wanted, study)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }
    return {
        "title": "raymem",
        "uid": "raymem",
        "schemaVersion": 39,
        "version": 2,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "tags": ["ray"],
        "editable": True,
        "templating": {"list": [source, study]},
        "panels": [panel_json(number, panel) for number, panel in enumerate(PANELS)],
    }


def text() -> str:
    """deploy/grafana.json."""
    return json.dumps(board(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
