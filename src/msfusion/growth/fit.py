"""Training a growth operator through the model that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from msfusion.batch import Batch
from msfusion.errors import DataError, GrowthError, TrainingError
from msfusion.growth.ligo import LiGO
from msfusion.objectives import cross_entropy
from msfusion.width.groups import State

if True:  # placed here so that the objective's type stands beside the others
    from collections.abc import Callable

    from torch import Tensor

    Objective = Callable[[nn.Module, Batch], Tensor]


class GrownModel(nn.Module):
    """A target model whose weights are made by an operator at every call. Its parameters are the operator's alone.

    Neither the source's tensors nor the target's own train.
    """

    def __init__(self, operator: LiGO, source: State, target: nn.Module) -> None:
        super().__init__()
        self.operator = operator
        operator.plan.check(source)
        self._source = {name: tensor.detach() for name, tensor in source.items()}
        self._target = [target]  # in a list, so that its parameters are not this module's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the grown model returns."""
        (target,) = self._target
        return functional_call(target, self.operator.materialise(self._source), args, kwargs)

    def train(self, mode: bool = True) -> GrownModel:
        """Training or evaluation, of the target too (dropout)."""
        for target in getattr(self, "_target", []):
            target.train(mode)
        super().train(mode)
        return self
