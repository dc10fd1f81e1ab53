"""Rounds on shards, side by side, are the rounds of one process: the same bits, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from engine_cases import CASES, alone, apart, figures
from side_by_side import side_by_side

RELEASE = {
    "heterofl", "feddropout", "fedavg, trimmed", "copies, median", "blocks kept", "fresh", "fresh, late", "copies",
}  # fmt: skip
"""What the other cases have in it too, or nearly."""


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("fresh, normed", 1),
        ("blocks", 1),
        *(
            pytest.param(name, 3, marks=[pytest.mark.release] * (name in RELEASE))
            for name, case in CASES.items()
            if case.codec is None
        ),
    ],
)
def test_ranks_side_by_side_end_with_the_bits_of_one_process(name: str, count: int) -> None:
    case = CASES[name]
    expected = alone(case)
    for done in side_by_side(count, lambda ranks: apart(case, case.made, ranks)):
        assert [*done.state] == [*expected.state]
        for key, tensor in expected.state.items():
            assert torch.equal(done.state[key], tensor), key
        assert [*map(figures, done.results)] == [*map(figures, expected.results)]
