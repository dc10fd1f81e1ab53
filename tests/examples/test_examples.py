"""The examples run, and show what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from msfusion.experiment.config import load_config
from msfusion.experiment.train import train

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.release
def test_the_loop_by_hand_learns(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](rounds=6)
    assert capsys.readouterr().out.count("round ") == 6
    assert accuracy > 0.6  # chance is 0.1


@pytest.mark.release
def test_growing_together_is_planned_and_trained(tmp_path: Path) -> None:
    """examples/fedgrow.toml, with less data and one round."""
    small = ("rounds=1", "data.max_train=60", "data.max_test=20", "grow.fit.steps=2")
    config = load_config(EXAMPLES / "fedgrow.toml", [*small, "grow.pretraining.local_epochs=1"])
    summary = train(config, tmp_path / "out")
    assert len(summary["participants"]) == 6
    assert config.comparison is not None
    assert set(config.comparison.variants) == {"Fed-Grow", "each alone"}


def test_the_page_of_examples_has_them_all() -> None:
    page = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\]\(([^)]+)\)", page))
    assert all((EXAMPLES / name).exists() for name in named)
    there = {f"{path.name}/" if path.is_dir() else path.name for path in EXAMPLES.iterdir()}
    assert there - named <= {"README.md", "__pycache__/"}
