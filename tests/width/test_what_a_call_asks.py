"""What a forward asks beside the values of its inputs, and what is changed by hand: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from msfusion import MsfusionError, UntraceableModelError, cut, narrow, trace

X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Asks(nn.Module):
    """Two layers; what it does between them depends on the answer to a question."""

    def __init__(self, question: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b, self.question = nn.Linear(16, 32), nn.Linear(32, 3), question

    def forward(self, x: Tensor) -> Tensor:
        asked = self.question(x)
        h = torch.relu(self.a(x))
        return self.b(h * 2 if asked else h)


QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "requires_grad": lambda x: x.requires_grad,
    "grad mode": lambda x: torch.is_grad_enabled(),
    "contiguous": lambda x: x.is_contiguous(),
    "stride": lambda x: x.stride(0) == 16,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_about_the_call_that_decides_is_refused(question: str) -> None:
    with pytest.raises(UntraceableModelError, match="is_contiguous"):
        trace(Asks(QUESTIONS[question]), (X,))


class Noise(nn.Module):
    """Random numbers lie as the inputs do in memory: other ones for other strides, and no question at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(16, 32), nn.Dropout(), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.drop(x) + torch.randn_like(x))))


def test_random_numbers_that_follow_memory_are_no_question() -> None:
    assert trace(Noise(), (X,)).groups


def test_inputs_that_lie_otherwise_or_require_gradients_are_answered_as_the_model_does() -> None:
    model = Asks(lambda x: False)
    sub = narrow(model, trace(model, (X,)), {})
    across = X.t().contiguous().t().requires_grad_()
    assert not across.is_contiguous()
    torch.testing.assert_close(sub(across), model(across))


@pytest.mark.parametrize("part", ["sub-model", "client"])
def test_a_model_that_asks_for_autocast_is_called_without(part: str) -> None:
    model = Asks(lambda x: torch.is_autocast_enabled("cpu"))
    width_map = trace(model, (X,))
    sub: nn.Module = (
        narrow(model, width_map, {}) if part == "sub-model" else cut(model, width_map, "a").client
    )
    sub(X)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        sub(X)


def test_a_model_that_does_not_ask_runs_under_autocast() -> None:
    model = Asks(lambda x: False)
    sub = narrow(model, trace(model, (X,)), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sub(X), model(X))


class Normed(nn.Module):
    """A layer with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


class StaysInEvaluation(Normed):
    """Its BatchNorm does not train, whatever the mode."""

    def train(self, mode: bool = True) -> StaysInEvaluation:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_is_set_by_hand_is_warned_of(training: bool) -> None:
    model = Normed().train(training)
    model.norm.train(not training)
    with pytest.warns(UserWarning, match=r"'norm', .*train\(\)"):
        width_map = trace(model, (X,))
    assert model.norm.training is not training
    sub = narrow(model, width_map, {}).train()
    assert sub(X).shape == model(X).shape


def test_a_mode_that_decides_nothing_is_not() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU()).eval()
    model.append(nn.Linear(32, 3))
    trace(model, (X,))


class Views(Asks):
    """It needs contiguous inputs, and asks for gradients all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), 16))


def test_who_needs_contiguous_inputs_is_asked_about_gradients() -> None:
    with pytest.raises(UntraceableModelError, match="requires_grad"):
        trace(Views(QUESTIONS["requires_grad"]), (X.reshape(4, 4, 4),))


def test_a_mode_that_train_keeps_is_kept() -> None:
    model = StaysInEvaluation().train()
    sub = narrow(model, trace(model, (X,)), {}).train()
    torch.testing.assert_close(sub(X), model(X))
    assert torch.equal(sub.state_dict()["norm.running_mean"], torch.zeros(32))


class Rms(Asks):
    """A norm as transformers write it: in float32, and back."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        kind, h = h.dtype, h.to(torch.float64)
        return self.b((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind))


def test_a_model_that_converts_numbers_is_called_without_autocast() -> None:
    model = Rms(lambda x: False)
    sub = narrow(model, trace(model, (X,)), {})
    torch.testing.assert_close(sub(X), model(X))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        sub(X)


class Scaled(nn.Module):
    """Attributes that it reads, of the object, its class, or not there; and what it writes itself."""

    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 3)
        self.scale, self.kind, self.sizes, self.floor = 2.0, "relu", (1, 2), float("nan")
        self.calls, self.auxiliary, self.seen, self._shift = 0, 0.0, None, 0.5
        self.batch_size, self.epoch, self.name_or_path = 4, 0, "here"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.batch_size = len(x)
        h = torch.relu(self.a(x))
        self.auxiliary = h.mean() if self.training else 0.0  # type: ignore[assignment]
        self.seen = h.detach()  # type: ignore[assignment]
        h = torch.relu(h + self.floor) if self.kind == "shifted" else h ** getattr(self, "bend", self.power)
        return self.b(h * self.scale * self.sizes[1] + self._shift)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("scale", 3.0),
        ("kind", "gelu"),
        ("sizes", (1, 3)),
        ("scale", torch.tensor(2.0)),
        ("power", 2.0),
        ("bend", 2.0),
        ("_shift", 1.0),
    ],
)
def test_an_attribute_that_was_changed_since_the_trace_is_named(attribute: str, value: object) -> None:
    model = Scaled()
    width_map = trace(model, (X,))
    narrow(model, width_map, {})
    setattr(model, attribute, value)
    with pytest.raises(MsfusionError, match=f"changed after it was traced: it has {attribute} ="):
        narrow(model, width_map, {})


def test_what_a_property_computes_is_not_asked_for() -> None:
    """The weight of a parametrised layer is one, and reading it in training moves spectral norm's buffers."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), spectral_norm(nn.Linear(32, 3))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    width_map = trace(model, (X,))
    narrow(model, width_map, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_hook_that_came_since_the_trace_is_named() -> None:
    model = Scaled()
    width_map = trace(model, (X,))
    handle = model.a.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(MsfusionError, match="module 'a' has other hooks"):
        narrow(model, width_map, {})
    handle.remove()
    narrow(model, width_map, {})
    model.b.forward = lambda h: h  # type: ignore[method-assign]
    with pytest.raises(MsfusionError, match="module 'b' has other hooks"):
        narrow(model, width_map, {})


def test_what_the_forward_changes_itself_may_change() -> None:
    model = Scaled()
    width_map = trace(model, (X,))
    assert (model.calls, model.auxiliary, model.seen) == (0, 0.0, None)
    model.train()
    model(X[:2])
    model.epoch, model.name_or_path = 3, "there"
    torch.testing.assert_close(narrow(model, width_map, {})(X), model(X))
