"""What draws are for: the numbers that keep them apart are named in one file, and never change."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

import msfusion
from msfusion.seeds import OfGrowth, OfRound, OfSide, chance, seed_of


@pytest.mark.parametrize(
    ("draws", "numbers"),
    [
        (OfRound, {"MEASURING": 1, "ABSENCE": 2, "CAPACITY": 3, "MACHINE": 4}),
        (OfGrowth, {"PRETRAINING": 1, "OPERATOR": 2, "FITTING": 3}),
        (OfSide, {"PARTICIPANT": 0, "SERVER": 1}),
    ],
)
def test_numbers_never_change_and_none_is_there_twice(draws: type[IntEnum], numbers: dict[str, int]) -> None:
    assert {name: draw.value for name, draw in draws.__members__.items()} == numbers
    assert len({seed_of(7, 1, 2, draw) for draw in draws}) == len(numbers)


def test_a_seed_of_a_path_never_changes() -> None:
    assert seed_of(0) == 3717377837946358015
    assert seed_of(7, 1, 2, OfRound.ABSENCE) == seed_of(7, 1, 2, 2) == 5678512462904837103
    assert chance(7, 1, 2, OfRound.ABSENCE) == pytest.approx(0.6156655548767437, abs=1e-15)


def test_no_draw_of_a_run_has_a_number_without_a_name() -> None:
    """The last part of a path is a name, but for zeros that only make it longer."""
    for path in Path(msfusion.__file__).parent.rglob("*.py"):
        calls = re.findall(r"(?:seed_of|chance)\(([^()]*)\)", path.read_text(encoding="utf-8"))
        assert not [call for call in calls if re.search(r"(^|, )[1-9][0-9]*\b", call)], path
