"""A small federation, which tests change as they need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import msfusion

TRAINING = msfusion.Training("adamw", learning_rate=0.01, batch_size=8)


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def federation(**options: Any) -> msfusion.Federation:
    given = {
        "method": msfusion.MSfusion(ratio=0.5, start="fresh"),
        "training": TRAINING,
        "test": examples(40, 9),
    }
    return msfusion.Federation(network(), [examples(20, seed) for seed in range(3)], **{**given, **options})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Falling:
    """A metric that gets worse from evaluation to evaluation."""

    def __init__(self, start: float = 0.0) -> None:
        self.value = start

    def reset(self) -> None:
        self.value -= 1

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        targets.zero_()  # what it is given is its own

    def compute(self) -> float:
        return self.value
