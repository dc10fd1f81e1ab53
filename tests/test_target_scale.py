"""Numbers on the scale on which they are learnt: fitted, there and back, and what a loss makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, TrainingError
from msfusion.scoring import DISTANCES, Accumulating, Scoring, loss_named, loss_told, metrics_named
from msfusion.target_scale import TargetScale

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
    assert scale == TargetScale((7.0,), (1.0,))
    assert scale.scaled(torch.full((2, 1), 7.0)).tolist() == [[0.0], [0.0]]
    # whose mean is rounded: the sum of three is no number that a third of is 0.1 again
    assert TargetScale.fitted(torch.full((3, 1), 0.1)).spread == (1.0,)


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e9, 1e30])
def test_numbers_of_any_size_are_learnt_and_told_alike(unit: float) -> None:
    """Squares of 1e30 and 1e-30 are no float32, and figures have to be right all the same."""
    pytest.importorskip("torchmetrics")
    metrics = metrics_named(["r2", "mean_squared_error", "mean_absolute_error"], 1, labels=False)
    drawn = torch.randn(40, 1, generator=torch.Generator().manual_seed(2)) + 3
    targets, outputs = drawn * unit, (drawn + 0.1) * unit
    scale = TargetScale.fitted(targets)
    assert scale.spread[0] == pytest.approx(unit * float(drawn.std(correction=0)), rel=1e-5)
    loss = loss_named("mse")
    scoring = Scoring(loss, metrics, labels=False, scale=scale)
    told = nn.Identity()
    batch = Batch((scale.scaled(outputs),), targets)
    found = scoring.evaluate(told, batch)
    assert found.loss == pytest.approx(0.01 * unit**2, rel=1e-4)
    assert found.metrics["mean_squared_error"] == pytest.approx(found.loss, rel=1e-6)
    assert found.metrics["mean_absolute_error"] == pytest.approx(0.1 * unit, rel=1e-4)
    assert found.metrics["r2"] == pytest.approx(1 - 0.01 / float(drawn.var(correction=0)), rel=1e-4)
    assert float(scoring.objective(told, batch)) == pytest.approx(found.loss, rel=1e-6)
    assert 0.5 < scoring.unit / scale.spread[0] ** 2 < 2
    assert math.frexp(scoring.unit)[0] == 0.5  # a power of two


def test_r2_is_right_far_from_zero() -> None:
    pytest.importorskip("torchmetrics")
    metric = metrics_named(["r2"], 1, labels=False)["r2"]
    noise = torch.randn(50, 1, generator=torch.Generator().manual_seed(3))
    targets = 1e6 + (10 * noise).round()
    outputs = targets + 5
    assert isinstance(metric, Accumulating)
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(outputs[part], targets[part])
    exact = targets.double()
    assert float(metric.compute()) == pytest.approx(1 - 25 / float(exact.var(correction=0)), abs=1e-9)
    metric.reset()
    metric.update(targets, targets)
    assert float(metric.compute()) == 1


def test_a_loss_in_no_units_has_the_unit_1() -> None:
    assert Scoring(loss_named("mse"), labels=False).unit == 1
    assert Scoring().unit == 1
    huge = TargetScale((0.0,), (1e9,))
    assert Scoring(loss_named("l1"), labels=False, scale=huge).unit == 2.0**30


def test_outputs_with_logits_are_scored_by_them() -> None:
    """As models of transformers return them."""

    class Named(nn.Module):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": values}

    batch = Batch((torch.tensor([[1.0], [3.0]]),), torch.tensor([[1.0], [1.0]]))
    for scale in (None, TargetScale((0.0,), (1.0,))):
        scoring = Scoring(loss_named("mse"), labels=False, scale=scale)
        assert scoring.evaluate(Named(), batch).loss == 2
        assert float(scoring.objective(Named(), batch)) == 2


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
    assert float(told.detach()) == float(loss(outputs.double(), batch.targets.double()))
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


def test_losses_of_any_size_are_told_with_four_digits() -> None:
    assert [loss_told(each) for each in (0.31, 216116880.0, 4.697e-20, 0.0, 0.0005)] == [
        "0.3100",
        "216,116,880",
        "4.697e-20",
        "0.0000",
        "0.0005",
    ]


def test_metrics_of_classes_are_refused_for_one_number() -> None:
    pytest.importorskip("torchmetrics")
    with pytest.raises(ConfigError, match="there is one number to predict"):
        metrics_named(["auc"], 1, labels=False)
