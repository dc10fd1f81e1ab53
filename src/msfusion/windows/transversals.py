"""Windows for a model that is made of copies: they hold as many copies of one unit as of any other.

With K units that are copies of w (unit j of unit j mod w), a window of w neighbours on the circle holds one copy of
each: a *transversal*. Then the slice is the small model. Window sizes must therefore divide: for the smallest ratio
the largest divisor w of K that is not above max(1, ceil(r K)), for a larger ratio the largest such divisor that is a
multiple of w. Where windows start is MSfusion's (`msfusion.windows.schedules.double_shift`).

A group that meets itself stands in another order each round, as it always does; but here the order keeps the classes
apart. Position q of the circle has class pi(q mod w), and of it copy number sigma(q div w), with a permutation pi of
the classes and a permutation sigma of the copies for each class.

The units of a window are listed by class, so that a slice's tensors are the small model's in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.width.groups import Group, WidthMap
from msfusion.windows.schedules import generator_of, neighbours, window_size, window_starts


def small_sizes(width_map: WidthMap, smallest: float) -> dict[str, int]:
    """How many units each group has in the small model that is copied, for the smallest ratio of all.

    Raises ConfigError unless the ratio is above 0 and at most 1.
    """
    return {group.name: _divisor(group.units, smallest, 1) for group in width_map.groups}


def held_sizes(width_map: WidthMap, ratio: float, smallest: float) -> dict[str, int]:
    """How many units of each group a participant of a ratio holds: a multiple of those of the small model."""
    small = small_sizes(width_map, smallest)
    return {group.name: _divisor(group.units, ratio, small[group.name]) for group in width_map.groups}


def transversal(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    smallest: float,
    seed: int = 0,
    shift: float | Fraction | Mapping[str, Fraction | float] | None = None,
    factor: int | None = None,
) -> dict[str, Tensor]:
    """The windows of a model of copies. `smallest` is the smallest ratio that anybody has; for the rest see
    `double_shift`.
    """
    starts = window_starts(width_map, participant, round_index, ratio, participants, shift, factor)
    small, held = small_sizes(width_map, smallest), held_sizes(width_map, ratio, smallest)
    window = {}
    for group in width_map.groups:
        classes = small[group.name]
        units = neighbours(starts[group.name], held[group.name], group.units)
        if round_index > 0 and frozenset([group.name]) in width_map.meetings:
            units = _order(group, classes, seed, round_index)[units]
        rows = units.reshape(-1, classes)
        window[group.name] = rows.gather(1, (rows % classes).argsort(1)).reshape(-1)
    return window


def _order(group: Group, classes: int, *key: int) -> Int[Tensor, " units"]:
    """Which unit stands at each position of the circle in a round: any `classes` neighbours are of all classes."""
    generator, copies = generator_of(group, *key), group.units // classes
    order = torch.randperm(classes, generator=generator)
    chosen = torch.stack([torch.randperm(copies, generator=generator) for _ in range(classes)], 1)
    return (chosen[:, order] * classes + order).reshape(-1)


def _divisor(units: int, ratio: float, multiple_of: int) -> int:
    """The largest divisor of `units`, itself a multiple, that is not above the window size of a ratio."""
    most = max(window_size(ratio, units), multiple_of)
    return next(size for size in range(most, 0, -1) if units % size == 0 and size % multiple_of == 0)
