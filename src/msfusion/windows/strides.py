"""Where the windows of each group stand: between participants, and from round to round.

*Why groups that meet must differ.* A weight entry is trained only while both its output and its input unit are
held. If two groups that meet in a weight shift alike, units further apart than w never meet, however long
the training. So the groups are coloured, groups that meet differently, and both shifts depend on the colour.

*Between participants.* In each group the N windows are spread evenly, K/N apart; what differs is which
participant has which place. With one order in all groups the windows lie along the diagonal of a weight, and
where they overlap much they cover little of it (44 % at N = 10 and r = 1/4). So colour c puts participant p at
place m^c p (mod N), with m near N r and coprime to N: who are neighbours in one group, K/N apart, are about a
window apart in the next. The windows then cover 62 %, which measured better; at r = 1/8 m is 1, since there the
diagonal is covered almost without overlap, and breaking it up measured worse (docs/experiments.md).

*Between rounds.* With d colours and y the root of y^d + y^(d+1) = 1, colour c shifts by S = K y^(c+1): the
Kronecker sequence with the generalised golden ratio ("R_d", M. Roberts, 2018). Relative offsets of *any* two
colours are then spread evenly from the first rounds on; multiples of one golden ratio would tie them together
(stride 2 phi against phi walks along a line), and few narrow participants would leave a part of the weights
untouched for ever.

*A group that meets itself* (the recurrent weights of an LSTM, a plain C -> C layer on a residual stream)
has the same window on both axes, so no shift can help. From round 1 on its units stand on the circle in
another random order each round, the same for all participants: windows still spread evenly, and any two
units become neighbours some time. (Dilating by a factor coprime to K, a simpler idea, can never bring units
K/2 apart together when K is even.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from msfusion.width.groups import WidthMap
from msfusion.width.memo import once_per_map

PRECISION = 2**60
"""Strides are fractions with this denominator: with integers, all machines find the same windows."""


def round_strides(width_map: WidthMap) -> dict[str, Fraction]:
    """For each group, S/K: the part of its units by which its windows shift from round to round."""
    colours = colour_meetings(width_map)
    values = kronecker_strides(max(colours.values(), default=0) + 1)
    return {name: values[colour] for name, colour in colours.items()}


def places(width_map: WidthMap, participant: int, participants: int, factor: int) -> dict[str, int]:
    """For each group, which of the N evenly spread places is the participant's, from 0 to N - 1."""
    return {
        name: pow(factor, colour, participants) * participant % participants
        for name, colour in colour_meetings(width_map).items()
    }


@once_per_map
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


@lru_cache(maxsize=64)
def place_factor(participants: int, ratio: float) -> int:
    """The number m nearest to N r, from 1 to N, that has no divisor in common with N (the smaller of two)."""
    by_distance = sorted(range(1, participants + 1), key=lambda factor: abs(factor - participants * ratio))
    return next(factor for factor in by_distance if math.gcd(factor, participants) == 1)


@lru_cache(maxsize=64)
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
