"""The overlap of MSfusion's windows, round by round: what is asked for, what is applied, what the windows then have."""

from __future__ import annotations

import pytest
from handmade_maps import meeting_map
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.errors import ConfigError
from msfusion.windows import Overlap, coverage, double_shift, double_shift_for, even_overlap


def test_the_shapes_by_hand() -> None:
    assert [Overlap("constant", 0.7, 0.0, 5).wanted(t) for t in (0, 4)] == [0.7, 0.7]
    linear = Overlap("linear", 0.9, 0.5, 5)
    assert [linear.wanted(t) for t in range(6)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    cosine = Overlap("cosine", 1.0, 0.0, 5)
    assert [cosine.wanted(t) for t in range(5)] == pytest.approx(
        [1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6
    )


def test_what_is_applied_is_never_less_than_evenly_spread_windows_have() -> None:
    assert even_overlap([0.25] * 10) == pytest.approx(0.6)
    overlap = Overlap("linear", 1.0, 0.0, 3)
    assert [overlap.applied(t, [0.25] * 10) for t in range(3)] == pytest.approx([1.0, 0.6, 0.6])
    assert [float(overlap.shift(t, [0.25] * 10)) for t in range(3)] == pytest.approx([0.0, 0.1, 0.1])


@pytest.mark.parametrize(("wanted", "shared"), [(1.0, 64), (0.75, 48), (0.5, 32)])
def test_neighbours_share_as_many_units_as_asked_for(wanted: float, shared: int) -> None:
    width_map = meeting_map(256, 128)
    schedule = double_shift_for([0.25] * 4, Overlap("constant", wanted))
    windows = [schedule(width_map, p, 3, 0.25, participants=4)["rows"].tolist() for p in range(2)]
    assert len(set(windows[0]) & set(windows[1])) == shared


def test_as_little_as_possible_is_evenly_spread() -> None:
    width_map = meeting_map(64, 96)
    schedule = double_shift_for([0.25] * 10, Overlap("constant", 0.0))
    for participant in range(10):
        ours = schedule(width_map, participant, 5, 0.25, participants=10)
        even = double_shift(width_map, participant, 5, 0.25, participants=10)
        assert {name: units.tolist() for name, units in ours.items()} == {
            name: units.tolist() for name, units in even.items()
        }


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["constant", "linear", "cosine"]))
def test_every_unit_is_reached_in_the_end_whatever_the_overlap(start: float, end: float, shape: str) -> None:
    width_map = meeting_map(12, 8)
    schedule = double_shift_for([0.5] * 3, Overlap(shape, start, end, 60))  # type: ignore[arg-type]
    assert coverage(width_map, schedule, [0.5] * 3, 120)[-1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("linear", 1.5, 0.0, 1), "start is 1.5"),
        (("linear", 0.5, -0.1, 1), "end is -0.1"),
        (("linear", 0.5, 0.5, 0), "rounds is 0"),
    ],
)
def test_impossible_overlaps_are_refused(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Overlap(*arguments)


def test_windows_that_stay_where_they_are() -> None:
    width_map = meeting_map(40, 30)
    still, moving = double_shift_for([0.25] * 10, between_rounds=False), double_shift_for([0.25] * 10)
    for participant in range(10):
        first = moving(width_map, participant, 0, 0.25, participants=10)
        later = still(width_map, participant, 5, 0.25, participants=10)
        assert {name: units.tolist() for name, units in first.items()} == {
            name: units.tolist() for name, units in later.items()
        }
