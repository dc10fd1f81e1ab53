"""The width maps of the zoo: what they reach, that they are complete, and what is refused."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from zoo import REFUSED, ZOO, by_name
from zoo_checks import BATCH, TIME, equal, other_inputs, same_form, traced
from zoo_entry import Entry, call

from msfusion.errors import UntraceableModelError
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

every_model = pytest.mark.parametrize("entry", ZOO, ids=str)


@every_model
def test_reach(entry: Entry) -> None:
    assert traced(entry.name)[2].reach() >= entry.reach


@every_model
def test_the_map_describes_the_state_dict(entry: Entry) -> None:
    model, _, width_map = traced(entry.name)
    state = model.state_dict(keep_vars=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == width_map.shapes
    assert list(width_map.shapes) == list(state)
    assert list(width_map.parameters) == [n for n, t in state.items() if isinstance(t, nn.Parameter)]
    for name, tensor in state.items():
        assert state[width_map.aliases.get(name, name)] is tensor
        same = [other for other, value in state.items() if value is tensor]
        assert width_map.aliases.get(name, name) == same[0]


@every_model
def test_groups_and_frozen_stretches_cover_every_axis_once(entry: Entry) -> None:
    _, _, width_map = traced(entry.name)
    assert len({group.name for group in width_map.groups}) == len(width_map.groups)
    for name, shape in width_map.shapes.items():
        stretches = [(p.axis, p.offset, p.length) for _, p in width_map.places.get(name, ())]
        stretches += [(f.axis, f.offset, f.length) for f in width_map.frozen if f.tensor == name]
        for axis, size in enumerate(shape):
            covered = Counter(i for a, start, n in stretches if a == axis for i in range(start, start + n))
            assert size == 1 or covered == Counter(range(size)), (name, axis)


@every_model
def test_a_group_has_several_units_and_is_written_and_read(entry: Entry) -> None:
    _, _, width_map = traced(entry.name)
    for group in width_map.groups:
        assert group.units > 1
        assert all(place.units == group.units for place in group.places)
        assert any(place.tensor in width_map.parameters for place in group.places)


@every_model
def test_inputs_outputs_time_and_head_dimensions_stay(entry: Entry) -> None:
    _, _, width_map = traced(entry.name)
    found = {group.units: group for group in width_map.groups}
    assert not [found[size] for size in entry.whole if size in found]


@pytest.mark.parametrize("entry", [e for e in ZOO if e.heads], ids=str)
def test_attention_is_narrowed_by_whole_heads(entry: Entry) -> None:
    _, _, width_map = traced(entry.name)
    units = {(group.units, place.thickness) for group in width_map.groups for place in group.places}
    assert units >= set(entry.heads)


@pytest.mark.parametrize("entry", [e for e in ZOO if e.reasons], ids=str)
def test_what_stays_has_a_reason(entry: Entry) -> None:
    reasons = [frozen.reason for frozen in traced(entry.name)[2].frozen]
    for word in entry.reasons:
        assert any(word in reason for reason in reasons), reasons


@pytest.mark.parametrize("entry", REFUSED, ids=str)
def test_refused_in_one_sentence_that_names_the_place(entry: Entry) -> None:
    with pytest.raises(UntraceableModelError) as caught:
        trace(entry.build(), entry.inputs(BATCH, TIME))
    message = str(caught.value)
    assert entry.name in message
    assert "\n" not in message
    assert "operation" in message


SOME = [by_name(name) for name in ("resnet_short", "gru", "nanogpt_slow", "bare_attention", "in_place")]


@pytest.mark.one_in_ci
@pytest.mark.parametrize("entry", SOME, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_only_read(entry: Entry, training: bool) -> None:
    model, inputs = entry.build().train(training), entry.inputs(BATCH, TIME)
    before, given = copy.deepcopy(model.state_dict()), copy.deepcopy(inputs)
    random = torch.get_rng_state()
    width_map = trace(model, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for one, two in zip(
        torch.utils._pytree.tree_leaves(inputs), torch.utils._pytree.tree_leaves(given), strict=True
    ):
        assert torch.equal(one, two)
    assert width_map == traced(entry.name)[2]


@pytest.mark.parametrize("entry", SOME, ids=str)
def test_an_example_of_one_is_enough(entry: Entry) -> None:
    model = entry.build().eval()
    width_map = trace(model, entry.inputs(1, TIME))
    assert width_map.groups == traced(entry.name)[2].groups
    inputs = other_inputs(entry)
    same_form(call(narrow(model, width_map, {}), inputs), call(model, inputs))


@pytest.mark.parametrize("entry", [e for e in SOME if e.sequence], ids=str)
def test_an_example_of_one_token_is_not_silently_wrong(entry: Entry) -> None:
    model, inputs = entry.build().eval(), other_inputs(entry)
    try:
        found = call(narrow(model, trace(model, entry.inputs(2, 1)), {}), inputs)
    except (RuntimeError, TypeError):
        return  # export takes an axis of size 1 for a constant, so other lengths fail
    assert equal(found, call(model, inputs))


@pytest.mark.one_in_ci
@pytest.mark.parametrize("entry", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(entry: Entry, dtype: torch.dtype) -> None:
    model = entry.build().eval().to(dtype)
    inputs = entry.inputs(BATCH, TIME)
    convert = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(convert, inputs)
    width_map = trace(model, inputs)
    assert width_map.groups == traced(entry.name)[2].groups
    same_form(call(narrow(model, width_map, {}), inputs), call(model, inputs))
