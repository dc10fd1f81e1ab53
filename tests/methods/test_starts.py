"""What `method.start = "auto"` chooses: by the length of the run, and by what the model and the settings allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import QUICK_SETTINGS
from safetensors.torch import load_file
from torch import nn

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.export import export
from msfusion.experiment.kinds import prepare as prepare_run
from msfusion.experiment.setup import Parts, Setup, prepare, prepare_parts, traced
from msfusion.experiment.train import train
from msfusion.federated.capacities import Capacities
from msfusion.federated.problem import Problem
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.copies import CopiesMethod
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.settings import MSfusion
from msfusion.methods.starts import affordable_blocks, first_block, passes_of, passes_of_a_block, steps_of
from msfusion.scoring import Scoring

OPEN = (*QUICK_SETTINGS, "method.start=auto", "participants.ratio=0.25", "training.local_epochs=1")


def opened(*overrides: str) -> Config:
    return load_config(None, [*OPEN, *overrides])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(opened())


def problem(*examples: int, **training: int) -> Problem:
    settings = TrainingSettings(batch_size=16, **training)  # type: ignore[arg-type]
    return Problem(
        nn.Linear(1, 2), Batch((torch.zeros(2, 1),), torch.zeros(2).long()), Capacities((0.25,) * len(examples)),
        (settings,) * len(examples), examples, rounds=10,
    )  # fmt: skip


def test_passes_by_hand() -> None:
    """Two passes in each of ten rounds; or, of 40 and 16 examples, two mini-batches of 16: 32 and 16 are seen."""
    assert passes_of(problem(40, 16, local_epochs=2)) == 20
    assert passes_of(problem(40, 16, max_steps=2)) == pytest.approx(10 * (32 / 40 + 1) / 2)


@pytest.mark.parametrize("examples", [33, 40, 1, 2, 17])
def test_rounds_of_one_pass_are_so_many_passes(examples: int) -> None:
    """Of 33 examples the last is a mini-batch of its own, which is left out; 59.9 passes would be a block fewer."""
    asked = replace(problem(examples, 32), rounds=60)
    assert passes_of(asked) == 60
    assert affordable_blocks(None, asked.capacities, passes_of(asked) / passes_of_a_block(asked)) == 2


def test_steps_by_hand() -> None:
    """Of 40 and 16 examples, mini-batches of 16: three and one in each of two passes, in each of ten rounds."""
    assert steps_of(problem(40, 16, local_epochs=2)) == 40
    assert steps_of(problem(40, 16, max_steps=2)) == 15


@pytest.mark.parametrize(
    ("epochs", "ratios", "settings", "first"),
    [
        (180, (0.25, 0.25), MSfusion(), 0.0),  # 3,600 steps: 900 for each of four blocks
        (178, (0.25, 0.25), MSfusion(), 0.5),
        (178, (0.25, 0.25), MSfusion(blocks=4), 0.0),  # whoever says how many knows what for
        (178, (0.25, 0.5), MSfusion(), 0.0),  # the second trains two at once
    ],
)
def test_with_few_steps_for_each_block_the_first_has_half_of_the_rounds(
    epochs: int, ratios: tuple[float, ...], settings: MSfusion, first: float
) -> None:
    asked = replace(problem(40, 16, local_epochs=epochs), capacities=Capacities(ratios))
    share, why = first_block(settings, asked, 4)
    assert share == first
    assert bool(why) == bool(first)


@pytest.mark.parametrize(
    ("ratio", "one_by_one", "blocks"),
    [
        ("0.25", 1.9, 1),
        ("0.25", 2.0, 2),
        ("0.25", 3.5, 3),
        ("0.25", 100.0, 4),
        ("0.125", 5.0, 5),
        ("1.0", 100.0, 1),
        ("[0.125, 0.25, 0.5]", 2.0, 4),  # (1 + 2 + 4) / 3 blocks at once
        ("[0.125, 0.25, 0.5]", 0.1, 2),
    ],
)
def test_a_block_for_so_many_passes(ratio: str, one_by_one: float, blocks: int) -> None:
    capacities = opened(f"participants.ratio={ratio}").capacities
    assert affordable_blocks(None, capacities, one_by_one) == blocks


@pytest.mark.parametrize(("language_modelling", "blocks"), [(False, 4), (True, 2)])
def test_a_block_of_a_language_model_needs_more_passes(language_modelling: bool, blocks: int) -> None:
    """In 200 passes six blocks of 30, of which the ratio asks for four; or two of 100."""
    asked = replace(problem(40, 16, local_epochs=20), scoring=Scoring(language_modelling=language_modelling))
    assert passes_of(asked) == 200
    one_by_one = passes_of(asked) / passes_of_a_block(asked)
    assert affordable_blocks(None, asked.capacities, one_by_one) == blocks


def test_a_number_of_blocks_that_is_given_is_taken() -> None:
    assert affordable_blocks(7, Capacities((0.25,)), 1.0) == 7


def chosen(parts: Parts, *overrides: str) -> Setup:
    return prepare(opened(*overrides), parts)


def test_a_short_run_trains_the_small_model_bit_for_bit(parts: Parts, tmp_path: Path) -> None:
    setup = chosen(parts)
    assert isinstance(setup.method, BlocksMethod)
    assert setup.method.phases.blocks == 1
    ours = train(opened(), tmp_path / "ours", parts=parts)
    small = train(opened("method.name=small"), tmp_path / "small", parts=parts)
    assert ours["loss"] == small["loss"]
    assert ours["start"]["chosen"] == "blocks"
    assert "start" not in small
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "small"))
    assert {name.removeprefix("block0."): tensor.tolist() for name, tensor in mine.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }


def test_a_long_run_trains_several_and_can_be_exported(parts: Parts, tmp_path: Path) -> None:
    several = ("method.blocks=2", "rounds=3")
    setup = chosen(parts, *several)
    assert isinstance(setup.method, BlocksMethod)
    assert (setup.method.phases.blocks, setup.config.method.start) == (2, "blocks")
    assert any("sum of 2 blocks" in remark for remark in prepare_run(opened(*several), parts).remarks)
    said = train(opened(*several), tmp_path / "open", parts=parts)
    told = train(opened(*several, "method.start=blocks"), tmp_path / "told", parts=parts)
    assert said["loss"] == told["loss"]
    names = {path.name for path in export(tmp_path / "open", tmp_path / "out")}
    assert {"model.json", "model.safetensors"} <= names


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("method.overlap={start=0.6}", CopiesMethod),
        ("method.between_rounds=false", CopiesMethod),
        ("method.contrastive_weight=0.5", CopiesMethod),
        ("method.recalibrate=true", CopiesMethod),
    ],
)
def test_settings_of_slices_ask_for_slices(parts: Parts, setting: str, kind: type) -> None:
    setup = prepare(load_config(None, [*OPEN, setting]), parts)
    assert isinstance(setup.method, kind)
    assert setting.partition("=")[0] in (setup.why_start or "")


def test_an_overlap_by_feedback_asks_for_fresh_slices(parts: Parts) -> None:
    setup = chosen(parts, "method.overlap={shape='feedback', start=0.6}")
    assert setup.config.method.start == "fresh"


class Gated(nn.Module):
    """Its logits are a product of two layers, so no tensor does nothing but make them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scores, self.gate = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, images: Any) -> Any:
        hidden = torch.relu(self.hidden(images.flatten(1)))
        return torch.exp(self.scores(hidden)) * torch.sigmoid(self.gate(hidden))


def test_a_model_that_has_no_silent_blocks_is_trained_as_copies(parts: Parts) -> None:
    torch.manual_seed(0)
    model = Gated()
    data: FederatedData = parts.data
    own = Parts(data, model, traced(model, data))
    setup = chosen(own, "method.blocks=4", "method.remembered_bytes=1000")
    assert isinstance(setup.method, CopiesMethod)
    assert "without a say" in (setup.why_start or "")
    assert isinstance(prepare(opened("method.start=fresh"), own).method, NarrowMethod)
