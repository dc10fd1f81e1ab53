"""Programs that need no msfusion: written, read in a fresh process, and equal to the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_JOB, QUICK_TEXT
from torch import nn

from msfusion import narrow
from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.errors import ConfigError
from msfusion.experiment import program
from msfusion.experiment.config import load_config
from msfusion.experiment.export import export
from msfusion.experiment.train import train
from msfusion.predictor import load_predictor
from msfusion.width.trace import trace

pytestmark = pytest.mark.slow

READER = """
import sys, torch
sys.modules["msfusion"] = None  # not even by accident
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save(program(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def some_data(inputs: object, targets: torch.Tensor, task: str = "classification") -> FederatedData:
    batch = Batch(inputs, targets)  # type: ignore[arg-type]
    return FederatedData((batch,), batch, task, 3)


@pytest.mark.release
def test_a_sum_of_blocks_as_a_program_that_knows_nothing_of_msfusion(tmp_path: Path) -> None:
    blocks = ("method.start=blocks", "method.blocks=2", "participants.ratio=0.5")
    train(load_config(None, [*QUICK_JOB, *blocks]), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", also=["program", "onnx"])
    given, answered = tmp_path / "given.pt", tmp_path / "answered.pt"
    predictor = load_predictor(tmp_path / "out")
    images = torch.rand(7, 1, 8, 8)
    torch.save(images, given)
    command = [sys.executable, "-c", READER, str(tmp_path / "out" / "model.pt2"), str(given), str(answered)]
    subprocess.run(command, check=True)
    with torch.no_grad():
        expected = predictor.model(images)
    torch.testing.assert_close(torch.load(answered, weights_only=True), expected)

    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_0": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.release
def test_inputs_that_have_names_keep_them(tmp_path: Path) -> None:
    settings = (
        "model.name=decoder_lm",
        "model.options={features=16, heads=2, layers=1}",
        "method.name=fedavg",
    )
    train(load_config(None, [*QUICK_TEXT, *settings, "participants.ratio=1"]), tmp_path / "run")
    assert msfusion("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--onnx").exit_code == 0
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["input_ids"]
    assert not (tmp_path / "out" / "model.pt2").exists()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What export cannot follow: it depends on values."""
        out: torch.Tensor = self.layer(x)
        return out if float(out.sum()) > 0 else -out


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path: Path) -> None:
    data = some_data((torch.randn(5, 4),), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"cannot be written as model.pt2 .*: leave --program out"):
        program.write_program(Branches(), data, tmp_path, "program")


def test_a_program_that_answers_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_data((torch.randn(5, 4),), torch.zeros(5, dtype=torch.long))
    model = nn.Linear(4, 3)

    def other(made: object, path: Path, names: object) -> program.Answers:
        return lambda values: model(values[0]) + 0.01

    monkeypatch.setattr(program, "_WAYS", {"program": other})
    with pytest.raises(ConfigError, match="answers otherwise than the model, for 1 examples"):
        program.write_program(model, data, tmp_path, "program")


@pytest.mark.release
def test_without_its_packages_onnx_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(load_config(None, [*QUICK_JOB, "method.name=fedavg", "participants.ratio=1"]), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(
        msfusion("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--onnx"),
        "--onnx needs onnxruntime: pip install",
    )
    assert not (tmp_path / "out").exists()


def test_a_sub_model_can_be_exported_itself() -> None:
    """Sizes that are symbols are left to whoever exports."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    values = (torch.randn(2, 6),)
    width_map = trace(model, values)
    small = narrow(model, width_map, {group.name: torch.arange(2) for group in width_map.groups})
    sizes = (({0: torch.export.Dim("examples", min=1)},),)
    exported = torch.export.export(small, values, dynamic_shapes=sizes, strict=False)
    more = torch.randn(9, 6)
    torch.testing.assert_close(exported.module()(more), small(more))
