"""Small tensors side by side in one flat tensor, so that one operation works on all of them.

A network has many small tensors: norms, biases, narrow convolutions. Averaging them one by one takes a few
microseconds per call and dozens of calls each, longer than the arithmetic. The readable reference is to do
without: with `limit` 0 there are no bundles, and the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from msfusion.width.groups import State
from msfusion.width.slices import Cut, Selection

SMALL = 65_536
"""Tensors of more entries than this stand alone: they gain nothing, and a bundle keeps 8 bytes per entry."""


@dataclass(frozen=True)
class Bundle:
    """Where the entries of some tensors, of one type and device, stand in a flat one; by their names."""

    positions: Mapping[str, Int[Tensor, "..."]]

    @property
    def name(self) -> str:
        """What the bundle is called: like its first tensor, so that names stay unique."""
        return next(iter(self.positions))

    @property
    def entries(self) -> int:
        """The length of the flat tensor."""
        return sum(positions.numel() for positions in self.positions.values())

    def joined(self, tensors: State) -> Shaped[Tensor, " entries"]:
        """The flat tensor of full tensors, or of a sub-model's."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.positions])

    def cut(self, cuts: Mapping[str, Cut]) -> Cut:
        """Where the flat tensor of a sub-model stands in that of the full model."""
        if all(cuts[name].whole for name in self.positions):
            everything = Selection(self.entries, self.entries, ((0, self.entries),))
            return Cut((self.entries,), ((0, everything),))
        parts, cursor = [], 0
        within: dict[int, Tensor] = {}  # many tensors, such as a norm's, share one cut
        for name, places in self.positions.items():
            cut = cuts[name]
            if id(cut) not in within:
                within[id(cut)] = cut.take(places - cursor).reshape(-1)
            parts.append(within[id(cut)] + cursor)
            cursor += places.numel()
        held = torch.cat(parts)
        return Cut((self.entries,), ((0, Selection(self.entries, len(held), None, held)),))

    def parted(self, flat: Shaped[Tensor, " entries"]) -> dict[str, Tensor]:
        """The full tensors that a flat one consists of, as copies."""
        sizes = [positions.numel() for positions in self.positions.values()]
        parts = zip(self.positions.items(), torch.split(flat, sizes), strict=True)
        return {name: part.reshape(positions.shape).clone() for (name, positions), part in parts}


def bundles_of(tensors: State, limit: int = SMALL) -> list[Bundle]:
    """Bundles of the tensors with at most `limit` entries, alike in type and device, two at least in each."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        if 0 < tensor.numel() <= limit:
            alike.setdefault((tensor.dtype, tensor.device), []).append(name)
    return [_bundle(tensors, names) for names in alike.values() if len(names) > 1]


def _bundle(tensors: State, names: Sequence[str]) -> Bundle:
    positions, cursor = {}, 0
    for name in names:
        shape = tensors[name].shape
        positions[name] = torch.arange(cursor, cursor + shape.numel()).reshape(shape)
        cursor += shape.numel()
    return Bundle(positions)
