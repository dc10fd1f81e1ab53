"""Examples in memory: what a model is called with, and what it should answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from msfusion.offsets import Offset

IGNORED = -100
"""The target that no loss and no metric counts (padding)."""


@dataclass(frozen=True)
class Batch:
    """Some examples, stacked: a mini-batch, a participant's whole data, or a test set.

    `inputs` are the model's positional (tuple) or keyword (dict) arguments, each with the examples on axis 0.
    `targets` has one class label per example (shape [examples]) or, for language modelling, one token per position
    (shape [examples, time]); IGNORED marks positions that do not count. For a loss of one's own (`Scoring.loss`) it is
    whatever that takes, with the examples on axis 0. `offset` (shape [examples, *time, classes]),
    where there is one, is added to the model's logits wherever they are scored: what other models say of the same
    examples.
    """

    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    targets: Shaped[Tensor, "examples ..."]
    offset: Offset | None = None

    def __post_init__(self) -> None:
        """Raises TypeError where inputs are no tuple or dict of tensors, or targets are no tensor."""
        if not isinstance(self.inputs, tuple | list | dict):
            raise TypeError(
                f"the inputs of a Batch must be a tuple of tensors or a dict, not {type(self.inputs).__name__}: write "
                "Batch((x,), y)"
            )
        named = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs)
        for name, value in [
            *((f"input {name!r}", value) for name, value in named),
            ("targets", self.targets),
        ]:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} of a Batch must be a torch.Tensor, not {type(value).__name__}")

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    def take(self, indices: Int[Tensor, " chosen"] | slice) -> Batch:
        """The examples at the given indices, in that order."""
        return self._each(lambda tensor: tensor[indices])

    def repeated(self, count: int) -> Batch:
        """The first example so many times, in no more memory: it stands in for data that is on another machine."""
        return self._each(lambda tensor: tensor[:1].expand(count, *(-1,) * (tensor.ndim - 1)))

    @property
    def is_repeated(self) -> bool:
        """Whether it is one example many times, as `repeated` makes it."""
        return len(self) > 1 and self.targets.stride(0) == 0

    @property
    def distinct(self) -> Batch:
        """The same examples, but one that is repeated only once: to be looked at."""
        return self.take(slice(0, 1)) if self.is_repeated else self

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
        return self._each(lambda tensor: tensor.to(device))

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What a model is called with: positional arguments, and those with names."""
        return ((), self.inputs) if isinstance(self.inputs, dict) else (tuple(self.inputs), {})

    def call(self, model: Callable[..., Any]) -> Any:
        """What the model returns for these inputs."""
        args, kwargs = self.arguments
        return model(*args, **kwargs)

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        """The batch with all its tensors, and the offset, changed in the same way."""
        offset = None if self.offset is None else change(self.offset)
        if isinstance(self.inputs, dict):
            inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
            return Batch(inputs, change(self.targets), offset)
        return Batch(tuple(change(tensor) for tensor in self.inputs), change(self.targets), offset)


def joined(batches: Sequence[Batch]) -> Batch | None:
    """The examples of several batches without offsets, one after the other; None of none, or of different shapes."""
    forms = {
        (name, value.dtype, value.shape[1:])
        for batch in batches
        for name, value in (*_named(batch.inputs), ("targets", batch.targets))
    }
    if not batches or len(forms) != 1 + len(batches[0].inputs):
        return None
    whole = {
        name: torch.cat([dict(_named(batch.inputs))[name] for batch in batches])
        for name, _ in _named(batches[0].inputs)
    }
    targets = torch.cat([batch.targets for batch in batches])
    return Batch(whole if isinstance(batches[0].inputs, dict) else tuple(whole.values()), targets)


def _named(inputs: tuple[Tensor, ...] | dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    named = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    return [(str(name), value) for name, value in named]
