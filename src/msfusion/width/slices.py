"""Cutting a sub-model's tensors out of the full ones, and finding the place of each of their entries again.

The readable reference is `WidthMap.axis_positions`: a sub-tensor is `tensor[numpy.ix_(positions per axis)]`.
What is here does the same faster, because a simulation does it for each participant in each round: windows
are mostly one or two runs of neighbouring units, and such a sub-tensor is a few blocks, copied whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.errors import MsfusionError
from msfusion.width.groups import Place, ShardMap, State, WidthMap, Window
from msfusion.width.memo import once_per_map

Runs = list[tuple[int, int]]
"""Stretches of neighbouring positions, each as (start, stop)."""

MOST_BLOCKS = 16
"""A sub-tensor of more rectangular blocks than this is gathered by index instead."""


def extract(state: State, width_map: WidthMap, window: Window) -> dict[str, Tensor]:
    """The tensors of the sub-model that a window holds: contiguous copies under the original's names.

    `state` has full tensors by their name in the model's `state_dict()`, all or some; it is left untouched.
    An axis is narrowed to the window's units in the window's order; a tensor without a narrowed axis is
    copied whole. The names of a tied tensor share one copy, as they do in a `state_dict()`.

    Raises MsfusionError where the window or a tensor does not fit the width map.
    """
    cuts = plan(width_map, window)
    taken: dict[str, Tensor] = {}
    sub_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        check_shape(name, tensor, width_map)
        first = width_map.aliases.get(name, name)
        if first not in taken:
            taken[first] = cuts[name].take(tensor)
        sub_state[name] = taken[first]
    return sub_state


def plan(width_map: WidthMap, window: Window) -> dict[str, Cut]:
    """For each tensor of the model, where the window's part of it stands; of a shard, the window's part of the shard.

    Raises MsfusionError where the window does not fit the width map.
    """
    if isinstance(width_map, ShardMap):
        return _plan_of_shard(width_map, window)
    layout = _layout(width_map)
    runs = {name: _runs(window[name].cpu()) for name in checked_units(width_map, window)}
    selections = [axis.select(runs, window) for axis in layout.axes]
    cuts = [
        Cut(shape, tuple((axis, selections[index]) for axis, index in axes)) for shape, axes in layout.kinds
    ]
    return {name: cuts[kind] for name, kind in layout.tensors.items()}


MOST_WINDOWS = 64
"""Of so many windows a shard's cuts are kept: each is cut to and averaged from, and the empty one in every round."""


def _plan_of_shard(shard: ShardMap, window: Window) -> dict[str, Cut]:
    """As `plan`. A window is known by its tensors, which are kept so that no others can take their places."""
    known = _known_windows(shard)
    key = tuple((name, id(units)) for name, units in window.items())
    if key not in known:
        if len(known) >= MOST_WINDOWS:
            known.clear()
        known[key] = dict(window), _in_shard(plan(shard.whole, window), shard)
    return known[key][1]


@once_per_map
def _known_windows(width_map: WidthMap) -> dict[tuple[tuple[str, int], ...], tuple[Window, dict[str, Cut]]]:
    return {}


def _in_shard(cuts: Mapping[str, Cut], shard: ShardMap) -> dict[str, Cut]:
    """Where the parts of tensors stand in a shard. Tensors that are cut and divided alike share one cut."""
    found: dict[tuple[int, int], Cut] = {}
    restricted: dict[str, Cut] = {}
    for name, cut in cuts.items():
        if name not in shard.owned:
            restricted[name] = cut
            continue
        key = id(cut), id(shard.owned[name])
        if key not in found:
            found[key] = cut.of_rows(shard.numbers[name], len(shard.owned[name]))
        restricted[name] = found[key]
    return restricted


def checked_units(width_map: WidthMap, window: Mapping[str, object]) -> dict[str, list[int]]:
    """The units that a window names, by group, as plain integers.

    Raises MsfusionError where a group is unknown, or its units are not a one-dimensional LongTensor of at
    least one index, all of them from 0 to K - 1 and none twice.
    """
    checked = {}
    for name, units in window.items():
        if name not in _sizes(width_map):
            raise MsfusionError(f"the window names a width group {name!r} that the width map does not have")
        if not isinstance(units, Tensor) or units.dtype != torch.long or units.ndim != 1:
            raise MsfusionError(f"the window's units of group {name!r} must be a one-dimensional LongTensor")
        listed: list[int] = units.tolist()
        size = _sizes(width_map)[name]
        if not listed:
            raise MsfusionError(f"the window holds no unit of group {name!r}: it must hold at least one")
        if min(listed) < 0 or max(listed) >= size:
            raise MsfusionError(f"the window's units of group {name!r} must lie between 0 and {size - 1}")
        if len(set(listed)) != len(listed):
            raise MsfusionError(f"the window holds a unit of group {name!r} more than once")
        checked[name] = listed
    return checked


def check_shape(name: str, tensor: Tensor, width_map: WidthMap) -> None:
    """Raise MsfusionError unless the width map knows the tensor and has it with this shape."""
    shape = width_map.shapes.get(name)
    if shape is None:
        raise MsfusionError(f"the state has a tensor {name!r} that the width map does not know")
    if tensor.shape != shape:
        raise MsfusionError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, but the width map has {tuple(shape)}"
        )


@dataclass(frozen=True)
class Selection:
    """The positions of one axis that are held: as runs of neighbours where they are few, else one by one."""

    length: int
    held: int
    runs: tuple[tuple[int, int], ...] | None
    positions: Int[Tensor, " held"] | None = None

    @cached_property
    def index(self) -> Int[Tensor, " held"]:
        """The positions one by one."""
        if self.positions is not None:
            return self.positions
        assert self.runs is not None
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs])

    @property
    def whole(self) -> bool:
        """Whether all positions are held in their order."""
        return self.runs == ((0, self.length),)


def selected(length: int, positions: Int[Tensor, " held"]) -> Selection:
    """Some positions of an axis, in their order, perhaps none: as runs where they are few."""
    runs = _runs(positions)
    return Selection(length, len(positions), tuple(runs) if len(runs) <= MOST_BLOCKS else None, positions)


@dataclass(frozen=True)
class Cut:
    """Where the entries of one sub-tensor stand in the full tensor. `axes` has the narrowed axes in order."""

    shape: tuple[int, ...]
    axes: tuple[tuple[int, Selection], ...]

    @cached_property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of the sub-tensor."""
        shape = list(self.shape)
        for axis, selection in self.axes:
            shape[axis] = selection.held
        return tuple(shape)

    @cached_property
    def whole(self) -> bool:
        """Whether the sub-tensor is the full tensor."""
        return all(selection.whole for _, selection in self.axes)

    @property
    def rows(self) -> Int[Tensor, " held"]:
        """The positions of axis 0 that are held, in their order."""
        chosen = dict(self.axes).get(0)
        return torch.arange(self.shape[0]) if chosen is None else chosen.index

    def of_rows(self, numbers: Int[Tensor, " rows"], count: int) -> Cut:
        """Where the same sub-tensor stands in a tensor of which only so many rows are there.

        `numbers` has the new number of each row, -1 of those that are not there. The sub-tensor lacks these as well.
        """
        shape = (count, *self.shape[1:])
        if not self.axes or self.axes[0][0] != 0:
            return Cut(shape, self.axes)
        (_, chosen), *others = self.axes
        kept = numbers[chosen.index]
        return Cut(shape, ((0, selected(count, kept[kept >= 0])), *others))

    def take(self, full: Tensor) -> Tensor:
        """A contiguous copy of the sub-tensor. `full` may have length 1 on axes that are not narrowed."""
        blocks = self._blocks
        if blocks is None:
            return self._gather(full)
        if len(blocks) == 1:
            return full[blocks[0][0]].clone(memory_format=torch.contiguous_format)
        shape = list(full.shape)
        for axis, selection in self.axes:
            shape[axis] = selection.held
        part = full.new_empty(shape)
        for there, here in blocks:
            part[here] = full[there]
        return part

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write the sub-tensor `part` to its place in `full`, in place; the opposite of `take`."""
        blocks = self._blocks
        if blocks is not None:
            for there, here in blocks:
                full[there] = part[here]
            return
        # index tensors on all leading axes, so that the indexed axes are neighbours and keep their order
        last = self.axes[-1][0]
        chosen = dict(self.axes)
        indices = []
        for axis in range(last + 1):
            index = chosen[axis].index if axis in chosen else torch.arange(full.shape[axis])
            indices.append(index.to(full.device).reshape((-1,) + (1,) * (last - axis)))
        full[tuple(indices)] = part

    @cached_property
    def _blocks(self) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]] | None:
        """The blocks, each as (slices of the full tensor, slices of the sub-tensor); None if too many."""
        runs = []
        for _, selection in self.axes:
            if selection.runs is None:
                return None
            runs.append(selection.runs)
        if math.prod(len(r) for r in runs) > MOST_BLOCKS:
            return None
        per_axis = [list(_paired_slices(r)) for r in runs]
        return [self._block(pairs) for pairs in itertools.product(*per_axis)]

    def _block(self, pairs: Sequence[tuple[slice, slice]]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        there = [slice(None)] * len(self.shape)
        here = [slice(None)] * len(self.shape)
        for (axis, _), (from_full, from_part) in zip(self.axes, pairs, strict=True):
            there[axis], here[axis] = from_full, from_part
        return tuple(there), tuple(here)

    def _gather(self, full: Tensor) -> Tensor:
        # the axis that shrinks most first, so that the others have less to copy
        for axis, selection in sorted(self.axes, key=lambda entry: entry[1].held / max(1, entry[1].length)):
            if selection.runs is not None and len(selection.runs) == 1:
                start, stop = selection.runs[0]
                full = full.narrow(axis, start, stop - start)
            else:
                full = full.index_select(axis, selection.index.to(full.device))
        return full.contiguous()


def _paired_slices(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Each run as a slice of the full axis and of the narrowed one."""
    cursor = 0
    for start, stop in runs:
        yield slice(start, stop), slice(cursor, cursor + stop - start)
        cursor += stop - start


@dataclass(frozen=True)
class _Axis:
    """The groups on an axis, by offset: (group's name, place). Places name no tensor: axes must compare."""

    length: int
    stretches: tuple[tuple[str, Place], ...]

    def select(self, runs: Mapping[str, Runs], window: Window) -> Selection:
        """The positions that a window holds, given the runs of its units."""
        found: Runs = []
        cursor = 0
        for name, place in self.stretches:
            unit_runs = runs.get(name, [(0, place.units)])
            if len(unit_runs) * place.repeat > MOST_BLOCKS:
                return self._one_by_one(window)
            join_run(found, cursor, place.offset)
            for block in range(place.repeat):
                first = place.offset + block * place.units * place.thickness
                for start, stop in unit_runs:
                    join_run(found, first + start * place.thickness, first + stop * place.thickness)
            cursor = place.offset + place.length
        join_run(found, cursor, self.length)
        return Selection(self.length, sum(stop - start for start, stop in found), tuple(found))

    def _one_by_one(self, window: Window) -> Selection:
        parts: list[Tensor] = []
        cursor = 0
        for name, place in self.stretches:
            units = window[name].cpu() if name in window else torch.arange(place.units)
            parts += [torch.arange(cursor, place.offset), place.positions(units)]
            cursor = place.offset + place.length
        positions = torch.cat([*parts, torch.arange(cursor, self.length)])
        return Selection(self.length, len(positions), None, positions)


@dataclass(frozen=True)
class _Layout:
    """What is worked out once for a map. Many tensors share an axis, and many are cut alike (norms).

    `kinds` are the different (shape, pairs of an axis and its index into `axes`); `tensors` has their kinds.
    """

    axes: tuple[_Axis, ...]
    kinds: tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...]
    tensors: Mapping[str, int]


@once_per_map
def _layout(width_map: WidthMap) -> _Layout:
    numbers: dict[_Axis, int] = {}
    kinds: dict[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], int] = {}
    tensors = {}
    for name, shape in width_map.shapes.items():
        by_axis: dict[int, list[tuple[str, Place]]] = {}
        first = width_map.aliases.get(name, name)
        for group, place in width_map.places.get(name, width_map.places.get(first, ())):
            nameless = Place("", 0, place.offset, place.units, place.thickness, place.repeat)
            by_axis.setdefault(place.axis, []).append((group.name, nameless))
        axes = tuple(
            (axis, numbers.setdefault(_Axis(shape[axis], tuple(stretches)), len(numbers)))
            for axis, stretches in sorted(by_axis.items())
        )
        tensors[name] = kinds.setdefault((tuple(shape), axes), len(kinds))
    return _Layout(tuple(numbers), tuple(kinds), tensors)


@once_per_map
def _sizes(width_map: WidthMap) -> dict[str, int]:
    return {group.name: group.units for group in width_map.groups}


def _runs(positions: Int[Tensor, " held"]) -> Runs:
    """Stretches of neighbours, one after the other, that positions consist of."""
    breaks = (positions.diff() != 1).nonzero().flatten()
    starts = positions[torch.cat([breaks.new_zeros(min(1, len(positions))), breaks + 1])].tolist()
    stops = positions[torch.cat([breaks, breaks.new_full((min(1, len(positions)),), len(positions) - 1)])]
    return list(zip(starts, (stops + 1).tolist(), strict=True))


def join_run(runs: Runs, start: int, stop: int) -> None:
    """Append a run, joined with the last one where it continues that; an empty run is left out."""
    if start == stop:
        return
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))
