"""A large model whose unit j is a copy of unit j mod w of a small one: which entries are copies of which.

Entries that are copied from the same small entry are each other's *kin*. A group of K units is K/w copies of w classes,
one after the other: copy c of class i is unit c w + i. Axes can be composite (fused projections, gates,
concatenations), so everything goes by the width map's places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.groups import Group, Place, ShardMap, WidthMap
from msfusion.width.slices import Cut, Selection, join_run, selected

Along = Mapping[int, float | Tensor]
"""By axis, what each position is multiplied by: one number, or one for each position of the axis."""


@dataclass(frozen=True, eq=False)
class Copies:
    """A model of the map's widths, as copies of one that has `sizes[group]` units: each must divide the group's.

    Raises ConfigError where one does not.
    """

    width_map: WidthMap
    sizes: Mapping[str, int]
    _axes: dict[tuple[str, int], _Axis] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for group in self.width_map.groups:
            if group.units % self.sizes[group.name]:
                raise ConfigError(
                    f"{group.units} units of {group.name} are no copies of {self.sizes[group.name]}: choose a divisor"
                )

    def small_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the small model."""
        shape = list(self.width_map.shapes[name])
        for number, axis in self.axes(name).items():
            shape[number] = axis.small_length
        return tuple(shape)

    def spread(self, name: str, small: Tensor) -> Tensor:
        """A small tensor in the large one's shape. It may have length 1 on axes that are not narrowed."""
        for number, axis in self.axes(name).items():
            if axis.small_length != axis.length:
                small = small.index_select(number, axis.origin.to(small.device))
        return small

    def pieces(self, name: str) -> Iterator[tuple[Cut, Cut]]:
        """The copies one by one: where each stands in the large tensor, and which part of the small one it is."""
        axes = self.axes(name)
        large, small = self.width_map.shapes[name], self.small_shape(name)
        for chosen in itertools.product(*(axis.copies for axis in axes.values())):
            yield (
                Cut(large, tuple(zip(axes, (there for there, _ in chosen), strict=True))),
                Cut(small, tuple(zip(axes, (here for _, here in chosen), strict=True))),
            )

    def along(
        self, name: str, by_group: Mapping[str, int] | Mapping[str, float], axes: Iterable[int] | None = None
    ) -> Along:
        """A number for each group, by the axes where its units stand (or some of them); 1 elsewhere."""
        wanted = self.axes(name) if axes is None else axes
        found = {
            number: self.axes(name)[number].values(by_group) for number in wanted if number in self.axes(name)
        }
        return {
            number: values for number, values in found.items() if isinstance(values, Tensor) or values != 1
        }

    def axes(self, name: str) -> dict[int, _Axis]:
        """The axes of a tensor where groups stand, in order."""
        stretches: dict[int, list[tuple[Group, Place]]] = {}
        first = self.width_map.aliases.get(name, name)
        for group, place in self.width_map.places.get(name, self.width_map.places.get(first, ())):
            stretches.setdefault(place.axis, []).append((group, place))
        for number in stretches:
            if (first, number) not in self._axes:
                length = self.width_map.shapes[name][number]
                self._axes[first, number] = _Axis(length, tuple(stretches[number]), self.sizes)
        return {number: self._axes[first, number] for number in sorted(stretches)}

    def classes(self, name: str) -> Int[Tensor, " rows"]:
        """For each row of a tensor the small row that it is copied from; the rows of one class are kin."""
        axes = self.axes(name)
        return axes[0].origin if 0 in axes else torch.arange(self.width_map.shapes[name][0])

    def in_shard(self, shard: ShardMap) -> Copies:
        """The same of a shard, which must have whole classes of rows: all copies of those that it has."""
        return _CopiesInShard(shard, self.sizes, whole=self)


@dataclass(frozen=True, eq=False)
class _CopiesInShard(Copies):
    """Copies of which a shard has some rows: axis 0 is another, the others are as they were."""

    whole: Copies = field(kw_only=True)

    def axes(self, name: str) -> dict[int, _Axis]:
        """The axes of a tensor where groups stand, in order."""
        axes = dict(self.whole.axes(name))
        assert isinstance(self.width_map, ShardMap)
        if 0 in axes and name in self.width_map.owned:
            first = self.width_map.aliases.get(name, name)
            if (first, 0) not in self._axes:
                self._axes[first, 0] = _AxisInShard(axes[0], self.width_map.owned[name])
            axes[0] = self._axes[first, 0]
        return axes


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis with the groups on it, by offset."""

    length: int
    stretches: tuple[tuple[Group, Place], ...]
    sizes: Mapping[str, int]

    @cached_property
    def small_length(self) -> int:
        """How long the axis is in the small model."""
        return self.length - sum(
            place.length - place.length // place.units * self.sizes[group.name]
            for group, place in self.stretches
        )

    @cached_property
    def copies(self) -> list[tuple[Selection, Selection]]:
        """For each copy its positions in the large axis and in the small one; what no group owns is in the first."""
        most = max(place.units // self.sizes[group.name] for group, place in self.stretches)
        return [self._copy(number) for number in range(most)]

    def _copy(self, number: int) -> tuple[Selection, Selection]:
        large: list[tuple[int, int]] = []
        small: list[tuple[int, int]] = []
        cursor = small_cursor = 0
        for group, place in self.stretches:
            size, gap = self.sizes[group.name], place.offset - cursor
            if number == 0:
                join_run(large, cursor, place.offset)
                join_run(small, small_cursor, small_cursor + gap)
            small_cursor += gap
            for block in range(place.repeat):
                if number < place.units // size:
                    start = place.offset + (block * place.units + number * size) * place.thickness
                    join_run(large, start, start + size * place.thickness)
                    join_run(small, small_cursor, small_cursor + size * place.thickness)
                small_cursor += size * place.thickness
            cursor = place.offset + place.length
        if number == 0:
            join_run(large, cursor, self.length)
            join_run(small, small_cursor, self.small_length)
        return _selection(self.length, large), _selection(self.small_length, small)

    @cached_property
    def origin(self) -> Int[Tensor, " large"]:
        """For each position the one of the small axis that it is copied from."""
        origin = torch.empty(self.length, dtype=torch.long)
        for there, here in self.copies:
            origin[there.index] = here.index
        return origin

    def values(self, by_group: Mapping[str, int] | Mapping[str, float]) -> float | Tensor:
        """A number for each group at the positions of its units, 1 elsewhere; one number where all are equal."""
        values = torch.ones(self.length, dtype=torch.float64)
        for group, place in self.stretches:
            values[place.offset : place.offset + place.length] = by_group[group.name]
        first = float(values[0])
        return first if bool((values == first).all()) else values


class _AxisInShard(_Axis):
    """Some rows of an axis: whole classes, whose small rows are numbered anew."""

    _whole: _Axis
    _owned: Int[Tensor, " owned"]

    def __init__(self, whole: _Axis, owned: Int[Tensor, " owned"]) -> None:
        super().__init__(len(owned), whole.stretches, whole.sizes)
        self._set("_whole", whole)
        self._set("_owned", owned)
        small = torch.unique(whole.origin[owned])
        numbers, small_numbers = (torch.full((length,), -1) for length in (whole.length, whole.small_length))
        numbers[owned], small_numbers[small] = torch.arange(len(owned)), torch.arange(len(small))
        self._set("small_length", len(small))
        self._set("origin", small_numbers[whole.origin[owned]])
        parts = [
            (_numbered(there, numbers, len(owned)), _numbered(here, small_numbers, len(small)))
            for there, here in whole.copies
        ]
        self._set("copies", [part for part in parts if part[0].held])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # as dataclasses that are frozen do

    def values(self, by_group: Mapping[str, int] | Mapping[str, float]) -> float | Tensor:
        """A number for each group at the positions of its units, 1 elsewhere; one number where all are equal."""
        values = self._whole.values(by_group)
        return values[self._owned] if isinstance(values, Tensor) else values


def _numbered(chosen: Selection, numbers: Int[Tensor, " _"], length: int) -> Selection:
    kept = numbers[chosen.index]
    return selected(length, kept[kept >= 0])


def _selection(length: int, runs: list[tuple[int, int]]) -> Selection:
    return Selection(length, sum(stop - start for start, stop in runs), tuple(runs))


def factor_at(along: Along, cut: Cut | None, rank: int) -> float | Tensor:
    """The product over all axes, for the part of a tensor that a cut holds (None: all of it)."""
    held = {} if cut is None else dict(cut.axes)
    product: float | Tensor = 1.0
    for number, values in along.items():
        if isinstance(values, Tensor):
            chosen = values[held[number].index] if number in held else values
            values = chosen.reshape([-1 if axis == number else 1 for axis in range(rank)])
        product = values * product
    return product


def beside(factor: float | Tensor, tensor: Tensor) -> float | Tensor:
    """A factor on the device of the tensor that it goes with."""
    return factor.to(tensor.device) if isinstance(factor, Tensor) else factor


def copies_in(window: Mapping[str, Tensor], width_map: WidthMap, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many copies of each small unit a window holds, by group."""
    return {
        group.name: math.ceil(len(window.get(group.name, range(group.units))) / sizes[group.name])
        for group in width_map.groups
    }
