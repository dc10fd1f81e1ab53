"""What is run is what was proved: models whose graph could differ from them are made right or refused by name."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import deque
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msfusion.errors import CutError, MsfusionError, UntraceableModelError
from msfusion.width.cut import cut
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


class Net(nn.Module):
    """Two layers; what is between them differs from test to test."""

    def __init__(self, features: int = 8, hidden: int = 24, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = (
            nn.Linear(features, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def at_full_width(model: nn.Module, inputs: Any) -> nn.Module:
    return narrow(model, trace(model, inputs), {})


def same_training(model: nn.Module, inputs: tuple[Tensor, ...], steps: int = 3) -> None:
    """The sub-model at full width goes through the same steps of training as the model, buffers included."""
    model.train()
    sub = at_full_width(model, inputs).train()
    for module in (model, sub):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            module(*inputs).square().mean().backward()
            optimizer.step()
    ours = sub.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(ours[name].detach(), tensor, atol=1e-6), name
        assert ours[name].requires_grad is False or isinstance(ours[name], nn.Parameter)


# -- how a model is called ---------------------------------------------------------------------------------------------


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


# -- gradients and updates of the user's own ---------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class OwnGradients(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "module hook":
            self.b.register_full_backward_hook(
                lambda m, i, o: tuple(None if g is None else g * 0.1 for g in i)
            )
        if how == "parameter hook":
            self.a.weight.register_hook(lambda g: 0.1 * g)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        if self.how == "Straight":
            h = Straight.apply(h)
        if self.how == "Identity":
            h = Identity.apply(h)
        if self.how == "tensor hook" and h.requires_grad:
            h.register_hook(lambda g: 0.1 * g)
        return self.o(h)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("Straight", "Straight"),
        ("tensor hook", "hook"),
        ("module hook", "hook"),
        ("parameter hook", "a.weight"),
    ],
)
def test_gradients_that_the_user_wrote_are_refused(how: str, word: str) -> None:
    model = OwnGradients(how)
    with pytest.raises(UntraceableModelError, match=word):
        trace(model, (X,))


class Clipped(torch.autograd.Function):
    """Passes values on, and their gradients where these are small: on most examples nothing shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


class RarelyItsOwn(OwnGradients):
    """Gradients that differ only where they are large."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.how == "function":
            h = Clipped.apply(h)  # type: ignore[no-untyped-call]
        if self.how == "tensor hook" and h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1, 1))
        if self.how == "parameter hook" and not hasattr(self, "hooked"):
            self.hooked = self.b.weight.register_hook(lambda g: g.clamp(-1, 1))
        return self.o(self.b(h))


@pytest.mark.parametrize(
    ("how", "word"), [("function", "Clipped"), ("tensor hook", "hook"), ("parameter hook", "hook")]
)
def test_gradients_of_the_users_own_are_refused_even_where_they_do_not_show(how: str, word: str) -> None:
    with pytest.raises(UntraceableModelError, match=word):
        trace(RarelyItsOwn(how), (X,))


def test_a_function_with_the_usual_gradient_trains() -> None:
    same_training(OwnGradients("Identity"), (X,))


def test_a_module_with_a_hook_on_its_gradient_is_refused() -> None:
    model = Net()
    model.b.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(UntraceableModelError, match="'b' has a hook"):
        trace(model, (X,))


class Average(Net):
    """A moving average of activations, updated in place or assigned, in `no_grad` or detached."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("average", torch.zeros(24))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.training:
            self.steps += 1
            if self.how == "in place":
                with torch.no_grad():
                    self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
            else:
                self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.o((h - self.average) * self.average.sigmoid())


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_buffers_are_updated_as_in_the_model(how: str) -> None:
    same_training(Average(how), (X,))


class Constrained(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.how == "renorm":
                self.a.weight.copy_(torch.renorm(self.a.weight, 2, 0, 0.25))
            else:
                self.a.weight.clamp_(min=0)
        return super().forward(x)


@pytest.mark.parametrize(
    "model",
    [
        Constrained("renorm"),
        Constrained("clamp"),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 24)), nn.ReLU(), nn.Linear(24, 4)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 24)), nn.ReLU(), nn.Linear(24, 4)),
    ],
    ids=["renorm", "clamp", "spectral norm", "weight norm"],
)
def test_updates_without_gradients_train_as_in_the_model(model: nn.Module) -> None:
    same_training(model, (X,))


# -- what Python decides -----------------------------------------------------------------------------------------------


class Coin(Net):
    def __init__(self, toss: Any) -> None:
        super().__init__()
        self.toss = toss

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if not self.training or self.toss() < 0.5:
            h = h + torch.relu(self.b(h))
        return self.o(h)


@pytest.mark.parametrize(
    ("toss", "word"),
    [(random.random, "Python"), (lambda: float(np.random.rand()), "numpy")],
    ids=["random", "numpy"],
)
def test_random_numbers_of_python_are_refused(toss: Any, word: str) -> None:
    with pytest.raises(UntraceableModelError, match=word):
        trace(Coin(toss), (X,))


class Counts(Net):
    """Counts its calls; `every` says after how many the answer changes, 0 that it never does."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.calls, self.every = 0, every

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + (self.calls // self.every if self.every else 0))


@pytest.mark.parametrize("every", [1, 500])
def test_a_counter_that_decides_is_refused(every: int) -> None:
    with pytest.raises(UntraceableModelError, match="calls"):
        trace(Counts(every), (X,))


class Keeps(Net):
    """Keeps something between its calls where no attribute of a module is a number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.counts = {"calls": 0}
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=50)
        self.helper = SimpleNamespace(calls=0)
        self.left = 700
        self.number = np.int64(0)
        self.numbers = itertools.count()
        self.chance = np.random.default_rng(0)
        self.python_chance = random.Random(0)
        self.steps = torch.zeros(())
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.late(x) else 1)

    def late(self, x: Tensor) -> bool:
        method: Any = getattr(self, self.what.replace(" ", "_"))
        return bool(method(x))

    def dict(self, x: Tensor) -> bool:
        self.counts["calls"] += 1
        return self.counts["calls"] > 500

    def list(self, x: Tensor) -> bool:
        self.history.append(0.0)
        return len(self.history) > 500

    def deque(self, x: Tensor) -> bool:
        self.recent.append(0.0)
        return len(self.recent) == 50

    def object(self, x: Tensor) -> bool:
        self.helper.calls += 1
        return bool(self.helper.calls > 500)

    def down(self, x: Tensor) -> bool:
        self.left -= 1
        return self.left < 0

    def between(self, x: Tensor) -> bool:
        self.left += 1
        return 710 < self.left < 720

    def numpy(self, x: Tensor) -> bool:
        self.number = self.number + np.int64(1)
        return bool(self.number == 1000)

    def module(self, x: Tensor) -> bool:
        COUNTED["calls"] += 1
        return COUNTED["calls"] > 500

    def iterator(self, x: Tensor) -> bool:
        return next(self.numbers) > 500

    def own_generator(self, x: Tensor) -> bool:
        return bool(self.chance.random() < 1e-6)

    def own_generator_of_Python(self, x: Tensor) -> bool:
        return self.python_chance.random() < 1e-6

    def not_read(self, x: Tensor) -> bool:
        self.history.append(0.0)
        self.counts["calls"] += 1
        self.helper.calls += 1
        self.last = x
        return False


COUNTED = {"calls": 0}


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("dict", "counts"), ("list", "history"), ("deque", "recent"), ("object", "helper.calls"), ("down", "left"),
        ("numpy", "number"), ("between", "left"), ("module", "COUNTED"), ("iterator", "numbers"),
        ("own generator", "chance"),
        pytest.param("own generator of Python", "python_chance", marks=pytest.mark.without_type_checks),
    ],
)  # fmt: skip
def test_what_python_keeps_between_calls_is_refused_where_the_model_goes_by_it(what: str, word: str) -> None:
    with pytest.raises(UntraceableModelError, match=word):
        trace(Keeps(what), (X,))
    assert COUNTED["calls"] < 500


def test_what_python_keeps_and_nobody_reads_is_left_as_it_was() -> None:
    model = Keeps("not read")
    trace(model, (X,))
    assert (model.history, model.counts, model.helper.calls, model.last) == ([], {"calls": 0}, 0, None)


def test_a_counter_that_nobody_reads_is_none_of_our_business() -> None:
    model = Counts(0)
    trace(model, (X,))
    assert model.calls == 0


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


@pytest.mark.parametrize("training", [True, False])
def test_buffers_keep_their_values(training: bool) -> None:
    model = Average("in place").train(training)
    model.average.fill_(0.5)
    trace(model, (X,))
    assert bool((model.average == 0.5).all())
    assert float(model.steps) == 0


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
