"""Which units of each width group a participant holds in a round: one function for each schedule.

With K units in group g, width ratio r and N participants, participant p holds in round t the window

    w[p,g]   = max(1, ceil(r_p * K))                     units
    s[p,t,g] = p * D[g] + t * S[g]   (mod K)             its start, rounded down last
    window   = {s, s + 1, ..., s + w - 1}  (mod K)

| schedule       | D, between participants | S, between rounds      | method                                 |
| -------------- | ----------------------- | ---------------------- | -------------------------------------- |
| `double_shift` | K / N                   | differs between groups | MSfusion, Xie & Li, 2407.03622         |
| `rolling`      | 0                       | 1                      | FedRolex, Alam et al., 2212.01548      |
| `static`       | 0                       | 0                      | HeteroFL, Diao et al., 2010.01264      |
| `random`       | (any w units, anew for each participant, round)  | Federated Dropout, 1812.07210          |
| `full`         | (w = K)                 | (w = K)                | FedAvg, McMahan et al., 1602.05629     |

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

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.groups import Group, WidthMap
from msfusion.width.memo import once_per_map

PRECISION = 2**60
"""Strides are fractions with this denominator: with integers, all machines find the same windows."""


class Schedule(Protocol):
    """Group name -> the units that a participant holds in a round, as a LongTensor of at least one index."""

    def __call__(
        self,
        width_map: WidthMap,
        participant: int,
        round_index: int,
        ratio: float,
        *,
        participants: int,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Raises ConfigError where the ratio is not in (0, 1] or there is no such participant."""


def double_shift(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    seed: int = 0,
    shift: float | Fraction | Mapping[str, Fraction | float] | None = None,
) -> dict[str, Tensor]:
    """MSfusion's windows: evenly spread over the participants, with different strides in groups that meet.

    `shift` is D/K, the part of a group between the windows of neighbouring participants, for all groups or
    by name; 1/participants if None. An overlap o between neighbours of ratio r is a shift of (1 - o) * r.
    `seed` orders the units of groups that meet themselves. Raises ConfigError as every `Schedule`.
    """
    _check(participant, round_index, participants)
    between = {} if shift is None or not isinstance(shift, Mapping) else shift
    default = Fraction(1, participants) if shift is None or isinstance(shift, Mapping) else Fraction(shift)
    strides = _strides(width_map)
    window = {}
    for group in width_map.groups:
        offset = participant * Fraction(between.get(group.name, default)) + round_index * strides[group.name]
        units = _neighbours(math.floor(group.units * offset), window_size(ratio, group.units), group.units)
        if round_index > 0 and frozenset([group.name]) in width_map.meetings:
            units = _permutation(group, seed, round_index)[units]
        window[group.name] = units
    return window


def rolling(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """FedRolex's windows: the same for all participants, one unit further each round (its equation 2).

    (The authors' code rolls the other way round, which reaches the mirror image of the same entries.)
    """
    _check(participant, round_index, participants)
    return {g.name: _neighbours(round_index, window_size(ratio, g.units), g.units) for g in width_map.groups}


def static(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """HeteroFL's windows: always the first units."""
    _check(participant, round_index, participants)
    return {g.name: torch.arange(window_size(ratio, g.units)) for g in width_map.groups}


def random(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Federated Dropout's windows: random units, ascending, drawn for each participant, round and group."""
    _check(participant, round_index, participants)
    window = {}
    for group in width_map.groups:
        order = _permutation(group, seed, round_index, participant)
        window[group.name] = order[: window_size(ratio, group.units)].sort().values
    return window


def full(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float = 1.0,
    *,
    participants: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """FedAvg's windows: everything, whatever the ratio."""
    _check(participant, round_index, participants)
    return width_map.full_window()


SCHEDULES: Mapping[str, Schedule] = {
    "double_shift": double_shift,
    "rolling": rolling,
    "static": static,
    "random": random,
    "full": full,
}


def window_size(ratio: float, units: int) -> int:
    """How many of a group's units a participant of this width ratio holds: max(1, ceil(ratio * units)).

    Raises ConfigError unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:  # NaN is not, either
        raise ConfigError(f"a width ratio must be greater than 0 and at most 1, not {ratio}")
    # 0.1 * 30 is 3.0000000000000004 in floating point, but a tenth of 30 units is 3
    return max(1, math.ceil(ratio * units - 1e-9))


def _check(participant: int, round_index: int, participants: int) -> None:
    if not 0 <= participant < participants:
        raise ConfigError(f"there is no participant {participant}: they count from 0 to {participants - 1}")
    if round_index < 0:
        raise ConfigError(f"rounds count from 0, so there is no round {round_index}")


def _neighbours(start: int, held: int, units: int) -> Tensor:
    return (torch.arange(held) + start % units) % units


def _permutation(group: Group, *key: int) -> Tensor:
    """The group's units in a random order that depends on nothing but the group's name and the key."""
    digest = hashlib.sha256(repr((group.name, *key)).encode()).digest()
    # 63 bits: a generator's seed is a signed integer
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(group.units, generator=generator)


@once_per_map
def _strides(width_map: WidthMap) -> dict[str, Fraction]:
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
