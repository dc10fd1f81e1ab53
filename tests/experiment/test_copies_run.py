"""Runs that begin as copies of the small model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import QUICK, msfusion, refused

COPIES = [*QUICK, "--set", "method.start=copies"]


@pytest.mark.release
def test_a_plan_says_where_a_window_must_divide_and_costs_what_the_run_does(here: Path) -> None:
    uneven = [*COPIES, "--set", "participants.ratio=0.15"]
    plan = json.loads(msfusion("plan", *uneven, "--json").stdout)
    copies = plan["copies"]
    assert (copies["from_round"], copies["apart"]) == (1, 1.0)
    assert copies["held"]["0.15"]
    assert all(held < asked < units for held, asked, units in copies["held"]["0.15"].values())
    assert copies["difference"] < 1e-4
    assert copies["left_in_operators"] == []
    shown = msfusion("plan", *uneven).stdout
    assert "stay equal for 1 of 2 rounds" in shown
    assert "must divide" in shown
    assert "copies" not in json.loads(msfusion("plan", *QUICK, "--json").stdout)
    assert msfusion("train", *uneven, "--out", "run").exit_code == 0
    assert json.loads((here / "run" / "summary.json").read_text())["participants"] == plan["participants"]


@pytest.mark.release
def test_copies_and_small_stand_in_one_comparison(here: Path) -> None:
    """Until they come apart copies are the small model, so they have its accuracy and loss."""
    config = here / "copies.toml"
    config.write_text("[method]\nstart = 'copies'\napart = 0.0\n[training]\noptimizer = 'adamw'\n")
    ran = msfusion(
        "compare", str(config), *QUICK, "--set", "method.start=copies", "--methods", "msfusion,small",
        "--seeds", "1", "--out", "out",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    cells = json.loads((here / "out" / "compare.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["msfusion", "small"]
    assert cells[0]["accuracy"]["mean"] == cells[1]["accuracy"]["mean"]


def test_copies_are_refused_where_they_mean_nothing(here: Path) -> None:
    for change, word in (
        ("method.overlap={shape='feedback', start=0.5}", "feedback"),
        ("method.apart=1.5", "method.apart"),
        ("method.grow_at=-1", "method.grow_at"),
        ("method.start=copy", "method.start"),
    ):
        refused(msfusion("train", *COPIES, "--set", change, "--out", "run"), word)
    split = ["--set", "method.name=split", "--set", "split.at=layers.0"]
    refused(msfusion("train", *COPIES, *split, "--out", "run"), "method.start")
    assert not (here / "run").exists()
