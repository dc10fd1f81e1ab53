"""What a participant's machine can bear, and the widest sub-model that fits into it."""

from __future__ import annotations

from collections.abc import Callable
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

    memory: int | None = setting(None, "peak bytes while it trains", gt=0)
    flops_per_example: float | None = setting(None, "of one forward and backward pass", gt=0)
    bytes_per_round: int | None = setting(None, "what it sends and receives together", gt=0)

    def __post_init__(self) -> None:
        check(self)

    def exceeded(self, costs: Costs) -> str | None:
        """The first limit that is not kept, as in `memory is 64,000 but 80,512 are needed`; None if all are."""
        needs = {
            "memory": costs.peak_memory,
            "flops_per_example": costs.flops_per_example,
            "bytes_per_round": costs.bytes_down + costs.bytes_up,
        }
        for name, need in needs.items():
            limit = getattr(self, name)
            if limit is not None and need > limit:
                return f"{name} is {limit:,.0f} but {need:,} are needed"
        return None


def largest_ratio(
    model: nn.Module, width_map: WidthMap, budget: Budget, costs: Callable[[nn.Module], Costs]
) -> float:
    """The largest width ratio at which a sub-model keeps within a budget, 1 if the whole model does.

    Costs grow with the ratio, and change only where the window of some group gains a unit: a binary search
    over these ratios. (The whole model is asked for first: it has nothing to scale, and so can need a little
    less than one that is almost as wide.) `costs` gives those of a module. Raises ConfigError where not even
    one unit of each group fits.
    """
    problem = budget.exceeded(costs(model))
    if problem is None:
        return 1.0
    ratios = sorted({units / group.units for group in width_map.groups for units in range(1, group.units)})

    def exceeded(ratio: float) -> str | None:
        window = static(width_map, 0, 0, ratio, participants=1)
        return budget.exceeded(costs(narrow(model, width_map, window)))

    if ratios:
        problem = exceeded(ratios[0])
    if problem is not None:
        raise ConfigError(
            f"{problem} for the narrowest sub-model: give a larger budget, or choose a smaller model or batch size"
        )
    fits, too_large = 0, len(ratios)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if exceeded(ratios[middle]):
            too_large = middle
        else:
            fits = middle
    return ratios[fits]
