"""What the zoo knows of a model: how to build it, what to call it with, what its width map must be like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...] | dict[str, Tensor]
"""Positional or keyword arguments of a model."""

MakeInputs = Callable[[int, int], Inputs]
"""Inputs for a batch size and a length (which a model without a time axis ignores)."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `reach` is the smallest share of parameters that must lie on a narrowed axis; `sequence` says that axis
    1 of the inputs is time and may have any length. `heads` are (units, thickness) pairs of attention: each
    must be found in some group. `whole` are sizes of inputs, outputs, time or head_dim: no group has so many
    units. `ablates` says that a unit which is not held acts like one whose outgoing weights are zero (false
    where a norm or a product of two activations runs over the width). `invariant` lists the
    "tensor:axis:offset" places whose absence from the map nobody can see in the output; `reasons` are words
    that the map must say about what stays frozen.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: MakeInputs
    reach: float
    sequence: bool = False
    heads: tuple[tuple[int, int], ...] = ()
    whole: tuple[int, ...] = ()
    ablates: bool = False
    invariant: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The model with the same initial weights every time, those that start at 0 or 1 moved off them."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say about these settings is not about us
            model = self.model()
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in state.items():
            if (
                tensor.is_floating_point()
                and tensor.numel() > 1
                and bool((tensor == tensor.flatten()[0]).all())
            ):
                noise = 0.1 * torch.randn_like(tensor)
                tensor.data += noise.abs() if name.endswith("running_var") else noise
        return model


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def images(channels: int, size: int) -> MakeInputs:
    """Square images: [batch, channels, size, size]."""
    return lambda batch, time: (_noise(batch, channels, size, size),)


def features(*sizes: int) -> MakeInputs:
    """One flat vector per example and argument: [batch, size]."""
    return lambda batch, time: tuple(_noise(batch, size) for size in sizes)


def sequences(*sizes: int) -> MakeInputs:
    """One vector per position, for each argument: [batch, time, size]."""
    return lambda batch, time: tuple(_noise(batch, time, size) for size in sizes)


def tokens(vocabulary: int, arguments: int = 1) -> MakeInputs:
    """Token numbers: [batch, time], the further arguments one token longer each."""
    return lambda batch, time: tuple(_integers(vocabulary, batch, time + more) for more in range(arguments))


def named_tokens(vocabulary: int, *, mask: bool = True) -> MakeInputs:
    """Keyword arguments as the transformers library names them; the mask hides one token of one example."""

    def make(batch: int, time: int) -> dict[str, Tensor]:
        inputs = {"input_ids": _integers(vocabulary, batch, time)}
        if mask:
            inputs["attention_mask"] = torch.ones(batch, time, dtype=torch.long)
            inputs["attention_mask"][0, -1] = 0
        return inputs

    return make


def named_images(channels: int, size: int) -> MakeInputs:
    """Keyword arguments of the transformers library's vision models."""
    return lambda batch, time: {"pixel_values": _noise(batch, channels, size, size)}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
