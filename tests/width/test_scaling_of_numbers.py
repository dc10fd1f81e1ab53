"""A sub-model of equal units answers as the whole: bounds of norms, identity matrices and repeated values too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import by_name
from zoo_checks import BATCH, TIME
from zoo_entry import call

from msfusion.width.groups import WidthMap
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


def _with_equal_units(model: nn.Module, width_map: WidthMap) -> None:
    """Give all units of each group the values of the first one."""
    tensors = dict(model.named_parameters())
    for name, entries in width_map.places.items():
        for group, place in entries:
            first = place.positions(torch.zeros(group.units, dtype=torch.long))
            with torch.no_grad():
                target = place.positions(torch.arange(group.units))
                tensors[name].index_copy_(place.axis, target, tensors[name].index_select(place.axis, first))


@pytest.mark.parametrize("name", ["bounded", "bounded_cubic", "by_identity", "rotated", "complex", "pairs"])
def test_half_of_equal_units_answers_as_the_whole(name: str) -> None:
    entry = by_name(name)
    model, inputs = entry.build().double().eval(), entry.inputs(BATCH, TIME)
    inputs = torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    width_map = trace(model, inputs)
    _with_equal_units(model, width_map)
    if name == "by_identity":  # a matrix without its diagonal has one entry less in each row, at any width
        model.get_parameter("within").data.zero_()
    window = {group.name: torch.arange(group.units // 2) for group in width_map.groups}
    half = narrow(model, width_map, window)
    assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in model.parameters())
    close = 1e-6 if "bounded" in name else 1e-9  # torch adds 1e-7 to a norm that it bounds
    torch.testing.assert_close(call(half, inputs), call(model, inputs), rtol=close, atol=close)


def test_a_bound_holds_for_the_units_that_are_there() -> None:
    class Bound(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
            return super().forward(x)

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Bound(16, 12), nn.ReLU(), nn.Linear(12, 3))
    inputs = torch.randn(4, 6)
    width_map = trace(model, (inputs,))
    window = {g.name: torch.arange(g.units // 4) for g in width_map.groups}
    quarter = narrow(model, width_map, window)
    with torch.no_grad():
        quarter.get_parameter("2.weight").mul_(100)
    quarter(inputs)
    assert quarter.get_parameter("2.weight").norm(dim=1).tolist() == pytest.approx([0.25] * 3, rel=1e-3)
