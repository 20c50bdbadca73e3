"""docs/scaling.md shows what its arithmetic gives for what was measured."""

import re
from pathlib import Path

from benchmarks.scaling import tables

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def test_the_page_shows_what_the_arithmetic_gives() -> None:
    shown = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL))
    given = tables()
    assert shown.keys() == given.keys()
    for name, text in given.items():
        assert shown[name] == text, f"run python -m benchmarks.scaling --write ({name})"
