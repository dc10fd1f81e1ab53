"""Cutting by blocks and by index does what the readable reference does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from handmade_maps import draw_map, map_of, meeting_map, random_state, resnet18_map, windows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.errors import MsfusionError
from msfusion.width.groups import Place, State, WidthMap, Window
from msfusion.width.slices import checked_units, extract, plan


def reference(state: State, width_map: WidthMap, window: Window) -> dict[str, torch.Tensor]:
    sub_state = {}
    for name, tensor in state.items():
        positions = width_map.axis_positions(name, window)
        axes = [positions.get(axis, torch.arange(length)).numpy() for axis, length in enumerate(tensor.shape)]
        sub_state[name] = tensor[np.ix_(*axes)] if axes else tensor.clone()
    return sub_state


@settings(max_examples=150)
@given(st.data())
def test_extract_agrees_with_the_reference(data: st.DataObject) -> None:
    width_map = draw_map(data)
    window = data.draw(windows_of(width_map))
    state = random_state(width_map)
    before = {name: tensor.clone() for name, tensor in state.items()}
    expected = reference(state, width_map, window)
    sub_state = extract(state, width_map, window)
    assert list(sub_state) == list(state)
    for name, tensor in sub_state.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
        assert torch.equal(state[name], before[name])
        assert (
            tensor.untyped_storage().data_ptr() != state[name].untyped_storage().data_ptr()
            or not tensor.numel()
        )


@settings(max_examples=100)
@given(st.data())
def test_put_is_the_opposite_of_take(data: st.DataObject) -> None:
    width_map = draw_map(data)
    state = random_state(width_map)
    for name, cut in plan(width_map, data.draw(windows_of(width_map))).items():
        part = cut.take(state[name])
        assert tuple(part.shape) == cut.held_shape
        target = torch.zeros_like(state[name])
        cut.put(target, part)
        assert torch.equal(cut.take(target), part)
        assert target.count_nonzero() == part.count_nonzero()


def test_a_wrapped_window_of_a_resnet() -> None:
    width_map = resnet18_map()
    state = random_state(width_map)
    window = {g.name: (torch.arange(g.units // 4) + g.units * 7 // 8) % g.units for g in width_map.groups}
    expected = reference(state, width_map, window)
    for name, tensor in extract(state, width_map, window).items():
        assert torch.equal(tensor, expected[name])


def test_the_names_of_a_tied_tensor_share_one_copy() -> None:
    shapes = {"embed": (5, 4), "head": (5, 4)}
    width_map = map_of(
        shapes, {"g": [Place("embed", 1, 0, 4), Place("head", 1, 0, 4)]}, aliases={"head": "embed"}
    )
    state = random_state(width_map)
    sub_state = extract(state, width_map, {"g": torch.tensor([3, 1])})
    assert sub_state["embed"] is sub_state["head"]
    assert torch.equal(sub_state["head"], state["embed"][:, [3, 1]])


def test_a_non_contiguous_tensor_and_another_dtype() -> None:
    width_map = meeting_map(4, 6)
    state = {"weight": torch.randn(6, 4, dtype=torch.bfloat16).T}
    sub_state = extract(state, width_map, {"rows": torch.tensor([2]), "columns": torch.tensor([5, 0])})
    assert sub_state["weight"].dtype == torch.bfloat16
    assert torch.equal(sub_state["weight"], state["weight"][[2]][:, [5, 0]])


@pytest.mark.parametrize(
    ("window", "sentence"),
    [
        ({"nobody": torch.tensor([0])}, "width group 'nobody' that the width map does not have"),
        ({"rows": torch.tensor([0, 4])}, "must lie between 0 and 3"),
        ({"rows": torch.tensor([-1])}, "must lie between 0 and 3"),
        ({"rows": torch.tensor([1, 1])}, "more than once"),
        ({"rows": torch.tensor([], dtype=torch.long)}, "holds no unit of group 'rows'"),
        ({"rows": torch.tensor([0.0])}, "one-dimensional LongTensor"),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, "one-dimensional LongTensor"),
        ({"rows": torch.tensor([[0]])}, "one-dimensional LongTensor"),
        ({"rows": torch.tensor(0)}, "one-dimensional LongTensor"),
        ({"rows": [0]}, "one-dimensional LongTensor"),
        ({"rows": None}, "one-dimensional LongTensor"),
    ],
)
def test_bad_windows(window: dict[str, object], sentence: str) -> None:
    with pytest.raises(MsfusionError, match=sentence):
        checked_units(meeting_map(4, 4), window)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"other": torch.zeros(4, 4)}, "'other' that the width map does not know"),
        ({"weight": torch.zeros(4, 5)}, r"has shape \(4, 5\), but the width map has \(4, 4\)"),
    ],
)
def test_bad_states(state: State, sentence: str) -> None:
    with pytest.raises(MsfusionError, match=sentence):
        extract(state, meeting_map(4, 4), {})
