"""What the catalogue knows of an architecture: how to build it, what to call it with, and how its calls may vary."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional or keyword arguments of a model."""

MakeInputs = Callable[[int, int], Inputs]
"""Inputs for a number of examples and a length, which a model without a time axis ignores."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    `kind` is the part of the catalogue, `style` what the architecture stands for. `length` is the one that it is traced
    with and `lengths` are others that it is called with; a model without a time axis has none. `answer` names
    what is asked for where a model returns hidden states beside it, as the encoder-decoders of `transformers` do.
    """

    name: str
    kind: str
    style: str
    model: Callable[[], nn.Module]
    inputs: MakeInputs
    length: int = 8
    lengths: tuple[int, ...] = ()
    answer: str | int | tuple[str, ...] | None = None

    def build(self) -> nn.Module:
        """The model, with the same weights at each call; parameters that start with one value get some noise."""
        seed_everything(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say about these settings is not about us
            model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.numel() > 1 and not parameter.is_meta:
                    first = parameter.flatten()[0]
                    if bool((parameter == first).all()):
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def example(self, seed: int, examples: int = 2, length: int | None = None) -> Inputs:
        """Inputs that depend on the seed alone."""
        seed_everything(seed)
        return self.inputs(examples, self.length if length is None else length)


def seed_everything(seed: int) -> None:
    """Start the random numbers of torch, NumPy and Python anew."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
