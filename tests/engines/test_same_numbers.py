"""The same numbers, whoever carries out the rounds: one process, several, a network, Flower, ranks without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import CASES, DATA, TEST, Case, Done, alone, apart, figures, rounds
from loopback import Loopback
from side_by_side import side_by_side

from msfusion.engines.processes import Processes
from msfusion.federated.engine import Engine

FIRST = 7
"""The number of participant 0's node."""


def by(case: Case, engine: Engine) -> Done:
    results = list(rounds(case, case.method(), engine))
    return Done(results, results[-1].state)


def processes(case: Case) -> Done:
    return by(case, Processes(workers=2))


def network(case: Case) -> Done:
    return by(case, Loopback(own=lambda _: case.method()))


def flower(case: Case) -> Done:
    pytest.importorskip("flwr", reason="needs flwr")
    from flower_grid import AGREED, QUICK, FakeGrid, participant

    from msfusion.engines.flower.engine import FlowerEngine

    nodes = {FIRST + who: participant(case.method, who, own, test=TEST) for who, own in enumerate(DATA)}
    return by(case, FlowerEngine(FakeGrid(nodes), [*map(len, DATA)], AGREED, QUICK))


def ranks(case: Case) -> Done:
    (done, *_) = side_by_side(2, lambda ranks: apart(case, case.made, ranks))
    return done


WITHOUT_A_CODEC = ("blocks, normed, late", "fresh, late", "small")
BY_A_CODEC = ("fresh, by a codec", "blocks, by a codec")
IN_CI = (WITHOUT_A_CODEC[0], BY_A_CODEC[0])


def cases() -> list[Any]:
    """By each engine each case that it carries."""
    found = [(name, carried) for name in WITHOUT_A_CODEC for carried in (processes, network, flower, ranks)]
    found += [(name, carried) for name in BY_A_CODEC for carried in (processes, network, flower)]
    return [
        pytest.param(name, carried, marks=[pytest.mark.release] * (name not in IN_CI))
        for name, carried in found
    ]


@pytest.mark.parametrize(("name", "carried"), cases())
def test_the_numbers_are_those_of_one_process(name: str, carried: Callable[[Case], Done]) -> None:
    expected, done = alone(CASES[name]), carried(CASES[name])
    assert [*done.state] == [*expected.state]
    for key, tensor in expected.state.items():
        assert torch.equal(done.state[key], tensor), key
    assert [*map(figures, done.results)] == [*map(figures, expected.results)]
