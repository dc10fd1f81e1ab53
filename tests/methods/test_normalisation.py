"""BatchNorm after fusion: pooled moments are those of one pass, for modules, functions and sub-models."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from building import AVERAGING, build_method
from simulated import fuse_updates, run_rounds
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import UpdateError
from msfusion.federated.method import Update
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings
from msfusion.methods.parts import batch_norm as normalisation
from msfusion.methods.parts.batch_norm import has_running_statistics, measure, pooled, recalibrate
from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@cache
def traced() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = net()
    return model, trace(model, (torch.randn(4, 2, 5, 5),))


def some_data(*counts: int) -> list[Batch]:
    return [Batch((torch.randn(count, 2, 5, 5) + count,), torch.randint(3, (count,))) for count in counts]


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel."""
    channels = values.transpose(0, 1).flatten(1).double()
    return channels.mean(1), channels.var(1)


def test_two_layers_get_the_statistics_of_all_batches_together() -> None:
    model, batches = net(), some_data(3, 8, 5)
    inputs, seen = [], []
    with torch.no_grad():
        for batch in batches:
            assert isinstance(batch.inputs, tuple)
            first = model[0](batch.inputs[0])
            inputs.append(first)
            seen.append(
                model[4](F.relu(F.batch_norm(first, None, None, model[1].weight, model[1].bias, True)))
            )
    recalibrate(model, batches)
    for layer, values in ((model[1], inputs), (model[5], seen)):
        mean, variance = statistics(torch.cat(values))
        torch.testing.assert_close(layer.running_mean, mean.float())
        torch.testing.assert_close(layer.running_var, variance.float())
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_a_function_with_buffers_counts_as_well() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(2))
            self.register_buffer("spread", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.average, self.spread, training=self.training)

    model, (batch,) = Own(), some_data(6)
    recalibrate(model, [batch])
    assert isinstance(batch.inputs, tuple)
    mean, variance = statistics(batch.inputs[0])
    torch.testing.assert_close(model.get_buffer("average"), mean.float())
    torch.testing.assert_close(model.get_buffer("spread"), variance.float())


def test_pooling_over_participants_is_one_pass_over_all_and_ignores_their_order() -> None:
    model, batches = net(), some_data(3, 8, 5)
    updates = []
    for participant, batch in enumerate(batches):
        moments, pairs = measure(model, [batch])
        updates.append(Update(participant, 0, moments, len(batch), 0.0, pairs))
    state = state_of(model)
    found = pooled(state, updates)
    assert all(torch.equal(found[name], again) for name, again in pooled(state, updates[::-1]).items())
    recalibrate(model, batches)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    assert set(found) == {name for name in state if "running" in name}


def test_single_values_and_models_without_batch_norm_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    recalibrate(model, [Batch((torch.randn(1, 4),), torch.zeros(1, dtype=torch.long))])
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert has_running_statistics(model)
    assert not has_running_statistics(nn.BatchNorm1d(3, track_running_stats=False))
    assert not has_running_statistics(nn.Linear(3, 3))
    assert measure(nn.Linear(4, 3), [Batch((torch.randn(2, 4),), torch.zeros(2, dtype=torch.long))]) == (
        {},
        {},
    )


@pytest.mark.one_in_ci
@pytest.mark.parametrize("name", [name for name in AVERAGING if name != "ensemble"])
def test_a_run_ends_with_the_fused_models_own_statistics(name: str) -> None:
    data = some_data(16, 8, 24)
    method = build_method(name, *traced(), (0.5,) * 3, SETTINGS)
    assert method.recalibrates
    outcomes = [
        list(
            run_rounds(method, data, RoundSettings(rounds=2, evaluate_every=2), test=data[0], workers=workers)
        )
        for workers in (1, 2)
    ]
    assert outcomes[0][0].measuring_bytes == 0
    assert outcomes[0][1].measuring_bytes > 0
    final = outcomes[0][1].state
    assert all(torch.equal(tensor, outcomes[1][1].state[key]) for key, tensor in final.items())
    pictures = torch.cat([batch.inputs[0] for batch in data if isinstance(batch.inputs, tuple)])
    mean, variance = statistics(F.conv2d(pictures, final["0.weight"], final["0.bias"]))
    torch.testing.assert_close(final["1.running_mean"], mean.float())
    torch.testing.assert_close(final["1.running_var"], variance.float())
    assert outcomes[0][1].evaluation is not None


def test_evaluation_after_recalibration_is_better_than_with_the_statistics_of_narrow_models() -> None:
    torch.manual_seed(1)
    labels = torch.randint(3, (96,))
    pictures = torch.randn(96, 2, 5, 5) + labels[:, None, None, None] * 1.5
    data = [Batch((pictures[i::3],), labels[i::3]) for i in range(3)]
    settings = TrainingSettings(learning_rate=0.05, batch_size=8, local_epochs=3)
    method = build_method("msfusion", *traced(), (0.5,) * 3, settings)
    state = method.initial_state()
    for round_index in range(6):
        tasks = [method.assign(state, round_index, participant) for participant in range(3)]
        state = fuse_updates(method, state, [method.train(task, data[task.participant]) for task in tasks])
    moments = [
        method.measure(method.measurement(state, 5, participant), data[participant])
        for participant in range(3)
    ]
    measured, unmeasured = (method.evaluate(s, data[0]) for s in (method.settle(state, moments), state))
    assert measured.loss < unmeasured.loss
    assert measured.accuracy > 0.9


@pytest.mark.parametrize("wrong", ["shape", "nan", "name"])
def test_moments_that_do_not_fit_are_refused(wrong: str) -> None:
    model = net()
    moments, pairs = measure(model, some_data(4))
    if wrong == "shape":
        moments["1.running_mean"] = moments["1.running_mean"][:, :3]
    elif wrong == "nan":
        moments["1.running_mean"] = moments["1.running_mean"] * torch.nan
    else:
        pairs["1.running_mean"] = "elsewhere"
    with pytest.raises(UpdateError, match=r"participant 5 in round 3: the moments of 1\.running_mean"):
        pooled(state_of(model), [Update(5, 2, moments, 4, 0.0, pairs)])


def test_a_participant_measures_at_most_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "MEASURED_BATCHES", 2)
    method = build_method("msfusion", *traced(), (0.5,), SETTINGS)
    (data,) = some_data(40)
    update = method.measure(method.measurement(method.initial_state(), 0, 0), data)
    counts = update.tensors["1.running_mean"][0]
    assert torch.equal(counts, torch.full_like(counts, 40.0 * 9))
