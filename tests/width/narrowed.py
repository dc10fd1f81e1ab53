"""A small model, and whether it trains as its narrowing to the full width does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


class Net(nn.Module):
    """Two layers; what is between them differs from test to test."""

    def __init__(self, features: int = 8, hidden: int = 24, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = (
            nn.Linear(features, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def at_full_width(model: nn.Module, inputs: Any) -> nn.Module:
    return narrow(model, trace(model, inputs), {})


def same_training(model: nn.Module, inputs: tuple[Tensor, ...], steps: int = 3) -> None:
    """The sub-model at full width goes through the same steps of training as the model, buffers included."""
    model.train()
    sub = at_full_width(model, inputs).train()
    for module in (model, sub):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            module(*inputs).square().mean().backward()
            optimizer.step()
    ours = sub.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(ours[name].detach(), tensor, atol=1e-6), name
        assert ours[name].requires_grad is False or isinstance(ours[name], nn.Parameter)
