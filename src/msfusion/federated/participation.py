"""Who takes part in each round, when each is done on a simulated clock, and whose work counts.

All of it is known before anything is trained: it depends on settings, seed and predicted times alone. So it can
be shown beforehand, it is the same for any number of workers, and a run that resumes finds it again.

*A round.* The server asks the participants of the round (a draw of those that qualify). Some are absent: they
never answer, and nobody waits for them. The others take their predicted seconds. Without a deadline the round
ends when the last is done. With one it ends at the deadline if somebody is not done by then (or nobody is there).

*Late.* "drop": what is not done at the deadline is abandoned, and the participant is free for the next round.
"downweight": it goes on, misses the rounds that begin meanwhile, and what it sends is merged at the end of the
round in which it arrives, counting only in part (`Update.share`): a synchronous server that takes in stale
updates at a discount, as FedAsync does (Xie, Koyejo & Gupta, arXiv 1903.03934).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from msfusion.errors import ConfigError
from msfusion.seeds import OfRound, chance, seed_of
from msfusion.setting import check, setting

Late = Literal["drop", "downweight"]


@dataclass(frozen=True)
class RoundSettings:
    """How many rounds, and how many are asked in each. Raises ConfigError for impossible values.

    Each round draws `count` participants, or the nearest whole number to `fraction` of them (at least one),
    from (seed, round).
    """

    rounds: int = setting(meaning="of the whole run", ge=1)
    fraction: float = setting(1.0, "share of the participants that is asked in a round", gt=0, le=1)
    count: int | None = setting(None, "how many are asked in a round, instead of a share", ge=1)
    evaluate_every: int = setting(1, "rounds between evaluations; the last round always has one", ge=1)
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)

    def participants_in(self, round_index: int, participants: int) -> tuple[int, ...]:
        """Who of that many participants is asked in a round. Raises ConfigError if there are too few."""
        count = max(1, math.floor(self.fraction * participants + 0.5)) if self.count is None else self.count
        if count > participants:
            raise ConfigError(
                f"{count} participants are to take part in a round, but there are {participants}"
            )
        if count == participants:
            return tuple(range(participants))
        generator = torch.Generator().manual_seed(seed_of(self.seed, round_index))
        return tuple(sorted(torch.randperm(participants, generator=generator)[:count].tolist()))


@dataclass(frozen=True)
class Conditions:
    """What else decides who takes part. The default: everybody qualifies, is there, and is waited for.

    `qualifies` says whether a (participant, round) may be asked at all. `dropout` has each participant's
    probability of being absent from a round (none: 0). `seconds` predicts how many simulated seconds a (participant,
    round) takes. Raises ConfigError for impossible values.
    """

    qualifies: Callable[[int, int], bool] | None = None
    dropout: tuple[float, ...] = ()
    seconds: Callable[[int, int], float] | None = None
    deadline: float | None = setting(None, "simulated seconds that a round may last", gt=0)
    late: Late = setting(
        "drop",
        "updates that are not there by the deadline: abandoned, or merged when they arrive and counted in part",
    )
    late_weight: float = setting(0.5, "the share that counts of a late update", gt=0, le=1)

    def __post_init__(self) -> None:
        check(self)
        for participant, probability in enumerate(self.dropout):
            if not 0 <= probability < 1:
                raise ConfigError(
                    f"the dropout of participant {participant} is {probability}: it must be at least 0, below 1"
                )
        if self.deadline is not None and self.seconds is None:
            raise ConfigError("a deadline needs to know how long the participants take: give their seconds")


@dataclass(frozen=True)
class Attendance:
    """A round: who is done in time, who is late, who is absent; participants in ascending order.

    `arriving` are the late updates of earlier rounds that are merged in this one, as (participant, round in
    which it began). `seconds` are those of everybody who is there, `duration` those of the round; none, and
    None, without predicted times.
    """

    on_time: tuple[int, ...]
    late: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    arriving: tuple[tuple[int, int], ...] = ()
    seconds: Mapping[int, float] = field(default_factory=dict)
    duration: float | None = None


class Calendar:
    """The attendance of every round, worked out in order when it is asked for, and kept."""

    def __init__(
        self, settings: RoundSettings, participants: int, conditions: Conditions | None = None
    ) -> None:
        self.settings, self.conditions = settings, conditions or Conditions()
        self._participants = participants
        self._rounds: list[Attendance] = []
        self._clock = 0.0
        self._under_way: dict[int, tuple[int, float]] = {}  # participant -> when it began, when it arrives
        if self.conditions.dropout and len(self.conditions.dropout) != participants:
            raise ConfigError(
                f"there are {participants} participants but {len(self.conditions.dropout)} values of dropout"
            )
        settings.participants_in(0, participants)  # refuses a count that there can never be

    def round(self, round_index: int) -> Attendance:
        """The attendance of a round, counted from 0."""
        while len(self._rounds) <= round_index:
            self._rounds.append(self._next(len(self._rounds)))
        return self._rounds[round_index]

    def is_merged(self, participant: int, round_index: int) -> bool:
        """Whether what a participant begins in a round is merged in some round of the run."""
        if participant in self.round(round_index).on_time:
            return True
        later = range(round_index + 1, self.settings.rounds)
        return any((participant, round_index) in self.round(index).arriving for index in later)

    def _next(self, round_index: int) -> Attendance:
        """The round after those that are known."""
        conditions = self.conditions
        asked = [each for each in self._asked(round_index) if each not in self._under_way]
        absent = tuple(each for each in asked if self._is_absent(each, round_index))
        there = [each for each in asked if each not in absent]
        if conditions.seconds is None:
            return Attendance(tuple(there), absent=absent)
        seconds = {each: conditions.seconds(each, round_index) for each in there}
        limit = math.inf if conditions.deadline is None else conditions.deadline
        late = tuple(each for each in there if seconds[each] > limit)
        duration = max(seconds.values(), default=0.0)
        if conditions.deadline is not None and (late or not there):
            duration = conditions.deadline
        begin, self._clock = self._clock, self._clock + duration
        arriving = {
            each: began for each, (began, arrival) in self._under_way.items() if arrival <= self._clock
        }
        for each in arriving:
            del self._under_way[each]
        if conditions.late == "downweight":
            self._under_way |= {each: (round_index, begin + seconds[each]) for each in late}
        on_time = tuple(each for each in there if each not in late)
        return Attendance(on_time, late, absent, tuple(sorted(arriving.items())), seconds, duration)

    def _asked(self, round_index: int) -> list[int]:
        """A draw of those that qualify."""
        qualifies = self.conditions.qualifies
        eligible = [
            each for each in range(self._participants) if qualifies is None or qualifies(each, round_index)
        ]
        count = self.settings.count
        if not eligible or (count is not None and count >= len(eligible)):
            return eligible
        return [eligible[index] for index in self.settings.participants_in(round_index, len(eligible))]

    def _is_absent(self, participant: int, round_index: int) -> bool:
        if not self.conditions.dropout:
            return False
        draw = chance(self.settings.seed, round_index, participant, OfRound.ABSENCE)
        return draw < self.conditions.dropout[participant]
