"""Robust averages: against their definition entry by entry, whatever the order, and against one that lies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import run_rounds
from test_fusion import some_updates
from test_kin import Given, drawn_copies, drawn_updates, entries, origins, two_groups
from torch import Tensor

from msfusion.averaging.fusion import Accumulator
from msfusion.averaging.robust import Average, RobustAccumulator, RobustKin, robust
from msfusion.errors import ConfigError
from msfusion.experiment.config import load_config
from msfusion.experiment.setup import prepare
from msfusion.width.copies import Copies
from msfusion.width.groups import State
from msfusion.width.slices import extract

from handmade_maps import draw_map, random_state  # isort: skip
from quick import QUICK_SETTINGS  # isort: skip

AVERAGES: list[Average] = ["median", "trimmed"]


def kept(values: Sequence[float], average: Average) -> list[float]:
    """The values that count, by the definition."""
    ordered, n = sorted(values), len(values)
    if average == "median":
        return ordered[(n - 1) // 2 : n - (n - 1) // 2]
    k = max(1, n // 5) if n >= 3 else 0
    return ordered[k : n - k]


@pytest.mark.parametrize("average", AVERAGES)
def test_by_hand(average: Average) -> None:
    values = torch.tensor(
        [[5.0, 1.0], [2.0, torch.nan], [1e9, 3.0], [4.0, torch.nan], [-1e9, torch.nan]]
    ).double()
    found = robust(values, average)
    middle = 4.0 if average == "median" else (2.0 + 4.0 + 5.0) / 3
    assert found.mean.tolist() == [pytest.approx(middle), 2.0]
    assert found.low.tolist() == [4.0 if average == "median" else 2.0, 1.0]
    assert found.high.tolist() == [4.0 if average == "median" else 5.0, 3.0]


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=13), st.sampled_from(AVERAGES))
def test_by_the_definition(values: list[float], average: Average) -> None:
    found = robust(torch.tensor(values, dtype=torch.float64).unsqueeze(1), average)
    assert float(found.mean) == pytest.approx(statistics.fmean(kept(values, average)), abs=1e-6)
    assert float(found.low) <= float(found.mean) <= float(found.high)
    if average == "median":
        assert float(found.mean) == pytest.approx(statistics.median(values), abs=1e-6)


@settings(max_examples=20)
@given(st.data())
def test_each_entry_is_the_robust_average_of_its_holders(data: st.DataObject) -> None:
    width_map, average = draw_map(data), data.draw(st.sampled_from(AVERAGES))
    state = random_state(width_map, dtype=torch.float64)
    updates = some_updates(data, width_map, torch.float64, data.draw(st.integers(1, 6)))

    def fuse_updates(order: Sequence[int]) -> dict[str, Tensor]:
        accumulator = RobustAccumulator(state, width_map, average)
        for number in order:
            accumulator.add(*updates[number])
        return accumulator.result()

    found, whole = (
        fuse_updates(range(len(updates))),
        Copies(width_map, {g.name: g.units for g in width_map.groups}),
    )
    for name, tensor in state.items():
        held: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
        for window, sub_state, _ in updates:
            for here, there in entries(whole, name, window):
                held[there].append(float(sub_state[name][here]))
        expected = tensor.clone()
        for there, values in held.items():
            expected[there] = statistics.fmean(kept(values, average))
        torch.testing.assert_close(found[name], expected)
    shuffled = fuse_updates(data.draw(st.permutations(range(len(updates)))))
    assert all(torch.equal(found[name], shuffled[name]) for name in state)


def test_a_part_of_an_update_and_nobody_s() -> None:
    copies = two_groups()
    state = {**random_state(copies.width_map), "seen": torch.tensor(3)}
    window = {"rows": torch.tensor([0, 1]), "columns": torch.tensor([0, 1, 2])}
    trained = {"weight": torch.full((2, 3), 4.0), "seen": torch.tensor(7)}
    accumulator = RobustAccumulator(state, copies.width_map, "median")
    assert all(torch.equal(state[name], tensor) for name, tensor in accumulator.result().items())
    rest = extract(state, copies.width_map, window)
    accumulator.add_part(window, trained, 1.0, share=0.25, rest=rest)
    found = accumulator.result()
    expected = state["weight"].clone()
    expected[:2, :3] = 0.25 * 4.0 + 0.75 * expected[:2, :3]
    torch.testing.assert_close(found["weight"], expected)
    assert int(found["seen"]) == 7


def fused_kin(
    state: State, copies: Copies, updates: Sequence[Given], apart: float, average: Average
) -> dict[str, Tensor]:
    accumulator = RobustKin(state, copies, {}, average)
    for each in updates:
        accumulator.add_update(
            each.window, each.trained, each.weight, received=each.received, share=each.share
        )
    return accumulator.result(apart)


@pytest.mark.release
@settings(max_examples=20)
@given(st.data())
def test_kin_move_by_the_robust_average_of_what_each_made_of_its_copies(data: st.DataObject) -> None:
    copies, average = drawn_copies(data), data.draw(st.sampled_from(AVERAGES))
    state = random_state(copies.width_map, dtype=torch.float64)
    updates = drawn_updates(data, copies, torch.float64, state)
    apart = data.draw(st.sampled_from([0.0, 0.6, 1.0]))
    found = fused_kin(state, copies, updates, apart, average)
    for name, tensor in state.items():
        expected = by_the_definition(name, tensor, copies, updates, apart, average)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)
    shuffled = fused_kin(state, copies, data.draw(st.permutations(updates)), apart, average)
    assert all(torch.equal(found[name], shuffled[name]) for name in state)


def by_the_definition(
    name: str, old: Tensor, copies: Copies, updates: Sequence[Given], apart: float, average: Average
) -> Tensor:
    """Entry by entry: the common change of the kin, and what holders add within the range that was kept."""
    kin, trained = origins(copies, name), name in copies.width_map.parameters
    changes: list[dict[tuple[int, ...], float]] = []
    for each in updates:
        change = {}
        for here, there in entries(copies, name, each.window):
            value = float(each.trained[name][here]) * each.share
            if not trained:
                value += float(old[there]) * (1 - each.share)
            else:
                value -= float(each.received[name][here]) * each.share
            change[there] = value
        changes.append(change)
    of_kin: defaultdict[object, list[tuple[int, ...]]] = defaultdict(list)
    for there, origin in kin.items():
        of_kin[origin].append(there)
    result = old.clone()
    for entries_alike in of_kin.values():
        alike = [{e: change[e] for e in entries_alike if e in change} for change in changes]
        values = kept([statistics.fmean(each.values()) for each in alike], average)
        low, high, common = min(values), max(values), statistics.fmean(values)
        weights = {there: sum(1 / len(each) for each in alike if there in each) for there in entries_alike}
        for there in entries_alike:
            own = sum(min(max(each[there], low), high) / len(each) for each in alike if there in each)
            if trained:
                most = max(weights.values())
                result[there] = old[there] + common + apart * (own - weights[there] * common) / most
            else:
                mine = own / weights[there] if weights[there] else common
                result[there] = common + apart * (mine - common)
    return result


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_one_that_lies_moves_nothing_out_of_the_others_range(average: Average, apart: float) -> None:
    copies = two_groups()
    state: State = {"weight": torch.zeros(8, 6), "seen": torch.tensor(3)}
    windows = [
        {"rows": torch.tensor([2 * i % 8, 2 * i % 8 + 1]), "columns": torch.arange(3) + 3 * (i % 2)}
        for i in range(6)
    ]
    honest = [1.0, 1.1, 1.2, 1.3, 1.4]
    updates = [
        Given(window, {"weight": torch.full((2, 3), value), "seen": torch.tensor(4)}, 1.0,
              extract(state, copies.width_map, window), 1.0)
        for window, value in zip(windows, [*honest, -1e6], strict=True)
    ]  # fmt: skip
    found = fused_kin(state, copies, updates, apart, average)["weight"]
    assert float(found.min()) >= 1.0
    assert float(found.max()) <= 1.4
    plain = Accumulator(state, copies.width_map)
    for each in updates:
        plain.add(each.window, each.trained, each.weight)
    assert float(plain.result()["weight"].min()) < -1000


@pytest.mark.release
@pytest.mark.parametrize("way", ["method.name=small", "method.start=copies", "method.start=blocks"])
def test_a_run_with_one_that_lies_goes_on_as_without(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times what it learnt, the other way round: under the bound of what is left out, and no use to the mean."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    lying = import_module("robust").Lying
    settings = (*QUICK_SETTINGS, way, "participants.count=5", "data.max_train=200", "rounds=3", "seed=1")

    def moved(average: str, lies: bool) -> float:
        setup = prepare(load_config(None, [*settings, f"method.average={average}"]))
        method: Any = setup.method
        if lies:
            method = lying(method, 2)
        *_, last = run_rounds(method, setup.data.participants, setup.rounds, test=setup.data.test)
        assert not last.left_out
        return float(method.evaluate(last.state, setup.data.test).loss)

    honest, ruined = moved("mean", False), moved("mean", True)
    for average in AVERAGES:
        assert moved(average, True) < (honest + ruined) / 2
    assert ruined > 2 * honest


@pytest.mark.release
def test_copies_that_do_not_come_apart_move_by_the_small_models_median() -> None:
    states = []
    for way in ("method.name=small", "method.start=copies"):
        config = load_config(None, [*QUICK_SETTINGS, way, "method.average=median", "participants.count=5"])
        setup = prepare(config.changed({"method.apart": 0.0} if "copies" in way else {}))
        method: Any = setup.method
        *_, last = run_rounds(method, setup.data.participants, setup.rounds, test=setup.data.test)
        states.append(float(method.evaluate(last.state, setup.data.test).loss))
    assert states[0] == pytest.approx(states[1], rel=1e-4)


@pytest.mark.parametrize("method", ["msfusion", "fedrolex", "heterofl", "feddropout"])
def test_slices_that_have_one_holder_each_are_refused(method: str) -> None:
    config = load_config(None, [*QUICK_SETTINGS, f"method.name={method}", "method.average=median"])
    with pytest.raises(ConfigError, match=r"method.average = 'median' .*'copies'"):
        prepare(config)
