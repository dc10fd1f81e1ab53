"""The notebooks of examples/: all cells run one after the other, and what they show is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_notebook(name: str) -> dict[str, Any]:
    """The names that its code cells leave. Their pictures stay open, as pyplot has no screen to show them on."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def plots() -> Iterator[Any]:
    """pyplot without a screen, and without pictures of others."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")
    yield pyplot
    pyplot.close("all")


def test_all_notebooks_are_tested_and_hold_no_output() -> None:
    """A stored picture would go stale unseen."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in EXAMPLES.glob("*.ipynb")}
    assert set(found) == {"tour.ipynb", "reading_a_run.ipynb", "method_of_your_own.ipynb"}
    for notebook in found.values():
        assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_the_tour(plots: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook("tour.ipynb")
    told = capsys.readouterr().out
    assert [(group.name, group.units) for group in names["width_map"].groups] == [("0", 24), ("3", 32)]
    assert "axis 1 of 6.weight, 16 entries for each unit" in told
    assert names["difference"] < 1e-6
    # MSfusion's participants hold different units of the last group in a round, all of them together
    for picture in names["held"]["MSfusion"]:
        assert torch.equal(picture.sum(0), torch.ones(32))
        assert torch.equal(picture.sum(1), torch.full((4,), 8.0))
    still, moving = names["held"]["HeteroFL"], names["held"]["FedRolex"]
    assert all(torch.equal(picture, still[0]) for picture in still)
    assert not torch.equal(moving[0], moving[1])
    ends = {name: shares[-1] for name, shares in names["covered"].items()}
    assert ends["MSfusion"] == 1 > ends["FedRolex"] > ends["HeteroFL"]
    parameters = [each.parameters for each in names["costs"].values()]
    assert parameters[2] < parameters[0] / 4
    assert parameters == sorted(parameters, reverse=True)
    assert set(names["weights"].unique().tolist()) == {0, 1, 2, 3, 4}
    assert "the mean of 1, 2, 3 and 4 is 2.5" in told
    windows, coverage, fused = (plots.figure(number) for number in plots.get_fignums())
    assert len(windows.axes) == 12
    assert [line.get_label() for line in coverage.axes[0].lines] == list(names["covered"])
    assert len(fused.axes) == 2  # with its scale


@pytest.mark.release
def test_reading_a_run(here: Path, plots: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_notebook("reading_a_run.ipynb")
    told = capsys.readouterr().out
    assert len(names["runs"]) == 4
    for name in ("report.html", "metrics.jsonl", "summary.json", "config.toml", "model.safetensors"):
        assert f"{name}\n" in told
    table = names["table"]
    assert names["gain"] == table["msfusion"]["accuracy"] - table["small"]["accuracy"]
    for (method, seed), summary in names["summaries"].items():
        assert summary["accuracy"] > 3 * summary["constant_answer"]["accuracy"], (method, seed)
        assert names["rounds"][method, seed][-1]["accuracy"] == summary["accuracy"]
    # what the page says of costs: a round costs the same, finished blocks come on top, and there are four of them
    assert 1 < table["msfusion"]["megabytes"] / table["small"]["megabytes"] < 2
    assert (
        1 < table["msfusion"]["memory"] / table["small"]["memory"] < 2
    )  # what is remembered of other blocks
    assert table["msfusion"]["weights"] == 4 * table["small"]["weights"]
    assert sum(names["examples"].values()) == 160
    assert "left out: nobody" in told
    (number,) = plots.get_fignums()
    assert [line.get_linestyle() for line in plots.figure(number).axes[0].lines] == ["-", "--"]


@pytest.mark.release
def test_a_method_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The method of 30 lines is federated averaging where its rate is 1."""
    results = run_notebook("method_of_your_own.ipynb")["results"]
    assert all(figures["accuracy"] > 0.5 for name, figures in results.items() if "fresh" not in name)
    assert all(0 < figures["confidence"] <= 1 for figures in results.values())
    assert len(capsys.readouterr().out.splitlines()) == len(results) == 5
