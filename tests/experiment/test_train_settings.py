"""Settings of a run that decide who holds what: methods, overlap, budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick import QUICK_SETTINGS
from timeless import metrics_of
from watching import Stopping

from msfusion.errors import ConfigError
from msfusion.experiment.compare import compare
from msfusion.experiment.comparison import Comparison
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.plan import plan_run
from msfusion.experiment.setup import Parts, prepare, prepare_parts
from msfusion.experiment.train import Silent, train
from msfusion.files import read_tensors


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK_SETTINGS, "rounds=4", *overrides])  # the last setting of a key counts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(quick())


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "method",
    [
        "heterofl",
        "fedavg",
        "small",
        "ensemble",
        # other windows, in the same runs: tests/test_checks.py has each of these methods in CI
        *(pytest.param(each, marks=pytest.mark.release) for each in ("fedrolex", "feddropout")),
    ],
)
def test_every_method_runs(parts: Parts, tmp_path: Path, method: str) -> None:
    summary = train(quick(f"method.name={method}", "rounds=2"), tmp_path, parts=parts)
    assert 0 <= summary["accuracy"] <= 1
    shares = {participant["share"] for participant in summary["participants"]}
    assert (shares == {1.0}) == (method == "fedavg")
    assert (summary["entry_coverage"] is None) == (method in ("small", "ensemble"))


def test_the_overlap_that_was_set_is_what_the_windows_have(parts: Parts, tmp_path: Path) -> None:
    overlap = "method.overlap={ shape = 'linear', start = 1.0, end = 0.0 }"
    config = quick("rounds=3", "participants.count=3", "participants.ratio=0.5", overlap)
    train(config, tmp_path, parts=parts)
    lines = RunDirectory(tmp_path).read_metrics()
    assert [line["overlap"] for line in lines] == pytest.approx([1.0, 0.5, 1 / 3])
    # in the first round all hold the same half of each group, so about a quarter of the entries
    assert 0.2 < lines[0]["entry_coverage"] < 0.5
    setup = prepare(config, parts)
    first = [setup.window(0, participant) for participant in range(3)]
    for name, units in first[0].items():
        assert all(torch.equal(units, window[name]) for window in first)
    evenly = prepare(quick("participants.ratio=0.5"), parts)
    assert evenly.method.overlap(0) == pytest.approx(1 / 3)
    assert prepare(quick("method.name=fedrolex"), parts).method.overlap(0) is None


@pytest.mark.release
def test_an_overlap_by_feedback_is_in_the_metrics_and_survives_a_stop(parts: Parts, tmp_path: Path) -> None:
    overlap = "method.overlap={ shape = 'feedback', start = 0.9, target = 1.0 }"
    config = quick("rounds=4", "participants.ratio=0.5", overlap)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole, parts=parts)
    overlaps = [line["overlap"] for line in RunDirectory(whole).read_metrics()]
    assert overlaps[0] == pytest.approx(0.9, abs=1e-6)
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[-1] < overlaps[0]
    with pytest.raises(KeyboardInterrupt):
        train(config, broken, parts=parts, watcher=Stopping(2))
    train(config, broken, parts=parts, resume=True)
    assert metrics_of(broken) == metrics_of(whole)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_tensors(whole / "model.safetensors")[0].keys() == parts.model.state_dict().keys()


@pytest.mark.release
def test_budgets_decide_the_ratios(parts: Parts, tmp_path: Path) -> None:
    budgets = "participants.budget=[{memory='300 kB'}, {bytes_per_round='100 kB'}, {flops_per_example=3e5}]"
    config = quick(budgets, "rounds=1")
    summary = train(config, tmp_path, parts=parts)
    first, second, third = summary["participants"]
    assert first["peak_memory"] <= 300_000
    assert second["bytes_down"] + second["bytes_up"] <= 100_000
    assert third["flops_per_example"] <= 3e5
    assert len({each["ratio"] for each in summary["participants"]}) > 1
    assert load_config(tmp_path / "config.toml") == config
    assert train(config, tmp_path, resume=True, parts=parts) == summary
    with pytest.raises(ConfigError, match="no budget allows more than"):
        prepare(
            quick("participants.budget={bytes_per_round=500000}", "participants.minimum_ratio=0.9"), parts
        )
    with pytest.raises(ConfigError, match="budget of participant 0: memory is 5 but"):
        prepare(quick("participants.budget={memory=5}"), parts)
    with pytest.raises(ConfigError, match="exclude each other"):
        compare(config, tmp_path / "all", Comparison(["msfusion"], 1, [0.5]), watch=lambda _: Silent())


def test_the_evaluation_batch_size_is_used(parts: Parts) -> None:
    assert prepare(quick("evaluation.batch_size=7"), parts).method.scoring.batch_size == 7


@pytest.mark.one_in_ci
@pytest.mark.parametrize("start", ["fresh", "blocks"])
def test_the_bytes_of_small_messages_are_foreseen(tmp_path: Path, start: str) -> None:
    given = [f"method.start={start}", "model.options={ widths = [32, 64] }", "evaluation.every=4"]
    plain = prepare(quick(*given), prepare_parts(quick(*given)))
    small = quick(*given, "method.codec={codec='dead_zone',step=1.5}", "method.codec_down=dense")
    planned = plan_run(prepare(small))
    train(small, tmp_path)
    lines = RunDirectory(tmp_path).read_metrics()
    before = plain.costs(0.25)
    (asked,) = {(row["bytes_down"], row["bytes_up"]) for row in planned["participants"]}
    assert asked[0] < before.bytes_down / 6
    assert asked[1] < before.bytes_up / 10
    up = sum(line["bytes_up"] for line in lines) / 4 / 3
    assert up == pytest.approx(asked[1], rel=0.25)
    if (
        start == "fresh"
    ):  # weights that nobody has held since are not new; and blocks that are finished go down besides
        assert sum(line["bytes_down"] for line in lines) / 4 / 3 < 1.1 * asked[0]


def test_split_learning_has_codecs_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"method\.codec has no meaning"):
        quick("method.name=split", "split.at=layers.3", "method.start=auto", "method.codec=dense")
