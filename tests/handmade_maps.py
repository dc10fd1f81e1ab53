"""Width maps written by hand, and random ones, for the tests of what stands on the width map."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from msfusion.width.groups import Group, Place, WidthMap


def map_of(shapes: dict[str, tuple[int, ...]], places: dict[str, list[Place]], **more: object) -> WidthMap:
    """A width map with the given places by group; all tensors are parameters unless `more` says not."""
    groups = tuple(Group(name, stands[0].units, tuple(stands)) for name, stands in places.items())
    settings = {"parameters": tuple(shapes), **more}
    return WidthMap(groups=groups, shapes=shapes, **settings)


def meeting_map(rows: int = 64, columns: int = 128) -> WidthMap:
    """One weight in which two groups meet."""
    return map_of(
        {"weight": (rows, columns)},
        {"rows": [Place("weight", 0, 0, rows)], "columns": [Place("weight", 1, 0, columns)]},
    )


def self_meeting_map(units: int = 64) -> WidthMap:
    """One weight in which a group meets itself."""
    return map_of(
        {"weight": (units, units)}, {"g": [Place("weight", 0, 0, units), Place("weight", 1, 0, units)]}
    )


def resnet18_map(classes: int = 10) -> WidthMap:
    """The CIFAR ResNet-18: 11.2 million parameters, four stages of two blocks of 64 to 512 channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, list[Place]] = {}
    size = {f"stage{stage}": 64 * 2 ** (stage - 1) for stage in range(1, 5)}

    def convolution(name: str, out: str, into: str | None, kernel: int) -> None:
        shapes[name] = (size[out], size[into] if into else 3, kernel, kernel)
        places.setdefault(out, []).append(Place(name, 0, 0, size[out]))
        if into:
            places.setdefault(into, []).append(Place(name, 1, 0, size[into]))

    def norm(name: str, group: str) -> None:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{kind}"] = (size[group],)
            places[group].append(Place(f"{name}.{kind}", 0, 0, size[group]))
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1.weight", "stage1", None, 3)
    norm("bn1", "stage1")
    before = "stage1"
    for stage in range(1, 5):
        here = f"stage{stage}"
        for block in range(2):
            inner, prefix = f"stage{stage}.block{block}", f"layer{stage}.{block}"
            size[inner] = size[here]
            convolution(f"{prefix}.conv1.weight", inner, before, 3)
            norm(f"{prefix}.bn1", inner)
            convolution(f"{prefix}.conv2.weight", here, inner, 3)
            norm(f"{prefix}.bn2", here)
            if before != here:
                convolution(f"{prefix}.shortcut.weight", here, before, 1)
                norm(f"{prefix}.shortcut_bn", here)
            before = here
    shapes["linear.weight"], shapes["linear.bias"] = (classes, 512), (classes,)
    places["stage4"].append(Place("linear.weight", 1, 0, 512))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return map_of(shapes, places, parameters=tuple(n for n in shapes if not n.endswith(buffers)))


MOST_ENTRIES = 2000
"""Of a drawn tensor: references go through each, and three long axes would have a hundred thousand."""


def draw_map(data: st.DataObject) -> WidthMap:
    """A small map: up to three groups, axes made of several places with gaps, thick and repeated units."""
    # made outside the strategy: beartype draws random numbers, which hypothesis forbids inside one
    return map_of(*data.draw(_shapes_and_places()))


@st.composite
def _shapes_and_places(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Place]]]:
    names = "abc"[: draw(st.integers(1, 3))]
    units = {name: draw(st.integers(1, 6)) for name in names}
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, list[Place]] = {name: [] for name in names}
    for number in range(draw(st.integers(1, 4))):
        shape = []
        for axis in range(draw(st.integers(0, 3))):
            length = draw(st.integers(0, 1))
            for _ in range(draw(st.integers(0, 2))):
                group = draw(st.sampled_from(names))
                place = Place(
                    f"t{number}", axis, length, units[group], draw(st.integers(1, 2)), draw(st.integers(1, 2))
                )
                if math.prod(shape) * (place.offset + place.length + 1) > MOST_ENTRIES:
                    break
                places[group].append(place)
                length = place.offset + place.length + draw(st.integers(0, 1))
            shape.append(max(length, 1))
        shapes[f"t{number}"] = tuple(shape)
    # a group always stands somewhere
    for name in names:
        shapes[f"bias_{name}"] = (units[name],)
        places[name].append(Place(f"bias_{name}", 0, 0, units[name]))
    return shapes, places


@st.composite
def windows_of(draw: st.DrawFn, width_map: WidthMap) -> dict[str, Tensor]:
    """Any units in any order, or neighbouring ones; now and then a group is not named (and so held whole)."""
    window = {}
    for group in width_map.groups:
        held = draw(st.integers(1, group.units))
        kind = draw(st.sampled_from(["any", "neighbours", "unnamed"]))
        if kind == "any":
            units = draw(st.permutations(range(group.units)))[:held]
            window[group.name] = torch.tensor(units, dtype=torch.long)
        elif kind == "neighbours":
            window[group.name] = (torch.arange(held) + draw(st.integers(0, group.units - 1))) % group.units
    return window


def random_state(width_map: WidthMap, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Normal values for each tensor of the map; counters (`num_batches_tracked`) are integers."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in width_map.shapes.items():
        first = width_map.aliases.get(name, name)
        if first in state:
            state[name] = state[first]
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.randint(100, shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return state
