"""Gradients and updates that a user has written train as in the model, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrowed import Net, X, same_training
from torch import Tensor, nn

from msfusion.errors import UntraceableModelError
from msfusion.width.trace import trace


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


@pytest.mark.parametrize("training", [True, False])
def test_buffers_keep_their_values(training: bool) -> None:
    model = Average("in place").train(training)
    model.average.fill_(0.5)
    trace(model, (X,))
    assert bool((model.average == 0.5).all())
    assert float(model.steps) == 0
