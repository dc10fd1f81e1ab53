"""How much participants disagree about the entries that several of them held, relative to the size of their
updates.

With u_p = theta_p - theta the update of participant p, and mean_a the average over the holders of an entry with
the weights of fusion,

    disagreement = sum_e (mean_a u_p[e]^2 - (mean_a u_p[e])^2) / sum_e mean_a u_p[e]^2

over the entries e that at least two hold: 0 where all made the same update, and 1 where updates cancel out. The
sums are exact before they are rounded, so the order in which updates arrive does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from msfusion.averaging.fusion import Accumulator
from msfusion.width.groups import State, WidthMap
from msfusion.width.slices import plan


class Disagreement:
    """Takes in a round's updates one by one beside the `Accumulator`; memory: three tensors for each of the
    state's.
    """

    def __init__(self, state: State, width_map: WidthMap) -> None:
        self._width_map = width_map
        self._state = {
            name: tensor
            for name, tensor in state.items()
            if tensor.is_floating_point() and width_map.aliases.get(name, name) == name
        }
        nothing = {
            name: tensor.new_zeros(tensor.shape, dtype=torch.float64) for name, tensor in self._state.items()
        }
        self._squares, self._means = Accumulator(nothing, width_map), Accumulator(nothing, width_map)
        self._holders = {
            name: torch.zeros_like(tensor, dtype=torch.int32) for name, tensor in nothing.items()
        }

    def add(self, window: Mapping[str, Tensor], sub_state: State, weight: float) -> None:
        """One participant's tensors, trained under a window, with its weight. Raises UpdateError as fusion does."""
        cuts = plan(self._width_map, window)
        steps = {
            name: sub_state[name].detach().to(torch.float64) - cuts[name].take(old.detach()).to(torch.float64)
            for name, old in self._state.items()
        }
        self._means.add(window, steps, weight)
        self._squares.add(window, {name: step.square() for name, step in steps.items()}, weight)
        for name, holders in self._holders.items():
            cuts[name].put(holders, cuts[name].take(holders) + 1)

    def value(self) -> float:
        """Between 0 and 1; 0 where nobody shared an entry, or nobody changed one."""
        means, squares = self._means.result(), self._squares.result()
        apart, size = [], []
        for name, holders in self._holders.items():
            shared = holders > 1
            square = squares[name][shared]
            apart.append(float((square - means[name][shared].square()).clamp_min(0).sum()))
            size.append(float(square.sum()))
        total = math.fsum(size)
        return math.fsum(apart) / total if total > 0 else 0.0
