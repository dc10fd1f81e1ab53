"""Split learning as a method of the commands: planned, trained, resumed and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_JOB
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from watching import Stopping, silent

from msfusion.experiment.compare import compare
from msfusion.experiment.comparison import Comparison, plan_runs
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.kinds import prepare
from msfusion.experiment.report.comparison import traffic_table
from msfusion.experiment.report.spreads import first_as_good, times_less, until_as_good
from msfusion.experiment.split import SplitRun
from msfusion.experiment.train import train
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.methods.split.rounds import run_split_rounds

pytestmark = pytest.mark.slow

SPLIT = ("method.name=split", "split.at=layers.3")


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK_JOB, *SPLIT, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "out"
    train(quick(), path)
    return path


def test_a_run_is_what_the_engine_does(trained: Path) -> None:
    run = prepare(quick())
    assert isinstance(run, SplitRun)
    training, rounds = run.config.training_settings, RoundSettings(2)
    (*_, last) = run_split_rounds(
        run.cut,
        run.parts.model,
        run.data.participants,
        run.settings,
        training,
        rounds,
        state=state_of(run.parts.model),
    )
    saved = load_file(trained / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in last.state.items())
    line = RunDirectory(trained).read_metrics()[-1]
    assert line["activations_bytes"] == sum(each.activations for each in last.traffic)
    assert line["gradients_bytes"] == sum(each.gradients for each in last.traffic)
    assert line["bytes_up"] == sum(each.bytes_up for each in last.participants)
    assert line["codec_error"] == last.metrics["codec_error"] > 0
    assert "metrics" not in line


def test_what_was_planned_crosses(trained: Path) -> None:
    """The paper's codec has no entropy coder: its bytes are those of the plan, but for smaller last mini-batches."""
    config = quick(
        "split.activations=paper", "training.batch_size=8", "training.max_steps=1", "training.local_epochs=1"
    )
    plan = prepare(config).plan()
    run = prepare(config)
    first = next(run.rounds(run.initial_state(), {}, 0, lambda result: None))
    crossed, everybody = first.server_figures, len(first.participants)
    assert crossed["activations_bytes"] == everybody * plan["batch"]["activations"]
    assert crossed["plain_gradients_bytes"] == everybody * plan["batch"]["plain_gradients"]
    for row, done in zip(plan["participants"], first.participants, strict=True):
        assert row["bytes_up"] == done.bytes_up
    assert (
        plan["server"]["parameters"] + plan["participants"][0]["parameters"]
        == (plan["full_model"]["parameters"])
    )
    assert plan["batch"]["plain_activations"] == 8 * 4 * plan_elements(plan)


def test_the_server_computes_what_is_planned() -> None:
    run = prepare(quick())
    assert isinstance(run, SplitRun)
    batch = run.data.participants[0].take(slice(0, 4))
    crossing = [tensor.detach().requires_grad_() for tensor in batch.call(run.cut.client)]
    with FlopCounterMode(display=False) as counter:
        run.cut.server(*crossing).sum().backward()
    assert run.figures()["server"]["flops_per_example"] == counter.get_total_flops() / 4


def plan_elements(plan: dict[str, Any]) -> int:
    """The activations of an example, from what crosses without a codec."""
    return int(plan["batch"]["plain_gradients"]) // (4 * int(plan["batch"]["examples"]))


def test_few_gradients_are_planned_and_counted(trained: Path) -> None:
    """By the true derivative: with `paper`, one in a hundred, as many as planned."""
    changes = (
        "split.activations=paper",
        "training.batch_size=8",
        "training.max_steps=1",
        "training.local_epochs=1",
    )
    run = prepare(quick(*changes, "split.derivative=true", "split.gradients=identity"))
    batch = run.plan()["batch"]
    survivors = batch["plain_gradients"] // 4 // 100
    assert batch["gradients"] == 4 * survivors + 14
    first = next(run.rounds(run.initial_state(), {}, 0, lambda result: None))
    line = run.observer().figures(first, {})
    assert line["gradients_bytes"] == 3 * batch["gradients"]
    assert line["plain_gradients_bytes"] == 3 * batch["plain_gradients"]
    for row, done in zip(run.plan()["participants"], first.participants, strict=True):
        assert row["bytes_down"] == done.bytes_down


def test_a_variant_may_bring_another_codec(tmp_path: Path) -> None:
    """Its settings are not mixed with those of the codec that it replaces, nor do they need a table before."""
    config = quick("split.gradients={codec='top_k', ratio=0.5}")
    variants = {
        "quantized": {"split": {"gradients": {"codec": "quantized", "bits": 4}}},
        "by name": {"split": {"gradients": "compact", "activations": {"codec": "top_k", "ratio": 0.9}}},
    }
    planned = [run.config.split for run in plan_runs(config, Comparison(["split"], 1, variants=variants))]
    assert [each.gradients for each in planned if each] == [{"codec": "quantized", "bits": 4}, "compact"]
    assert [each.activations for each in planned if each] == ["compact", {"codec": "top_k", "ratio": 0.9}]


def test_a_run_that_was_stopped_ends_with_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path / "out", watcher=Stopping(1))
    train(quick(), tmp_path / "out", resume=True)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", trained))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.release
def test_codecs_are_compared_by_the_traffic_to_the_baseline(tmp_path: Path) -> None:
    plain = {"split.activations": "identity", "split.gradients": "identity"}
    variants = {"no codec": plain, "paper": {}}
    result = compare(quick(), tmp_path / "out", Comparison(["split"], 2, variants=variants), watch=silent)
    baseline, paper = result["cells"]
    assert baseline["until_baseline"]["reached"] == 2  # each is held against itself
    assert baseline["until_baseline"]["accuracy"] == pytest.approx(
        baseline["accuracy"]["mean"] - baseline["accuracy"]["sd"]
    )
    assert paper["ratio_label"] == "-"
    assert len(traffic_table(result).rows) == 2


def test_traffic_is_summed_until_the_accuracy_is_reached() -> None:
    def line(number: int, accuracy: float | None) -> dict[str, Any]:
        line = {
            "round": number,
            "activations_bytes": 10,
            "gradients_bytes": 4,
            "bytes_up": 11,
            "bytes_down": 5,
        }
        return line if accuracy is None else {**line, "accuracy": accuracy}

    run = [line(1, 0.2), line(2, None), line(3, 0.7), line(4, 0.9)]
    assert first_as_good(run, 0.6) == {
        "rounds": 3,
        "activation_bytes": 30,
        "gradient_bytes": 12,
        "all_bytes": 48,
    }
    assert first_as_good(run, 0.95)["rounds"] is None
    found = until_as_good([run, run], {"values": [0.95, 0.75], "sd": 0.1})
    assert (found["reached"], found["rounds"]["values"]) == (2, [4, 3])
    found = until_as_good([run, run], {"values": [0.95, 0.95], "sd": 0.1})
    other = until_as_good([run[2:], run[2:]], {"values": [0.6, 0.6], "sd": None})
    assert times_less(other, found) == {"activations": 4.0, "both": 4.0, "all": 4.0}
    never = until_as_good([run], {"values": [1.0], "sd": 0.0})
    assert times_less(never, found) == {"activations": None, "both": None, "all": None}


@pytest.mark.release
def test_the_commands_tell_both_sides(tmp_path: Path) -> None:
    settings = [part for each in (*QUICK_JOB, *SPLIT) for part in ("--set", each)]
    planned = msfusion("plan", *settings)
    assert planned.exit_code == 0
    assert "server" in planned.output
    assert "what crosses, in bytes" in planned.output
    assert json.loads(msfusion("plan", "--json", *settings).output)["at"] == "layers.3"
    done = msfusion("train", "--out", str(tmp_path / "out"), *settings)
    assert done.exit_code == 0
    assert "each of 3" in done.output
    refused(msfusion("plan", "--out", str(tmp_path / "a.png"), *settings), "split has none")


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("split.at=nowhere", "no module 'nowhere'"),
        ("split.activations=best", "split.activations: there is no codec 'best'"),
        ("split.gradients={ratio=0.9}", "split.gradients: it should be a name, or a table that has one"),
        ("split.activations={codec='top_k', ratio=2.0}", "at least 0 and below 1"),
        ("split.activations={codec='top_k', ration=0.5}", "no setting 'ration'"),
        ("split.server_step=both", "split.server_step"),
        ("split.derivative=exact", "split.derivative"),
        ("participants.fraction=0.5", "participants.fraction has no meaning for method.name = 'split'"),
        ("run.workers=2", "run.workers has no meaning"),
        ("split.clients=relayed", None),
        ("split.derivative=true", None),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(change: str, told: str | None, tmp_path: Path) -> None:
    settings = [part for each in (*QUICK_JOB, *SPLIT, change) for part in ("--set", each)]
    result = msfusion("train", "--out", str(tmp_path / "out"), *settings, "--quiet")
    if told is None:
        assert result.exit_code == 0
        return
    refused(result, told)
    assert not (tmp_path / "out").exists()


def test_a_derivative_of_no_use_is_refused_in_a_sentence() -> None:
    changes = ("split.activations=quantized", "split.derivative=true")
    settings = [part for each in (*QUICK_JOB, *SPLIT, *changes) for part in ("--set", each)]
    refused(msfusion("plan", *settings), "derivative = 'true' has no meaning with activations by quantized")


def test_split_needs_its_table() -> None:
    refused(msfusion("plan", "--set", "method.name=split"), "needs a [split] table")
