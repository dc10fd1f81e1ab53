"""Windows of copies: each holds as many copies of one unit as of any other, in every round, also where groups meet."""

from __future__ import annotations

import hashlib

import pytest
import torch
from handmade_maps import meeting_map, resnet18_map, self_meeting_map
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.errors import ConfigError
from msfusion.width.groups import WidthMap
from msfusion.windows import Overlap, double_shift, double_shift_for, held_sizes, small_sizes, transversal

MAPS = {"meeting": meeting_map(24, 60), "itself": self_meeting_map(24), "resnet": resnet18_map()}


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MAPS)),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.integers(0, 20),
    st.integers(0, 4),
)
def test_every_window_is_a_transversal_listed_by_class(
    name: str, one: float, other: float, round_index: int, participant: int
) -> None:
    width_map, smallest, ratio = MAPS[name], min(one, other), max(one, other)
    small, held = small_sizes(width_map, smallest), held_sizes(width_map, ratio, smallest)
    window = transversal(
        width_map, participant, round_index, ratio, participants=5, smallest=smallest, seed=3
    )
    for group in width_map.groups:
        units, classes = window[group.name], small[group.name]
        assert group.units % classes == held[group.name] % classes == 0
        assert len(units) == len(set(units.tolist())) == held[group.name]
        assert torch.equal(
            units.reshape(-1, classes) % classes, torch.arange(classes).expand(len(units) // classes, -1)
        )


@pytest.mark.parametrize(
    ("units", "ratio", "small"),
    [(64, 0.25, 16), (10, 0.25, 2), (7, 0.25, 1), (12, 0.3, 4), (9, 1.0, 9), (1, 0.1, 1), (30, 0.1, 3)],
)
def test_the_small_model_has_the_largest_divisor_that_the_ratio_allows(
    units: int, ratio: float, small: int
) -> None:
    assert small_sizes(self_meeting_map(units), ratio) == {"g": small}


def test_a_wider_participant_holds_a_multiple_and_no_more_than_its_ratio_allows() -> None:
    assert held_sizes(self_meeting_map(12), 0.5, 0.25) == {"g": 6}
    assert held_sizes(self_meeting_map(20), 0.5, 0.25) == {"g": 10}
    assert held_sizes(self_meeting_map(12), 0.4, 0.3) == {"g": 4}


def test_without_a_group_that_meets_itself_windows_are_those_of_msfusion_in_another_order() -> None:
    width_map = meeting_map(32, 64)
    for round_index in range(5):
        ours = transversal(width_map, 2, round_index, 0.25, participants=5, smallest=0.25)
        theirs = double_shift(width_map, 2, round_index, 0.25, participants=5)
        assert all(torch.equal(ours[name].sort().values, theirs[name].sort().values) for name in ours)


def test_in_a_group_that_meets_itself_all_classes_meet_in_other_copies_from_round_to_round() -> None:
    width_map: WidthMap = self_meeting_map(16)
    met = torch.eye(16, dtype=torch.bool)
    for round_index in range(60):
        for participant in range(4):
            (units,) = transversal(
                width_map, participant, round_index, 0.25, participants=4, smallest=0.25
            ).values()
            met[units[:, None], units] = True
    other_class = torch.arange(16) % 4 != (torch.arange(16) % 4)[:, None]
    assert bool(met[other_class].all())
    assert not bool(met[~other_class & ~torch.eye(16, dtype=torch.bool)].any())


def test_a_ratio_above_one_or_an_unknown_participant_is_refused() -> None:
    with pytest.raises(ConfigError):
        transversal(meeting_map(), 0, 0, 1.5, participants=2, smallest=0.5)
    with pytest.raises(ConfigError):
        transversal(meeting_map(), 2, 0, 0.5, participants=2, smallest=0.5)


def test_windows_of_fresh_slices_are_what_they_were_before_there_were_copies() -> None:
    digest = hashlib.sha256()
    schedule = double_shift_for((0.25, 0.5, 0.3), Overlap("linear", 0.3, 0.8, 9))
    for width_map in MAPS.values():
        for round_index in range(9):
            for participant, ratio in enumerate((0.25, 0.5, 0.3)):
                for window in (
                    schedule(width_map, participant, round_index, ratio, participants=3, seed=5),
                    double_shift(width_map, participant, round_index, ratio, participants=3, seed=5),
                ):
                    digest.update(repr({name: units.tolist() for name, units in window.items()}).encode())
    assert digest.hexdigest() == "f2dfd38b3d7f8a0a6d4f336eb34f5560ee8c844702d3a4051cc50ef47efa015f"
