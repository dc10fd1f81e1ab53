"""What a participant's machine can bear, and the widest sub-model that fits into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from msfusion.costs import Costs
from msfusion.errors import ConfigError
from msfusion.setting import check, setting
from msfusion.width.groups import WidthMap
from msfusion.width.submodel import narrow
from msfusion.windows import static


@dataclass(frozen=True)
class Budget:
    """Limits of one participant; None where there is none. What is counted: `msfusion.costs`."""

    memory: int | None = setting(None, "peak bytes while it trains; in a configuration also '64 MB'", gt=0)
    flops_per_example: float | None = setting(None, "of one forward and backward pass", gt=0)
    bytes_per_round: int | None = setting(
        None, "what it sends and receives together; in a configuration also '500 kB'", gt=0
    )

    def __post_init__(self) -> None:
        check(self)

    def exceeded(self, costs: Costs) -> str | None:
        """The first limit that is not kept, as in `memory is 64,000 but 80,512 are needed`; None if all are."""
        for name, need in needs_of(costs).items():
            limit = getattr(self, name)
            if limit is not None and need > limit:
                return f"{name} is {limit:,.15g} but {need:,} are needed"
        return None


def needs_of(costs: Costs) -> dict[str, int]:
    """What a budget has limits for, by their names."""
    return {
        "memory": costs.peak_memory,
        "flops_per_example": costs.flops_per_example,
        "bytes_per_round": costs.bytes_down + costs.bytes_up,
    }


def ratios_of(width_map: WidthMap) -> list[float]:
    """The width ratios below 1, ascending, at which the window of some group gains a unit."""
    return sorted({units / group.units for group in width_map.groups for units in range(1, group.units)})


def largest_ratio(
    model: nn.Module, width_map: WidthMap, budget: Budget, costs: Callable[[nn.Module], Costs]
) -> float:
    """The largest width ratio at which a sub-model keeps within a budget, 1 if the whole model does.

    `costs` gives those of a module. Raises ConfigError where not even one unit of each group fits.
    """

    def exceeded(ratio: float) -> str | None:
        if ratio == 1:
            return budget.exceeded(costs(model))
        window = static(width_map, 0, 0, ratio, participants=1)
        return budget.exceeded(costs(narrow(model, width_map, window)))

    return largest_that_keeps([*ratios_of(width_map), 1.0], exceeded)


def largest_that_keeps(ratios: Sequence[float], exceeded: Callable[[float], str | None]) -> float:
    """The largest of some ascending ratios, at least one, at which no limit is exceeded.

    Costs grow with the ratio: a binary search. (The last is asked for first: the whole model has nothing to scale, and
    so can need a little less than one that is almost as wide.) Raises ConfigError where the first is too large.
    """
    if exceeded(ratios[-1]) is None:
        return ratios[-1]
    problem = exceeded(ratios[0])
    if problem is not None:
        raise too_small(problem)
    fits, too_large = 0, len(ratios) - 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if exceeded(ratios[middle]):
            too_large = middle
        else:
            fits = middle
    return ratios[fits]


def too_small(problem: str) -> ConfigError:
    """That not even the narrowest sub-model keeps within a budget, as `exceeded` says, and what to do."""
    smaller = "a smaller model or batch size" if problem.startswith("memory") else "a smaller model"
    return ConfigError(f"{problem} for the narrowest sub-model: give a larger budget, or choose {smaller}")
