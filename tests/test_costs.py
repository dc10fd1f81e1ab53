"""Costs against numbers worked out by hand."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.costs import costs_of
from msfusion.errors import MsfusionError


def batch_of(*inputs: Tensor) -> Batch:
    return Batch(inputs, torch.zeros(len(inputs[0]), dtype=torch.long))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_perceptron_by_hand() -> None:
    costs = costs_of(perceptron(), batch_of(torch.randn(5, 4)))
    assert costs.parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert costs.bytes_down == costs.bytes_up == 4 * costs.parameters
    # forward, the weights' gradients, and the hidden layer's gradient (the input needs none)
    assert costs.flops_per_example == 2 * (2 * (4 * 8 + 8 * 3) + 8 * 3)
    activations = 4 * 5 * (4 + 8)  # the input, and the ReLU's output, which both its neighbours share
    assert costs.peak_memory == 2 * costs.bytes_up + activations


@pytest.mark.parametrize(("states", "copies"), [(0, 2), (1, 3), (2, 4)])
def test_the_optimisers_state_and_the_batch_size(states: int, copies: int) -> None:
    costs = costs_of(
        perceptron(), batch_of(torch.randn(5, 4)), optimizer_states_per_parameter=states, batch_size=50
    )
    assert costs.peak_memory == copies * costs.bytes_up + 4 * 50 * (4 + 8)
    assert costs.flops_per_example == costs_of(perceptron(), batch_of(torch.randn(1, 4))).flops_per_example


def test_a_convolution_with_batch_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    costs = costs_of(module, batch_of(torch.randn(2, 3, 8, 8)))
    assert costs.parameters == 6 * 3 * 9 + 12
    assert costs.bytes_down == 4 * (costs.parameters + 12) + 8  # running statistics, and a counter of 64 bits
    assert costs.flops_per_example == 2 * (2 * 6 * 3 * 9 * 64)


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_are_not_free(layer: type[nn.RNNBase], gates: int) -> None:
    time, width, hidden = 7, 5, 6
    costs = costs_of(layer(width, hidden, batch_first=True), batch_of(torch.randn(2, time, width)))
    into, recurrent = gates * hidden * width * time, gates * hidden * hidden
    # forward, gradients of the weights, and of the hidden state (not of the first, nor of the input)
    assert costs.flops_per_example == 2 * (2 * into + 2 * recurrent * time + recurrent * (time - 1))


def test_attention_is_not_free() -> None:
    time, width, inner = 7, 16, 32
    module = nn.TransformerEncoderLayer(width, 4, inner, batch_first=True).eval()
    costs = costs_of(module, batch_of(torch.randn(2, time, width)))
    linear = 4 * width * width + 2 * width * inner
    attention = 2 * time * width  # of each position to all others: scores, and the mean of the values
    input_gradient = 3 * width * width  # the projection of the input, which needs no gradient
    assert costs.flops_per_example == 2 * time * (3 * linear - input_gradient + 3 * attention)
    assert not module.training


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(tokens)) * scale[:, None, None], "tokens": tokens}


def test_a_tied_tensor_costs_once_and_inputs_can_be_named() -> None:
    inputs = {"tokens": torch.randint(11, (3, 5)), "scale": torch.rand(3)}
    costs = costs_of(Tied(), Batch(inputs, torch.zeros(3, 5, dtype=torch.long)))
    assert costs.parameters == 44
    assert costs.bytes_up == 4 * 44
    assert costs.flops_per_example == 3 * 2 * 5 * 44


def test_frozen_parameters_travel_but_have_no_gradient() -> None:
    module = perceptron()
    module[0].requires_grad_(False)
    costs = costs_of(module, batch_of(torch.randn(5, 4)))
    assert costs.parameters == 8 * 3 + 3
    assert costs.bytes_up == 4 * (4 * 8 + 8 + 27)
    assert costs.peak_memory == costs.bytes_up + 4 * 27 + 4 * 5 * 8
    assert costs.flops_per_example == 2 * (4 * 8 + 2 * 8 * 3)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training: bool) -> None:
    module = nn.Sequential(
        nn.LSTM(4, 4, batch_first=True), Second(), nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Dropout(0.5)
    )
    module.train(training)
    module[3].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    batch = batch_of(torch.randn(3, 2, 4, generator=torch.Generator()))
    costs_of(module, batch)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert module(batch.inputs[0]).shape == (6, 4)


class Second(nn.Module):
    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


def test_a_model_larger_than_this_machine() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*[nn.Linear(2**16, 2**16) for _ in range(8)])
        batch = batch_of(torch.empty(4, 2**16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = costs_of(module, batch)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    )  # kilobytes, of 137 gigabytes
    assert costs.parameters == 8 * (2**32 + 2**16)
    assert costs.flops_per_example == 2 * (3 * 8 - 1) * 2**32


class DependsOnValues(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * values.sum().item()


class Constant(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.ones(3)


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(MsfusionError, match="DependsOnValues cannot be predicted"):
        costs_of(DependsOnValues(), batch_of(torch.randn(2, 3)))
    with pytest.raises(MsfusionError, match="Constant depends on no trained parameter"):
        costs_of(Constant(), batch_of(torch.randn(2, 3)))
