"""Entry coverage: against a loop over all entries, closed forms, and what the design promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from handmade_maps import draw_map, map_of, meeting_map, resnet18_map, self_meeting_map
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.errors import ConfigError
from msfusion.width.groups import Place, WidthMap
from msfusion.windows import SCHEDULES, Schedule, coverage, double_shift, full, rolling, static


def by_looping_over_entries(
    width_map: WidthMap, schedule: Schedule, ratios: list[float], present: list[list[int]]
) -> list[float]:
    held = {name: torch.zeros(width_map.shapes[name], dtype=torch.bool) for name in width_map.parameters}
    shares = []
    for round_index, participants in enumerate(present):
        for p in participants:
            window = schedule(width_map, p, round_index, ratios[p], participants=len(ratios), seed=5)
            for name, mask in held.items():
                positions = width_map.axis_positions(name, window)
                axes = [positions.get(a, torch.arange(n)).tolist() for a, n in enumerate(mask.shape)]
                for entry in itertools.product(*axes):
                    mask[entry] = True
        shares.append(sum(int(m.sum()) for m in held.values()) / sum(m.numel() for m in held.values()))
    return shares


@settings(max_examples=30)
@given(st.data())
def test_it_agrees_with_a_loop_over_entries(data: st.DataObject) -> None:
    width_map = draw_map(data)
    schedule = SCHEDULES[data.draw(st.sampled_from(sorted(SCHEDULES)))]
    ratios = data.draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3))
    everyone = st.lists(st.integers(0, len(ratios) - 1), unique=True)
    present = data.draw(st.lists(everyone, min_size=1, max_size=3))
    expected = by_looping_over_entries(width_map, schedule, ratios, present)
    found = coverage(width_map, schedule, ratios, len(present), seed=5, present=present.__getitem__)
    assert found == pytest.approx(expected, abs=1e-12)


def test_closed_forms() -> None:
    width_map = meeting_map(64, 64)
    assert coverage(width_map, full, [0.1, 0.1], 2) == [1.0, 1.0]
    assert coverage(width_map, static, [0.5] * 3, 4) == [0.25] * 4
    # rolling: units are held together if they are less than w apart on the circle
    assert coverage(width_map, rolling, [0.25], 64)[-1] == (2 * 16 - 1) / 64
    # evenly spread disjoint windows: the diagonal blocks
    assert coverage(width_map, double_shift, [0.25] * 4, 1) == [0.25]


def test_a_tied_tensor_counts_once_and_unnarrowed_entries_are_held() -> None:
    shapes = {"embed": (2, 4), "head": (2, 4), "bias": (8,)}
    places = {"g": [Place("embed", 1, 0, 4), Place("head", 1, 0, 4)]}
    width_map = map_of(shapes, places, aliases={"head": "embed"})
    assert coverage(width_map, static, [0.5], 1) == [(4 + 8) / 16]


def test_nobody_present_holds_nothing() -> None:
    found = coverage(meeting_map(), static, [0.5, 0.5], 3, present=lambda t: [1] if t == 1 else [])
    assert found == [0.0, 0.25, 0.25]


def test_a_map_without_groups_or_parameters() -> None:
    assert coverage(map_of({"bias": (3,)}, {}), static, [0.5], 1) == [1.0]
    assert coverage(map_of({}, {}), static, [0.5], 1) == [1.0]


def test_an_unknown_participant_is_refused() -> None:
    with pytest.raises(ConfigError, match="no participant 2"):
        coverage(meeting_map(), static, [0.5, 0.5], 1, present=lambda _: [2])


def test_different_strides_reach_what_equal_strides_cannot() -> None:
    width_map = meeting_map(64, 128)
    assert coverage(width_map, double_shift, [0.25] * 10, 12)[-1] >= 0.99
    assert coverage(width_map, rolling, [0.25] * 10, 12)[-1] < 0.25
    assert coverage(width_map, rolling, [0.25] * 10, 128)[-1] == (16 + 32 - 1) / 64


@pytest.mark.parametrize("units", [64, 100, 512])
def test_a_group_that_meets_itself_is_reached_too(units: int) -> None:
    width_map = self_meeting_map(units)
    assert coverage(width_map, double_shift, [0.25] * 10, 12)[-1] >= 0.99
    assert coverage(width_map, rolling, [0.25] * 10, 12)[-1] < 0.55


@pytest.mark.parametrize(
    ("participants", "ratio", "rounds"), [(1, 0.25, 120), (2, 0.125, 300), (4, 0.25, 40)]
)
def test_few_narrow_participants_reach_everything_in_the_end(
    participants: int, ratio: float, rounds: int
) -> None:
    assert coverage(meeting_map(64, 96), double_shift, [ratio] * participants, rounds)[-1] >= 0.99


@pytest.mark.release
@pytest.mark.slow
def test_resnet18_as_promised() -> None:
    width_map = resnet18_map()
    assert coverage(width_map, double_shift, [0.25] * 10, 12)[-1] >= 0.99
    assert coverage(width_map, rolling, [0.25], 512)[-1] == pytest.approx(0.536, abs=5e-4)
