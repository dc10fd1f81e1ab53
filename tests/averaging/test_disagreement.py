"""How much participants disagree: by hand, at both ends, and whatever the order."""

from __future__ import annotations

import itertools

import pytest
import torch
from handmade_maps import map_of, meeting_map, random_state
from torch import Tensor

from msfusion.averaging.disagreement import Disagreement
from msfusion.width.groups import Place, State, WidthMap
from msfusion.width.slices import extract
from msfusion.windows import double_shift


def three_units() -> tuple[WidthMap, dict[str, Tensor]]:
    width_map = map_of({"bias": (3,)}, {"g": [Place("bias", 0, 0, 3)]})
    return width_map, {"bias": torch.tensor([1.0, 1.0, 1.0])}


def value_of(state: State, width_map: WidthMap, updates: list) -> float:
    disagreement = Disagreement(state, width_map)
    for window, sub_state, weight in updates:
        disagreement.add({"g": torch.tensor(window)}, {"bias": torch.tensor(sub_state)}, weight)
    return disagreement.value()


def test_by_hand() -> None:
    width_map, state = three_units()
    # unit 1 is shared: steps +2 (weight 1) and +4 (weight 3): mean 3.5, mean square (4 + 3 * 16) / 4 = 13
    updates = [([0, 1], [9.0, 3.0], 1.0), ([1, 2], [5.0, -7.0], 3.0)]
    assert value_of(state, width_map, updates) == pytest.approx((13 - 3.5**2) / 13)


def test_both_ends() -> None:
    width_map, state = three_units()
    assert value_of(state, width_map, [([0, 1], [2.0, 3.0], 1.0), ([1, 2], [3.0, 4.0], 5.0)]) == 0.0
    assert value_of(state, width_map, [([0, 1], [2.0, 3.0], 2.0), ([1, 2], [-1.0, 4.0], 2.0)]) == 1.0
    assert value_of(state, width_map, [([0], [5.0], 1.0), ([2], [-5.0], 1.0)]) == 0.0  # nothing is shared
    assert value_of(state, width_map, [([0, 1], [1.0, 1.0], 1.0), ([1, 0], [1.0, 1.0], 1.0)]) == 0.0
    assert value_of(state, width_map, []) == 0.0


def test_the_order_of_updates_does_not_matter() -> None:
    width_map = meeting_map(8, 12)
    state = random_state(width_map)
    updates = []
    for participant in range(4):
        window = double_shift(width_map, participant, 1, 0.5, participants=4)
        trained = random_state(width_map, seed=participant + 1)
        updates.append((window, extract(trained, width_map, window), 0.1 + participant))
    values = set()
    for order in itertools.permutations(updates):
        disagreement = Disagreement(state, width_map)
        for window, sub_state, weight in order:
            disagreement.add(window, sub_state, weight)
        values.add(disagreement.value())
    assert len(values) == 1
    assert 0 < values.pop() < 1
