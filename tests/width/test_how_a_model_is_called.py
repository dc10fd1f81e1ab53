"""A model narrowed to its full width is called as the model is: inputs by name, none, twice, wrapped."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrowed import Net, X, at_full_width
from torch import Tensor, nn

from msfusion.errors import MsfusionError
from msfusion.width.cut import cut
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor, *, flip: bool = False) -> Tensor:
        return self.o(torch.relu(self.a(x)) - (2.0 if flip else 1.0) * self.a(y))


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
def test_keyword_inputs_reach_their_parameters_in_any_order(order: tuple[str, str]) -> None:
    model, y = TwoInputs().eval(), X.flip(0) + 1
    inputs = {name: {"x": X, "y": y}[name] for name in order}
    sub = at_full_width(model, inputs)
    assert torch.equal(sub(**inputs), model(X, y))
    assert torch.equal(sub(y=y, x=X), model(X, y))
    assert torch.equal(sub(X, y), model(X, y))


ONE = torch.ones(1)


class Masked(Net):
    """None is another answer than the default; the last two are None anyway."""

    def forward(
        self, x: Tensor, mask: Tensor | None = ONE, y: Tensor | None = None, z: Tensor | None = None
    ) -> Tensor:
        h = torch.relu(self.a(x)) * (5.0 if mask is None else mask)
        return self.o(h + (0.0 if y is None else self.a(y)) - (0.0 if z is None else torch.tanh(self.a(z))))


def test_a_none_that_is_not_the_default_stays_what_it_is() -> None:
    model = Masked().eval()
    plain = at_full_width(model, (X,))
    assert torch.equal(plain(X, y=None), model(X))
    with pytest.raises(TypeError, match="mask"):
        plain(X, None)
    for inputs in ((X, None), {"mask": None, "x": X}):
        without = at_full_width(model, inputs)
        assert torch.allclose(without(X, None), model(X, None), atol=1e-6)
        assert torch.allclose(without(mask=None, x=X, z=None), model(X, None), atol=1e-6)
        with pytest.raises(TypeError, match="mask"):
            without(X)


def test_an_input_by_position_is_not_taken_for_a_later_one() -> None:
    model = Masked().eval()
    sub = at_full_width(model, {"x": X, "z": X.flip(0)})
    assert torch.allclose(sub(x=X, z=X + 1), model(x=X, z=X + 1), atol=1e-6)
    with pytest.raises(TypeError, match="traced with the inputs x, z"):
        sub(X, X + 1)


class Attending(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(self.attention(q, k, k, need_weights=False)[0])))


@pytest.mark.release
def test_one_tensor_given_twice_is_two_inputs() -> None:
    model, x = Attending().eval(), torch.randn(3, 5, 8)
    sub = at_full_width(model, (x, x))
    other = torch.randn(3, 5, 8)
    assert torch.allclose(sub(x, other), model(x, other), atol=1e-5)
    assert torch.allclose(sub(x, x), model(x, x), atol=1e-5)


class Difference(Net):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(q)) - torch.relu(self.a(k)))


def test_one_tensor_given_twice_does_not_hide_what_is_computed() -> None:
    model = Difference().eval()
    sub = at_full_width(model, (X, X))
    assert torch.allclose(sub(X, X + 1), model(X, X + 1), atol=1e-5)


class Normed(Net):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(24, momentum=momentum), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.drop(torch.relu(self.norm(self.a(x)))))


def test_one_example_is_allowed_in_the_modes_in_which_the_model_takes_it() -> None:
    model = Normed().eval()
    sub = at_full_width(model, (X,))
    assert torch.allclose(sub(X[:1]), model(X[:1]), atol=1e-6)
    with pytest.raises(TypeError, match="at least 2"):
        sub.train()(X[:1])
    assert all(tensor.isfinite().all() for tensor in sub.state_dict().values())

    free = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))
    assert at_full_width(free, (X,)).train()(X[:1]).shape == (1, 4)


def _less_dropout(model: nn.Module) -> None:
    model.drop.p = 0.0


def _another_activation(model: nn.Module) -> None:
    model.act = nn.Tanh()


def _another_momentum(model: nn.Module) -> None:
    model.norm.momentum = 0.5


def _own_dropout(model: nn.Module) -> None:
    model.attention_dropout = 0.3


def _nothing_that_counts(model: nn.Module) -> None:
    model.criterion, model.step, model.temperature = nn.CrossEntropyLoss(), 7, 0.5
    model.eval().train().requires_grad_(False)


class Changed(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.step, self.attention_dropout = nn.ReLU(), 0, 0.1

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        h = self.drop(self.act(self.norm(self.a(x))))
        return self.o(F.dropout(h, self.attention_dropout, self.training))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_less_dropout, "'drop'"),
        (_another_activation, "'act'"),
        (_another_momentum, "'norm'"),
        (_own_dropout, "attention_dropout"),
    ],
)
def test_a_model_that_was_changed_since_is_not_the_traced_one(change: Any, word: str) -> None:
    model = Changed()
    width_map = trace(model, (X,))
    change(model)
    for use in (lambda: narrow(model, width_map, {}), lambda: cut(model, width_map, "norm")):
        with pytest.raises(MsfusionError, match=f"{word}.*trace it again"):
            use()


def test_what_changes_in_ordinary_use_is_no_change() -> None:
    model = Changed()
    width_map = trace(model, (X,))
    _nothing_that_counts(model)
    assert narrow(deepcopy(model), width_map, {})(X).shape == (4, 4)


class NamedLikeState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(24.0))
        self.t = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, mask: Tensor, T: Tensor, tensors_0: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(mask)) * self.mask * T) / self.t + tensors_0


def test_inputs_may_have_the_names_of_tensors() -> None:
    model, inputs = NamedLikeState().eval(), (X, torch.rand(4, 1), torch.rand(4, 4))
    assert torch.equal(at_full_width(model, inputs)(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "name",
    [
        'a",0),open("EXECUTED","w")#',
        'q"q',
        "back\\slash",
        "line\nbreak",
        "\x1b[31m",
        "[/]",
        "ä b",
    ],
)
def test_no_name_of_a_module_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Keyed(Net):
        def __init__(self) -> None:
            super().__init__()
            self._modules[name] = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.relu(self._modules[name](x)))  # type: ignore[misc]

    model = Keyed().eval()
    width_map = trace(model, (X,))
    assert torch.equal(narrow(model, width_map, {})(X), model(X))
    assert narrow(model, width_map, {g.name: torch.arange(2) for g in width_map.groups})(X).shape == (4, 4)
    assert not (tmp_path / "EXECUTED").exists()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [Wrapped, nn.DataParallel, lambda m: torch.compile(m, backend="eager")],
    ids=["args", "parallel", "compiled"],
)
def test_wrappers_are_traced_through(wrap: Any) -> None:
    model = wrap(Net()).eval()
    width_map = trace(model, (X,))
    assert width_map.reach() > 0.3
    assert list(width_map.shapes) == list(model.state_dict())
    assert torch.equal(narrow(model, width_map, {})(X), Net().eval()(X))


def test_keyword_arguments_of_a_wrapper() -> None:
    model = Wrapped(TwoInputs()).eval()
    inputs = {"y": X + 1, "x": X}
    assert torch.equal(at_full_width(model, inputs)(**inputs), model(**inputs))


def test_what_is_no_tensor_is_fixed() -> None:
    model = TwoInputs().eval()
    sub = at_full_width(model, {"x": X, "y": X, "flip": True})
    assert torch.equal(sub(x=X, y=X, flip=True), model(X, X, flip=True))
    with pytest.raises(TypeError, match="flip"):
        sub(x=X, y=X, flip=False)
    with pytest.raises(TypeError, match="flip"):
        sub(x=X, y=X, flip=1)
    with pytest.raises(TypeError, match="y"):
        sub(x=X, y=3, flip=True)
