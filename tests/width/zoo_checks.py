"""What the tests of the width map share: traced models, windows, comparisons of what models return."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import by_name
from zoo_entry import Entry, Inputs

from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

BATCH, TIME = 2, 7


@cache
def traced(name: str) -> tuple[nn.Module, Inputs, WidthMap]:
    """A model of the zoo, the inputs it was traced with, and its map. Made once: tests must not change it."""
    entry = by_name(name)
    model, inputs = entry.build().eval(), entry.inputs(BATCH, TIME)
    return model, inputs, trace(model, inputs)


def half_window(width_map: WidthMap, seed: int = 0) -> dict[str, Tensor]:
    """Half of each group, neighbours on a circle."""
    generator = torch.Generator().manual_seed(seed)
    window = {}
    for group in width_map.groups:
        start = int(torch.randint(group.units, (), generator=generator))
        window[group.name] = (start + torch.arange(-(-group.units // 2))) % group.units
    return window


def random_window(width_map: WidthMap, seed: int = 0) -> dict[str, Tensor]:
    """Any number of units of each group, any units, in any order."""
    generator = torch.Generator().manual_seed(seed)
    window = {}
    for group in width_map.groups:
        size = int(torch.randint(1, group.units + 1, (), generator=generator))
        window[group.name] = torch.randperm(group.units, generator=generator)[:size]
    return window


def smallest_window(width_map: WidthMap) -> dict[str, Tensor]:
    """The last unit of each group alone: axes of length one."""
    return {group.name: torch.tensor([group.units - 1]) for group in width_map.groups}


def shuffled_window(width_map: WidthMap, seed: int = 0) -> dict[str, Tensor]:
    """All units of each group in another order."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.units, generator=generator) for group in width_map.groups}


def other_inputs(entry: Entry) -> Inputs:
    """Inputs of another batch size, and for sequence models of another length."""
    return entry.inputs(BATCH + 1, TIME + 2 if entry.sequence else TIME)


def tensors(output: Any) -> list[Tensor]:
    """The tensors in whatever a model returns, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def same_form(one: Any, two: Any) -> None:
    """Two outputs have the same type, structure, shapes and dtypes."""
    assert type(one) is type(two)
    assert pytree.tree_structure(one) == pytree.tree_structure(two)
    for a, b in zip(tensors(one), tensors(two), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def equal(one: Any, two: Any) -> bool:
    """Two outputs have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def distance(one: Any, two: Any) -> float:
    """The largest difference of two outputs, relative to the spread of the first; infinities must agree."""
    worst = 0.0
    for a, b in zip(tensors(one), tensors(two), strict=True):
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (x.detach().nan_to_num(0.0, 0.0, 0.0).double() for x in (a, b))
        if a.numel():
            spread = float(a.max() - a.min())
            worst = max(worst, float((a - b).abs().max()) / max(spread, 1e-6))
    return worst


def loss_of(output: Any) -> Tensor:
    """A number that depends on every floating-point output."""
    parts = [t.float().nan_to_num(0.0, 0.0, 0.0) for t in tensors(output) if t.is_floating_point()]
    return torch.stack([part.sin().mean() for part in parts]).sum()
