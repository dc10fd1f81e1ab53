"""Tasks beside classification, trained from the command line: numbers, several labels, pixels, a loss of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion

from msfusion.errors import MsfusionError
from msfusion.experiment.config import load_config
from msfusion.experiment.setup import prepare_parts

MODULE = '''
"""Data and models of a user."""
import torch
from torch import nn
from msfusion import Batch

def split(inputs, targets, named=None):
    inputs = inputs if isinstance(inputs, dict) else (inputs,)
    whole = Batch(inputs, targets)
    return whole.take(slice(0, 90)), whole.take(slice(90, 120))

def vectors():
    return torch.randn(120, 6, generator=torch.Generator().manual_seed(0))

def measures():
    x = vectors()
    return split(x, x[:, :2] * 2 + 1)

def several():
    x = vectors()
    return split(x, (x[:, :3] > 0).float())

def pixels():
    x = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return split(x, (x[:, 0] > 0).long())

def with_labels():
    x = vectors()
    y = (x.sum(1) > 0).long()
    return split({"x": x, "labels": y}, y)

def perceptron(outputs=2):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))

def segmenter():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = perceptron()

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

def its_own(outputs, targets):
    return outputs["loss"]

def per_pixel(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)

def right_pixels(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()
'''

USUAL = (
    "rounds=8",
    "data.partition=iid",
    "participants.count=3",
    "participants.ratio=0.5",
    "training.optimizer=adamw",
    "training.learning_rate=0.02",
    "training.batch_size=15",
    "evaluation.every=8",
    "run.workers=1",
)
TASKS: dict[str, tuple[Sequence[str], str, float]] = {
    "regression": (
        (
            "data.source=theirs:measures",
            "model.name=theirs:perceptron",
            "evaluation.metrics=['mean_absolute_error']",
        ),
        "mean_absolute_error",
        1.0,
    ),
    "several labels": (
        (
            "data.source=theirs:several",
            "model.name=theirs:perceptron",
            "model.options={outputs=3}",
            "training.loss=binary_cross_entropy",
            "evaluation.metrics=['auc']",
        ),
        "auc",
        0.8,
    ),
    "pixels": (
        (
            "data.source=theirs:pixels",
            "model.name=theirs:segmenter",
            "training.loss=theirs:per_pixel",
            "evaluation.metrics=['theirs:right_pixels', 'mean_iou']",
        ),
        "right_pixels",
        0.8,
    ),
    "its own loss": (
        (
            "data.source=theirs:with_labels",
            "model.name=theirs:Own",
            "training.loss=theirs:its_own",
        ),
        "accuracy",
        0.7,
    ),
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(*given: str) -> list[str]:
    return [part for each in (*USUAL, *given) for part in ("--set", each)]


def every_start() -> list[Any]:
    """Each task with slices and one of them with each start; the other pairs are left to `scripts/check --all`."""
    return [
        pytest.param(task, start, marks=() if start == "fresh" or task == "pixels" else pytest.mark.release)
        for task in TASKS
        for start in ("fresh", "blocks", "copies")
    ]


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize(("task", "start"), every_start())
def test_a_task_is_trained_and_told(task: str, start: str, theirs: Path) -> None:
    chosen, figure, least = TASKS[task]
    blocks = ("method.blocks=2",) if start == "blocks" else ()
    if (task, start) == ("its own loss", "blocks"):
        pytest.skip("outputs that hold a loss cannot be added up")
    given = settings(*chosen, f"method.start={start}", *blocks)
    done = msfusion("train", *given, "--out", "run")
    assert done.exit_code == 0, done.output
    line = json.loads((theirs / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    line |= line.get("metrics", {})
    assert figure in done.stdout
    better = -line[figure] if figure == "mean_absolute_error" else line[figure]
    assert better > (-least if figure == "mean_absolute_error" else least)
    assert ("accuracy" in line) == (task == "its own loss")
    summary = json.loads((theirs / "run" / "summary.json").read_text())
    assert summary["loss"] == line["loss"]


def prepared(*given: str) -> Any:
    return prepare_parts(load_config(None, [*USUAL, *given]))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("data.source=theirs:pixels", "model.name=theirs:segmenter"), "set training.loss"),
        (("training.loss=nonsense",), "should be 'cross_entropy', 'mse'"),
        (("evaluation.metrics=['nonsense']",), "should be a list of 'auc'"),
        (("data.task=regression",), "is for classification"),
        (("method.name=split", "split.at=layers.3", "training.loss=mse"), "training.loss has no meaning"),
    ],
)
def test_what_does_not_fit_is_refused(given: Sequence[str], sentence: str, theirs: Path) -> None:
    from msfusion.experiment.setup import prepare

    with pytest.raises(MsfusionError, match=sentence):
        prepare(load_config(None, [*USUAL, *given]))


def test_numbers_of_a_file_are_targets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import datasets

    from msfusion.data import DataSpec, load_data

    x = torch.randn(40, 3)
    rows = {"features": x.tolist(), "target": x.sum(1).tolist()}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "numbers.parquet"))
    spec = DataSpec(
        str(tmp_path / "numbers.parquet"), task="regression", label_column="target", participants=2
    )
    data = load_data(spec)
    assert (data.task, data.classes) == ("regression", 1)
    own = torch.cat([own.inputs[0].sum(1) - own.targets[:, 0] for own in (*data.participants, data.test)])
    assert len(own) == 40
    torch.testing.assert_close(own, torch.zeros(40), rtol=0, atol=1e-5)
