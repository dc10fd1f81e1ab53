"""Numbers on the scale on which they are learnt: fitted, there and back, and what a loss makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import TrainingError
from msfusion.scoring import DISTANCES, Scoring, loss_named
from msfusion.target_scale import SMALLEST_SPREAD, TargetScale

SCALE = TargetScale((3e5, -2.0), (1e5, 0.5))


def test_it_is_mean_and_deviation_of_each_number_whatever_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(500, 2, generator=generator) * torch.tensor([1e5, 0.5]) + torch.tensor([3e5, -2.0])
    scale = TargetScale.fitted(targets)
    exact = targets.double()
    assert scale.centre == pytest.approx(exact.mean(0).tolist(), rel=1e-12)
    assert scale.spread == pytest.approx(exact.std(0, correction=0).tolist(), rel=1e-12)
    assert TargetScale.fitted(targets.flip(0)) == scale
    scaled = scale.scaled(targets)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scale.in_units(scaled), targets)


def test_numbers_that_are_all_the_same_become_0() -> None:
    scale = TargetScale.fitted(torch.full((4, 1), 7.0))
    assert scale == TargetScale((7.0,), (SMALLEST_SPREAD,))
    assert scale.scaled(torch.full((2, 1), 7.0)).tolist() == [[0.0], [0.0]]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def some(targets: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 3, generator=generator)
    drawn = SCALE.in_units(torch.randn(6, 2, generator=generator))
    return Batch((inputs,), drawn if targets is None else targets)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_is_of_scaled_targets_and_all_that_is_told_in_units(name: str) -> None:
    loss, batch = loss_named(name), some()
    assert loss is not None
    scoring = Scoring(loss, {"largest": lambda o, t: (o - t).abs().max()}, labels=False, scale=SCALE)
    model, other = linear(), linear()
    told = scoring.objective(model, batch)
    told.backward()  # type: ignore[no-untyped-call]
    plain = Scoring(loss, labels=False).objective(other, Batch(batch.inputs, SCALE.scaled(batch.targets)))
    plain.backward()  # type: ignore[no-untyped-call]
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert torch.equal(mine.grad, its.grad)
    outputs = SCALE.in_units(model(*batch.arguments[0])).detach()
    assert float(told.detach()) == float(loss(outputs, batch.targets))
    found = scoring.evaluate(model, batch)
    assert found.loss == pytest.approx(float(told.detach()), rel=1e-6)
    assert found.metrics["largest"] == float((outputs - batch.targets).abs().max())


def test_what_other_models_say_is_added_before_the_outputs_get_their_units() -> None:
    loss, batch, model = loss_named("mse"), some(), linear()
    assert loss is not None
    offset = torch.full((6, 2), 0.25)
    scoring = Scoring(loss, labels=False, scale=SCALE)
    found = scoring.evaluate(model, Batch(batch.inputs, batch.targets, offset=offset)).loss
    expected = loss(SCALE.in_units(model(*batch.arguments[0]) + offset), batch.targets)
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    scoring = Scoring(loss_named("mse"), labels=False, scale=SCALE)
    model = linear()
    nn.init.constant_(model.weight, math.inf)
    assert not math.isfinite(float(scoring.objective(model, some()).detach()))


def test_outputs_of_another_shape_are_refused_before_they_are_stretched() -> None:
    scoring = Scoring(loss_named("mse"), labels=False, scale=TargetScale((0.0,), (1.0,)))
    batch = some(torch.zeros(6, 1))
    for score in (scoring.objective, scoring.evaluate):
        with pytest.raises(TrainingError, match=r"returned \[6, 2\] where the targets are \[6, 1\]"):
            score(linear(), batch)
