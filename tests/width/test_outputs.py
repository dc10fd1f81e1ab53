"""`trace(..., outputs=...)`: what does not count is dropped, and may be narrowed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from zoo import by_name
from zoo_checks import half_window
from zoo_entry import call, features

from msfusion.errors import UntraceableModelError
from msfusion.width.cut import cut
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor | None


class States(nn.Module):
    """Returns its hidden features beside its logits, in one kind of container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.one(x))
        logits = self.two(hidden)
        if self.kind == "dict":
            return {"hidden": hidden, "logits": logits}
        if self.kind == "named":
            return Named(logits, hidden)
        return [logits, hidden] if self.kind == "list" else (logits, hidden)


KINDS = [("dict", "logits"), ("tuple", 0), ("tuple", -2), ("list", 0), ("named", "logits"), ("named", 0)]


@pytest.mark.parametrize(("kind", "outputs"), KINDS, ids=str)
def test_an_output_of_the_same_kind_with_one_part(kind: str, outputs: str | int) -> None:
    model, (x,) = States(kind).eval(), features(6)(4, 0)
    assert trace(model, (x,)).groups == ()
    width_map = trace(model, (x,), outputs=outputs)
    assert [group.units for group in width_map.groups] == [16]
    expected, found = model(x), narrow(model, width_map, {})(x)
    assert type(found) is type(expected)
    logits = expected["logits"] if kind == "dict" else expected[0]
    if kind == "named":
        assert found.hidden is None
    assert torch.equal(found["logits"] if kind == "dict" else found[0], logits)
    assert len(found) == (2 if kind == "named" else 1)
    half = narrow(model, width_map, half_window(width_map))
    assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in model.parameters())


def test_several_outputs_in_the_order_asked_for() -> None:
    model, (x,) = States("tuple").eval(), features(6)(4, 0)
    width_map = trace(model, (x,), outputs=(1, 0))
    hidden, logits = narrow(model, width_map, {})(x)
    assert torch.equal(logits, model(x)[0])
    assert torch.equal(hidden, model(x)[1])
    assert width_map.groups == ()


@pytest.mark.parametrize("outputs", ["answer", 2, -1, ()], ids=str)
def test_a_part_that_is_not_there_is_refused(outputs: Any) -> None:
    model, (x,) = States("dict").eval(), features(6)(4, 0)
    with pytest.raises(UntraceableModelError, match="outputs=") as caught:
        trace(model, (x,), outputs=outputs)
    assert "'logits'" in str(caught.value)
    with pytest.raises(UntraceableModelError, match="one tensor"):
        trace(model.two, (torch.randn(4, 16),), outputs="logits")


@pytest.mark.release
def test_an_encoder_decoder_of_which_only_the_logits_count() -> None:
    entry = by_name("T5ForConditionalGeneration")
    model, inputs = entry.build().eval(), entry.inputs(2, 7)
    width_map = trace(model, inputs, outputs="logits")
    assert width_map.reach() > 0.97
    assert "encoder" in " ".join(p.tensor for group in width_map.groups for p in group.places)
    assert not [
        f for f in width_map.frozen if f.reason == "an axis of the model's output" and "encoder" in f.tensor
    ]
    expected, found = call(model, inputs), call(narrow(model, width_map, {}), inputs)
    assert type(found) is type(expected)
    assert list(found) == ["logits"]
    assert torch.equal(found.logits, expected.logits)
    half = narrow(model, width_map, half_window(width_map)).train()
    call(half, inputs).logits.mean().backward()


def test_a_cut_model_returns_what_counts() -> None:
    model, (x,) = States("dict").eval(), features(6)(4, 0)
    parts = cut(model, trace(model, (x,), outputs="logits"), "one")
    found = parts.server(*parts.client(x))
    assert list(found) == ["logits"]
    assert torch.equal(found["logits"], model(x)["logits"])
