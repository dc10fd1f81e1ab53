"""Training an operator through the model that it makes."""

from __future__ import annotations

import pytest
import torch
from growth_families import LARGE, SMALL, decoder, planned, traced

import msfusion
from msfusion.costs import costs_of
from msfusion.errors import DataError, GrowthError, TrainingError
from msfusion.growth import Copy, FitSettings, GrownModel, LiGO, fit_operator


def sentences(count: int = 32) -> msfusion.Batch:
    """Counting upwards: there is something to learn."""
    start = torch.randint(0, 50, (count, 1), generator=torch.Generator().manual_seed(4))
    ids = (start + torch.arange(9)) % 50
    return msfusion.Batch((ids[:, :-1],), ids[:, 1:])


def fitted(settings: FitSettings) -> tuple[LiGO, list[float]]:
    operator = LiGO(planned(decoder, SMALL, LARGE))
    source, target = traced(decoder, SMALL)[0], traced(decoder, LARGE)[0]
    return operator, fit_operator(operator, source.state_dict(), target, sentences(), settings)


@pytest.mark.release
def test_the_operator_learns_and_nothing_else_changes() -> None:
    models = [traced(decoder, size)[0] for size in (SMALL, LARGE)]
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    random_state = torch.get_rng_state()
    _, losses = fitted(FitSettings(steps=40, learning_rate=1e-2, batch_size=16))
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(random_state, torch.get_rng_state())
    for model, state in zip(models, before, strict=True):
        assert not model.training
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_result_depends_on_the_arguments_alone() -> None:
    settings = FitSettings(steps=3, batch_size=20)
    (first, losses), (second, again) = fitted(settings), fitted(settings)
    assert losses == again
    assert all(torch.equal(t, second.tensors()[name]) for name, t in first.tensors().items())


@pytest.mark.release
@pytest.mark.parametrize("kind", ["full", "padded", "copies"])
def test_the_costs_of_an_operator_s_step_can_be_counted(kind: str) -> None:
    """More than the target's own step, by the matrix products that make the weights."""
    plan, target = planned(decoder, SMALL, LARGE), traced(decoder, LARGE)[0]
    operator = LiGO(plan, Copy(plan)) if kind == "copies" else LiGO(plan, form=kind)  # type: ignore[arg-type]
    model = GrownModel(operator, traced(decoder, SMALL)[0].state_dict(), target)
    costs = [costs_of(module, sentences(4)) for module in (model, target)]
    assert not target.training
    assert costs[0].flops_per_example > costs[1].flops_per_example
    assert costs[0].parameters == sum(p.numel() for p in operator.parameters())


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_warm_up_is_relative_to_the_stage(steps: int) -> None:
    settings = FitSettings(steps=steps, learning_rate=1.0, warmup=0.1)
    rates = [settings.rate_at(step) for step in range(steps)]
    assert max(rates) == 1.0
    peak = rates.index(1.0)
    assert peak == max(1, round(0.1 * steps)) - 1
    assert min(rates) > 0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert sum(rates) > 0.49 * steps


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"warmup": 1.0}, "warmup is 1.0: it must be at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_impossible_settings(setting: dict[str, float], sentence: str) -> None:
    with pytest.raises(GrowthError, match=sentence):
        FitSettings(**setting)  # type: ignore[arg-type]


def test_nothing_to_train_on_and_losses_that_are_not_finite() -> None:
    operator = LiGO(planned(decoder, SMALL, LARGE))
    source, target = traced(decoder, SMALL)[0], traced(decoder, LARGE)[0]
    with pytest.raises(DataError, match="no examples"):
        fit_operator(operator, source.state_dict(), target, sentences(0))
    with pytest.raises(TrainingError, match=r"became nan in step 1: lower the learning rate"):
        fit_operator(
            operator,
            source.state_dict(),
            target,
            sentences(),
            objective=lambda m, b: 0 * m(*b.inputs).sum() / 0,
        )
