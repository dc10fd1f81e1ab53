"""Tensors that share memory without being one tensor are refused, unless nothing ever changes them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msfusion.averaging.fusion import fuse
from msfusion.errors import UntraceableModelError
from msfusion.width.cut import cut
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """A layer of 16 units beside a second weight `w` of 16 rows, made by each test."""

    w: Tensor

    def __init__(self, make: Callable[[Two], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.i, self.o = nn.Linear(8, 16), nn.Linear(32, 4)
        make(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cat([torch.relu(self.i(x)), torch.tanh(x @ self.w.reshape(-1, 8)[:16].t())], 1))


def as_parameter(model: Two) -> None:
    model.w = nn.Parameter(model.i.weight.data)


def as_transposed_parameter(model: Two) -> None:
    model.w = nn.Parameter(model.i.weight.data.t())


def as_part_of_a_parameter(model: Two) -> None:
    model.w = nn.Parameter(torch.randn(32, 8))
    model.i.weight = nn.Parameter(model.w.data[8:24])


def as_buffer(model: Two) -> None:
    model.register_buffer("w", model.i.weight.data)


def as_attribute(model: Two) -> None:
    model.w = model.i.weight.detach()


def through_numpy(model: Two) -> None:
    values = np.ones((16, 8), dtype=np.float32)
    model.w, model.i.weight = (nn.Parameter(torch.from_numpy(values)) for _ in range(2))


@pytest.mark.parametrize(
    "make",
    [as_parameter, as_transposed_parameter, as_part_of_a_parameter, as_buffer, as_attribute, through_numpy],
)
def test_a_trained_tensor_that_shares_its_memory_is_refused_by_both_names(
    make: Callable[[Two], None],
) -> None:
    with pytest.raises(UntraceableModelError, match=r"(?=.*'w')(?=.*'i\.weight').*share memory.*clone"):
        trace(Two(make), (X,))


def as_other_columns(model: Two) -> None:
    both = torch.randn(16, 16) * 0.3
    model.i.weight, model.w = nn.Parameter(both[:, ::2]), nn.Parameter(both[:, 1::2])


def as_part_of_flat_memory(model: Two) -> None:
    flat = torch.randn(256) * 0.3
    model.i.weight, model.w = nn.Parameter(flat[:128].view(16, 8)), nn.Parameter(flat[128:].view(16, 8))


def as_one_value(model: Two) -> None:
    model.register_buffer("w", torch.ones(1, 1).expand(16, 8))


@pytest.mark.parametrize("make", [as_other_columns, as_part_of_flat_memory, as_one_value])
def test_parts_of_one_memory_without_a_common_entry_are_allowed(make: Callable[[Two], None]) -> None:
    model = Two(make).eval()
    sub = narrow(model, trace(model, (X,)), {})
    assert torch.allclose(sub(X), model(X), atol=1e-6)


class Frozen(nn.Module):
    """Two tables made from the same vectors, neither trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vectors = torch.randn(20, 8)
        self.one, self.two = nn.Embedding.from_pretrained(vectors), nn.Embedding.from_pretrained(vectors)
        self.i, self.o = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(torch.relu(self.i(torch.cat([self.one(ids), self.two(ids)], -1))))


def test_frozen_tables_may_share_their_vectors_until_one_is_trained() -> None:
    model, ids = Frozen().eval(), torch.arange(12).view(4, 3)
    width_map = trace(model, (ids,))
    assert torch.allclose(narrow(model, width_map, {})(ids), model(ids), atol=1e-6)
    model.two.weight.requires_grad_(True)
    with pytest.raises(UntraceableModelError, match=r"'one\.weight' and 'two\.weight' share memory"):
        narrow(model, width_map, {})


class Running(nn.Module):
    """A mean that is a view of the statistics, which each step in training changes."""

    mean: Tensor
    stats: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.i, self.o, self.how = nn.Linear(8, 16), nn.Linear(16, 4), how
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("stats", torch.zeros(2, 16))
        self.register_buffer("mean", self.norm.running_mean.view(16) if how == "norm" else self.stats[0])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.i(x)))
        if self.training and self.how == "in place":
            with torch.no_grad():
                self.stats[0].add_(h.mean(0) * 0.1)
        return self.o(h - self.mean + self.stats[1])


@pytest.mark.parametrize("how", ["in place", "norm"])
def test_a_view_of_a_buffer_that_is_written_is_refused(how: str) -> None:
    with pytest.raises(UntraceableModelError, match=r"'mean'.*share memory|share memory.*'mean'"):
        trace(Running(how), (X,))


def test_a_view_of_a_buffer_that_nobody_writes_is_a_copy() -> None:
    model = Running("never").eval()
    assert torch.allclose(narrow(model, trace(model, (X,)), {})(X), model(X), atol=1e-6)


def test_without_values_memory_is_compared_as_well() -> None:
    with torch.device("meta"):
        separate, together = Two(as_other_columns), Two(as_transposed_parameter)
    assert trace(separate, (X,)).groups
    with pytest.raises(UntraceableModelError, match="share memory"):
        trace(together, (X,))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.o = kind(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.layer(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_flattened_weights_are_separate(kind: type[nn.RNNBase]) -> None:
    model = Recurrent(kind).eval()
    layer, x = model.layer, torch.randn(3, 5, 8)
    flat = torch.cat([p.detach().flatten() for p in layer.parameters()])
    offset = 0
    for p in layer.parameters():
        p.data = flat[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    assert torch.allclose(narrow(model, trace(model, (x,)), {})(x), model(x), atol=1e-6)


# -- one module, or one buffer, under two names ------------------------------------------------------------------------


class OneNormTwice(nn.Module):
    """A BatchNorm that is an attribute, and a part of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a = nn.BatchNorm1d(16), nn.Linear(8, 16)
        self.layers = nn.Sequential(self.a, self.norm, nn.ReLU())
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.layers(x))


class SharedStatistics(nn.Module):
    """Two BatchNorms that keep the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o, self.one, self.two = (
            nn.Linear(8, 16),
            nn.Linear(16, 4),
            nn.BatchNorm1d(16),
            nn.BatchNorm1d(16),
        )
        self.two.running_mean, self.two.running_var = self.one.running_mean, self.one.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.one(self.a(x))) + self.two(self.a(x)))


class Assigned(OneNormTwice):
    """A module under two names that assigns its buffer anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Mean()
        self.layers[1] = self.norm


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.one_in_ci
@pytest.mark.parametrize("kind", [OneNormTwice, SharedStatistics, Assigned])
@pytest.mark.parametrize("converted", ["as it is", "copied", "converted"])
def test_a_buffer_of_two_names_is_one_in_the_sub_model(kind: type[nn.Module], converted: str) -> None:
    model, x = kind().train(), X * 3 + 1
    width_map = trace(model, (x,))
    assert width_map.groups
    sub = narrow(model, width_map, {})
    start = model.state_dict()
    if converted != "as it is":
        sub = deepcopy(sub) if converted == "copied" else sub.double().float()
    start = {name: tensor.clone() for name, tensor in start.items()}
    for _ in range(3):
        model(x), sub(x)
    fused = fuse(start, width_map, [({}, sub.state_dict(), 1.0)])
    for name, tensor in model.state_dict().items():
        assert torch.allclose(fused[name], tensor, atol=1e-6), name
        assert torch.allclose(sub.state_dict()[name], tensor, atol=1e-6), name


def test_a_buffer_of_two_names_is_one_in_both_halves() -> None:
    model = OneNormTwice().train()
    parts = cut(model, trace(model, (X,)), "layers")
    model(X), parts.server(*parts.client(X))
    for name, tensor in parts.join().items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-6), name
