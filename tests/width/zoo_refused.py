"""Models that no width map may be made of: each does something that no graph can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zoo_entry import Entry, features


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 10)


class BranchesOnValues(_Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if x.sum() > 0:
            x = torch.relu(x)
        return self.two(x)


class ReadsItem(_Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        scale = float(hidden.abs().max().item())
        return self.two(hidden / (1.0 + scale)) if scale < 1e9 else self.two(hidden)


class ThroughNumpy(_Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        return self.two(torch.from_numpy(hidden.detach().numpy().copy()))


class LoopsOnValues(_Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        while x.norm() > 1:
            x = x / 2
        return self.two(x)


@dataclass
class _Opaque:
    """An output type that nobody knows how to take apart."""

    logits: Tensor


class OddOutput(_Base):
    def forward(self, x: Tensor) -> _Opaque:
        return _Opaque(self.two(torch.relu(self.one(x))))


class KeepsState(_Base):
    """Remembers activations on the module from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.memory.append(self.one(x))
        if len(self.memory) > 1:
            return self.two(self.memory[-2] + self.memory[-1])
        return self.two(self.memory[-1])


class Raises(_Base):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this model is broken")


REFUSED = tuple(
    Entry(model.__name__, model, features(12), 0.0)
    for model in (
        BranchesOnValues,
        ReadsItem,
        ThroughNumpy,
        LoopsOnValues,
        OddOutput,
        KeepsState,
        Raises,
    )
)
