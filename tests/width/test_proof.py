"""Mutations: a map with any one place missing, shifted or misread must not pass its proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from zoo import by_name
from zoo_checks import traced

from msfusion.errors import UntraceableModelError
from msfusion.width.groups import Group, Place, WidthMap

MUTATED = [
    "resnet_short",
    "resnext",
    "vgg_bn",
    "densenet",
    "convnext",
    "encoder",
    "bare_attention",
    "lstm_both_ways",
    "nanogpt",
    "gqa_slices",
    "low_rank",
    "maxout",
    "BertForMaskedLM",
    "LlamaForCausalLM",
]
"""Every place of each of these is taken away, shifted, misread and moved to other groups."""


@pytest.mark.parametrize("name", ["resnet_short", "gru", "nanogpt"])
def test_a_map_can_be_proved_again(name: str) -> None:
    traced(name)[2].prove()


def test_a_map_without_its_graph_cannot_be_proved() -> None:
    with pytest.raises(UntraceableModelError, match="trace"):
        replace(traced("mlp")[2], program=None).prove()


def changed(width_map: WidthMap, group: Group, old: Place, new: Place | None) -> WidthMap:
    """The map of this group alone, with one of its places replaced or removed."""
    places = tuple(place for place in group.places if place != old) + ((new,) if new else ())
    return replace(width_map, groups=(replace(group, places=places),))


def refused(width_map: WidthMap) -> bool:
    """Whether the proof of a map fails as it should: with the error that says so."""
    try:
        width_map.prove()
    except UntraceableModelError:
        return True
    return False


def places(width_map: WidthMap) -> Iterator[tuple[Group, Place]]:
    """Every place of every group."""
    for group in width_map.groups:
        for place in group.places:
            yield group, place


def label(place: Place) -> str:
    """A place by tensor, axis and offset."""
    return f"{place.tensor}:{place.axis}:{place.offset}"


@pytest.mark.parametrize("name", MUTATED)
def test_a_missing_place_is_noticed(name: str) -> None:
    width_map = traced(name)[2]
    missed = {
        label(place)
        for group, place in places(width_map)
        if not refused(changed(width_map, group, place, None))
    }
    assert missed == set(by_name(name).invariant)


@pytest.mark.parametrize("name", MUTATED)
def test_a_shifted_place_is_noticed(name: str) -> None:
    width_map = traced(name)[2]
    missed = set()
    for group, place in places(width_map):
        for offset in (place.offset + place.thickness, place.offset - place.thickness):
            if not refused(changed(width_map, group, place, replace(place, offset=offset))):
                missed.add(label(place))
    assert missed <= set(by_name(name).invariant)


@pytest.mark.parametrize("name", MUTATED)
def test_units_read_in_the_wrong_order_are_noticed(name: str) -> None:
    """Heads of 8 rows are not 8 blocks of rows of one each."""
    width_map = traced(name)[2]
    missed = set()
    for group, place in places(width_map):
        if place.thickness * place.repeat == 1:
            continue
        swapped = replace(place, thickness=place.repeat, repeat=place.thickness)
        if swapped != place and not refused(changed(width_map, group, place, swapped)):
            missed.add(label(place))
    assert missed <= set(by_name(name).invariant)


@pytest.mark.parametrize("name", MUTATED)
def test_a_place_in_the_wrong_group_is_noticed(name: str) -> None:
    width_map = traced(name)[2]
    missed = set()
    for group, place in places(width_map):
        for other in width_map.groups:
            if other is group or other.units != group.units or place in other.places:
                continue
            without = tuple(p for p in group.places if p != place)
            groups = replace(group, places=without), replace(other, places=(*other.places, place))
            if not refused(replace(width_map, groups=groups)):
                missed.add(label(place))
            break
    assert missed <= set(by_name(name).invariant)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel", "nanogpt", "language_lstm"])
def test_names_of_a_tied_tensor_must_agree(name: str) -> None:
    """Either name may be left out without a change of the output: the proof compares the names themselves."""
    width_map = traced(name)[2]
    assert width_map.aliases
    tied = set(width_map.aliases) | set(width_map.aliases.values())
    for group, place in places(width_map):
        if place.tensor in tied:
            with pytest.raises(UntraceableModelError, match="tied"):
                changed(width_map, group, place, None).prove()


def test_a_group_of_the_wrong_number_of_units_is_refused() -> None:
    width_map = traced("mlp")[2]
    group = width_map.groups[0]
    smaller = replace(group, units=group.units - 1)
    assert refused(replace(width_map, groups=(smaller, *width_map.groups[1:])))
    narrower = tuple(replace(place, units=place.units - 1) for place in group.places)
    width_map = replace(width_map, groups=(replace(smaller, places=narrower), *width_map.groups[1:]))
    width_map.prove()  # one unit left out of the group altogether is a smaller group, and a right one
