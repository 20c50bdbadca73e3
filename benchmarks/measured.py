"""Numbers kept beside the pages that show them: benchmarks/measured/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "measured"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep(name: str, numbers: dict[str, Any]) -> None:
    """Write what was measured, with when and on what."""
    where = f"{os.cpu_count()} cores of {processor()}"
    body = {"measured": f"{datetime.now(UTC):%Y-%m-%d}", "on": where, **numbers}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")


def kept(name: str) -> dict[str, Any]:
    """What was measured last. Raises FileNotFoundError."""
    numbers: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return numbers
