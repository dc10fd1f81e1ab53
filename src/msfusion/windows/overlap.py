"""How much of its window a participant shares with its neighbour, round by round.

With a distance D between neighbouring windows of w units the overlap is 1 - D/w. Without a setting the windows
are spread evenly, D = K/N, which is the least overlap at which N windows hold every unit equally often:
1 - K/(N w), 60 % for N = 10 and r = 1/4. More overlap means that fewer units are held by more participants each
in a round; the shift between rounds still reaches them all. At 1 all participants hold the same window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from msfusion.setting import check, setting
from msfusion.width.groups import WidthMap
from msfusion.windows.schedules import Schedule, double_shift
from msfusion.windows.strides import place_factor

OverlapShape = Literal["constant", "linear", "cosine"]

GRAIN = 2**20
"""Overlaps become fractions with this denominator, so that all machines find the same windows."""


@dataclass(frozen=True)
class Overlap:
    """The overlap of each round. Raises ConfigError, naming the setting, for impossible values."""

    shape: OverlapShape = setting(
        "constant", "over the rounds: always start, or to end in a linear way, or cosine, slow at both ends"
    )
    start: float = setting(
        0.0, "share of its window that a participant has in common with its neighbour", ge=0, le=1
    )
    end: float = setting(0.0, "the same in the last round; by default as start", ge=0, le=1)
    rounds: int = setting(1, "over which it changes", ge=1)

    def __post_init__(self) -> None:
        check(self, prefix="the overlap's ")

    def wanted(self, round_index: int) -> float:
        """The overlap asked for in a round, 0 to 1; after the last of `rounds` it stays at its end."""
        if self.shape == "constant":
            return self.start
        progress = min(round_index / max(1, self.rounds - 1), 1.0)
        if self.shape == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress

    def applied(self, round_index: int, ratios: Sequence[float]) -> float:
        """The overlap that a round has, for participants of these width ratios: never less than evenly
        spread windows have, so that every unit is held by someone whenever N windows can hold them all.

        Where ratios differ it is that between windows of their mean.
        """
        return max(self.wanted(round_index), even_overlap(ratios))

    def shift(self, round_index: int, ratios: Sequence[float]) -> Fraction:
        """D/K in a round: the part of a group between neighbouring windows, at most 1/N."""
        apart = (1.0 - self.applied(round_index, ratios)) * sum(ratios) / len(ratios)
        return min(Fraction(round(apart * GRAIN), GRAIN), Fraction(1, len(ratios)))


@dataclass(frozen=True)
class Feedback:
    """An overlap that rises while participants disagree more than `target` about what they share, and falls
    while they disagree less: by `gain` times the difference after each round.

    Raises ConfigError, naming the setting, for impossible values.
    """

    start: float = setting(0.0, "in the first round", ge=0, le=1)
    target: float = setting(0.5, "with feedback: the disagreement that is aimed at", ge=0, le=1)
    gain: float = setting(0.2, "with feedback: how strongly the overlap follows", gt=0)

    def __post_init__(self) -> None:
        check(self, prefix="the overlap's ")

    def after(self, overlap: float, disagreement: float, ratios: Sequence[float]) -> float:
        """The overlap of the next round, given that of this one and the disagreement in it (0 to 1)."""
        return self.bounded(overlap + self.gain * (disagreement - self.target), ratios)

    def bounded(self, overlap: float, ratios: Sequence[float]) -> float:
        """At most 1, and never less than evenly spread windows have; on a grid, as all overlaps."""
        bounded = min(max(overlap, even_overlap(ratios), 0.0), 1.0)
        return round(bounded * GRAIN) / GRAIN


def even_overlap(ratios: Sequence[float]) -> float:
    """The overlap of evenly spread windows, 1 - K/(N w); negative where they leave gaps."""
    return 1.0 - 1.0 / sum(ratios)


def double_shift_for(
    ratios: Sequence[float],
    overlap: Overlap | None = None,
    *,
    between_rounds: bool = True,
    windows: Callable[..., dict[str, Tensor]] = double_shift,
) -> Schedule:
    """MSfusion's windows for participants of these width ratios, with an overlap of its own in each round.

    Spread evenly if `overlap` is None. Without `between_rounds` they stay where they are in the first round,
    which shows what that shift is good for. `windows` is `double_shift`, or what takes the same arguments.
    """
    factor = place_factor(len(ratios), sum(ratios) / len(ratios))

    def schedule(
        width_map: WidthMap, participant: int, round_index: int, ratio: float, **others: int
    ) -> dict[str, Tensor]:
        shift = None if overlap is None else overlap.shift(round_index, ratios)
        moved = round_index if between_rounds else 0
        return windows(width_map, participant, moved, ratio, shift=shift, factor=factor, **others)

    return schedule
