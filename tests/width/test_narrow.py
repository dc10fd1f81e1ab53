"""Sub-models of the zoo: they run, train, and compute what the full model's units would."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO
from zoo_checks import (
    distance,
    equal,
    half_window,
    loss_of,
    other_inputs,
    random_window,
    same_form,
    shuffled_window,
    smallest_window,
    traced,
)
from zoo_distance import DISTANCE
from zoo_entry import Entry, call
from zoo_lookup import LOOKUP

from msfusion.width.groups import WidthMap
from msfusion.width.slices import extract
from msfusion.width.submodel import narrow

every_model = pytest.mark.parametrize("entry", ZOO, ids=str)
every_window = pytest.mark.parametrize("choose", [random_window, smallest_window])


@every_model
def test_at_full_width_the_sub_model_is_the_model(entry: Entry) -> None:
    model, inputs, width_map = traced(entry.name)
    model = copy.deepcopy(model)
    for given in (inputs, other_inputs(entry)):
        for training in (False, True):
            sub = narrow(model, width_map, width_map.full_window()).train(training)
            model.train(training)
            torch.manual_seed(1)
            expected = call(model, given)
            torch.manual_seed(1)
            found = call(sub, given)
            same_form(found, expected)
            assert equal(found, expected), (training, distance(expected, found))
            for (name, one), (other, two) in zip(
                sub.state_dict().items(), model.state_dict().items(), strict=True
            ):
                assert name == other
                assert torch.equal(one, two), name  # running statistics move alike


@every_model
@every_window
def test_a_sub_model_runs_and_has_the_models_names(
    entry: Entry, choose: Callable[[WidthMap], dict[str, Tensor]]
) -> None:
    model, inputs, width_map = traced(entry.name)
    window = choose(width_map)
    sub = narrow(model, width_map, window)
    expected = extract(model.state_dict(), width_map, window)
    assert list(sub.state_dict()) == list(expected)
    for name, tensor in sub.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert set(dict(sub.named_parameters(remove_duplicate=False))) == set(width_map.parameters)
    for given in (inputs, other_inputs(entry)):
        same_form(call(sub.eval(), given), call(model, given))
        same_form(call(sub.train(), given), call(model, given))


@every_model
def test_a_sub_model_trains(entry: Entry) -> None:
    model, inputs, width_map = traced(entry.name)
    before = copy.deepcopy(model.state_dict())
    sub = narrow(model, width_map, half_window(width_map, seed=1)).train()
    start = copy.deepcopy(sub.state_dict())
    output = call(sub, inputs)
    same_form(output, call(copy.deepcopy(model).train(), inputs))
    loss = loss_of(output)
    assert loss.isfinite()
    loss.backward()
    gradients = {name: p.grad for name, p in sub.named_parameters()}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    assert (
        sum(gradient is not None for gradient in gradients.values()) > 0.5 * len(gradients)
        or entry.name == "unused"
    )
    torch.optim.SGD(sub.parameters(), 1.0).step()
    assert any(not torch.equal(p, start[name]) for name, p in sub.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


@every_model
def test_a_sub_model_is_smaller(entry: Entry) -> None:
    model, _, width_map = traced(entry.name)
    sub = narrow(model, width_map, half_window(width_map))
    full, held = (sum(p.numel() for p in m.parameters()) for m in (model, sub))
    if width_map.groups:
        assert held < full
    assert held <= full * (1 - 0.25 * entry.reach)


@every_model
def test_the_order_of_units_does_not_matter(entry: Entry) -> None:
    """All units in another order compute the same function: the sub-model is right about every width."""
    model, inputs, width_map = traced(entry.name)
    sub = narrow(model, width_map, shuffled_window(width_map))
    assert distance(call(model, inputs), call(sub, inputs)) < 1e-4


def without(model: nn.Module, width_map: WidthMap, window: dict[str, Tensor], factor: bool) -> nn.Module:
    """The model in which units that are not held add nothing: what is read from them is multiplied by zero.

    With `factor`, what is read from the units held is multiplied by K/w instead of one.
    """
    model = copy.deepcopy(model)
    done = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        for group, place in width_map.places.get(name, ()):
            if (name, place.axis) not in width_map.contracting or (id(tensor), place) in done:
                continue
            done |= {(id(tensor), place)}
            scale = torch.zeros(tensor.shape[place.axis])
            everything = torch.arange(group.units)
            scale[:] = 1.0
            scale[place.positions(everything)] = 0.0
            held = window.get(group.name, everything)
            scale[place.positions(held)] = group.units / len(held) if factor else 1.0
            shape = [1] * tensor.dim()
            shape[place.axis] = -1
            tensor.data *= scale.view(shape)
    return model


@pytest.mark.parametrize("entry", [e for e in ZOO if e.ablates], ids=str)
@pytest.mark.parametrize("choose", [half_window, random_window])
def test_units_not_held_are_units_that_nobody_reads(
    entry: Entry, choose: Callable[[WidthMap], dict[str, Tensor]]
) -> None:
    model, inputs, width_map = traced(entry.name)
    window = choose(width_map)
    sub = narrow(model, width_map, window, scaling=False).eval()
    expected = call(without(model, width_map, window, False), inputs)
    assert distance(expected, call(sub, inputs)) < 1e-4


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "name", ["mlp", "in_place", "two_towers", "vgg_bn", "text_cnn", "lstm", "super_resolution"]
)
def test_scaling_multiplies_what_is_read(name: str) -> None:
    model, inputs, width_map = traced(name)
    window = half_window(width_map, seed=2)
    sub = narrow(model, width_map, window).eval()
    expected = call(without(model, width_map, window, True), inputs)
    assert distance(expected, call(sub, inputs)) < 1e-4


def with_copies(model: nn.Module, width_map: WidthMap) -> nn.Module:
    """The model in which each unit of the second half of a group is a copy of one of the first."""
    model = copy.deepcopy(model)
    state = {**dict(model.named_buffers()), **model.state_dict()}
    for group in width_map.groups:
        half = torch.arange(group.units // 2)
        for place in group.places:
            tensor = state[place.tensor]
            first = tensor.index_select(place.axis, place.positions(half))
            tensor.index_copy_(place.axis, place.positions(half + len(half)), first)
    return model


@pytest.mark.parametrize("entry", [*LOOKUP, *DISTANCE], ids=str)
def test_half_of_a_model_of_copies_answers_as_the_whole(entry: Entry) -> None:
    """Every sum over a width is twice that of the half: the factors of width scaling are right in each place."""
    model, inputs, width_map = traced(entry.name)
    assert all(group.units % 2 == 0 for group in width_map.groups)
    model = with_copies(model, width_map)
    sub = narrow(model, width_map, {group.name: torch.arange(group.units // 2) for group in width_map.groups})
    assert distance(call(model, inputs), call(sub, inputs)) < 1e-4


@pytest.mark.release
def test_scaled_sub_models_answer_as_the_model_on_average() -> None:
    """Where one sum is narrowed, the mean over all windows of K/w times the sum held is the whole sum."""
    for name, group in (
        ("mlp", "layers.3"),
        ("vgg_bn", "classifier.4"),
        ("lstm", "hidden"),
        ("in_place", "one"),
    ):
        model, inputs, width_map = traced(name)
        units = width_map[group].units
        outputs = []
        for start in range(units):
            window = {group: (start + torch.arange(3)) % units}
            outputs.append(call(narrow(model, width_map, window).eval(), inputs))
        mean = torch.stack(outputs).mean(0)
        assert distance(call(model, inputs), mean) < 1e-4, name


@pytest.mark.release
def test_called_by_position_or_by_name() -> None:
    model, inputs, width_map = traced("film")
    sub = narrow(model, width_map, half_window(width_map))
    assert isinstance(inputs, tuple)
    image, condition = inputs
    expected = sub(image, condition)
    assert equal(expected, sub(image, condition=condition))
    assert equal(expected, sub(condition=condition, image=image))
    model, inputs, width_map = traced("BertForSequenceClassification")
    sub = narrow(model, width_map, half_window(width_map))
    assert isinstance(inputs, dict)
    assert equal(sub(**inputs), sub(inputs["input_ids"], attention_mask=inputs["attention_mask"]))


def test_a_call_that_was_not_traced_is_an_error() -> None:
    model, inputs, width_map = traced("film")
    sub = narrow(model, width_map, half_window(width_map))
    assert isinstance(inputs, tuple)
    with pytest.raises(TypeError, match="condition"):
        sub(inputs[0])
    with pytest.raises(TypeError):
        sub(*inputs, 3)
    with pytest.raises(TypeError):
        sub(*inputs, colour=3)


@pytest.mark.release
@pytest.mark.slow  # seconds, where no other test has traced its model before
def test_sub_models_of_equal_sizes_share_their_graph() -> None:
    model, inputs, width_map = traced("resnet18")
    one, two = (narrow(model, width_map, half_window(width_map, seed)) for seed in (0, 1))
    state = copy.deepcopy(two.state_dict())
    expected = call(two, inputs)
    one.load_state_dict(state)
    assert equal(call(one, inputs), expected)


@pytest.mark.release
def test_compute_shrinks() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("resnet18", "unet", "nanogpt_slow", "LlamaForCausalLM", "mixer"):
        model, inputs, width_map = traced(name)
        sub = narrow(model, width_map, half_window(width_map))
        counts = []
        for module in (model, sub):
            with FlopCounterMode(display=False) as counter:
                call(module, inputs)
            counts.append(counter.get_total_flops())
        assert counts[1] < 0.6 * counts[0], (name, counts)
