"""Targets that are numbers, brought to mean 0 and variance 1 for the loss, and a model's outputs brought back.

A price of 300,000 is out of reach of a network whose outputs begin near 0: it would learn nothing but one large number.
So the model learns (target - centre) / spread, and what it says stands for output * spread + centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SPREAD_OF_ONE = 1.0
"""Of numbers that are all the same, which then are 0, in whatever unit: others stay as far from them as they were."""


@dataclass(frozen=True)
class TargetScale:
    """The centre and the spread of each number that is predicted, in the units of the targets."""

    centre: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def fitted(cls, targets: Float[Tensor, "examples numbers"]) -> TargetScale:
        """To the mean and the standard deviation of these targets.

        The sums are exact, so that every machine finds the same numbers to the last bit.
        """
        fitted = [_mean_and_deviation(column.tolist()) for column in targets.double().unbind(1)]
        return cls(tuple(mean for mean, _ in fitted), tuple(spread for _, spread in fitted))

    def scaled(self, targets: Float[Tensor, "... numbers"]) -> Float[Tensor, "... numbers"]:
        """What a model learns: targets without units."""
        centre, spread = self.like(targets)
        return (targets - centre) / spread

    def in_units(self, outputs: Float[Tensor, "... numbers"]) -> Float[Tensor, "... numbers"]:
        """What a model's outputs stand for, in the units of the targets."""
        centre, spread = self.like(outputs)
        return outputs * spread + centre

    def like(self, tensor: Tensor) -> tuple[Float[Tensor, " numbers"], Float[Tensor, " numbers"]]:
        """Centre and spread as float32, on the tensor's device."""
        centre, spread = (
            torch.tensor(each, dtype=torch.float32, device=tensor.device)
            for each in (self.centre, self.spread)
        )
        return centre, spread


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    if min(values) == max(values):  # whose mean may be rounded
        return values[0], SPREAD_OF_ONE
    mean = math.fsum(values) / len(values)
    variance = math.fsum((each - mean) ** 2 for each in values) / len(values)
    return mean, math.sqrt(variance)
