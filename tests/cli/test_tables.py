"""The commands that tell rather than train: plan, inspect, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import QUICK, msfusion, refused


@pytest.mark.release
def test_plan_says_what_training_will_cost(here: Path) -> None:
    shown = msfusion("plan", *QUICK, "--out", "picture.png")
    assert shown.exit_code == 0, shown.output
    assert "full model" in shown.stdout
    assert "█" in shown.stdout
    assert (here / "picture.png").read_bytes().startswith(b"\x89PNG")
    plan = json.loads(msfusion("plan", *QUICK, "--json").stdout)
    assert len(plan["participants"]) == 3
    assert len(plan["entry_coverage"]) == 2
    for participant in plan["participants"]:
        for key in ("parameters", "flops_per_example", "peak_memory", "bytes_down", "bytes_up"):
            assert 0 < participant[key] < plan["full_model"][key]


@pytest.mark.release
def test_a_plan_says_who_will_be_there_and_how_long_it_takes(here: Path) -> None:
    unsteady = ("--set", "participants.dropout=0.3", "--set", "network.profile=phones")
    shown = msfusion("plan", *QUICK, *unsteady)
    assert shown.exit_code == 0, shown.output
    for header in ("on time", "absent", "GFLOP/s", "time of a round", "simulated"):
        assert header in shown.stdout
    plan = json.loads(msfusion("plan", *QUICK, *unsteady, "--json").stdout)
    assert [row["participant"] for row in plan["attendance"]] == [0, 1, 2]
    assert all(row["rounds_on_time"] + row["rounds_absent"] == 2 for row in plan["attendance"])
    assert "on time" not in msfusion("plan", *QUICK).stdout


@pytest.mark.release
@pytest.mark.slow
def test_a_comparison_that_stands_in_the_file_with_a_target(here: Path) -> None:
    config = here / "quick.toml"
    config.write_text(
        "rounds = 1\n[evaluation]\ntarget_accuracy = 0.01\n[network]\nprofile = 'hospitals'\n"
        "[comparison]\nmethods = ['small']\nseeds = 1\n"
        "[comparison.variants]\nquick = {}\nslow = { training.local_epochs = 3 }\n"
    )
    ran = msfusion("compare", str(config), "--out", "out", *QUICK)
    assert ran.exit_code == 0, ran.output
    assert "until the accuracy was first reached" in ran.stdout
    cells = json.loads((here / "out" / "compare.json").read_text())["cells"]
    assert [(cell["method"], cell["variant"]) for cell in cells] == [("small", "quick"), ("small", "slow")]
    fast, slow = (cell["targets"][0]["simulated_seconds"]["mean"] for cell in cells)
    assert slow > fast > 0


def test_a_plan_comes_true(here: Path) -> None:
    plan = json.loads(msfusion("plan", *QUICK, "--json").stdout)
    summary = json.loads(msfusion("train", *QUICK, "--out", "run", "--json").stdout)
    written = json.loads((here / "run" / "summary.json").read_text())
    assert summary == {
        key: written[key] for key in written if key not in ("files", "sha256")
    }  # digests of the files
    assert summary["participants"] == plan["participants"]
    assert summary["entry_coverage"] == plan["entry_coverage"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "decoder_lm",
        *(pytest.param(each, marks=pytest.mark.release) for each in ("resnet", "convnet", "text_classifier")),
    ],
)
def test_inspect_tells_the_width_map_of_every_built_in_model(here: Path, model: str) -> None:
    description = json.loads(msfusion("inspect", model, "--json").stdout)
    assert description["reach"] > 0.5
    assert description["groups"]
    shown = msfusion("inspect", model).stdout
    assert "of them in at least one group" in shown
    assert description["groups"][0]["name"] in shown
    assert "Never narrowed:" in shown


@pytest.mark.release
def test_inspect_takes_configurations_and_functions(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "small.toml").write_text("[model]\nname = 'convnet'\n")
    assert "in at least one group" in msfusion("inspect", "small.toml").stdout
    monkeypatch.syspath_prepend(here)
    (here / "mine.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    first, last = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)\n"
        "    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)\n"
    )
    described = json.loads(msfusion("inspect", "mine:model", "--json").stdout)
    assert [group["units"] for group in described["groups"]] == [8]
    for command in (["inspect", "mine:model"], ["plan", "--set", "model.name=mine:model"]):
        digits = msfusion(*command, "--set", "data.source=digits")  # grey; the model wants three colours
        refused(digits, "mine:model")
        assert "8x8 grey images" in digits.stderr
