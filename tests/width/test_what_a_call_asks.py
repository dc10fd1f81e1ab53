"""What a forward asks beside the values of its inputs, and what is changed by hand: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
def test_a_mode_that_is_set_by_hand_is_refused(training: bool) -> None:
    model = Normed().train(training)
    model.norm.train(not training)
    with pytest.raises(UntraceableModelError, match=r"'norm' .*train\(\)"):
        trace(model, (X,))
    assert model.norm.training is not training


def test_a_mode_that_train_keeps_is_kept() -> None:
    model = StaysInEvaluation().train()
    sub = narrow(model, trace(model, (X,)), {}).train()
    torch.testing.assert_close(sub(X), model(X))
    assert torch.equal(sub.state_dict()["norm.running_mean"], torch.zeros(32))


class Scaled(nn.Module):
    """Attributes of its own: a factor that it reads, and what it writes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 3)
        self.scale, self.kind, self.sizes, self.floor = 2.0, "relu", (1, 2), float("nan")
        self.calls, self.auxiliary, self.seen = 0, 0.0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.relu(self.a(x))
        self.auxiliary, self.seen = h.mean(), h.detach()  # type: ignore[assignment]
        return self.b(h * self.scale * self.sizes[1])


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("scale", 3.0), ("kind", "gelu"), ("sizes", (1, 3)), ("scale", torch.tensor(2.0))],
)
def test_an_attribute_that_was_changed_since_the_trace_is_named(attribute: str, value: object) -> None:
    model = Scaled()
    width_map = trace(model, (X,))
    narrow(model, width_map, {})
    setattr(model, attribute, value)
    with pytest.raises(MsfusionError, match=f"changed after it was traced: it has {attribute} ="):
        narrow(model, width_map, {})


def test_what_the_forward_changes_itself_may_change() -> None:
    model = Scaled()
    width_map = trace(model, (X,))
    assert (model.calls, model.auxiliary, model.seen) == (0, 0.0, None)
    model(X)
    model(X)
    torch.testing.assert_close(narrow(model, width_map, {})(X), model(X))
