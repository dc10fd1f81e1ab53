"""Strides: different for groups that meet, and spread evenly."""

from __future__ import annotations

import math

import pytest
from handmade_maps import map_of, resnet18_map, self_meeting_map

from msfusion.width.groups import Place
from msfusion.windows.strides import colour_meetings, kronecker_strides


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
