"""By how much the windows of each group shift from round to round.

*Why strides differ.* A weight entry is trained only while both its output and its input unit are held. If
two groups that meet in a weight shift alike, units further apart than w never meet, however long the
training. `double_shift` gives groups that meet different strides, so that the windows' relative offset
takes all values. The strides are those of a Kronecker sequence with the generalised golden ratio ("R_d", M.
Roberts, 2018): with d colours and y the root of y^d + y^(d+1) = 1, colour c has S = K * y^(c+1). Offsets of
*any* two colours are then spread evenly from the first rounds on; multiples of one golden ratio would tie
them together (stride 2 phi against phi walks along a line), and few narrow participants would leave a part
of the weights untouched for ever.

*A group that meets itself* (the recurrent weights of an LSTM, a plain C -> C layer on a residual stream)
has the same window on both axes, so no stride can help. From round 1 on its units stand on the circle in
another random order each round, the same for all participants: windows still spread evenly, and any two
units become neighbours some time. (Dilating by a factor coprime to K, a simpler idea, can never bring units
K/2 apart together when K is even.)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from msfusion.width.groups import WidthMap
from msfusion.width.memo import once_per_map

PRECISION = 2**60
"""Strides are fractions with this denominator: with integers, all machines find the same windows."""


@once_per_map
def round_strides(width_map: WidthMap) -> dict[str, Fraction]:
    """For each group, the part of its units by which its windows shift from round to round."""
    colours = colour_meetings(width_map)
    values = kronecker_strides(max(colours.values(), default=0) + 1)
    return {name: values[colour] for name, colour in colours.items()}


def colour_meetings(width_map: WidthMap) -> dict[str, int]:
    """A small number for each group, different for groups that meet (greedy, those that meet most first)."""
    neighbours: dict[str, set[str]] = {group.name: set() for group in width_map.groups}
    for pair in width_map.meetings:
        if len(pair) == 2:
            one, other = pair
            neighbours[one].add(other)
            neighbours[other].add(one)
    colours: dict[str, int] = {}
    for name in sorted(neighbours, key=lambda name: -len(neighbours[name])):  # a stable sort: the map's order
        taken = {colours.get(other) for other in neighbours[name]}
        colours[name] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    return colours


def kronecker_strides(count: int) -> Sequence[Fraction]:
    """y, y^2, ..., y^count where y^count + y^(count+1) = 1: for one, the golden ratio 0.618."""
    low, high = 0, PRECISION
    while high - low > 1:
        middle = (low + high) // 2
        if middle**count * (PRECISION + middle) < PRECISION ** (count + 1):
            low = middle
        else:
            high = middle
    return [Fraction(low**power // PRECISION ** (power - 1), PRECISION) for power in range(1, count + 1)]
