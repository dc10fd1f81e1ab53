"""Norms and distances along a width: metric learning, normalised weights; and slices of one parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, features, sequences


class Prototypes(nn.Module):
    """How far the features of an example are from those of each class, in several ways."""

    def __init__(self, distance: str) -> None:
        super().__init__()
        self.distance = distance
        self.one, self.two = nn.Linear(12, 26), nn.Linear(26, 20)
        self.prototypes = nn.Parameter(torch.randn(10, 20))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x)))
        if self.distance in ("1", "2"):
            return torch.cdist(x, self.prototypes, p=float(self.distance))
        x, prototypes = x.unsqueeze(1), self.prototypes.unsqueeze(0)
        if self.distance == "pairwise":
            return F.pairwise_distance(x, prototypes)
        if self.distance == "cosine":
            return F.cosine_similarity(x, prototypes, dim=-1)
        if self.distance == "normalised":
            return (F.normalize(x, dim=-1) * F.normalize(prototypes, dim=-1)).sum(-1)
        return torch.linalg.vector_norm(x - prototypes, ord=3, dim=-1)


class WithinABatch(nn.Module):
    """How far the examples are from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 26), nn.Linear(26, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x)))
        return torch.cdist(x, x).mean(1, keepdim=True) + x.norm(dim=-1, keepdim=True)


class DoRA(nn.Module):
    """A weight of fixed direction and trained magnitude, its columns' norm taken with the low-rank change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base, self.head = nn.Linear(12, 26), nn.Linear(26, 20), nn.Linear(20, 10)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(4, 26)), nn.Parameter(torch.randn(20, 4))
        self.magnitude = nn.Parameter(torch.rand(20) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        low = self.lora_b @ self.lora_a
        norm = torch.linalg.norm(self.base.weight + 0.5 * low, dim=1)
        scale = (self.magnitude / norm.detach()).view(1, -1)
        x = scale * (F.linear(x, self.base.weight) + 0.5 * F.linear(x, low)) + self.base.bias
        return self.head(torch.tanh(x))


class ProjectedLSTM(nn.Module):
    """An LSTM whose hidden state is a projection of its cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(9, 16, num_layers=2, bidirectional=True, batch_first=True, proj_size=10)
        self.head = nn.Linear(20, 7)
        self.lstm(torch.zeros(1, 1, 9))  # torch warns once that it has no fast kernel for projections

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class TwoSlices(nn.Module):
    """Two stretches of one parameter weigh the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.weights = nn.Parameter(torch.randn(12, 32)), nn.Parameter(torch.randn(4, 16))
        self.flat, self.inner = nn.Parameter(torch.randn(2 * 32)), nn.Linear(32, 32)
        self.heads, self.features = nn.Linear(4, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        whole = x @ self.mix
        heads = whole.view(-1, 4, 8)
        left, right = self.weights[:, :8], self.weights[:, 8:]
        by_heads = torch.tanh((heads * left).sum(-1)) * torch.tanh((heads * right).sum(-1))
        inner = self.inner(whole)
        by_features = torch.tanh(inner * self.flat[:32]) * torch.tanh(inner * self.flat[-32:])
        return self.heads(by_heads) + self.features(by_features)


def _prototypes(distance: str, *, ablates: bool = True) -> Entry:
    make = lambda: Prototypes(distance)  # noqa: E731
    return Entry(f"prototypes_{distance}", make, features(12), 0.99, whole=(10, 12), ablates=ablates)


DISTANCE = (
    _prototypes("1", ablates=False),
    _prototypes("2", ablates=False),
    _prototypes("pairwise", ablates=False),
    _prototypes("cosine", ablates=False),
    _prototypes("normalised", ablates=False),
    _prototypes("cubic", ablates=False),
    Entry("within_a_batch", WithinABatch, features(12), 0.99, whole=(12,)),
    Entry("dora", DoRA, features(12), 0.99, whole=(10, 12)),
    Entry("projected_lstm", ProjectedLSTM, sequences(9), 0.99, sequence=True, whole=(7, 9, 20)),
    Entry("two_slices", TwoSlices, features(12), 0.98, whole=(10, 12)),
)
