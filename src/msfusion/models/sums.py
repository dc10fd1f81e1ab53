"""Several models of one shape as one model: their logits added, or their probabilities averaged.

Each is an `nn.Module` as any other: it is called as one of its parts is, and returns logits alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msfusion.objectives import logits_of


def label(block: int) -> str:
    """The name of one of the models, in front of its tensors' own names."""
    return f"block{block}"


class Together(nn.Module):
    """Models of one shape, called with the same inputs; their tensors are `block0.<name>`, `block1.<name>`, ..."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(label(number), part)

    def each(self, *args: Any, **kwargs: Any) -> list[Float[Tensor, "examples ..."]]:
        """The logits of every part."""
        return [logits_of(part(*args, **kwargs)) for part in self.children()]


class SumOfBlocks(Together):
    """The large model of `methods.blocks`."""

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "examples ..."]:
        """The sum of the blocks' logits, in the order of the blocks."""
        return self.joined(self.each(*args, **kwargs))

    @staticmethod
    def joined(each: Sequence[Tensor]) -> Tensor:
        """The answer of the whole, from those of its parts."""
        first, *others = each
        for logits in others:
            first = first + logits
        return first


class MeanOfModels(Together):
    """An ensemble."""

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "examples ..."]:
        """The logarithm of the mean of the models' probabilities: logits whose softmax is that mean."""
        return self.joined(self.each(*args, **kwargs))

    @staticmethod
    def joined(each: Sequence[Tensor]) -> Tensor:
        """The answer of the whole, from those of its parts."""
        likely = torch.stack([logits.log_softmax(-1) for logits in each])
        return likely.logsumexp(0) - math.log(len(likely))
