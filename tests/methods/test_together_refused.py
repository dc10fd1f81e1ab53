"""What cannot be trained at once with the same numbers is refused; mistakes are told as the loop tells them."""

from __future__ import annotations

from typing import Any

import pytest
from simulated import run_rounds
from together_cases import (
    assert_alike,
    method_for,
    mlp,
    rounds,
    tasks_of,
    texts,
    traced,
    vectors,
)
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.federated.method import Method
from msfusion.federated.rounds import RoundSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.contrastive import ContrastiveSettings


def both(method: Method, data: list[Batch]) -> list[str]:
    """What the loop and the stack raise."""
    assert isinstance(method, NarrowMethod)
    tasks, raised = tasks_of(method), []
    for train in (lambda: [*map(method.train, tasks, data)], lambda: method.train_together(tasks, data)):
        with pytest.raises((TrainingError, DataError)) as caught:
            train()
        raised.append(f"{type(caught.value).__name__}: {caught.value}")
    return raised


def test_a_loss_that_is_not_finite_names_the_participant_and_the_step() -> None:
    data = vectors()
    assert isinstance(data[3].inputs, tuple)
    data[3].inputs[0][7] = float("nan")
    loop, stack = both(method_for(mlp()), data)
    assert loop == stack
    assert "participant 3's loss became nan in round 1, step " in stack


def test_labels_and_shapes_that_do_not_fit_are_told_as_the_loop_does() -> None:
    data = vectors()
    data[1].targets[2] = 7
    loop, stack = both(method_for(mlp()), data)
    assert loop == stack
    assert "label 7 is out of range" in stack
    wrong = [Batch(own.inputs, own.targets[:, None].expand(-1, 4).clone()) for own in vectors()]
    loop, stack = both(method_for(mlp()), wrong)
    assert loop.split("targets of shape")[0] == stack.split("targets of shape")[0]


class Mixing(nn.Module):
    """An example's answer depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        result: Tensor = self.last(hidden - hidden.mean(0, keepdim=True))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.core, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.core(self.embed(x))[0])
        return result


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3)),
            "'1' draws random numbers",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
            "over the examples of a mini-batch",
        ),
        (Mixing, "depends on the other examples"),
        (Recurrent, "torch.vmap cannot run its sub-models"),
    ],
)
def test_models_that_would_give_other_numbers_are_refused(model: Any, reason: str) -> None:
    data = texts() if model is Recurrent else vectors()
    method = method_for(traced(model(), data))
    with pytest.raises(ConfigError, match=reason) as caught:
        run_rounds(method, data, RoundSettings(rounds=2), together=2)
    assert str(caught.value).endswith("or set together to 1")
    assert "\n" not in str(caught.value)


def test_dropout_of_zero_is_no_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.ReLU(), nn.Linear(8, 3))
    method = method_for(traced(model, vectors()))
    assert_alike(rounds(method, vectors(), 1), rounds(method, vectors(), 5))


@pytest.mark.parametrize("name", ["msfusion", "small"])
def test_the_contrastive_loss_is_refused(name: str) -> None:
    method = method_for(mlp(), name=name, contrastive=ContrastiveSettings(0.5))
    with pytest.raises(ConfigError, match="contrastive_weight to 0 or together to 1"):
        run_rounds(method, vectors(), RoundSettings(rounds=1), together=2)
