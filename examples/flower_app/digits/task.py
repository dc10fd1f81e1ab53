"""The network, the data and the training, as any app has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import msfusion  # msfusion
from msfusion.data.builtin import read_digits

TEST = 360


def network() -> nn.Module:
    """Any module that torch.export can follow."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(64, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4, 10),
    )  # fmt: skip


WIDTH_MAP = msfusion.trace(network(), (torch.zeros(2, 1, 8, 8),))  # msfusion


def own_data(node: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in 0..1 and their labels, of one of so many nodes."""
    images, labels = read_digits()
    return images[TEST + node :: nodes], labels[TEST + node :: nodes]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """The app's own training loop; the mean loss."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.005), []
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(16):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On images that no node has."""
    images, labels = read_digits()
    return float((model(images[:TEST]).argmax(1) == labels[:TEST]).double().mean())
