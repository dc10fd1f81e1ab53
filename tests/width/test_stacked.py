"""Sub-models stacked into one give what each gives alone, gradients too; what would not is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msfusion.errors import ConfigError
from msfusion.width.stacked import check_stackable, run_stacked
from msfusion.width.submodel import SubModel, narrow
from msfusion.width.trace import trace


class Tied(nn.Module):
    """A tied embedding, attention, memory formats and lengths that are asked for as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        query, value = (
            layer(stream).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.query, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, query, value, is_causal=True)
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        result: Tensor = self.head(stream + mixed.transpose(1, 2).flatten(2))
        return result


def submodels(count: int) -> list[SubModel]:
    model = Tied()
    width_map = trace(model, (torch.randint(11, (2, 5)),))
    group = max(width_map.groups, key=lambda group: group.units)
    windows = [{group.name: (torch.arange(group.units // 2) + shift) % group.units} for shift in range(count)]
    return [narrow(model, width_map, window).train() for window in windows]


def test_stacked_sub_models_give_what_each_gives_alone() -> None:
    models, tokens = submodels(3), torch.randint(11, (3, 4, 6))
    names = [name for name, _ in models[0].named_parameters()]
    assert "head.weight" not in names  # it is the embedding's
    stacked = {
        name: torch.stack([model.get_parameter(name).detach() for model in models]).requires_grad_()
        for name in names
    }
    found = run_stacked(models[0], stacked, lambda call, own: call(own), tokens)
    found.square().sum().backward()
    for row, model in enumerate(models):
        alone = model(tokens[row])
        alone.square().sum().backward()
        torch.testing.assert_close(found[row], alone)
        for name in names:
            gradient = stacked[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[row], model.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_what_can_be_stacked_passes_and_is_left_as_it_was() -> None:
    (model,) = submodels(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        check_stackable(model.train(training))
        assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Counts(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 1.0


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Noise(), r"module '1' draws random numbers \(operation aten.rand_like.default\)"),
        (Counts(), r"changes its tensor '1.count' as it runs"),
        (nn.BatchNorm1d(8), r"module '1' normalises over the examples"),
        (nn.BatchNorm1d(8, track_running_stats=False), "module '1' normalises over the examples"),
        (nn.RReLU(), "draws random numbers"),
    ],
)
def test_what_would_change_is_refused_by_module_and_operation(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))
    width_map = trace(model, (torch.randn(3, 6),))
    with pytest.raises(ConfigError, match=reason):
        check_stackable(narrow(model, width_map, {}))
