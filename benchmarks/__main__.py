"""Ratios measured side by side in one run, medians of repeats: python -m benchmarks [--quick].

Writes benchmarks/RESULTS.md (with --quick, benchmarks/QUICK.md).
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import (
    curvature,
    estimators,
    explorer,
    fleets,
    passes,
    private,
    scoring_at_scale,
    simulation,
    streaming,
    ten_thousand,
    trial,
)
from benchmarks.measured import processor
from raymem.version import VERSION

PARTS = {
    "trial": trial.against_the_plain_loop,
    "utilization": trial.utilization,
    "gathering": trial.gathering,
    "curvature": curvature.exact_trace,
    "stratified": curvature.stratified,
    "private": private.against_plain_steps,
    "streaming": streaming.against_the_bare_loop,
    "passes": passes.measure,
    "estimators": estimators.against_the_dense_way,
    "share": fleets.useful_share,
    "overhead": fleets.overhead,
    "resume": fleets.resume,
    "models": fleets.models_needed,
}
# Minutes each, at the size of large studies: only if named.
AT_SCALE = {
    "explorer": explorer.in_a_browser,
    "scoring-at-scale": scoring_at_scale.scoring,
    "influence-at-scale": scoring_at_scale.influence,
    "ten-thousand": ten_thousand.measure,
    "simulation": simulation.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", choices=PARTS | AT_SCALE, action="append", help="prints, writes nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = [
        "# Benchmark results",
        "",
        f"`make bench{' QUICK=1' if arguments.quick else ''}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{processor()}, {torch.get_num_threads()} thread a trial, raymem {VERSION}, torch "
        f"{torch.__version__}. Both sides in one run; medians of repeats.",
        "",
        "| what | measured | goal | |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.only or PARTS:
        for row in (PARTS | AT_SCALE)[name](arguments.quick):
            lines.append(f"| {' | '.join(row.cells())} |")
            print(lines[-1], flush=True)
    if not arguments.only:
        page = "QUICK.md" if arguments.quick else "RESULTS.md"
        path = Path(__file__).parent / page
        path.write_text("\n".join(lines) + "\n" + below_the_table(path))


def below_the_table(path: Path) -> str:
    """What a page says below its first table: results that other commands gave."""
    if not path.exists():
        return ""
    lines = path.read_text().splitlines()
    rows = [n for n, line in enumerate(lines) if line.startswith("|")]
    end = next((n for n in rows if n + 1 not in rows), len(lines))
    return "\n".join([*lines[end + 1 :], ""])


if __name__ == "__main__":
    main()
