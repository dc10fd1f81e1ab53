"""What is run is what was proved: models whose graph could differ from them are made right or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrowed import Net, X, at_full_width, same_training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msfusion.errors import CutError, MsfusionError, UntraceableModelError
from msfusion.width.cut import cut
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

# -- what a call may vary ----------------------------------------------------------------------------------------------


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), 24)
        for t in range(x.size(1)):
            h = torch.tanh(self.a(x[:, t]) + self.b(h))
        return self.o(h)


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.o(h * 2 if x.shape[1] > 5 else h)


class Mean(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x)).sum(1) / x.shape[1])


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.o(torch.relu(self.c(x))), size=x.shape[-2:], mode="bilinear")


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("model", "traced", "called", "fits"),
    [
        (Loop, (2, 8, 8), (2, 12, 8), False),
        (Loop, (2, 8, 8), (2, 5, 8), False),
        (Loop, (2, 8, 8), (5, 8, 8), True),
        (Branch, (2, 8, 8), (3, 6, 8), True),
        (Branch, (2, 8, 8), (3, 5, 8), False),
        (Mean, (2, 8, 8), (3, 5, 8), True),
        (Mean, (2, 8, 8), (1, 8, 8), True),
        (Resized, (2, 3, 16, 16), (2, 3, 24, 24), False),
        (Resized, (2, 3, 16, 16), (5, 3, 16, 16), True),
    ],
)
def test_other_sizes_answer_right_or_are_refused(model: Any, traced: Any, called: Any, fits: bool) -> None:
    network, x = model().eval(), torch.randn(called)
    sub = at_full_width(network, (torch.randn(traced),))
    if fits:
        assert torch.allclose(sub(x), network(x), atol=1e-6)
    else:
        with pytest.raises(TypeError, match="x"):
            sub(x)


def test_types_of_tensors_are_checked() -> None:
    sub = at_full_width(Net().eval(), (X,))
    with pytest.raises(TypeError, match="float64"):
        sub(X.double())
    assert sub.double()(X.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="axes"):
        sub(X[0].double())


def test_the_parts_of_a_cut_are_checked_too() -> None:
    model = Loop().eval()
    width_map = trace(model, (torch.randn(2, 8, 8),))
    try:
        parts = cut(model, width_map, "a")
    except CutError:
        return
    with pytest.raises(TypeError):
        parts.client(torch.randn(2, 12, 8))


# -- the model is only read --------------------------------------------------------------------------------------------


class LazyMask(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.ones(x.shape[1], x.shape[1]).tril()
        return self.o(self.mask @ torch.relu(self.a(x)))


def test_what_a_model_sets_while_it_is_traced_is_taken_back() -> None:
    model, x = LazyMask(), torch.randn(4, 5, 8)
    width_map = trace(model, (x,))
    assert model.mask is None
    assert model.seen == []
    assert torch.equal(narrow(model, width_map, {})(x), model(x))


# -- more that is followed ---------------------------------------------------------------------------------------------


def test_a_module_under_two_names() -> None:
    model = Net()
    model.c = model.b
    width_map = trace(model, (X,))
    assert width_map.aliases["c.weight"] == "b.weight"


class Extra(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_extra_state_and_renaming_hooks_are_no_matter() -> None:
    assert trace(Extra(), (X,)).groups
    model = Net()
    model._register_state_dict_hook(
        lambda m, s, p, d: [s.__setitem__("x." + k, s.pop(k)) for k in list(s)] and None
    )
    assert "a.weight" in trace(model, (X,)).shapes


def test_torchscript_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript's age
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)))
    with pytest.raises(UntraceableModelError, match="TorchScript"):
        trace(scripted, (X,))


def test_a_model_without_values_can_be_planned_and_not_trained() -> None:
    with torch.device("meta"):
        model = Net()
    width_map = trace(model, (X,))
    assert width_map.groups == trace(Net(), (X,)).groups
    sub = narrow(model, width_map, {g.name: torch.arange(2) for g in width_map.groups})
    assert all(parameter.is_meta for parameter in sub.parameters())
    with pytest.raises(MsfusionError, match="values"):
        narrow(Net(), width_map, {})


def test_cumulative_batch_norm_is_refused_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24, momentum=None), nn.Linear(24, 4))
    with pytest.raises(UntraceableModelError, match="momentum"):
        trace(model, (X,))
    assert capsys.readouterr().err == ""


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.o(checkpoint(self.b, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_told(reentrant: bool) -> None:
    model = Checkpointed(reentrant).train()
    assert trace(model, (X,)).checkpointing == ("the model itself",)
    assert trace(Net(), (X,)).checkpointing == ()
    same_training(model, (X,))


# -- which module it is ------------------------------------------------------------------------------------------------


class OtherwiseWhenExported(nn.Module):
    """Doubles what its layer gives, but only while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * 2 if torch.compiler.is_exporting() else y


class Residual(Net):
    """Two layers inside, of which only the second is exported otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(24, 24), OtherwiseWhenExported()])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        for block in self.blocks:
            x = x + block(x)
        return self.o(x)


class OtherwiseBetweenModules(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.o(x) * (2 if torch.compiler.is_exporting() else 1)


@pytest.mark.parametrize(
    ("model", "module"), [(Residual(), "'blocks.1'"), (OtherwiseBetweenModules(), "'the model itself'")]
)
def test_a_difference_in_answers_names_the_module(model: nn.Module, module: str) -> None:
    with pytest.raises(UntraceableModelError, match=f"module {module} answers otherwise"):
        trace(model, (X,))


class RarelyDropped(nn.Module):
    """A branch that training skips so seldom that its answers mostly agree with those of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if self.training:
            hidden = hidden * (torch.rand(x.shape[0], 1) < 0.999)
        result: Tensor = self.last(hidden)
        return result


def test_what_only_training_draws_is_not_in_the_evaluation_graph() -> None:
    width_map = trace(RarelyDropped(), (torch.randn(2, 4),))
    assert width_map.program is not None
    drawn = {
        training: any("rand" in node.name for node in graph.graph.nodes)
        for training, graph in width_map.program.graphs.items()
    }
    assert drawn == {True: True, False: False}
