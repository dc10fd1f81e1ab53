"""The engine of Flower: one message for each task, and whatever may come back."""

from __future__ import annotations

import pytest
from averaging import Counting, some_data

pytest.importorskip("flwr", reason="needs flwr")

from flower_grid import AGREED, QUICK, FakeGrid, participant

from msfusion.engines.flower.engine import FlowerEngine
from msfusion.federated.engine import InProcess
from msfusion.federated.rounds import RoundSettings, run_rounds


def test_it_ends_with_the_bits_of_one_process() -> None:
    data = some_data(3)
    grid = FakeGrid({70 + who: participant(Counting, who, own) for who, own in enumerate(data)})
    engine = FlowerEngine(grid, [len(own) for own in data], AGREED, QUICK)
    there = run_rounds(Counting(), data, RoundSettings(rounds=3), engine=engine)
    here = run_rounds(Counting(), data, RoundSettings(rounds=3), engine=InProcess())
    for one, other in zip(there, here, strict=True):
        assert one.state["weight"].equal(other.state["weight"])
