"""Strides: different for groups that meet, and spread evenly."""

from __future__ import annotations

import math

import pytest
from handmade_maps import map_of, meeting_map, resnet18_map, self_meeting_map

from msfusion.width.groups import Place
from msfusion.windows import coverage, double_shift
from msfusion.windows.strides import colour_meetings, kronecker_strides, place_factor, places


def test_groups_that_meet_have_different_strides() -> None:
    width_map = resnet18_map()
    colours = colour_meetings(width_map)
    assert set(colours.values()) == {0, 1, 2}
    for pair in width_map.meetings:
        assert len({colours[name] for name in pair}) == len(pair)


def test_colours_of_a_group_that_meets_itself_and_nothing() -> None:
    alone = map_of({"a": (4,), "b": (4,)}, {"a": [Place("a", 0, 0, 4)], "b": [Place("b", 0, 0, 4)]})
    assert colour_meetings(alone) == {"a": 0, "b": 0}
    assert colour_meetings(self_meeting_map()) == {"g": 0}


def test_the_strides_solve_their_equation() -> None:
    assert float(kronecker_strides(1)[0]) == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-15)
    for count in range(1, 8):
        strides = [float(s) for s in kronecker_strides(count)]
        y = strides[0]
        assert y**count + y ** (count + 1) == pytest.approx(1, abs=1e-14)
        assert strides == pytest.approx([y**power for power in range(1, count + 1)], abs=1e-14)


@pytest.mark.parametrize("participants", [1, 2, 3, 4, 6, 10, 12, 97])
def test_every_place_is_somebodys_in_every_group(participants: int) -> None:
    width_map = resnet18_map()
    everybody = [
        places(width_map, participant, participants, place_factor(participants, 0.25))
        for participant in range(participants)
    ]
    for group in width_map.groups:
        assert {each[group.name] for each in everybody} == set(range(participants))


def test_neighbours_in_one_group_are_a_window_apart_in_the_next() -> None:
    assert [place_factor(count, 0.25) for count in (1, 2, 4, 10, 20, 40)] == [1, 1, 1, 3, 3, 9]
    assert place_factor(10, 0.125) == 1
    assert place_factor(10, 1.0) == 9
    width_map = meeting_map(64, 128)
    assert [list(places(width_map, p, 10, 3).values()) for p in range(4)] == [[0, 0], [1, 3], [2, 6], [3, 9]]
    # ten windows of 1/16 of the weight each, nearly without overlap, instead of 0.44 along the diagonal
    assert coverage(width_map, double_shift, [0.25] * 10, 1) == [pytest.approx(0.6125, abs=0.02)]
