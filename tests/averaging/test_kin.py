"""Averaging changes to copies against exact rational arithmetic, its guarantees, and what it refuses."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from handmade_maps import draw_map, map_of, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion.averaging.kin import KinAccumulator
from msfusion.errors import ConfigError, UpdateError
from msfusion.width.copies import Along, Copies
from msfusion.width.groups import Place, State, Window
from msfusion.width.slices import extract

Index = tuple[int, ...]


@dataclass
class Given:
    window: Window
    trained: State
    weight: float
    received: State
    share: float


def entries(copies: Copies, name: str, window: Window) -> Iterator[tuple[Index, Index]]:
    """Each entry that a window holds: its index in the slice, and in the whole."""
    positions = copies.width_map.axis_positions(name, window)
    axes = [positions.get(a, torch.arange(n)).tolist() for a, n in enumerate(copies.width_map.shapes[name])]
    for here in itertools.product(*(range(len(axis)) for axis in axes)):
        yield here, tuple(axis[index] for axis, index in zip(axes, here, strict=True))


def origins(copies: Copies, name: str) -> dict[Index, Index]:
    """For each entry the small one that it is copied from, by the definition: unit j is a copy of unit j mod w."""
    by_axis: dict[int, list[object]] = {
        a: list(range(n)) for a, n in enumerate(copies.width_map.shapes[name])
    }
    for group, place in copies.width_map.places.get(name, ()):
        for unit in range(group.units):
            for number, position in enumerate(place.positions(torch.tensor([unit])).tolist()):
                by_axis[place.axis][position] = (place.offset, unit % copies.sizes[group.name], number)
    return {
        there: tuple(by_axis[axis][index] for axis, index in enumerate(there))  # type: ignore[misc]
        for _, there in entries(copies, name, {})
    }


def reference(state: State, copies: Copies, updates: list[Given], apart: float) -> dict[str, Tensor]:
    """Entry by entry, with fractions for all sums."""
    fused = {}
    for name, tensor in state.items():
        kin = origins(copies, name)
        sums: defaultdict[Index, Fraction] = defaultdict(Fraction)
        weights: defaultdict[Index, Fraction] = defaultdict(Fraction)
        for each in updates:
            held = list(entries(copies, name, each.window))
            number = Counter(kin[there] for _, there in held)
            for here, there in held:
                n = number[kin[there]]
                terms = [(each.trained[name][here], each.weight * each.share)]
                if name not in copies.width_map.parameters:
                    terms.append((tensor[there], each.weight * (1 - each.share)))
                else:
                    terms.append((each.received[name][here], -each.weight * each.share))
                for value, weight in terms:
                    sums[there] += Fraction(float(value) / n) * Fraction(weight)
                weights[there] += Fraction(each.weight / n)
        class_sums: defaultdict[Index, Fraction] = defaultdict(Fraction)
        class_weights: defaultdict[Index, Fraction] = defaultdict(Fraction)
        largest: defaultdict[Index, float] = defaultdict(float)
        for there, weight in weights.items():
            class_sums[kin[there]] += sums[there]
            class_weights[kin[there]] += weight
            largest[kin[there]] = max(largest[kin[there]], float(weight))
        result = tensor.clone()
        for there in kin:
            common = float(class_sums[kin[there]] / class_weights[kin[there]])
            if name in copies.width_map.parameters:
                own = float(sums[there]) - float(weights[there]) * common
                result[there] = float(tensor[there]) + (common + apart * own / largest[kin[there]])
            else:
                own = float(sums[there] / weights[there]) if weights[there] else common
                result[there] = common + apart * (own - common)
        fused[name] = result
    return fused


def drawn_copies(data: st.DataObject) -> Copies:
    width_map = draw_map(data)
    sizes = {
        group.name: data.draw(st.sampled_from([d for d in range(1, group.units + 1) if group.units % d == 0]))
        for group in width_map.groups
    }
    parameters = tuple(
        name for name in width_map.shapes if name != "t0"
    )  # which stands for a running statistic
    return Copies(replace(width_map, parameters=parameters), sizes)


def drawn_window(data: st.DataObject, copies: Copies) -> dict[str, Tensor]:
    """Any number of copies, the same for every class; any of them, in any order."""
    window = {}
    for group in copies.width_map.groups:
        classes = copies.sizes[group.name]
        number = data.draw(st.integers(1, group.units // classes))
        units = [
            copy * classes + each
            for each in range(classes)
            for copy in data.draw(st.permutations(range(group.units // classes)))[:number]
        ]
        window[group.name] = torch.tensor(data.draw(st.permutations(units)))
    return window


def drawn_updates(data: st.DataObject, copies: Copies, dtype: torch.dtype, state: State) -> list[Given]:
    updates = []
    for number in range(data.draw(st.integers(1, 4))):
        window = drawn_window(data, copies)
        trained = extract(random_state(copies.width_map, number + 1, dtype), copies.width_map, window)
        weight = data.draw(st.one_of(st.integers(1, 5000).map(float), st.floats(1e-3, 1e3)))
        share = data.draw(st.sampled_from([1.0, 0.5, 0.3]))
        received = extract(state, copies.width_map, window)
        updates.append(Given(window, trained, weight, received, share))
    return updates


def fused(
    state: State, copies: Copies, updates: list[Given], apart: float, factors: dict[str, Along] | None = None
) -> dict[str, Tensor]:
    accumulator = KinAccumulator(state, copies, factors or {})
    for each in updates:
        accumulator.add_update(
            each.window, each.trained, each.weight, received=each.received, share=each.share
        )
    return accumulator.result(apart)


def assert_same_bits(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@settings(max_examples=25)
@given(st.data())
def test_the_streaming_sums_are_the_reference_to_the_bit(data: st.DataObject) -> None:
    copies = drawn_copies(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    state = random_state(copies.width_map, dtype=dtype)
    updates = drawn_updates(data, copies, dtype, state)
    apart = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    assert_same_bits(fused(state, copies, updates, apart), reference(state, copies, updates, apart))


@pytest.mark.release
@settings(max_examples=15)
@given(st.data())
def test_the_order_does_not_matter(data: st.DataObject) -> None:
    copies = drawn_copies(data)
    state = random_state(copies.width_map, dtype=torch.float64)
    updates = drawn_updates(data, copies, torch.float64, state)
    shuffled = data.draw(st.permutations(updates))
    assert_same_bits(fused(state, copies, updates, 0.7), fused(state, copies, shuffled, 0.7))


@settings(max_examples=15)
@given(st.data())
def test_kin_move_together_however_far_they_come_apart(data: st.DataObject) -> None:
    """The sum over each class of kin is that of equal copies: FedAvg of the small model."""
    copies = drawn_copies(data)
    state = random_state(copies.width_map, dtype=torch.float64)
    updates = drawn_updates(data, copies, torch.float64, state)
    equal, free = fused(state, copies, updates, 0.0), fused(state, copies, updates, 1.0)
    for name in copies.width_map.parameters:
        one: defaultdict[Index, float] = defaultdict(float)
        two: defaultdict[Index, float] = defaultdict(float)
        for there, small in origins(copies, name).items():
            one[small] += float(equal[name][there])
            two[small] += float(free[name][there])
        assert one == pytest.approx(two, abs=1e-11)


def two_groups() -> Copies:
    width_map = map_of(
        {"weight": (8, 6), "seen": ()},
        {"rows": [Place("weight", 0, 0, 8)], "columns": [Place("weight", 1, 0, 6)]},
        parameters=("weight",),
    )
    return Copies(width_map, {"rows": 2, "columns": 3})


def test_with_one_holder_each_and_equal_weights_an_entry_becomes_what_its_holder_made_of_it() -> None:
    copies = two_groups()
    state: State = {"weight": torch.zeros(8, 6), "seen": torch.tensor(3)}
    windows = [{"rows": torch.tensor([0, 1]), "columns": torch.tensor([3, 4, 5])},
               {"rows": torch.tensor([6, 5]), "columns": torch.tensor([0, 1, 2])}]  # fmt: skip
    updates = [
        Given(window, {"weight": torch.full((2, 3), value), "seen": torch.tensor(count)},
              2.0, extract(state, copies.width_map, window), 1.0)
        for window, value, count in zip(windows, (1.0, 4.0), (5, 4), strict=True)
    ]  # fmt: skip
    after = fused(state, copies, updates, 1.0)
    expected = torch.full((8, 6), 2.5)
    expected[:2, 3:], expected[5:7, :3] = 1.0, 4.0
    assert torch.equal(after["weight"], expected)
    assert int(after["seen"]) == 5
    assert torch.equal(fused(state, copies, updates, 0.0)["weight"], torch.full((8, 6), 2.5))
    scaled = fused(state, copies, updates, 0.0, {"weight": {1: 2.0}})
    assert torch.equal(scaled["weight"], torch.full((8, 6), 1.25))


def test_what_does_not_fit_is_refused_and_leaves_no_trace() -> None:
    copies = two_groups()
    state = random_state(copies.width_map)
    accumulator = KinAccumulator(state, copies, {})
    window = {"rows": torch.tensor([0, 1]), "columns": torch.tensor([0, 1, 2])}
    good = extract(state, copies.width_map, window)
    for bad in (
        {"weight": good["weight"] * float("nan"), "seen": good["seen"]},
        {"weight": good["weight"][:1], "seen": good["seen"]},
        {"seen": good["seen"]},
    ):
        with pytest.raises(UpdateError, match="weight"):
            accumulator.add_update(window, bad, 1.0, received=good)
    assert_same_bits(accumulator.result(1.0), state)
    with pytest.raises(ConfigError, match="rows"):
        Copies(copies.width_map, {"rows": 3, "columns": 3})
