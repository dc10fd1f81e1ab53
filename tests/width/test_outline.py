"""A model's outline: equal for equal models in any process, another for whatever changes the numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfusion.width.trace import outline_of, trace

INPUTS = (torch.zeros(2, 6),)


class Network(nn.Module):
    def __init__(
        self,
        activation: str = "relu",
        factor: float = 1.0,
        shift: float = 1.0,
        drop: float = 0.5,
        order: int = 1,
        trained: bool = True,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 3).requires_grad_(trained)
        self.activation, self.factor, self.drop, self.order = activation, factor, drop, order
        self.register_buffer("shift", torch.full((width,), shift), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = self.first(numbers)
        other = getattr(torch, self.activation)(hidden)
        hidden = hidden - other * 0.5 if self.order > 0 else other - hidden * 0.5
        return self.last(torch.dropout(hidden * self.factor + self.shift, self.drop, self.training))


def outline(**changes: Any) -> str:
    return outline_of(Network(**changes), INPUTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "tanh"},
        {"factor": 2.0},
        {"shift": 2.0},
        {"drop": 0.25},
        {"order": -1},
        {"trained": False},
        {"width": 9},
    ],
    ids=str,
)
def test_another_model_has_another_outline(changes: dict[str, Any]) -> None:
    assert outline(**changes) != outline()


def test_weights_do_not_count_and_tracing_gives_the_same() -> None:
    """Two models with weights of their own."""
    assert trace(Network(), INPUTS).outline() == outline()


@pytest.mark.release
def test_another_process_finds_the_same() -> None:
    code = "import test_outline, sys; sys.stdout.write(test_outline.outline())"
    paths = ":".join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {"PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told.stdout == outline(), told.stderr
