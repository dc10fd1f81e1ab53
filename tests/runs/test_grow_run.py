"""Fed-Grow as a method of the commands: planned, trained, resumed and compared with its rivals."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion, refused
from safetensors.torch import load_file

from msfusion.config import Config, load_config
from msfusion.runs.compare import compare
from msfusion.runs.comparison import Comparison
from msfusion.runs.directory import RunDirectory
from msfusion.runs.prepare import prepare
from msfusion.runs.train import Silent, Watcher, train

GROW = (
    "rounds=2",
    "data.source=python-docs",
    "data.partition=iid",
    "data.max_train=40",
    "data.max_test=16",
    "data.length=12",
    "participants.count=3",
    "model.name=decoder_lm",
    "model.options={features=16, heads=2, layers=2}",
    "method.name=fedgrow",
    "grow.small=[{features=8, layers=1}, {features=12, layers=1}]",
    "grow.intermediate={features=12, layers=2}",
    "grow.fit={steps=3}",
    "grow.pretraining={optimizer='adamw', learning_rate=0.01}",
    "training.batch_size=8",
    "training.local_epochs=1",
    "run.workers=1",
)
SETTINGS = [part for each in GROW for part in ("--set", each)]


def quick(*overrides: str) -> Config:
    return load_config(None, [*GROW, *overrides])


def silent(title: str) -> AbstractContextManager[Watcher]:
    return Silent()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grow") / "out"
    train(quick(), path)
    return path


def test_only_the_operator_is_left_behind_and_counted(trained: Path) -> None:
    saved = load_file(trained / "model.safetensors")
    assert saved
    assert all(name.startswith("operator.") for name in saved)
    figures = prepare(quick()).figures()
    moved = sum(tensor.nbytes for tensor in saved.values())
    assert figures["participants"][0]["bytes_up"] == moved
    line = RunDirectory(trained).read_metrics()[0]
    assert line["bytes_up"] == line["bytes_down"] == 3 * moved
    assert figures["participants"][0]["small_parameters"] < figures["participants"][1]["small_parameters"]


def test_participants_are_told_apart_and_their_work_is_counted(trained: Path) -> None:
    first, second = RunDirectory(trained).read_metrics()
    assert first["accuracy_sd"] > 0
    private = sum(row["private_flops"] for row in RunDirectory(trained).read_summary()["participants"])
    assert private > 0
    assert first["training_flops"] - second["training_flops"] == private


def test_a_run_that_was_stopped_ends_with_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stops(Silent):
        def round(self, line: Any) -> None:
            raise Stopped

    with pytest.raises(Stopped):
        train(quick(), tmp_path / "out", watcher=Stops())
    summary = train(quick(), tmp_path / "out", resume=True)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", trained))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert summary["accuracy"] == RunDirectory(trained).read_summary()["accuracy"]
    lines = [RunDirectory(path).read_metrics()[-1]["training_flops"] for path in (tmp_path / "out", trained)]
    assert lines[0] == lines[1]


def test_rivals_are_variants(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "together": {},
        "alone": {"grow.share": "nothing"},
        "stack": {"grow": {"growth": "stack", "further": "federated"}},
    }
    result = compare(quick(), tmp_path / "out", Comparison(["fedgrow"], 1, variants=variants), watch=silent)
    together, alone, stack = result["cells"]
    target = prepare(quick()).figures()["full_model"]
    moved = target["bytes_down"] + target["bytes_up"]
    assert alone["total_bytes"] < 0.01 * moved  # scores alone
    assert stack["total_bytes"] == 2 * moved
    assert together["total_bytes"] > moved
    assert together["total_flops"] == pytest.approx(alone["total_flops"])


def test_the_commands_say_what_leaves(tmp_path: Path) -> None:
    planned = msfusion("plan", *SETTINGS)
    assert planned.exit_code == 0
    assert "what leaves a participant: operator" in planned.output
    assert json.loads(msfusion("plan", "--json", *SETTINGS).output)["leaves_participants"] == ["operator"]
    done = msfusion("train", "--out", str(tmp_path / "out"), *SETTINGS)
    assert done.exit_code == 0
    assert "between participants" in done.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("grow.intermediate={features=24}", "does not grow into"),
        ("grow.small=[{features=32}]", "participant 0's small model does not grow into"),
        ("grow.small=[]", "grow.small should list the participants' models"),
        ("grow.small=['nowhere']", "nowhere"),
        ("grow.growth=stack", "set further to 'alone' or 'federated'"),
        ("grow.fit={steps=0}", "steps is 0: it must be at least 1"),
        ("grow.further=alone", "set growth_rounds"),
        ("grow.growth_rounds=2", "leaves nothing of the 2 rounds"),
        ("grow.small=[{feature=8}]", "unknown to decoder_lm"),
        ("method.contrastive_weight=1.0", "has no meaning for method.name = 'fedgrow'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(change: str, told: str, tmp_path: Path) -> None:
    refused(msfusion("train", "--out", str(tmp_path / "out"), *SETTINGS, "--set", change, "--quiet"), told)
    assert not (tmp_path / "out").exists()
