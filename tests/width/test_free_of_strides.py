"""Sub-models run whatever strides their operators give; what is written through a view is still seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo_checks import half_window, smallest_window, traced

from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


@pytest.mark.release
@pytest.mark.slow  # seconds, where no other test has traced its model before
def test_attention_runs_with_fewer_heads_on_any_device_and_kernel() -> None:
    """Export drops nanoGPT's `.contiguous()`, and other kernels give other strides."""
    model, inputs, width_map = traced("nanogpt")
    for choose in (half_window, smallest_window):
        window = choose(width_map)
        sub = narrow(model, width_map, window).eval()
        expected = sub(*inputs)[0]
        with torch.no_grad():
            assert torch.allclose(sub(*inputs)[0], expected, atol=1e-5)
        assert torch.allclose(sub.double()(*inputs)[0].float(), expected, atol=1e-5)
        assert sub.to("meta")(*(x.to("meta") for x in inputs))[0].shape == expected.shape


class WrittenThroughAView(nn.Module):
    """A view is written, and what it was made of is read; and the other way round; and a buffer is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        hidden.view(-1, 4, 4).mul_(2.0)
        squares = hidden.square()
        rows = squares.view(-1, 8, 2)
        squares.add_(1.0)
        self.calls.view(-1).add_(1.0)
        return self.two(torch.tanh(hidden) + rows.reshape(-1, 16))


def test_what_is_written_through_a_view_is_read_behind_it() -> None:
    model, x = WrittenThroughAView().eval(), torch.randn(5, 6)
    width_map = trace(model, (x,))
    assert width_map.reach() > 0.9
    sub = narrow(model, width_map, {})
    before = model.calls.clone()
    assert torch.equal(sub(x), model(x))
    assert torch.equal(sub.state_dict()["calls"], before + 1)
    half = {group.name: torch.arange(group.units // 2) for group in width_map.groups}
    assert narrow(model, width_map, half)(x).shape == (5, 3)
    views = [n for n in width_map.program.graphs[True].graph.nodes if n.target is torch.ops.aten.view.default]
    assert len(views) == 3  # each is written on one side and read on the other


@pytest.mark.release
@pytest.mark.slow  # seconds, where no other test has traced its model before
def test_a_view_whose_other_side_is_not_read_becomes_a_reshape() -> None:
    _, _, width_map = traced("nanogpt_slow")
    operators = {n.target for n in width_map.program.graphs[True].graph.nodes}
    assert torch.ops.aten.reshape.default in operators
    assert torch.ops.aten.view.default not in operators
