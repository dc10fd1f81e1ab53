"""A window schedule that goes by the weights: everybody holds the units with the largest weights, and some at random.

msfusion train --set method.name=windows --set method.schedule=top_k_windows:top_k
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import msfusion
from msfusion.seeds import seed_of

EXPLORED = 0.25
"""The share of a window that is drawn at random, anew for each participant and round: else most units never train."""


@msfusion.schedule("top_k")
def top_k(
    width_map: msfusion.WidthMap,
    participant: int,
    round_index: int,
    ratio: float,
    *,
    participants: int,
    seed: int = 0,
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """By group, the units whose parameters have the largest sum of squares, and others."""
    window = {}
    for number, group in enumerate(width_map.groups):
        size = msfusion.windows.window_size(ratio, group.units)
        draw = torch.Generator().manual_seed(seed_of(seed, round_index, participant, number))
        chance = torch.rand(group.units, generator=draw)
        best = norms(width_map, group, state).argsort(descending=True, stable=True)
        kept = best[: size - int(EXPLORED * size)]
        chance[kept] = -1
        window[group.name] = (
            torch.cat([kept, chance.argsort(descending=True)[: size - len(kept)]]).sort().values
        )
    return window


top_k.of_state = True  # type: ignore[attr-defined]  # the server gives it the weights, and the units travel


def norms(width_map: msfusion.WidthMap, group: msfusion.Group, state: Mapping[str, Tensor]) -> Tensor:
    """The sum of squares of what belongs to each unit, in all places of its group."""
    total = torch.zeros(group.units)
    for unit in range(group.units):
        window = {**width_map.full_window(), group.name: torch.tensor([unit])}
        cut = msfusion.extract(state, width_map, window)
        places = {place.tensor for place in group.places}
        total[unit] = sum(float(cut[name].square().sum()) for name in places if name in cut)
    return total
