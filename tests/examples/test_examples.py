"""The examples run, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_loop_by_hand_learns(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](rounds=6)
    assert capsys.readouterr().out.count("round ") == 6
    assert accuracy > 0.6  # chance is 0.1


def test_the_width_map_page_is_true() -> None:
    """The code of docs/width-map.md runs, and its group is where the page says."""
    page = (EXAMPLES.parent / "docs" / "width-map.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(code, "docs/width-map.md", "exec"), names)
    group = names["width_map"].groups[0]  # type: ignore[attr-defined]
    places = [(p.tensor, p.axis) for p in group.places]
    assert f"# {group.name} {group.units} {places}" in code
