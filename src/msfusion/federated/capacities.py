"""How much of each layer a participant can hold in a round: one ratio for ever, or one that comes and goes.

Server and participants must find the same window without talking about it, so a participant's ratio in a
round depends on the configuration, the seed, the round and the participant alone.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

from msfusion.errors import ConfigError
from msfusion.seeds import OfRound, chance


@dataclass(frozen=True)
class OneOf:
    """In each round one of these ratios, all equally likely, drawn anew (HeteroFL's "dynamic" participants)."""

    ratios: tuple[float, ...]


@dataclass(frozen=True)
class FromRound:
    """(round, ratio): from this round on this ratio, until the next entry. Rounds count from 0; the first is 0."""

    steps: tuple[tuple[int, float], ...]


Capacity = float | OneOf | FromRound


@dataclass(frozen=True)
class Capacities:
    """The width ratio of each participant in each round. Raises ConfigError unless all are above 0, at most 1."""

    each: tuple[Capacity, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.each:
            raise ConfigError("there are no participants: give at least one width ratio")
        for participant, capacity in enumerate(self.each):
            if isinstance(capacity, FromRound) and [*_rounds(capacity)][:1] != [0]:
                raise ConfigError(f"the ratios of participant {participant} by round must begin with round 0")
            values = _values(capacity)
            if not values:
                raise ConfigError(f"participant {participant} has no width ratio to choose from")
            for ratio in values:
                if not 0 < ratio <= 1:
                    raise ConfigError(
                        f"the width ratio of participant {participant} is {ratio}: it must be above 0, at most 1"
                    )

    def ratio(self, participant: int, round_index: int) -> float:
        """The participant's ratio in a round."""
        capacity = self.each[participant]
        if isinstance(capacity, OneOf):
            draw = chance(self.seed, round_index, participant, OfRound.CAPACITY)
            return capacity.ratios[int(draw * len(capacity.ratios))]
        if isinstance(capacity, FromRound):
            return [ratio for first, ratio in capacity.steps if first <= round_index][-1]
        return capacity

    def possible(self, participant: int) -> tuple[float, ...]:
        """Every ratio that the participant can have, the largest first."""
        return tuple(sorted(set(_values(self.each[participant])), reverse=True))

    @cached_property
    def typical(self) -> tuple[float, ...]:
        """For each participant the mean of its ratios: what the spacing of the windows goes by."""
        return tuple(statistics.fmean(_values(capacity)) for capacity in self.each)

    @property
    def alike(self) -> bool:
        """Whether everybody has the same ratio as the others in every round."""
        return len(set(self.each)) == 1 and not isinstance(self.each[0], OneOf)

    @cached_property
    def smallest(self) -> float:
        """The smallest ratio that anybody can have."""
        return min(min(_values(capacity)) for capacity in self.each)


def _values(capacity: Capacity) -> tuple[float, ...]:
    if isinstance(capacity, OneOf):
        return capacity.ratios
    if isinstance(capacity, FromRound):
        return tuple(ratio for _, ratio in capacity.steps)
    return (capacity,)


def _rounds(capacity: FromRound) -> list[int]:
    """The rounds of its steps. Raises ConfigError unless they ascend."""
    rounds = [first for first, _ in capacity.steps]
    if rounds != sorted(set(rounds)):
        raise ConfigError(f"ratios by round must have ascending rounds, not {rounds}")
    return rounds
