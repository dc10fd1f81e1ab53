"""Declarations of what may leave a participant: the type, and what the methods of narrow models declare."""

from __future__ import annotations

import math

import pytest
import torch
from building import AVERAGING, build_method
from torch import nn

import msfusion
from msfusion.batch import Batch
from msfusion.errors import PrivacyError, UpdateError
from msfusion.federated.privacy import Outbound, Shared, check_figures, forms_of
from msfusion.federated.training import TrainingSettings

DECLARED = Outbound(
    {"weight": (torch.float32, (2, 3)), "count": (torch.int64, ())},
    metadata=frozenset({"steps", "pairs"}),
    words=frozenset({"running_var"}),
)
WHOLE = {"weight": torch.ones(2, 3), "count": torch.tensor(1)}


def test_what_was_declared_may_leave_or_less() -> None:
    for tensors in (WHOLE, {"count": torch.tensor(2)}, {}):
        shared = DECLARED.select(tensors, {"steps": 3, "pairs": "running_var"}, "participant 1")
        assert isinstance(shared, Shared)
        assert dict(shared) == tensors
        assert Outbound.like(shared).tensors == forms_of(tensors)


@pytest.mark.parametrize(
    ("tensors", "metadata", "sentence"),
    [
        ({**WHOLE, "memory": torch.ones(1)}, {}, "would send the tensor 'memory', which its method does not"),
        ({"weight": torch.ones(3, 2)}, {}, r".* as torch.float32 of shape \[3, 2\], but .* shape \[2, 3\]"),
        ({"weight": torch.ones(2, 3).double()}, {}, ".* as torch.float64 of shape"),
        ({}, {"note": 1}, "would send 'note' in its metadata"),
        ({}, {"steps": "a text"}, "would send 'steps' in its metadata"),
        ({}, {"steps": 2**63}, "would send 'steps' in its metadata"),
        ({}, {"steps": [1.0]}, "would send 'steps' in its metadata"),
    ],
)  # fmt: skip
def test_nothing_else_does(tensors: dict, metadata: dict, sentence: str) -> None:
    with pytest.raises(PrivacyError, match=f"^participant 1 {sentence}"):
        DECLARED.select(tensors, metadata, "participant 1")
    assert issubclass(PrivacyError, UpdateError)


def test_numbers_of_any_value_may_leave() -> None:
    for value in (math.inf, math.nan, -(2**63), 2**63 - 1, True):
        DECLARED.select({}, {"steps": value}, "")


@pytest.mark.parametrize("examples", [-1, 2**63, True, 3.0, "3", [3]])
def test_a_count_of_examples_is_one_number(examples: object) -> None:
    check_figures(0, math.nan, "")
    check_figures(2**63 - 1, -math.inf, "")
    with pytest.raises(
        PrivacyError, match=r"^participant 1 would send, as its number of examples, what is no int"
    ):
        check_figures(examples, 0.5, "participant 1")


@pytest.mark.parametrize("loss", [[0.5], "0.5", 10**400, None, torch.tensor(0.5)])
def test_a_loss_is_one_number(loss: object) -> None:
    with pytest.raises(PrivacyError, match=r"^participant 1 would send an? \w+ as its loss"):
        check_figures(3, loss, "participant 1")


def test_nobody_else_makes_shared_tensors() -> None:
    for made_by in (None, object(), Outbound({})):
        with pytest.raises(PrivacyError, match="only as the method declares"):
            Shared(WHOLE, made_by)


@pytest.mark.parametrize("name", [name for name in AVERAGING if name != "ensemble"])
def test_narrow_methods_declare_their_sub_model_and_nothing_of_what_they_remember(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    width_map = msfusion.trace(model, (torch.randn(2, 4),))
    method = build_method(name, model, width_map, [0.5, 0.5], TrainingSettings(batch_size=4))
    data = Batch((torch.randn(8, 4),), torch.randint(3, (8,)))
    task = method.assign(method.initial_state(), 0, 1)
    update = method.train(task, data)
    outbound = method.outbound("train", task)
    assert outbound.tensors == forms_of(update.tensors) == forms_of(task.tensors)
    outbound.select(update.tensors, update.metadata, "")
    assert method.recalibrates
    asked = method.measurement(method.initial_state(), 0, 1)
    measured = method.measure(asked, data)
    outbound = method.outbound("measure", asked)
    outbound.select(measured.tensors, measured.metadata, "")
    assert list(measured.tensors) == ["1.running_mean"]
    assert list(outbound.tensors) == ["1.running_mean", "1.running_var"]
