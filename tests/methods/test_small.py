"""The small model: a model of its own, initialised as one of its width would have been."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from building import build_method
from simulated import run_rounds
from torch import nn

from msfusion.batch import Batch
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.small import SmallMethod, reinitialised, small_method
from msfusion.width.groups import WidthMap
from msfusion.width.slices import extract
from msfusion.width.trace import trace
from msfusion.windows import static

SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=8)


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 16, 5),
    )


@cache
def wide() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = net(64)
    return model, trace(model, (torch.randn(2, 2, 4, 4),))


def some_data(participants: int = 3) -> list[Batch]:
    return [Batch((torch.randn(16, 2, 4, 4),), torch.randint(5, (16,))) for _ in range(participants)]


def build(*ratios: float) -> SmallMethod:
    return small_method(*wide(), min(ratios), (SETTINGS,) * len(ratios))


def test_it_has_the_shape_of_a_model_of_the_smallest_ratio() -> None:
    state = build(0.5, 0.25, 1.0).initial_state()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in net(16).state_dict().items()
    }


def test_its_initial_variance_is_that_of_a_model_of_its_width() -> None:
    start, fresh = build(0.25).initial_state(), net(16).state_dict()
    for name in ("2.weight", "5.weight"):
        spread, expected = start[name].std().item(), fresh[name].std().item()
        assert spread == pytest.approx(expected, rel=0.1), name
    first = extract(state_of(wide()[0]), wide()[1], static(wide()[1], 0, 0, 0.25, participants=1))
    assert torch.equal(start["0.weight"], first["0.weight"])  # what sums over the input is not narrowed
    assert torch.equal(start["2.bias"], first["2.bias"])


def test_outputs_start_as_large_as_those_of_a_fresh_model_of_its_width() -> None:
    x = torch.randn(64, 2, 4, 4)
    method = build(0.25)
    method.model.load_state_dict(method.initial_state())
    hidden = net(16)[:4]
    hidden.load_state_dict({name: t for name, t in method.initial_state().items() if name < "5"})
    ours, fresh = hidden(x).std().item(), net(16)[:4](x).std().item()
    assert ours == pytest.approx(fresh, rel=0.4)
    assert method.model(x).shape == (64, 5)


def test_two_narrow_axes_of_one_tensor_count_both() -> None:
    shapes = {"w": (4, 6, 8)}
    width_map = WidthMap((), shapes, ("w",), contracting=frozenset({("w", 1), ("w", 2)}))
    (scaled,) = reinitialised({"w": torch.ones(4, 3, 2)}, width_map).values()
    torch.testing.assert_close(scaled, torch.full((4, 3, 2), math.sqrt(2 * 4)))


def test_a_round_is_fedavg_of_a_plain_small_model() -> None:
    data, method = some_data(), build(0.25, 0.25, 0.25)
    (result,) = run_rounds(method, data, RoundSettings(rounds=1))
    trained = []
    for participant, own in enumerate(data):
        local = net(16)
        local.load_state_dict(method.initial_state())
        local_steps(local, own, SETTINGS, seed=0, round_index=0, participant=participant)
        trained.append(state_of(local))
    for name, tensor in result.state.items():
        torch.testing.assert_close(tensor, torch.stack([t[name] for t in trained]).mean(0))


def test_it_learns_and_is_evaluated_as_itself() -> None:
    data = some_data(1)
    settings = TrainingSettings(learning_rate=0.05, batch_size=8, local_epochs=10)
    method = build_method("small", *wide(), (0.25,), settings)
    first, *_, last = run_rounds(method, data, RoundSettings(rounds=4), test=data[0])
    assert first.evaluation is not None
    assert last.evaluation is not None
    assert last.evaluation.loss < first.evaluation.loss
    assert last.evaluation.accuracy > 0.8
