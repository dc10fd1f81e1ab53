"""Examples in memory: what a model is called with, and what it should answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100
"""The target that no loss and no metric counts (padding)."""


@dataclass(frozen=True)
class Batch:
    """Some examples, stacked: a mini-batch, a participant's whole data, or a test set.

    `inputs` are the model's positional (tuple) or keyword (dict) arguments, each with the examples on axis 0.
    `targets` has one class label per example (shape [examples]) or, for language modelling, one token per position
    (shape [examples, time]); IGNORED marks positions that do not count.
    """

    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    targets: Int[Tensor, "examples ..."]

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    def take(self, indices: Int[Tensor, " chosen"] | slice) -> Batch:
        """The examples at the given indices, in that order."""
        if isinstance(self.inputs, dict):
            return Batch(
                {name: tensor[indices] for name, tensor in self.inputs.items()}, self.targets[indices]
            )
        return Batch(tuple(tensor[indices] for tensor in self.inputs), self.targets[indices])

    def split(self, size: int) -> Iterator[Batch]:
        """The examples in order, in mini-batches of at most `size`."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """The examples in random order, in mini-batches of at most `size`."""
        order = torch.randperm(len(self), generator=generator)
        for start in range(0, len(self), size):
            yield self.take(order[start : start + size])

    def to(self, device: torch.device) -> Batch:
        """The same examples on a device."""
        if isinstance(self.inputs, dict):
            inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
            return Batch(inputs, self.targets.to(device))
        return Batch(tuple(tensor.to(device) for tensor in self.inputs), self.targets.to(device))

    def call(self, model: Callable[..., Any]) -> Any:
        """What the model returns for these inputs."""
        return model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)
