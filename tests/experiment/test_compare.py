"""Comparisons: equal budgets, resumed run by run, mean and deviation as calculated by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from quick import QUICK_SETTINGS
from watching import silent

from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.experiment import comparison as module
from msfusion.experiment.compare import compare
from msfusion.experiment.comparison import Comparison, plan_runs
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.report.cells import compare_cells, gap_closed
from msfusion.experiment.report.comparison import comparison_table
from msfusion.experiment.report.plot import figures, plot_of, save_plot
from msfusion.experiment.report.spreads import curve, spread

pytestmark = pytest.mark.slow


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK_SETTINGS, *overrides])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("compare") / "out"
    comparison = Comparison(["msfusion", "small", "fedavg"], 2, [0.25, 0.5])
    return path, compare(quick(), path, comparison, watch=silent)


def test_every_method_ratio_and_seed_is_one_run(compared: tuple[Path, dict[str, Any]]) -> None:
    path, comparison = compared
    assert [(cell["method"], cell["ratio"]) for cell in comparison["cells"]] == [
        ("fedavg", 1.0),
        ("msfusion", 0.5),
        ("small", 0.5),
        ("msfusion", 0.25),
        ("small", 0.25),
    ]
    assert all(cell["rounds"] == 2 for cell in comparison["cells"])
    assert [cell["method"] for cell in comparison["cells"] if not cell["within_budget"]] == ["fedavg"]
    assert len([entry for entry in path.iterdir() if entry.is_dir()]) == 10
    assert json.loads((path / "compare.json").read_text()) == comparison
    assert comparison["environment"]["torch"]
    assert comparison["seeds"] == [0, 1]


def test_figures_agree_with_the_runs(compared: tuple[Path, dict[str, Any]]) -> None:
    path, comparison = compared
    for cell in comparison["cells"]:
        accuracies, moved = [], []
        for run in cell["runs"]:
            directory = RunDirectory(path / run["directory"])
            accuracies.append(directory.read_summary()["accuracy"])
            moved.append(sum(line["bytes_down"] + line["bytes_up"] for line in directory.read_metrics()) / 3)
        assert cell["accuracy"]["mean"] == pytest.approx(statistics.fmean(accuracies))
        assert cell["accuracy"]["sd"] == pytest.approx(statistics.stdev(accuracies))
        assert cell["total_bytes"] == pytest.approx(statistics.fmean(moved))
        spent = []
        for run in cell["runs"]:
            rows = RunDirectory(path / run["directory"]).read_summary()["participants"]
            # a mini-batch with a single example is left out
            seen = [row["examples"] - (row["examples"] % 16 == 1) for row in rows]
            spent.append(2 * 4 * sum(seen) / 3 * rows[0]["flops_per_example"])
        assert cell["total_flops"] == pytest.approx(statistics.fmean(spent))
        assert cell["curve"]["rounds"] == [1, 2]
        assert cell["curve"]["mean"][-1] == pytest.approx(cell["accuracy"]["mean"])


def test_slices_and_the_small_model_have_the_same_budget(compared: tuple[Path, dict[str, Any]]) -> None:
    cells = {(cell["method"], cell["ratio"]): cell for cell in compared[1]["cells"]}
    for ratio in (0.25, 0.5):
        small, sliced = cells["small", ratio], cells["msfusion", ratio]
        assert small["parameters"] == sliced["parameters"]
        assert small["flops_per_example"] == pytest.approx(sliced["flops_per_example"], rel=0.02)
        assert sliced["flops_per_example"] < cells["fedavg", 1.0]["flops_per_example"]


@pytest.mark.release
def test_finished_runs_are_kept_and_new_seeds_added(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first = compare(quick(), tmp_path, Comparison(["small"], 1), watch=silent)
    model = tmp_path / first["cells"][0]["runs"][0]["directory"] / "model.safetensors"
    written = model.stat().st_mtime_ns
    with pytest.raises(RunDirectoryError, match="already holds files"):
        compare(quick(), tmp_path, Comparison(["small"], 2), watch=silent)
    more = compare(quick(), tmp_path, Comparison(["small", "heterofl"], 2), resume=True, watch=silent)
    assert model.stat().st_mtime_ns == written
    assert [len(cell["runs"]) for cell in more["cells"]] == [2, 2]
    changed = quick("training.learning_rate=0.5")
    with pytest.raises(RunDirectoryError, match=r"in which training.learning_rate is .* not 0.5"):
        compare(changed, tmp_path, Comparison(["small"], 1), resume=True, watch=silent)


def test_fedavg_stops_at_equal_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prepare", lambda config: config)
    monkeypatch.setattr(module, "mean_flops_per_example", lambda config: config.participants.ratios[0] ** 2)
    config = quick("rounds=20")
    runs = plan_runs(config, Comparison(["msfusion", "fedavg"], 1, [0.5, 0.125], "flops"))
    assert {(run.method, run.ratio): run.config.rounds for run in runs if run.method == "msfusion"} == {
        ("msfusion", 0.5): 20,
        ("msfusion", 0.125): 20,
    }
    assert [run.config.rounds for run in runs if run.method == "fedavg"] == [5, 1]


@pytest.mark.slow
def test_a_budget_that_one_method_cannot_keep_is_refused_before_any_run(tmp_path: Path) -> None:
    """Enough for the small model, which would run first, but not for a sum of blocks of the narrowest width."""
    config = quick("method.start=blocks", "method.blocks=2", "rounds=3", "participants.budget={memory=71000}")
    with pytest.raises(ConfigError, match="in a sum of 2 blocks, memory is 71,000 but"):
        compare(config, tmp_path / "compared", Comparison(("small", "msfusion")), watch=silent)
    assert not (tmp_path / "compared").exists()
    compare(config, tmp_path / "compared", Comparison(("small",)), watch=silent)
    assert (tmp_path / "compared" / "compare.json").exists()


def test_the_plot_is_a_picture(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    save_plot(compared[1], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_mean_and_deviation() -> None:
    assert spread([1.0, 2.0, 4.5]) == {"mean": 2.5, "sd": pytest.approx(1.8027756), "values": [1.0, 2.0, 4.5]}
    assert spread([3.0]) == {"mean": 3.0, "sd": None, "values": [3.0]}
    assert spread([3.0, None])["mean"] is None
    lines = [[{"round": 1, "accuracy": 0.5}, {"round": 2}], [{"round": 1, "accuracy": 0.7}, {"round": 2}]]
    assert curve(lines, "accuracy")["rounds"] == [1]
    assert curve(lines, "accuracy")["mean"] == [pytest.approx(0.6)]


def test_how_far_each_row_is_behind_the_first_method(compared: tuple[Path, dict[str, Any]]) -> None:
    cells = {(cell["method"], cell["ratio"]): cell for cell in compared[1]["cells"]}
    assert cells["msfusion", 0.25]["behind"] is None
    assert cells["fedavg", 1.0]["behind"] is None  # behind which of the two ratios?
    small, leader = cells["small", 0.25], cells["msfusion", 0.25]
    by_hand = [
        one - other
        for one, other in zip(leader["accuracy"]["values"], small["accuracy"]["values"], strict=True)
    ]
    assert small["behind"]["values"] == pytest.approx(by_hand)
    assert small["behind"]["mean"] == pytest.approx(statistics.fmean(by_hand))


def cell(method: str, accuracies: list[float], variant: str | None = None, **more: Any) -> dict[str, Any]:
    ratio = 1.0 if method == "fedavg" else 0.25
    row = {"method": method, "variant": variant, "ratio": ratio, "rounds": 10, "accuracy": spread(accuracies)}
    return {**row, "loss": spread([1.0 - each for each in accuracies]), **more}


def test_the_share_of_the_gap_is_paired_and_told_where_there_is_a_gap() -> None:
    small, whole = cell("small", [0.5, 0.52]), cell("fedavg", [0.7, 0.74])
    ours = cell("msfusion", [0.6, 0.64])
    closed = gap_closed(ours, [ours, small, whole])
    assert closed is not None
    assert closed["share"] == pytest.approx((0.10 + 0.12) / (0.20 + 0.22))
    assert closed["gap"]["values"] == pytest.approx([0.20, 0.22])
    worse = gap_closed(cell("msfusion", [0.4, 0.42]), [small, whole])
    assert worse is not None
    assert worse["share"] == pytest.approx(-0.2 / 0.42)
    by_chance = gap_closed(ours, [small, cell("fedavg", [0.5, 0.74])])
    assert by_chance is not None
    assert by_chance["share"] is None
    assert gap_closed(small, [small, whole]) is None
    assert gap_closed(ours, [small, {**whole, "rounds": 9}]) is None
    assert gap_closed(ours, [{**small, "ratio": 0.5}, whole]) is None
    tuned = cell("small", [0.56, 0.58], "tuned")
    other = gap_closed(cell("msfusion", [0.6, 0.64], "blocks"), [small, tuned, {**whole, "variant": "whole"}])
    assert other is not None  # the better one of the small models
    assert other["share"] == pytest.approx((0.04 + 0.06) / (0.14 + 0.16))


def test_the_share_of_the_gap_in_perplexity() -> None:
    words = [
        {**cell(name, [0.1, 0.1]), "perplexity": spread(values)}
        for name, values in (("msfusion", [90.0, 92.0]), ("small", [100.0, 102.0]), ("fedavg", [60.0, 63.0]))
    ]
    closed = gap_closed(words[0], words)
    assert closed is not None
    assert closed["share"] == pytest.approx(20 / 79)


@pytest.mark.release
def test_each_method_runs_under_each_variant(tmp_path: Path) -> None:
    variants = {"as it is": {}, "More overlap": {"method": {"overlap": {"start": 1.0}}, "rounds": 1}}
    comparison = Comparison(["msfusion", "small"], 1, variants=variants)
    runs = plan_runs(quick(), comparison)
    assert [run.name for run in runs] == [
        "msfusion-as-it-is-rounds2-seed0",
        "small-as-it-is-rounds2-seed0",
        "msfusion-more-overlap-rounds1-seed0",
        "small-more-overlap-rounds1-seed0",
    ]
    assert runs[0].config.method.overlap is None
    overlap = runs[2].config.method.overlap
    assert overlap is not None
    assert overlap.start == 1.0
    result = compare(quick(), tmp_path / "out", comparison, watch=silent)
    assert [(cell["method"], cell["variant"]) for cell in result["cells"]] == [
        ("msfusion", "as it is"),
        ("small", "as it is"),
        ("msfusion", "More overlap"),
        ("small", "More overlap"),
    ]
    behind = [cell["behind"] for cell in result["cells"]]
    assert behind[0] is None
    values = [cell["accuracy"]["mean"] for cell in result["cells"]]
    assert behind[2]["mean"] == pytest.approx(
        values[0] - values[2]
    )  # the first method: behind its first variant
    assert behind[3]["mean"] == pytest.approx(values[2] - values[3])
    save_plot(result, tmp_path / "variants.png")
    assert (tmp_path / "variants.png").stat().st_size > 0


def test_a_comparison_stands_in_the_configuration(tmp_path: Path) -> None:
    base, file = tmp_path / "base.toml", tmp_path / "ablation.toml"
    base.write_text('rounds = 7\n[model]\nname = "convnet"\n[participants]\ncount = 4\n')
    file.write_text(
        'extends = "base.toml"\n[participants]\nratio = 0.5\n[comparison]\nmethods = ["small", "fedavg"]\n'
        'seeds = 2\n[comparison.variants."few rounds"]\nrounds = 3\n'
    )
    config = load_config(file)
    assert (config.rounds, config.participants.count, config.participants.ratio) == (7, 4, 0.5)
    comparison = Comparison.of(config, methods=[], seeds=None, ratios=[], equal=None)
    assert (comparison.methods, comparison.seeds, comparison.equal) == (["small", "fedavg"], 2, "rounds")
    assert Comparison.of(config, methods=["msfusion"], seeds=1).methods == ["msfusion"]
    assert [run.config.rounds for run in plan_runs(config, comparison)] == [3] * 4
    assert config.fingerprint() == load_config(base, ["participants.ratio=0.5"]).fingerprint()
    with pytest.raises(ConfigError, match="give --methods"):
        Comparison.of(load_config(base))
    misspelt = Comparison(["small"], 1, variants={"b": {"training": {"batchsize": 3}}})
    told = r"^the variant 'b' of \[comparison\]: there is no key 'training.batchsize' \(did you mean"
    with pytest.raises(ConfigError, match=told):
        plan_runs(config, misspelt)
    base.write_text('extends = "ablation.toml"\n')
    with pytest.raises(ConfigError, match=r"extends = .* not this one again"):
        load_config(file)


def test_variants_of_other_tasks_have_scales_of_their_own() -> None:
    """A perplexity of 60 beside an accuracy of a half: four panels in two rows, and no curve is pressed flat."""

    def cell(variant: str, method: str, metric: str, mean: float) -> dict[str, Any]:
        curve = {"rounds": [1, 2], "mean": [mean, 1.1 * mean], "sd": [None, None], "metric": metric}
        return {
            "variant": variant,
            "method": method,
            "ratio_label": "0.25",
            "within_budget": True,
            "curve": curve,
        }

    tasks = [
        ("images", "accuracy", 0.5),
        ("words", "perplexity", 60.0),
        ("more", "accuracy", 0.1),
        ("d", "loss", 3.0),
    ]
    cells = [
        cell(*(variant, method, metric, mean))
        for variant, metric, mean in tasks
        for method in ("msfusion", "small")
    ]
    with figures("A plot") as figure_class:
        panels = plot_of({"cells": cells, "seeds": [0, 1]}, figure_class).axes
    assert [panel.get_ylabel().split()[1] for panel in panels] == [
        "accuracy",
        "perplexity",
        "accuracy",
        "loss",
    ]
    for panel, (_, _, mean) in zip(panels, tasks, strict=True):
        low, high = panel.get_ylim()
        assert 0.9 * mean < low < mean < 1.1 * mean < high < 1.2 * mean
    assert len({panel.get_position().y0 for panel in panels}) == 2


def row(variant: str, method: str, ratio: float, **figures: float) -> dict[str, Any]:
    found: dict[str, Any] = {name: spread([value, value + 0.01]) for name, value in figures.items()}
    return {
        "variant": variant, "method": method, "ratio": ratio, "ratio_label": f"{ratio}", "rounds": 3,
        "within_budget": ratio < 1, "parameters": 10, "share": ratio, "flops_per_example": 1, "total_flops": 1,
        "total_bytes": 1, "inference_flops_per_example": 1, **found,
    }  # fmt: skip


def test_a_variant_with_other_data_is_compared_with_its_own_rows() -> None:
    images = [
        row("images", name, 0.25, accuracy=value, loss=1.0)
        for name, value in (("msfusion", 0.6), ("small", 0.5))
    ]
    words = [
        row("words", "msfusion", 0.25, perplexity=50.0, accuracy=0.3, loss=3.9),
        row("words", "small", 0.25, perplexity=52.0, accuracy=0.3, loss=4.0),
        row("words", "fedavg", 1.0, perplexity=40.0, accuracy=0.4, loss=3.7),
    ]
    cells = [*images, *words]
    compare_cells(cells, ["a", "a", "b", "b", "b"])
    assert [cell["behind"] and round(cell["behind"]["mean"], 9) for cell in cells] == [
        None,
        0.1,
        None,
        2.0,
        -10.0,
    ]
    assert [cell["gap_closed"] is None for cell in cells] == [True, True, False, True, True]
    assert cells[2]["gap_closed"]["gap"]["mean"] == pytest.approx(12.0)
    headings, rows = comparison_table({"cells": cells, "seeds": [0, 1]}).texts()
    told = [line[headings.index("behind")] for line in rows]
    assert told == ["-", "+10.0% ± 0.0%", "-", "+2.00 ± 0.00", "-10.00 ± 0.00"]


def test_a_loss_and_its_deviation_have_as_many_decimals() -> None:
    cells = [row("", "msfusion", 0.25, loss=value) for value in (4.1637, 216_116_880.0)]
    for cell in cells:
        cell["behind"] = None
    headings, rows = comparison_table({"cells": cells, "seeds": [0, 1]}).texts()
    assert [line[headings.index("loss")] for line in rows] == ["4.169 ± 0.007", "216,116,880 ± 0.007071"]


def test_variants_with_other_ratios_are_curves_of_one_panel() -> None:
    cells = [
        {
            "variant": f"{count} participants",
            "method": "msfusion",
            "ratio_label": str(2.5 / count),
            "within_budget": True,
            "curve": {"rounds": [1, count], "mean": [0.1, 0.5], "sd": [None, None], "metric": "accuracy"},
        }
        for count in (5, 10, 20)
    ]
    with figures("A plot") as figure_class:
        (panel,) = plot_of({"cells": cells, "seeds": [0]}, figure_class).axes
    assert [line.get_label() for line in panel.get_lines()] == [cell["variant"] for cell in cells]
