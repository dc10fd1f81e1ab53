"""Averaging on a shard of a model is averaging on the whole, row by row and bit for bit."""

from __future__ import annotations

import pytest
import torch
from handmade_maps import draw_map, map_of, random_state, resnet18_map, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion.averaging.kin import KinAccumulator
from msfusion.averaging.robust import Average, accumulator_for, kin_accumulator_for
from msfusion.width.copies import Copies
from msfusion.width.groups import Place, State, WidthMap, Window
from msfusion.width.shards import Division, divide
from msfusion.width.slices import extract, plan
from msfusion.windows import double_shift

FLOAT = 4


def divided(width_map: WidthMap, count: int, copies: Copies | None = None) -> Division:
    return divide(width_map, dict.fromkeys(width_map.shapes, FLOAT), count, copies and copies.classes)


def assert_same_bits(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8),
            other[name].contiguous().view(-1).view(torch.uint8),
        ), name


def parts_of(division: Division, window: Window, tensors: State) -> list[dict[str, Tensor]]:
    """A participant's tensors as each owner has them."""
    cuts = plan(division.width_map, window)
    parts: list[dict[str, Tensor]] = [{} for _ in range(division.count)]
    for name, tensor in tensors.items():
        for owner, part in enumerate(parts):
            part[name] = (
                tensor[division.places(name, cuts[name].rows)[owner]] if name in division.owners else tensor
            )
    return parts


@settings(max_examples=60)
@given(st.data())
def test_slices_of_shards_are_the_rows_of_slices(data: st.DataObject) -> None:
    width_map, count = draw_map(data), data.draw(st.integers(1, 4))
    window, state = data.draw(windows_of(width_map)), random_state(width_map)
    division = divided(width_map, count)
    for name, owners in division.owners.items():
        assert len(owners) == width_map.shapes[name][0]
        rows = [division.shard_map(owner).owned[name] for owner in range(count)]
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(len(owners)))  # one owner for each
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
    expected = parts_of(division, window, extract(state, width_map, window))
    for owner in range(count):
        shard = division.shard(state, owner)
        assert_same_bits(extract(shard, division.shard_map(owner), window), expected[owner])


@pytest.mark.one_in_ci
@pytest.mark.parametrize("average", ["mean", "median", "trimmed"])
@settings(max_examples=25)
@given(st.data())
def test_averages_of_shards_are_the_rows_of_the_average(average: Average, data: st.DataObject) -> None:
    width_map, count = draw_map(data), data.draw(st.integers(1, 4))
    division, state = divided(width_map, count), random_state(width_map)
    whole = accumulator_for(state, width_map, average)
    shards = [
        accumulator_for(division.shard(state, owner), division.shard_map(owner), average)
        for owner in range(count)
    ]
    for number in range(data.draw(st.integers(0, 4))):
        window, weight = data.draw(windows_of(width_map)), data.draw(st.floats(1e-3, 1e3))
        share = data.draw(st.sampled_from([1.0, 0.5]))
        trained = extract(random_state(width_map, seed=number + 1), width_map, window)
        rest = extract(state, width_map, window) if share < 1 else None
        whole.add_part(window, trained, weight, share=share, rest=rest)
        parts = parts_of(division, window, trained)
        rests = parts if rest is None else parts_of(division, window, rest)
        for shard, part, left in zip(shards, parts, rests, strict=True):
            shard.add_part(window, part, weight, share=share, rest=None if rest is None else left)
    fused = whole.result()
    for owner, shard in enumerate(shards):
        assert_same_bits(shard.result(), division.shard(fused, owner))


def copied_map() -> tuple[WidthMap, dict[str, int]]:
    """Thick units, gates, a concatenation with a gap, a tie, a statistic and a counter."""
    shapes: dict[str, tuple[int, ...]] = {
        "first": (8, 3), "gates": (50, 8), "mean": (8,), "tied": (8, 3), "last": (3, 14), "count": (),
    }  # fmt: skip
    places = {
        "a": [
            Place("first", 0, 0, 8), Place("gates", 1, 0, 8), Place("mean", 0, 0, 8), Place("last", 1, 1, 8),
        ],
        "b": [Place("gates", 0, 1, 6, thickness=2, repeat=4), ],
        "c": [Place("last", 1, 9, 4)],
    }  # fmt: skip
    parameters = ("first", "gates", "tied", "last")
    width_map = map_of(shapes, places, parameters=parameters, aliases={"tied": "first"})
    return width_map, {"a": 4, "b": 2, "c": 2}


@pytest.mark.parametrize("average", ["mean", "median"])
@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_copies_come_apart_on_shards_as_on_the_whole(count: int, apart: float, average: Average) -> None:
    width_map, sizes = copied_map()
    copies, state = Copies(width_map, sizes), random_state(width_map)
    state["count"] = torch.tensor(3)
    factors = {
        "last": {1: torch.arange(1.0, 15.0, dtype=torch.float64)},
        "gates": {0: torch.arange(1.0, 51.0).double()},
    }
    division = divided(width_map, count, copies)

    def on_shard(owner: int) -> KinAccumulator:
        shard = division.shard_map(owner)
        own = {
            name: {axis: values[shard.owned[name]] if axis == 0 else values for axis, values in along.items()}
            for name, along in factors.items()
        }
        return kin_accumulator_for(division.shard(state, owner), copies.in_shard(shard), own, average)

    whole, shards = kin_accumulator_for(state, copies, factors, average), [*map(on_shard, range(count))]
    for number, share in enumerate([1.0, 1.0, 0.5, 1.0]):
        window = {
            "a": (torch.arange(4) + 2 * number) % 8,
            "b": torch.tensor([0, 1, 2, 3, 4, 5]) if number == 1 else torch.tensor([0, 3]),
            "c": torch.tensor([3, 0]),
        }
        received = extract(state, width_map, window)
        trained = extract(
            {**random_state(width_map, number + 1), "count": torch.tensor(9 - number)}, width_map, window
        )
        whole.add_update(window, trained, 1.5 + number, received=received, share=share)
        for shard, part, sent in zip(
            shards, parts_of(division, window, trained), parts_of(division, window, received), strict=True
        ):
            shard.add_update(window, part, 1.5 + number, received=sent, share=share)
    fused = whole.result(apart)
    for owner, shard in enumerate(shards):
        assert_same_bits(shard.result(apart), division.shard(fused, owner))


def test_a_resnet_is_divided_evenly() -> None:
    width_map = resnet18_map()
    division, state = divided(width_map, 4), random_state(width_map)
    shards = [division.shard(state, owner) for owner in range(4)]
    sizes = [sum(tensor.numel() for tensor in shard.values()) for shard in shards]
    assert max(sizes) <= 1.01 * min(sizes)
    window = double_shift(width_map, 3, 7, 0.25, participants=10)
    held = extract(state, width_map, window)
    for owner, part in enumerate(parts_of(division, window, held)):
        assert_same_bits(extract(shards[owner], division.shard_map(owner), window), part)
