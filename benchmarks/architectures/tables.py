"""Networks for tables, users and items, written by hand as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture, Inputs, MakeInputs

COLUMNS = (5, 7, 9)
"""How many values each of the categories has."""


def table(examples: int, length: int) -> Inputs:
    """Ten numbers."""
    return (torch.randn(examples, 10),)


def mixed(examples: int, length: int) -> Inputs:
    """Three categories and four numbers, by keyword."""
    categories = torch.stack([torch.randint(0, n, (examples,)) for n in COLUMNS], 1)
    return {"categories": categories, "numbers": torch.randn(examples, 4)}


def users(examples: int, length: int) -> Inputs:
    """Users and items."""
    return (torch.randint(0, 20, (examples,)), torch.randint(0, 30, (examples,)))


def bags(examples: int, length: int) -> Inputs:
    """Numbers, indices of several bags, and where each bag starts."""
    return {
        "dense": torch.randn(examples, 4),
        "indices": torch.randint(0, 20, (examples, 3)),
    }


class WideAndDeep(nn.Module):
    """A linear part beside a deep one."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 8) for n in COLUMNS)
        self.wide = nn.Linear(sum(COLUMNS) + 4, 1)
        self.deep = nn.Sequential(
            nn.Linear(28, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        ones = [F.one_hot(categories[:, i], n).to(numbers.dtype) for i, n in enumerate(COLUMNS)]
        wide = self.wide(torch.cat([*ones, numbers], 1))
        deep = torch.cat([e(categories[:, i]) for i, e in enumerate(self.embeddings)] + [numbers], 1)
        return torch.sigmoid(wide + self.deep(deep)).squeeze(1)


class FactorizationMachine(nn.Module):
    """Second-order interactions: half of the square of the sum less the sum of squares (DeepFM)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, 5, 12]), persistent=False)
        self.offsets: Tensor
        self.first, self.factors, self.bias = (
            nn.Embedding(21, 1),
            nn.Embedding(21, 16),
            nn.Parameter(torch.zeros(1)),
        )
        self.deep = nn.Sequential(nn.Linear(52, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 1))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        x = categories + self.offsets
        v = self.factors(x)
        second = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1, keepdim=True)
        return self.first(x).sum(1) + second + self.deep(torch.cat([v.flatten(1), numbers], 1)) + self.bias


class DLRM(nn.Module):
    """Bags of items and dense features, and all their dot products."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 16, mode="sum") for _ in range(3))
        self.top = nn.Sequential(nn.Linear(22, 24), nn.ReLU(), nn.Linear(24, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, indices: Tensor) -> Tensor:
        x = self.bottom(dense)
        every = torch.stack([x, *(bag(indices[:, i : i + 1]) for i, bag in enumerate(self.bags))], 1)
        products = torch.bmm(every, every.transpose(1, 2))
        row, column = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, products[:, row, column]], 1))


class NeuralCF(nn.Module):
    """Neural collaborative filtering: a product of embeddings beside an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 16), nn.Embedding(30, 16)
        self.user_mlp, self.item_mlp = nn.Embedding(20, 12), nn.Embedding(30, 12)
        self.mlp, self.head = (
            nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()),
            nn.Linear(32, 1),
        )

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        deep = self.mlp(torch.cat([self.user_mlp(users), self.item_mlp(items)], -1))
        return self.head(torch.cat([self.user(users) * self.item(items), deep], -1)).squeeze(-1)


class TwoTowers(nn.Module):
    """Users and items meet in a scaled product over the mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 12))
        self.item = nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 12))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        one, two = F.normalize(self.user(users), dim=-1), F.normalize(self.item(items), dim=-1)
        return self.scale.exp() * one @ two.t()


class MatrixFactorization(nn.Module):
    """Biases and a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 24), nn.Embedding(30, 24)
        self.user_bias, self.item_bias = nn.Embedding(20, 1), nn.Embedding(30, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        product = (self.user(users) * self.item(items)).sum(1)
        return product + self.user_bias(users).squeeze() + self.item_bias(items).squeeze()


class TabTransformer(nn.Module):
    """Attention over categories."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 16) for n in COLUMNS)
        self.column = nn.Parameter(0.1 * torch.randn(3, 16))
        self.layer = nn.TransformerEncoderLayer(
            16, 4, 32, batch_first=True, norm_first=True, activation="gelu"
        )
        self.norm, self.head = nn.LayerNorm(4), nn.Sequential(nn.Linear(52, 24), nn.SELU(), nn.Linear(24, 2))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        x = torch.stack([e(categories[:, i]) for i, e in enumerate(self.embeddings)], 1) + self.column
        return self.head(torch.cat([self.layer(x).flatten(1), self.norm(numbers)], 1))


class TabResNet(nn.Module):
    """Residual blocks with BatchNorm on numbers, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.temperature = (
            nn.Linear(10, 24),
            nn.Linear(24, 3),
            nn.Parameter(torch.ones(())),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(24), nn.Linear(24, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 24)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x) / self.temperature


def _table(
    name: str,
    style: str,
    model: Callable[[], nn.Module],
    inputs: MakeInputs = table,
    lengths: tuple[int, ...] = (),
) -> Architecture:
    return Architecture(name, "hand-written", style, model, inputs, 8, lengths)


TABLES = [
    _table("wide-and-deep", "one-hot beside embeddings, keywords", WideAndDeep, mixed),
    _table("factorization-machine", "square of the sum less the sum of squares (DeepFM)", FactorizationMachine, mixed),
    _table("dlrm", "embedding bags, dot products by index", DLRM, bags),
    _table("neural-cf", "product of embeddings beside an MLP", NeuralCF, users),
    _table("two-towers", "products over the mini-batch, a learned temperature", TwoTowers, users),
    _table("matrix-factorization", "dot product, squeeze", MatrixFactorization, users),
    _table("tab-transformer", "attention over columns", TabTransformer, mixed),
    _table("tab-resnet", "residual BatchNorm blocks, a parameter of no axes", TabResNet),
]  # fmt: skip
