"""docs/tutorial.md is run from top to bottom, and what it says of its own numbers is true."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.slow
def test_the_tutorial_runs_and_says_what_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = {"__name__": "tutorial"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), here)
    assert here["found"] > 0.6
    said = capsys.readouterr().out
    auc = {
        name: float(re.search(rf"{name} +[\d.]+ of at most [\d.]+, AUC ([\d.]+)", said)[1])
        for name in ("curvature_out", "loss_out")
    }
    assert auc["loss_out"] >= auc["curvature_out"] - 0.05 > 0.5
    private, plain = re.findall(r"memorization of wrong labels (-?[\d.]+)", said)
    assert float(private) < 0.1 < 0.3 < float(plain)
    assert "'paper': 0.86" in said
