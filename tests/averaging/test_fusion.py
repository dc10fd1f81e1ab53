"""Overlap averaging against exact rational arithmetic, its guarantees bit by bit, and hostile updates."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from handmade_maps import draw_map, map_of, meeting_map, random_state, resnet18_map, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion.averaging.fusion import Accumulator, fuse
from msfusion.errors import MsfusionError, UpdateError
from msfusion.width.groups import Place, State, WidthMap, Window
from msfusion.width.slices import extract
from msfusion.windows import double_shift

Update = tuple[Window, State, float]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert bits(tensor) == bits(other[name]), name


def reference(state: State, width_map: WidthMap, updates: list[Update]) -> dict[str, Tensor]:
    """Entry by entry, with fractions."""
    fused = {}
    for name, tensor in state.items():
        result = tensor.clone()
        sums: dict[tuple[int, ...], list[Fraction]] = {}
        for window, sub_state, weight in updates:
            positions = width_map.axis_positions(name, window)
            axes = [positions.get(a, torch.arange(n)).tolist() for a, n in enumerate(tensor.shape)]
            for here in itertools.product(*(range(len(axis)) for axis in axes)):
                there = tuple(axis[index] for axis, index in zip(axes, here, strict=True))
                total = sums.setdefault(there, [Fraction(0), Fraction(0)])
                total[0] += Fraction(weight) * Fraction(sub_state[name][here].item())
                total[1] += Fraction(weight)
        for there, (total_value, total_weight) in sums.items():
            result[there] = float(total_value / total_weight)
        fused[name] = result
    return fused


def some_updates(data: st.DataObject, width_map: WidthMap, dtype: torch.dtype, count: int) -> list[Update]:
    updates = []
    for number in range(count):
        window = data.draw(windows_of(width_map))
        trained = random_state(width_map, seed=number + 1, dtype=dtype)
        weight = data.draw(st.one_of(st.integers(1, 5000).map(float), st.floats(1e-3, 1e3)))
        updates.append((window, extract(trained, width_map, window), weight))
    return updates


@settings(max_examples=25)
@given(st.data())
def test_fuse_is_the_exact_mean(data: st.DataObject) -> None:
    width_map = draw_map(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    state = random_state(width_map, dtype=dtype)
    updates = some_updates(data, width_map, dtype, data.draw(st.integers(0, 4)))
    assert_same_bits(fuse(state, width_map, updates), reference(state, width_map, updates))


def spread(updates: list[Update], exponent: int) -> list[Update]:
    """The updates with each entry scaled by another power of two, from 2^-exponent to 2^exponent."""
    generator = torch.Generator().manual_seed(0)
    for _, sub_state, _ in updates:
        for tensor in sub_state.values():
            powers = torch.randint(-exponent, exponent, tensor.shape, generator=generator)
            tensor.copy_(torch.ldexp(tensor, powers))
    return updates


@settings(max_examples=15)
@given(st.data())
def test_the_order_does_not_matter(data: st.DataObject) -> None:
    width_map = draw_map(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    state = random_state(width_map, dtype=dtype)
    updates = spread(some_updates(data, width_map, dtype, 4), 120)
    shuffled = data.draw(st.permutations(updates))
    assert_same_bits(fuse(state, width_map, updates), fuse(state, width_map, shuffled))


@settings(max_examples=15)
@given(st.data())
def test_values_of_very_different_size_are_averaged_to_the_last_bit(data: st.DataObject) -> None:
    """But for a mean that lies between two numbers up to a term some 2^107 times smaller than itself."""
    width_map = draw_map(data)
    state = random_state(width_map, dtype=torch.float64)
    updates = spread(some_updates(data, width_map, torch.float64, 4), 40)
    assert_same_bits(fuse(state, width_map, updates), reference(state, width_map, updates))


@settings(max_examples=25)
@given(st.data())
def test_bundles_of_small_tensors_change_no_bit(data: st.DataObject) -> None:
    width_map = draw_map(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    state = random_state(width_map, dtype=dtype)
    updates = some_updates(data, width_map, dtype, 3)
    plain, bundled = Accumulator(state, width_map, bundle_limit=0), Accumulator(state, width_map)
    for window, sub_state, weight in updates:
        plain.add(window, sub_state, weight)
        bundled.add(window, sub_state, weight)
    assert_same_bits(plain.result(), bundled.result())


def test_sums_that_need_many_components() -> None:
    width_map = meeting_map(1, 1)
    values = [1e30, 1.0, 1e-30, -1e30, -1.0, 1e38, -1e38, 1e-38]
    updates = [({}, {"weight": torch.tensor([[value]])}, 3.0) for value in values]
    results = {
        bits(fuse({"weight": torch.zeros(1, 1)}, width_map, order)["weight"])
        for order in itertools.islice(itertools.permutations(updates), 0, None, 997)
    }
    exact = math.fsum(float(torch.tensor(value)) for value in values) / len(values)
    assert results == {bits(torch.tensor([[exact]]))}


def test_at_full_width_it_is_fedavg() -> None:
    width_map = map_of(
        {"weight": (40, 30), "bias": (40,)},
        {"out": [Place("weight", 0, 0, 40), Place("bias", 0, 0, 40)], "into": [Place("weight", 1, 0, 30)]},
    )
    states = [random_state(width_map, seed) for seed in range(7)]
    weights = [12.0, 900.0, 31.0, 7.0, 1.0, 55.0, 4096.0]
    updates = [(width_map.full_window(), s, w) for s, w in zip(states, weights, strict=True)]
    fused = fuse(states[0], width_map, updates)
    for name in fused:
        columns = torch.stack([s[name].double() * w for s, w in zip(states, weights, strict=True)])
        sums = [math.fsum(column) / math.fsum(weights) for column in columns.reshape(7, -1).T.tolist()]
        fedavg = torch.tensor(sums, dtype=torch.float64).float().reshape(fused[name].shape)
        assert bits(fused[name]) == bits(fedavg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_was_cut_out_and_not_trained_comes_back_as_it_was(dtype: torch.dtype) -> None:
    width_map = meeting_map(16, 24)
    state = random_state(width_map, dtype=dtype)
    before = state["weight"].clone()
    updates = []
    for participant in range(11):
        window = double_shift(width_map, participant, 3, 0.3, participants=11)
        updates.append((window, extract(state, width_map, window), 0.1 + participant / 7))
    assert_same_bits(fuse(state, width_map, updates), state)
    assert bits(before) == bits(state["weight"])


def test_an_entry_nobody_held_keeps_its_bits() -> None:
    width_map = meeting_map(4, 6)
    state = {"weight": torch.full((4, 6), -0.0)}
    state["weight"][3, 5] = torch.nan  # not even looked at
    window = {"rows": torch.tensor([0, 2]), "columns": torch.tensor([1, 4])}
    fused = fuse(state, width_map, [(window, {"weight": torch.ones(2, 2)}, 5.0)])["weight"]
    held = torch.zeros(4, 6, dtype=torch.bool)
    held[torch.tensor([0, 2])[:, None], torch.tensor([1, 4])] = True
    assert (fused[held] == 1).all()
    assert bits(fused[~held]) == bits(state["weight"][~held])


def test_no_updates_give_a_copy_of_the_state() -> None:
    state = {"weight": torch.randn(4, 6)}
    fused = fuse(state, meeting_map(4, 6), [])
    assert_same_bits(fused, state)
    assert fused["weight"].data_ptr() != state["weight"].data_ptr()


def test_counters_become_the_largest_among_their_holders() -> None:
    shapes = {"count": (), "kept": (4,), "flag": (4,)}
    width_map = map_of(shapes, {"g": [Place("kept", 0, 0, 4), Place("flag", 0, 0, 4)]}, parameters=())
    state = {
        "count": torch.tensor(7),
        "kept": torch.tensor([9, 9, 9, 9], dtype=torch.int32),
        "flag": torch.tensor([True, False, True, False]),
    }

    def update(units: list[int], count: int, kept: list[int], flag: list[bool]) -> Update:
        tensors = {"count": torch.tensor(count), "kept": torch.tensor(kept, dtype=torch.int32)}
        return {"g": torch.tensor(units)}, {**tensors, "flag": torch.tensor(flag)}, 2.0

    updates = [update([0, 1], 12, [1, 2], [False, True]), update([1, 2], 9, [3, -4], [False, False])]
    for order in (updates, updates[::-1]):
        fused = fuse(state, width_map, order)
        assert fused["count"].item() == 12
        assert fused["kept"].tolist() == [1, 3, -4, 9]
        assert fused["flag"].tolist() == [False, True, False, False]
        assert fused["kept"].dtype == torch.int32


def test_a_tied_tensor_is_averaged_once_and_stays_tied() -> None:
    shapes = {"embed": (5, 4), "head": (5, 4)}
    width_map = map_of(
        shapes, {"g": [Place("embed", 1, 0, 4), Place("head", 1, 0, 4)]}, aliases={"head": "embed"}
    )
    state = random_state(width_map)
    window = {"g": torch.tensor([3, 1])}
    copies = {name: tensor.clone() for name, tensor in extract(state, width_map, window).items()}
    fused = fuse(state, width_map, [(window, copies, 3.0)])
    assert_same_bits(fused, state)
    assert fused["embed"] is fused["head"]
    copies["head"][0, 0] += 1
    with pytest.raises(UpdateError, match="'head' is tied to another name but has other values"):
        fuse(state, width_map, [(window, copies, 3.0)])


def good_update() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    window = {"rows": torch.tensor([1, 0]), "columns": torch.tensor([5, 0, 2])}
    return window, {"weight": torch.ones(2, 3)}


HOSTILE = {
    "missing": (lambda s: s.pop("weight"), "lacks 1 tensors, among them 'weight'"),
    "unknown": (lambda s: s.update(extra=torch.ones(1)), "'extra' that the global model has not"),
    "shape": (lambda s: s.update(weight=torch.ones(3, 2)), r"shape \(3, 2\), but the window needs \(2, 3\)"),
    "dimensions": (lambda s: s.update(weight=torch.ones(2, 3, 1)), r"shape \(2, 3, 1\)"),
    "full": (lambda s: s.update(weight=torch.ones(4, 6)), r"shape \(4, 6\)"),
    "double": (lambda s: s.update(weight=torch.ones(2, 3).double()), "type torch.float64"),
    "integer": (lambda s: s.update(weight=torch.ones(2, 3).long()), "type torch.int64"),
    "nan": (lambda s: s["weight"].__setitem__((1, 2), math.nan), "not finite"),
    "infinite": (lambda s: s["weight"].__setitem__((0, 0), -math.inf), "not finite"),
}


@pytest.mark.parametrize(("spoil", "sentence"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_update_is_refused_and_leaves_no_trace(spoil, sentence: str) -> None:
    accumulator = Accumulator({"weight": torch.zeros(4, 6)}, meeting_map(4, 6))
    window, sub_state = good_update()
    accumulator.add(window, sub_state, 2.0)
    before = accumulator.result()
    spoil(sub_state)
    with pytest.raises(UpdateError, match=rf"participant 3, round 5: .*{sentence}") as caught:
        accumulator.add(window, sub_state, 2.0, source="participant 3, round 5")
    assert "\n" not in str(caught.value)
    assert_same_bits(accumulator.result(), before)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_bad_weights(weight: float) -> None:
    window, sub_state = good_update()
    with pytest.raises(UpdateError, match="the weight must be a finite number greater than 0"):
        Accumulator({"weight": torch.zeros(4, 6)}, meeting_map(4, 6)).add(window, sub_state, weight)


def test_a_bad_window_and_values_that_would_overflow() -> None:
    accumulator = Accumulator({"weight": torch.zeros(4, 6, dtype=torch.float64)}, meeting_map(4, 6))
    _, sub_state = good_update()
    with pytest.raises(UpdateError, match="update 7: the window's units of group 'rows' must lie between"):
        accumulator.add({"rows": torch.tensor([1, 4])}, sub_state, 1.0, source="update 7")
    with pytest.raises(UpdateError, match="too large to be averaged"):
        accumulator.add({}, {"weight": torch.full((4, 6), 1e300, dtype=torch.float64)}, 1.0)


def test_a_state_that_does_not_fit_the_map() -> None:
    with pytest.raises(MsfusionError, match="does not know"):
        Accumulator({"other": torch.zeros(1)}, meeting_map(4, 6))
    with pytest.raises(MsfusionError, match="complex"):
        Accumulator({"weight": torch.zeros(4, 6, dtype=torch.complex64)}, meeting_map(4, 6))


def test_memory_does_not_grow_with_the_participants() -> None:
    width_map = meeting_map(64, 128)
    state = random_state(width_map)
    accumulator = Accumulator(state, width_map)
    memory = []
    for participant in range(60):
        window = double_shift(width_map, participant, 0, 0.5, participants=60)
        trained = random_state(width_map, seed=participant)
        accumulator.add(window, extract(trained, width_map, window), 100.0 + participant)
        memory.append(accumulator.memory())
    # at most two float64 for each entry and two for its weight, and no more once both are there
    assert memory[30] == memory[-1] <= 2 * 8 * (64 * 128) * 2


def test_the_weights_of_tensors_that_are_cut_alike_are_kept_once() -> None:
    width_map = resnet18_map()
    state = random_state(width_map)
    window = double_shift(width_map, 0, 0, 0.25, participants=10)
    accumulator = Accumulator(state, width_map, bundle_limit=0)
    accumulator.add(window, extract(state, width_map, window), 5.0)
    entries = sum(tensor.numel() for tensor in state.values())
    assert accumulator.memory() < 1.15 * 8 * entries
