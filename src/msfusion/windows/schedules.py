"""Which units of each width group a participant holds in a round: one function for each schedule.

With K units in group g, width ratio r and N participants, participant p holds in round t the window

    w[p,g]   = max(1, ceil(r_p * K))                     units
    s[p,t,g] = q * D[g] + t * S[g]   (mod K)             its start, rounded down last
    window   = {s, s + 1, ..., s + w - 1}  (mod K)

where q is the participant's place in the group: p itself, or for `double_shift` p in another order in groups
that meet.

| schedule       | D, between participants | S, between rounds      | method                                 |
| -------------- | ----------------------- | ---------------------- | -------------------------------------- |
| `double_shift` | K / N                   | differs between groups | MSfusion, Xie & Li, 2407.03622         |
| `rolling`      | 0                       | 1                      | FedRolex, Alam et al., 2212.01548      |
| `static`       | 0                       | 0                      | HeteroFL, Diao et al., 2010.01264      |
| `random`       | (any w units, anew for each participant, round)  | Federated Dropout, 1812.07210          |
| `full`         | (w = K)                 | (w = K)                | FedAvg, McMahan et al., 1602.05629     |

Windows of a model made of copies, which hold one copy of each unit: `msfusion.windows.transversals`.

Why groups that meet need other places and strides, and which: `msfusion.windows.strides`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.imports import failing_as
from msfusion.registry import Registry
from msfusion.width.groups import Group, WidthMap
from msfusion.windows.strides import place_factor, places, round_strides


@runtime_checkable
class Schedule(Protocol):
    """Group name -> the units that a participant holds in a round, as a LongTensor of at least one index.

    The same for the same arguments: server and participant each work it out. A schedule that goes by the model's
    weights has an attribute `of_state = True`; it is given the global state as the keyword `state`, in the server
    alone, and the units that it chooses travel with the task.
    """

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
    factor: int | None = None,
) -> dict[str, Tensor]:
    """MSfusion's windows: evenly spread over the participants, shifted differently in groups that meet.

    `shift` is D/K, the part of a group between the windows at neighbouring places, for all groups or by
    name; 1/participants if None. An overlap o between neighbours of ratio r is a shift of (1 - o) * r.
    `factor` decides who is whose neighbour where (`strides.place_factor` of the participant's own ratio if
    None: where ratios differ give one for all). `seed` orders the units of groups that meet themselves.
    Raises ConfigError as every `Schedule`.
    """
    starts = window_starts(width_map, participant, round_index, ratio, participants, shift, factor)
    window = {}
    for group in width_map.groups:
        units = neighbours(starts[group.name], window_size(ratio, group.units), group.units)
        if round_index > 0 and frozenset([group.name]) in width_map.meetings:
            units = _permutation(group, seed, round_index)[units]
        window[group.name] = units
    return window


def window_starts(
    width_map: WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    participants: int,
    shift: float | Fraction | Mapping[str, Fraction | float] | None = None,
    factor: int | None = None,
) -> dict[str, int]:
    """Where MSfusion's windows begin, by group; not yet modulo the group's units. Arguments as in `double_shift`."""
    check_round(participant, round_index, participants)
    between = {} if shift is None or not isinstance(shift, Mapping) else shift
    default = Fraction(1, participants) if shift is None or isinstance(shift, Mapping) else Fraction(shift)
    strides = round_strides(width_map)
    place = places(width_map, participant, participants, factor or place_factor(participants, ratio))
    starts = {}
    for group in width_map.groups:
        apart = Fraction(between.get(group.name, default))
        offset = place[group.name] * apart + round_index * strides[group.name]
        starts[group.name] = math.floor(group.units * offset)
    return starts


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
    check_round(participant, round_index, participants)
    return {g.name: neighbours(round_index, window_size(ratio, g.units), g.units) for g in width_map.groups}


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
    check_round(participant, round_index, participants)
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
    check_round(participant, round_index, participants)
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
    check_round(participant, round_index, participants)
    return width_map.full_window()


SCHEDULES: Registry[Schedule] = Registry("window schedule", "method.schedule")
"""Every schedule by its name; `msfusion.schedule` adds one, and `module:function` stands for one of a user's."""


def schedule(name: str) -> Callable[[Schedule], Schedule]:
    """A decorator that registers a window schedule under a name. Raises ConfigError where the name is taken."""
    return SCHEDULES.add(name)


for _schedule in (double_shift, rolling, static, random, full):
    SCHEDULES.add(_schedule.__name__)(_schedule)


def window_size(ratio: float, units: int) -> int:
    """How many of a group's units a participant of this width ratio holds: max(1, ceil(ratio * units)).

    Raises ConfigError unless 0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:  # NaN is not, either
        raise ConfigError(f"a width ratio must be greater than 0 and at most 1, not {ratio}")
    # 0.1 * 30 is 3.0000000000000004 in floating point, but a tenth of 30 units is 3
    return max(1, math.ceil(ratio * units - 1e-9))


def check_round(participant: int, round_index: int, participants: int) -> None:
    """Raise ConfigError where there is no such participant or round."""
    if not 0 <= participant < participants:
        raise ConfigError(f"there is no participant {participant}: they count from 0 to {participants - 1}")
    if round_index < 0:
        raise ConfigError(f"rounds count from 0, so there is no round {round_index}")


def neighbours(start: int, held: int, units: int) -> Tensor:
    """So many units from `start` on, on a circle."""
    return (torch.arange(held) + start % units) % units


def _permutation(group: Group, *key: int) -> Tensor:
    """The group's units in a random order that depends on nothing but the group's name and the key."""
    return torch.randperm(group.units, generator=generator_of(group, *key))


def generator_of(group: Group, *key: int) -> torch.Generator:
    """Random numbers that depend on nothing but the group's name and the key."""
    digest = hashlib.sha256(repr((group.name, *key)).encode()).digest()
    # 63 bits: a generator's seed is a signed integer
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class CheckedSchedule:
    """A schedule of a user's: what is no window of its ratio, or is another one when asked again, is refused by name.

    Server and participant each work a window out: from two that differ, updates would be averaged into other units than
    those that were trained.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.name = getattr(schedule, "__name__", type(schedule).__name__)

    def __call__(
        self, width_map: WidthMap, participant: int, round_index: int, ratio: float, **more: Any
    ) -> dict[str, Tensor]:
        """The window. Raises ConfigError, naming the schedule and the group."""
        first, second = (self._window(width_map, participant, round_index, ratio, more) for _ in range(2))
        for group in width_map.groups:
            units, size = first[group.name], window_size(ratio, group.units)
            if len(units) != size:
                raise ConfigError(
                    f"the window schedule {self.name} gives {len(units)} of {group.units} units, and it must be "
                    f"{size} of group {group.name} at ratio {ratio:g}: give as many (windows.window_size)"
                )
            if not torch.equal(units, second[group.name]):
                raise ConfigError(
                    f"the window schedule {self.name} gives another window when it is asked again: draw from the seed, "
                    "the round and the participant alone"
                )
        return first

    def _window(
        self, width_map: WidthMap, participant: int, round_index: int, ratio: float, more: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        with failing_as(ConfigError, f"the window schedule {self.name}"):
            window = self.schedule(width_map, participant, round_index, ratio, **more)
        names = {group.name for group in width_map.groups}
        if not isinstance(window, dict) or set(window) != names:
            told = (
                f"windows of {', '.join(map(str, window))}"
                if isinstance(window, dict)
                else type(window).__name__
            )
            raise ConfigError(
                f"the window schedule {self.name} gives {told}: give a dict with a tensor of units for each of the "
                f"groups {', '.join(sorted(names))}"
            )
        for name, units in window.items():
            if not isinstance(units, Tensor) or units.dtype != torch.int64 or units.ndim != 1:
                raise ConfigError(
                    f"the window schedule {self.name} gives no int64 tensor with one axis for group {name}"
                )
        return window
