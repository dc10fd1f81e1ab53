"""Every schedule against its definition."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from handmade_maps import draw_map, meeting_map, self_meeting_map
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.slices import checked_units
from msfusion.windows import (
    SCHEDULES,
    Schedule,
    double_shift,
    full,
    random,
    rolling,
    static,
    window_size,
)
from msfusion.windows.strides import colour_meetings, kronecker_strides


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("ratio", "units", "held"),
    [
        (0.1, 30, 3),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.1 + 0.2, 10, 3),
        (0.25, 10, 3),
        (1e-9, 10, 1),
        (1.0, 4096, 4096),
        (0.7, 10, 7),
        (0.07, 100, 7),
    ],
)
def test_window_size(ratio: float, units: int, held: int) -> None:
    assert window_size(ratio, units) == held


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, math.nan, math.inf])
@pytest.mark.parametrize("schedule", [double_shift, rolling, static, random])
def test_impossible_ratios(schedule: Schedule, ratio: float) -> None:
    with pytest.raises(ConfigError, match="greater than 0 and at most 1"):
        schedule(meeting_map(), 0, 0, ratio, participants=2)


@pytest.mark.parametrize("schedule", [SCHEDULES[name] for name in SCHEDULES])
def test_impossible_participants_and_rounds(schedule: Schedule) -> None:
    for participant, participants in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="no participant"):
            schedule(meeting_map(), participant, 0, 0.5, participants=participants)
    with pytest.raises(ConfigError, match="no round -1"):
        schedule(meeting_map(), 0, -1, 0.5, participants=2)


@settings(max_examples=60)
@given(st.data())
def test_every_window_is_valid_and_repeatable(data: st.DataObject) -> None:
    width_map = draw_map(data)
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    participants = data.draw(st.integers(1, 6))
    arguments = (
        data.draw(st.integers(0, participants - 1)),
        data.draw(st.integers(0, 1000)),
        data.draw(st.floats(0.01, 1.0)),
    )
    seed = data.draw(st.integers(0, 3))
    window = SCHEDULES[name](width_map, *arguments, participants=participants, seed=seed)
    checked_units(width_map, window)
    for group in width_map.groups:
        held = group.units if name == "full" else window_size(arguments[2], group.units)
        assert len(window[group.name]) == held
        assert window[group.name].dtype == torch.long
    assert same(window, SCHEDULES[name](width_map, *arguments, participants=participants, seed=seed))


def test_double_shift_is_the_formula() -> None:
    width_map = meeting_map(64, 128)
    strides = kronecker_strides(2)
    for participant, round_index in itertools.product(range(10), (0, 1, 5, 77)):
        window = double_shift(width_map, participant, round_index, 0.25, participants=10)
        for name, units in (("rows", 64), ("columns", 128)):
            colour = colour_meetings(width_map)[name]
            place = (participant, 3 * participant)[colour]  # 3 is coprime to 10 and near to 2.5
            start = math.floor(units * (Fraction(place, 10) + round_index * strides[colour])) % units
            assert window[name].tolist() == [(start + j) % units for j in range(units // 4)]


@pytest.mark.parametrize("round_index", [0, 3])
def test_double_shift_holds_every_unit_equally_often(round_index: int) -> None:
    for width_map in (meeting_map(), self_meeting_map()):
        held: Counter[int] = Counter()
        for participant in range(8):
            window = double_shift(width_map, participant, round_index, 0.25, participants=8)
            held.update(window[width_map.groups[0].name].tolist())
        assert set(held.values()) == {2}


def test_a_shift_between_participants_can_be_given() -> None:
    width_map = meeting_map(64, 128)
    # half of each window is shared with the neighbour: D = (1 - 1/2) * r * K
    starts = [double_shift(width_map, p, 0, 0.25, participants=10, shift=0.125)["rows"][0] for p in range(4)]
    assert starts == [0, 8, 16, 24]
    window = double_shift(width_map, 1, 0, 0.25, participants=10, shift={"rows": 0.0})
    assert window["rows"][0] == 0
    assert window["columns"][0] == 38  # place 3 of 10
    standing = double_shift(width_map, 3, 0, 0.25, participants=10, shift=0.0)
    assert same(standing, static(width_map, 3, 0, 0.25, participants=10))


def test_rolling_and_static() -> None:
    width_map = meeting_map(8, 4)
    assert rolling(width_map, 1, 6, 0.5, participants=2)["rows"].tolist() == [6, 7, 0, 1]
    assert rolling(width_map, 1, 6, 0.5, participants=2)["columns"].tolist() == [2, 3]
    assert static(width_map, 1, 6, 0.5, participants=2)["rows"].tolist() == [0, 1, 2, 3]
    assert full(width_map, 1, 6, participants=2)["rows"].tolist() == list(range(8))


def test_random_windows_are_independent() -> None:
    width_map = self_meeting_map(64)
    draws = [
        tuple(random(width_map, p, t, 0.25, participants=4, seed=s)["g"].tolist())
        for p, t, s in itertools.product(range(4), range(4), range(2))
    ]
    assert len(set(draws)) == len(draws)
    assert all(list(draw) == sorted(draw) for draw in draws)
    counts = Counter(unit for draw in draws for unit in draw)
    assert len(counts) == 64  # 32 draws of 16: each unit is held about 8 times
    assert draws[0] == FIRST_DRAW, "random windows must be the same on every machine and in every version"


FIRST_DRAW = (8, 10, 12, 18, 21, 30, 31, 34, 46, 47, 48, 50, 51, 55, 58, 59)


def test_no_rounding_error_in_late_rounds() -> None:
    width_map = meeting_map(64, 128)
    stride = kronecker_strides(2)[colour_meetings(width_map)["rows"]]
    window = double_shift(width_map, 9, 10**12, 0.25, participants=10)
    assert window["rows"][0] == math.floor(64 * (Fraction(9, 10) + 10**12 * stride)) % 64
