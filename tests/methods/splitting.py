"""A small job of split learning: as one loop, the reference, and as a method that any engine carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES
from msfusion.data.builtin import read_digits
from msfusion.federated.capacities import Capacities
from msfusion.federated.engine import Engine
from msfusion.federated.participation import RoundSettings
from msfusion.federated.problem import Problem
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings
from msfusion.methods.settings import capacities_of
from msfusion.methods.split.method import SplitMethod, SplitSettings
from msfusion.methods.split.rounds import SplitRound, run_split_rounds
from msfusion.models.convolutional import ConvNet
from msfusion.width.groups import WidthMap

TRAINING = TrainingSettings(optimizer="adamw", learning_rate=0.01, batch_size=8)
SETTINGS = SplitSettings("layers.3", PROFILES["compact"], PROFILES["accurate"])


def digits(count: int, first: int = 0) -> Batch:
    images, labels = read_digits()
    chosen = slice(first, first + count)
    return Batch((images[chosen] - 0.3,), labels[chosen])


@cache
def network() -> tuple[nn.Module, WidthMap]:
    """A small network and its map. Nothing may change it."""
    torch.manual_seed(0)
    model = ConvNet(1, 10, image_size=8, widths=(8, 8))
    return model, msfusion.trace(model, digits(2).inputs)


@cache
def drawing_network() -> tuple[nn.Module, WidthMap]:
    """With running statistics and dropout on both sides of `layers.3`."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(512, 10),
    )
    model = _Layers(layers)
    return model, msfusion.trace(model, digits(2).inputs)


class _Layers(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@dataclass
class Job:
    """Participants with different numbers of examples."""

    data: list[Batch] = field(default_factory=lambda: [digits(20), digits(12, 100), digits(17, 200)])
    settings: SplitSettings = SETTINGS
    training: TrainingSettings = TRAINING
    rounds: RoundSettings = field(default_factory=lambda: RoundSettings(2))
    whole: tuple[nn.Module, WidthMap] = field(default_factory=network)
    screening: Screening = DEFAULT

    def reference(self) -> list[SplitRound]:
        model, width_map = self.whole
        parts = msfusion.cut(model, width_map, self.settings.at)
        more: dict[str, Any] = {
            "state": state_of(model),
            "screening": self.screening,
            "test": digits(30, 300),
        }
        return list(
            run_split_rounds(parts, model, self.data, self.settings, self.training, self.rounds, **more)
        )

    def method(self) -> SplitMethod:
        model, width_map = self.whole
        count = len(self.data)
        capacities: Capacities = capacities_of(1.0, count, 0)
        problem = Problem(
            model,
            digits(2),
            capacities,
            (self.training,) * count,
            tuple(map(len, self.data)),
            self.rounds.rounds,
            self.rounds.seed,
            known_map=width_map,
        )
        return self.settings.build(problem)

    def run(self, engine: Engine | None = None, **more: Any) -> list[RoundResult]:
        given = {"screening": self.screening, "test": digits(30, 300), **more}
        return list(run_rounds(self.method(), self.data, self.rounds, engine=engine, **given))


def same(ours: list[Any], theirs: list[Any]) -> None:
    """The very same numbers, bit for bit."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.state.keys() == other.state.keys()
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())
        assert one.server_figures == other.server_figures
        told = [
            [
                (each.participant, each.loss, each.examples, each.bytes_up, each.bytes_down, each.metrics)
                for each in result.participants
            ]
            for result in (one, other)
        ]
        assert told[0] == told[1]
        assert [each.participant for each in one.left_out] == [each.participant for each in other.left_out]
        assert one.evaluation == other.evaluation
        assert one.bytes_moved == other.bytes_moved
