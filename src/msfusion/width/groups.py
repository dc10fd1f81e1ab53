"""What a width map is: groups of units, and every place in the state dict where the units of a group stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from msfusion.width.graph import Program

Window = Mapping[str, Int[Tensor, " _"]]
"""Which units of each width group a participant holds: group name -> unit indices, in any order, none twice.

A group that a window does not name is held whole.
"""

State = Mapping[str, Tensor]
"""Plain tensors by their name in a model's `state_dict()`."""


@dataclass(frozen=True, order=True)
class Place:
    """One stretch of one axis of one tensor where all units of a group stand, unit after unit.

    The stretch starts at `offset` and consists of `repeat` blocks; each block holds the group's K units in order, and
    each unit is `thickness` consecutive rows: an attention head is one unit of head_dim rows, the four gates of an
    LSTM are four blocks. Row j of unit u in block b is at `offset + (b * K + u) * thickness + j`.
    """

    tensor: str
    axis: int
    offset: int
    units: int
    thickness: int = 1
    repeat: int = 1

    @property
    def length(self) -> int:
        """How many positions of the axis the stretch takes up."""
        return self.units * self.thickness * self.repeat

    def positions(self, units: Int[Tensor, " held"]) -> Int[Tensor, " positions"]:
        """The positions on the axis that the given units take up, block after block, in the order of `units`."""
        rows = units[:, None] * self.thickness + torch.arange(self.thickness)
        blocks = torch.arange(self.repeat) * (self.units * self.thickness)
        return (self.offset + blocks[:, None, None] + rows).reshape(-1)


@dataclass(frozen=True)
class Group:
    """A width group: `units` interchangeable units (channels, hidden features, attention heads) and their places."""

    name: str
    units: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Frozen:
    """One axis, or part of one, that is never narrowed, and why."""

    tensor: str
    axis: int
    offset: int
    length: int
    reason: str


@dataclass(frozen=True)
class WidthMap:
    """The width groups of a model. Made by `trace`; `prove` shows that it is right.

    `shapes` has the shape of every tensor of the model's `state_dict()` in its order; `parameters` are the names of
    those that are trained (a tied tensor under each of its names); `aliases` gives for each name the first name of the
    same tensor. `contracting` lists the (tensor, axis) pairs over which some operator sums. `constants` are tensors
    that the model reads but does not keep in its state dict (non-persistent buffers); groups may stand in them too, and
    `narrow` cuts them. `unknown` names the operators that no rule could follow (what they touch is frozen) and where
    they stand. `program` is the traced graph.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    frozen: tuple[Frozen, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    contracting: frozenset[tuple[str, int]] = frozenset()
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> Group:
        """The group of that name; KeyError where there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def places(self) -> Mapping[str, tuple[tuple[Group, Place], ...]]:
        """For each tensor that is narrowed: its groups and places, by axis and offset."""
        found: dict[str, list[tuple[Group, Place]]] = {}
        for group in self.groups:
            for place in group.places:
                found.setdefault(place.tensor, []).append((group, place))
        return {
            name: tuple(sorted(entries, key=lambda e: (e[1].axis, e[1].offset)))
            for name, entries in found.items()
        }

    @cached_property
    def meetings(self) -> frozenset[frozenset[str]]:
        """Which groups meet in one tensor on different axes: pairs of names; one name alone meets itself."""
        pairs = set()
        for entries in self.places.values():
            for group, place in entries:
                for other, elsewhere in entries:
                    if place.axis != elsewhere.axis:
                        pairs.add(frozenset((group.name, other.name)))
        return frozenset(pairs)

    @property
    def checkpointing(self) -> tuple[str, ...]:
        """The modules whose activations the model computes twice to save memory; sub-models keep theirs instead."""
        return () if self.program is None else tuple(self.program.checkpointing)

    def outline(self) -> str:
        """What the model computes, as text: the same whatever its weights. It must have been traced."""
        assert self.program is not None
        return self.program.outline()

    def full_window(self) -> dict[str, Tensor]:
        """The window that holds every unit of every group, in order."""
        return {group.name: torch.arange(group.units) for group in self.groups}

    def axis_positions(self, tensor: str, window: Window) -> dict[int, Int[Tensor, " positions"]]:
        """For each narrowed axis of a tensor, the positions that a window holds, in the sub-model's order.

        The sub-model's axis is the original's with each place's units replaced by the window's, in the window's order;
        what no group owns is kept. Axes that the window does not narrow at all are still given if a group stands there.
        """
        positions: dict[int, list[Tensor]] = {}
        cursor: dict[int, int] = {}
        for group, place in self.places.get(tensor, ()):
            parts = positions.setdefault(place.axis, [])
            parts.append(torch.arange(cursor.get(place.axis, 0), place.offset))
            units = window.get(group.name)
            parts.append(place.positions(torch.arange(group.units) if units is None else units))
            cursor[place.axis] = place.offset + place.length
        for axis, parts in positions.items():
            parts.append(torch.arange(cursor[axis], self._shape(tensor)[axis]))
        return {axis: torch.cat(parts) for axis, parts in positions.items()}

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.shapes[tensor] if tensor in self.shapes else self.constants[tensor]

    def reach(self) -> float:
        """The share of the trained parameters' entries that lie on at least one narrowed axis (0 to 1)."""
        total = reached = 0
        for name in self._distinct_parameters():
            inside = 1
            for axis, length in enumerate(self.shapes[name]):
                narrowed = sum(p.length for _, p in self.places.get(name, ()) if p.axis == axis)
                inside *= length - narrowed
            size = torch.Size(self.shapes[name]).numel()
            total, reached = total + size, reached + size - inside
        return reached / total if total else 0.0

    def _distinct_parameters(self) -> Iterable[str]:
        """The trained parameters, a tied one once."""
        return (name for name in self.parameters if self.aliases.get(name, name) == name)

    def prove(self) -> None:
        """Show in float64 that permuting the units of all groups leaves the model's output unchanged.

        Raises UntraceableModelError, naming the group, module and operation, where it does not.
        """
        from msfusion.width.proof import prove

        prove(self)


@dataclass(frozen=True, kw_only=True)
class ShardMap(WidthMap):
    """A shard of a model: of each tensor some rows (positions of axis 0), the others are elsewhere.

    It has the groups of the whole model's map, `whole`, and so the same windows; `shapes` are the shard's. `owned` has
    the rows of each tensor, ascending; tensors without an axis are whole in every shard, and have none.
    `numbers` has for each row of the whole tensor its number in the shard, -1 where it is elsewhere.
    """

    whole: WidthMap
    owned: Mapping[str, Int[Tensor, " owned"]]
    numbers: Mapping[str, Int[Tensor, " rows"]]


def held(window: Window, group: Group) -> Bool[Tensor, " units"]:
    """Which units of the group a window holds, as a mask."""
    units = window.get(group.name)
    if units is None:
        return torch.ones(group.units, dtype=torch.bool)
    mask = torch.zeros(group.units, dtype=torch.bool)
    mask[units] = True
    return mask
