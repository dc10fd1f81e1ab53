"""Local training: the loop that anyone would write, drawn from (seed, round, participant) alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.federated.training import Trained, TrainingSettings, build_optimizer, local_steps, mini_batches
from msfusion.seeds import seed_of


def some_examples(count: int = 20) -> Batch:
    return Batch((torch.randn(count, 6),), torch.randint(3, (count,)))


def a_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(model: nn.Module, data: Batch, settings: TrainingSettings, **path: int) -> Trained:
    return local_steps(model, data, settings, **{"seed": 0, "round_index": 0, "participant": 0, **path})


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_it_is_the_plain_loop_bit_for_bit() -> None:
    data, model, by_hand = some_examples(), a_model(), a_model()
    by_hand.load_state_dict(model.state_dict())
    settings = TrainingSettings(
        learning_rate=0.05, momentum=0.9, weight_decay=0.01, batch_size=8, local_epochs=2, clip_norm=0.5
    )
    trained = train(model, data, settings, seed=5, round_index=3, participant=2)

    generator = torch.Generator().manual_seed(seed_of(5, 3, 2))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)
    total = 0.0
    for _ in range(2):
        order = torch.randperm(20, generator=generator)
        for chosen in (order[:8], order[8:16], order[16:]):
            optimizer.zero_grad()
            assert isinstance(data.inputs, tuple)
            loss = F.cross_entropy(by_hand(data.inputs[0][chosen]), data.targets[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            optimizer.step()
            total += loss.item() * len(chosen)
    assert equal(weights(model), weights(by_hand))
    assert trained == Trained(loss=total / 40, examples_seen=40, steps=6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_lowers_the_loss(optimizer: Any) -> None:
    data, model = some_examples(), a_model()
    settings = TrainingSettings(optimizer=optimizer, learning_rate=0.01, local_epochs=20)
    first = train(model, data, TrainingSettings(learning_rate=1e-9))
    train(model, data, settings)
    assert train(model, data, TrainingSettings(learning_rate=1e-9)).loss < first.loss


def test_dropout_and_order_depend_on_seed_round_and_participant_alone() -> None:
    data = some_examples()
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    start = model.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}

    def outcome(**path: int) -> list[Tensor]:
        model.load_state_dict(start)
        torch.rand(torch.randint(9, ()))  # whatever else the process draws
        train(model, data, TrainingSettings(), **path)
        return weights(model)

    reference = outcome(seed=1, round_index=1, participant=1)
    assert equal(reference, outcome(seed=1, round_index=1, participant=1))
    for other in ({"seed": 2}, {"round_index": 2}, {"participant": 2}):
        assert not equal(reference, outcome(**{"seed": 1, "round_index": 1, "participant": 1, **other}))


def test_the_global_generator_goes_on_as_if_nothing_had_happened() -> None:
    data, model = some_examples(), a_model()
    before = torch.get_rng_state()
    train(model, data, TrainingSettings())
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_paths_differ() -> None:
    paths = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (0, 0, 0), (2**63, 1)]
    assert len({seed_of(*path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("examples", "batch_size", "sizes"),
    [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 100, [3]), (1, 4, [1]), (3, 1, [1, 1, 1]), (5, 5, [5])],
)
def test_a_single_last_example_is_left_out_where_there_are_others(
    examples: int, batch_size: int, sizes: list[int]
) -> None:
    settings = TrainingSettings(batch_size=batch_size)
    batches = mini_batches(some_examples(examples), settings, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == sizes


def test_batch_norm_trains_where_a_single_example_would_be_last() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert train(model, some_examples(9), TrainingSettings(batch_size=4)).examples_seen == 8


def test_max_steps_ends_a_round_early() -> None:
    trained = train(a_model(), some_examples(), TrainingSettings(batch_size=4, local_epochs=9, max_steps=7))
    assert (trained.steps, trained.examples_seen) == (7, 28)


def test_the_cosine_falls_from_the_learning_rate_to_zero() -> None:
    settings = TrainingSettings(learning_rate=0.4, learning_rate_schedule="cosine", rounds=10)
    rates = [settings.learning_rate_in(round_index) for round_index in range(11)]
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)
    assert build_optimizer(a_model(), settings, 5).param_groups[0]["lr"] == rates[5]
    assert TrainingSettings(learning_rate=0.4).learning_rate_in(99) == 0.4


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate is NaN"),
        ({"learning_rate": math.inf}, "learning_rate is Infinity"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"local_epochs": 0}, "local_epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"optimizer": "lion"}, "optimizer is .lion.: it must be one of sgd, adam, adamw"),
        ({"learning_rate_schedule": "cosine"}, "set rounds"),
    ],
)
def test_impossible_settings(wrong: dict[str, Any], sentence: str) -> None:
    # straight to the check: in tests the types of dataclass fields are checked as well
    settings = object.__new__(TrainingSettings)
    for name, field in TrainingSettings.__dataclass_fields__.items():
        object.__setattr__(settings, name, wrong.get(name, field.default))
    with pytest.raises(ConfigError, match=sentence):
        settings.__post_init__()


def test_a_loss_that_is_not_finite_names_participant_round_and_step() -> None:
    data = Batch((torch.full((4, 6), torch.nan),), torch.randint(3, (4,)))
    with pytest.raises(
        TrainingError,
        match=r"participant 7's loss became nan in round 4, step 1: lower .* \(it is 5\)",
    ):
        train(
            a_model(),
            data,
            TrainingSettings(learning_rate=5.0),
            round_index=3,
            participant=7,
        )


def test_nothing_to_train_with_or_on() -> None:
    model = a_model().requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter that requires a gradient"):
        train(model, some_examples(), TrainingSettings())
    with pytest.raises(DataError, match="participant 4 has no examples"):
        train(a_model(), some_examples(0), TrainingSettings(), participant=4)
