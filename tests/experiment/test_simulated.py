"""Runs of unequal participants that come and go, on a simulated clock: by hand, resumed, and in the reports."""

from __future__ import annotations

import io
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import QUICK_SETTINGS
from rich.console import Console
from timeless import metrics_of
from watching import Stopping

from msfusion.errors import ConfigError
from msfusion.experiment.compare import compare
from msfusion.experiment.comparison import Comparison, plan_runs
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.plan import plan_run
from msfusion.experiment.report.comparison import targets_table
from msfusion.experiment.report.spreads import first_reached
from msfusion.experiment.report.usual import attendance_tables, closing_table, plan_tables
from msfusion.experiment.report.words import duration
from msfusion.experiment.setup import Parts, prepare, prepare_parts
from msfusion.experiment.train import Silent, Watcher, train
from msfusion.files import read_tensors

pytestmark = pytest.mark.slow

CLOCK = "network.machines={download_megabits=8,upload_megabits=2,latency_seconds=0.5,gigaflops=0.5}"
MIXED = "participants.ratio=[1.0, {any_of=[0.5, 0.25]}, {from_round={1=0.25, 3=0.125}}]"
UNSTEADY = (
    MIXED,
    "rounds=5",
    "participants.dropout=0.3",
    "network.machines=[{download_megabits=8,upload_megabits=4,gigaflops=0.5},"
    "{download_megabits=8,upload_megabits=8,gigaflops=0.5},{download_megabits=8,upload_megabits=8,gigaflops=2}]",
    "network.deadline=3",
)


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK_SETTINGS, "training.local_epochs=1", "seed=3", *overrides])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(quick())


def silent(title: str) -> AbstractContextManager[Watcher]:
    return Silent()


def text_of(*tables: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_clock_by_hand_and_nothing_else_changes(parts: Parts, tmp_path: Path) -> None:
    config = quick(CLOCK, "participants.ratio=[1.0, 0.5, 0.25]")
    summary = train(config, tmp_path / "clock", parts=parts)
    lines = RunDirectory(tmp_path / "clock").read_metrics()
    for line in lines:
        expected = {}
        for row in summary["participants"]:
            flops = row["flops_per_example"] * row["examples"]  # one epoch, no mini-batch of one
            assert row["examples"] % 16 != 1
            seconds = 0.5 + row["bytes_down"] / 1e6 + flops / 5e8 + row["bytes_up"] / 0.25e6
            expected[str(row["participant"])] = pytest.approx(seconds)
        assert line["simulated_seconds_each"] == expected
        assert line["simulated_seconds"] == max(line["simulated_seconds_each"].values())
        assert line["bytes_down"] == sum(row["bytes_down"] for row in summary["participants"])
    assert summary["simulated_seconds"] == pytest.approx(sum(line["simulated_seconds"] for line in lines))
    train(quick("participants.ratio=[1.0, 0.5, 0.25]"), tmp_path / "none", parts=parts)
    with_clock, without = (tmp_path / name / "model.safetensors" for name in ("clock", "none"))
    assert with_clock.read_bytes() == without.read_bytes()
    assert "simulated_seconds" not in RunDirectory(tmp_path / "none").read_metrics()[0]


@pytest.fixture(scope="module")
def unsteady(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {}
    for late in ("drop", "downweight"):
        paths[late] = tmp_path_factory.mktemp("unsteady") / late
        train(quick(*UNSTEADY, f"network.late='{late}'"), paths[late], parts=parts)
    return paths


@pytest.mark.release
@pytest.mark.parametrize("late", ["drop", "downweight"])
def test_any_number_of_workers_and_any_stop_give_the_same_run(
    parts: Parts, unsteady: dict[str, Path], tmp_path: Path, late: str
) -> None:
    config = quick(*UNSTEADY, f"network.late='{late}'")
    train(config.changed({"run.workers": 2}), tmp_path / "two", parts=parts)
    for after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / f"stop{after}", parts=parts, watcher=Stopping(after))
        train(config, tmp_path / f"stop{after}", parts=parts, resume=True)
    for other in ("two", "stop1", "stop2", "stop3"):
        assert metrics_of(tmp_path / other) == metrics_of(unsteady[late])
        model = (tmp_path / other / "model.safetensors").read_bytes()
        assert model == (unsteady[late] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("late", ["drop", "downweight"])
def test_a_plan_is_what_the_run_then_is(parts: Parts, unsteady: dict[str, Path], late: str) -> None:
    setup = prepare(quick(*UNSTEADY, f"network.late='{late}'"), parts)
    plan, lines = plan_run(setup), RunDirectory(unsteady[late]).read_metrics()
    assert plan["entry_coverage"] == [line["entry_coverage"] for line in lines]
    assert plan["simulated_seconds"] == pytest.approx(sum(line["simulated_seconds"] for line in lines))
    for row in plan["attendance"]:
        own = row["participant"]
        assert row["rounds_on_time"] == sum(own in line["participants"] for line in lines)
        assert row["rounds_late"] == sum(own in line.get("late", []) for line in lines)
        assert row["rounds_absent"] == sum(own in line.get("absent", []) for line in lines)
    assert any(line.get("late") for line in lines)
    assert any(line.get("absent") for line in lines)
    assert any(line.get("arriving") for line in lines) == (late == "downweight")
    assert all(line["simulated_seconds"] <= 3 for line in lines)
    json.dumps(plan, allow_nan=False)
    shown = text_of(*plan_tables(plan))
    assert "0.25-0.5" in shown  # the ratio that changes
    assert "time of a round" in shown


def slices_bytes(rows: list[dict[str, Any]], participants: list[int], round_index: int) -> int:
    """The bytes of the slices that these participants hold in a round, by a run's summary."""
    total = 0
    for participant in participants:
        ratio = quick(*UNSTEADY).capacities.ratio(participant, round_index)
        choices = rows[participant].get("by_ratio", [rows[participant]])
        total += next(figures["bytes_up"] for figures in choices if figures["ratio"] == ratio)
    return total


def test_bytes_of_the_late_are_counted(unsteady: dict[str, Path]) -> None:
    for path in unsteady.values():
        rows, lines = RunDirectory(path).read_summary()["participants"], RunDirectory(path).read_metrics()
        for line in lines:
            on_time, dropped, index = line["participants"], line.get("late", []), line["round"] - 1
            assert line["bytes_down"] == slices_bytes(rows, on_time + dropped, index)
            arriving = [tuple(each) for other in lines for each in other.get("arriving", [])]
            sent = on_time + [each for each in dropped if (each, line["round"]) in arriving]
            assert line["bytes_up"] == slices_bytes(rows, sent, index)
            assert (line["training_loss"] is None) == (not on_time)
        assert not all(line["participants"] for line in lines)


def test_there_is_nothing_to_show_of_participants_that_are_always_there(parts: Parts) -> None:
    assert attendance_tables(plan_run(prepare(quick(), parts))) == []


def test_late_updates_under_a_changing_overlap_are_refused(parts: Parts) -> None:
    overlap = "method.overlap={ shape = 'feedback', start = 0.9 }"
    with pytest.raises(ConfigError, match="was cut under another overlap"):
        prepare(quick(*UNSTEADY, "network.late='downweight'", overlap), parts)
    prepare(quick(*UNSTEADY, overlap), parts)


def test_the_first_round_that_was_good_enough() -> None:
    lines: list[dict[str, Any]] = [
        {"round": 1, "bytes_down": 100, "bytes_up": 50, "measuring_bytes": 0, "simulated_seconds": 2.0},
        {"round": 2, "accuracy": 0.7, "bytes_down": 100, "bytes_up": 50, "measuring_bytes": 6}
        | {"simulated_seconds": 3.0},
        {"round": 3, "accuracy": 0.6, "bytes_down": 100, "bytes_up": 50, "measuring_bytes": 6}
        | {"simulated_seconds": 4.0},
    ]
    found = {"accuracy": 0.65, "rounds": 2, "simulated_seconds": 5.0, "bytes": 306 / 3}
    assert first_reached(lines, 0.65, 3) == found
    never = {"accuracy": 0.8, "rounds": None, "simulated_seconds": None, "bytes": None}
    assert first_reached(lines, 0.8, 3) == never
    for line in lines:
        del line["simulated_seconds"]
    assert first_reached(lines, 0.65, 3)["simulated_seconds"] is None


@pytest.mark.release
def test_time_to_accuracy_in_summary_table_and_comparison(parts: Parts, tmp_path: Path) -> None:
    config = quick(CLOCK, "evaluation.target_accuracy=[0.01, 1.0]")
    first = compare(config, tmp_path, Comparison(["msfusion", "small"], 2), watch=silent)
    for cell in first["cells"]:
        reached, never = cell["targets"]
        assert (reached["accuracy"], reached["reached"], never["reached"]) == (0.01, 2, 0)
        seconds = []
        for run in cell["runs"]:
            directory = RunDirectory(tmp_path / run["directory"])
            summary, line = directory.read_summary(), directory.read_metrics()[0]
            assert summary["targets"][0]["rounds"] == 1
            assert summary["targets"][1]["rounds"] is None
            seconds.append(line["simulated_seconds"])
        assert reached["rounds"]["values"] == [1, 1]
        assert reached["simulated_seconds"]["values"] == seconds
        assert reached["bytes"]["values"] == [(line["bytes_down"] + line["bytes_up"]) / 3] * 2
        assert len(cell["simulated_seconds"]["values"]) == 2
    closing = text_of(closing_table(summary))
    assert "accuracy 1.0% after 1 rounds" in closing
    assert "accuracy 100.0%: not reached" in closing
    assert text_of(targets_table(first)).count("not reached") == 2
    # a target that is set when all runs are finished is found in their metrics
    other = config.changed({"evaluation.target_accuracy": 0.02})
    again = compare(other, tmp_path, Comparison(["msfusion", "small"], 2), resume=True, watch=silent)
    assert [cell["targets"][0]["accuracy"] for cell in again["cells"]] == [0.02, 0.02]
    assert not targets_table({**first, "cells": [{**cell, "targets": []} for cell in first["cells"]]}).rows


@pytest.mark.release
def test_leaving_the_weak_out_is_a_row_of_the_table(parts: Parts, tmp_path: Path) -> None:
    config = quick("participants.count=3", "participants.ratio=[1.0, 1.0, 0.25]")
    variants = {"everybody": {}, "only the strong": {"participants": {"minimum_ratio": 1.0}}}
    found = compare(config, tmp_path, Comparison(["heterofl"], 1, variants=variants), watch=silent)
    assert [cell["variant"] for cell in found["cells"]] == list(variants)
    path = tmp_path / found["cells"][1]["runs"][0]["directory"]
    assert path.name == "heterofl-only-the-strong-rounds2-seed3"
    assert all(line["participants"] == [0, 1] for line in RunDirectory(path).read_metrics())
    # whoever holds the whole model, its units in their order, trains as in FedAvg
    train(
        quick("method.name=fedavg", "participants.ratio=[1.0, 1.0, 0.25]", "participants.minimum_ratio=1"),
        tmp_path / "fedavg",
        parts=parts,
    )
    strong, fedavg = (read_tensors(where / "model.safetensors")[0] for where in (path, tmp_path / "fedavg"))
    assert all(torch.equal(strong[name], fedavg[name]) for name in fedavg)


@pytest.mark.parametrize(
    ("variants", "sentence"),
    [
        ({"other": {"seed": 3}}, "cannot have a seed of its own"),
        ({"other": {"faster": True}}, "there is no key 'faster'"),
        ({"other": {"method": {"name": "fast"}}}, "method.name"),
        ({"Two rounds": {"rounds": 2}, "two  rounds": {"rounds": 2}}, "almost the same name"),
    ],
)
def test_variants_that_cannot_be(variants: dict[str, dict[str, object]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_runs(quick(), Comparison(["msfusion"], 1, variants=variants))


def test_a_variant_with_a_method_of_its_own_is_run_with_that_one() -> None:
    variants = {"ours": {}, "theirs": {"method": {"name": "feddropout"}}}
    runs = plan_runs(quick(), Comparison(["msfusion", "small"], 1, variants=variants))
    assert [(run.variant, run.method, run.config.method.name) for run in runs] == [
        ("ours", "msfusion", "msfusion"),
        ("ours", "small", "small"),
        ("theirs", "feddropout", "feddropout"),
    ]


def test_flops_of_participants_whose_ratio_changes_are_those_of_each_round(
    parts: Parts, tmp_path: Path
) -> None:
    ratio = "participants.ratio={ from_round = { 1 = 0.5, 2 = 0.25 } }"
    (cell,) = compare(quick(ratio), tmp_path, Comparison(["msfusion"], 1), watch=silent)["cells"]
    assert cell["ratio_label"] == "0.25-0.5"
    summary = RunDirectory(tmp_path / cell["runs"][0]["directory"]).read_summary()
    spent = [
        figures["flops_per_example"] * row["examples"]
        for row in summary["participants"]
        for figures in row["by_ratio"]
    ]
    assert cell["total_flops"] == pytest.approx(sum(spent) / 3)


def test_times_in_words() -> None:
    for seconds, text in (
        (None, "-"),
        (0.25, "0.25 s"),
        (119.0, "119 s"),
        (270.0, "4.5 min"),
        (9000.0, "2.5 h"),
    ):
        assert duration(seconds) == text
    assert duration(4 * 86_400.0) == "4 d"
