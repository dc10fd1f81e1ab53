"""Participants trained at once give the numbers of one after the other, whatever the model and the settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import run_rounds
from together_cases import (
    SETTINGS,
    assert_alike,
    digits,
    gpt2,
    method_for,
    mlp,
    rounds,
    tasks_of,
    texts,
    traced,
    vectors,
)
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.federated.method import Task, Update
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.training import TrainingSettings, mini_batches
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.vectorised import clip_each, groups_of, stacked_batches
from msfusion.models.convolutional import ConvNet, ResNet
from msfusion.models.transformer import DecoderLM, TextClassifier
from msfusion.windows import Feedback


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "name",
    [
        "convnet",
        "decoder",
        *(
            pytest.param(each, marks=pytest.mark.release)
            for each in ("resnet", "colours", "classifier", "gpt2")
        ),
    ],
)
def test_two_rounds_give_the_weights_of_the_loop(name: str) -> None:
    model: nn.Module
    if name in ("convnet", "resnet", "colours"):
        data = digits(3 if name == "colours" else 1)
        model = (
            ResNet(1, 10, widths=(8, 16))
            if name == "resnet"
            else ConvNet(3 if name == "colours" else 1, 10, image_size=8, widths=(8, 16))
        )
    elif name == "gpt2":
        model, data = gpt2(), texts("input_ids")
    elif name == "classifier":
        data = [Batch(own.inputs, own.targets[:, 0].clamp(min=0)) for own in texts()]
        model = TextClassifier(11, 11, block_length=6, features=16, heads=4, layers=1)
    else:
        model, data = DecoderLM(11, block_length=6, features=16, heads=4, layers=1), texts()
    method = method_for(traced(model, data))
    assert_alike(rounds(method, data, 1), rounds(method, data, 3))


@pytest.mark.one_in_ci
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.3}, {"max_steps": 3, "weight_decay": 0.1}])
def test_every_setting_of_training_gives_the_weights_of_the_loop(
    optimizer: Any, more: dict[str, Any]
) -> None:
    training = replace(SETTINGS, optimizer=optimizer, learning_rate=0.02, **more)
    method = method_for(mlp(), training)
    assert_alike(rounds(method, vectors(), 1), rounds(method, vectors(), 5))


@pytest.mark.release
def test_in_float64_nothing_is_left_of_the_differences() -> None:
    """AdamW, which divides by the size of gradients, magnifies rounding; a mistake would stay."""
    torch.manual_seed(1)
    images = [Batch((own.inputs[0].double(),), own.targets) for own in digits(3)]  # type: ignore[index]
    model = traced(ConvNet(3, 10, image_size=8, widths=(8, 16)).double(), images)
    method = method_for(model, replace(SETTINGS, optimizer="adamw", weight_decay=0.1, clip_norm=1.0))
    assert_alike(rounds(method, images, 1), rounds(method, images, 3), tolerance=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "small"},
        {"name": "fedavg"},
        {"name": "feddropout"},
        {"ratios": (0.25, 0.5, 0.5, 0.25, 1.0)},
        {"overlap": Feedback(0.5, 0.5, 0.2)},
    ],
)
def test_every_method_gives_the_weights_of_the_loop(options: dict[str, Any]) -> None:
    assert_alike(*(rounds(method_for(mlp(), **options), vectors(), together) for together in (1, 3)))


def test_any_number_of_workers_gives_the_same_bits_and_so_does_going_on() -> None:
    method, data = method_for(mlp()), vectors()
    one, two = (rounds(method, data, 2, workers=workers) for workers in (1, 2))
    rest = run_rounds(
        method, data, RoundSettings(rounds=2), together=2, state=one[0].state, first_round=1, workers=2
    )
    for result in (two[1], next(rest)):
        assert all(torch.equal(tensor, result.state[name]) for name, tensor in one[1].state.items())
    rest.close()


def test_updates_come_in_the_order_of_the_tasks_and_say_what_each_did() -> None:
    method, data = method_for(mlp()), vectors()
    assert isinstance(method, NarrowMethod)
    tasks = tasks_of(method)
    before = [{name: tensor.clone() for name, tensor in task.tensors.items()} for task in tasks]
    for task, own, update, tensors in zip(
        tasks, data, method.train_together(tasks, data), before, strict=True
    ):
        alone = method.train(task, own)
        assert (update.participant, update.examples) == (alone.participant, alone.examples)
        assert update.metadata == alone.metadata
        assert list(update.tensors) == list(alone.tensors)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in task.tensors.items())


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_the_predicted_sizes_are_those_of_the_mini_batches(
    examples: int, size: int, epochs: int, most: int | None
) -> None:
    training = TrainingSettings(batch_size=size, local_epochs=epochs, max_steps=most)
    data = Batch((torch.zeros(examples, 1),), torch.zeros(examples, dtype=torch.long))
    found = [len(batch) for batch in mini_batches(data, training, torch.Generator())][:most]
    assert training.batch_sizes(examples) == found


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=25), st.integers(1, 8))
def test_groups_hold_everybody_once_and_nobody_unlike(people: list[tuple[int, int]], limit: int) -> None:
    data = [Batch((torch.zeros(n, 2),), torch.zeros(n, dtype=torch.long)) for n, _ in people]
    training = [SETTINGS] * len(people)
    groups = groups_of(range(len(people)), data, training, limit, lambda each: people[each][1])
    assert sorted(each for group in groups for each in group) == list(range(len(people)))
    for group in groups:
        assert 1 <= len(group) <= limit
        assert len({people[each][1] for each in group}) == 1
    for kind in {kind for _, kind in people}:
        alike = [group for group in groups if people[group[0]][1] == kind]
        sizes = [people[each][0] for group in alike for each in group]
        assert sizes == sorted(sizes, reverse=True)
        assert max(map(len, alike)) - min(map(len, alike)) <= 1


def test_settings_and_shapes_of_examples_part_participants() -> None:
    data = vectors((4, 4, 4))
    data[2] = Batch((torch.zeros(4, 6, dtype=torch.float64),), data[2].targets)
    training = [SETTINGS, replace(SETTINGS, batch_size=2), SETTINGS]
    groups = groups_of(range(3), data, training, 8, lambda each: ())
    assert sorted(groups) == [(0,), (1,), (2,)]


def test_short_mini_batches_are_filled_with_what_does_not_count() -> None:
    long, short = (Batch({"x": torch.arange(n).float()[:, None]}, torch.arange(n)) for n in (3, 2))
    stacked = stacked_batches([long, short])
    assert isinstance(stacked.inputs, dict)
    assert stacked.inputs["x"].squeeze(-1).tolist() == [[0, 1, 2], [0, 1, 1]]
    assert stacked.targets.tolist() == [[0, 1, 2], [0, 1, IGNORED]]
    assert stacked.offset is None
    assert short.targets.tolist() == [0, 1]


def test_everybody_is_clipped_by_itself() -> None:
    gradients = [torch.randn(4, 3, 2) * 5, torch.randn(4), torch.randn(4, 7) * torch.tensor([[1e-3]])]
    gradients[0][1], gradients[1][1] = 1e-3, 1e-3  # a participant that needs no clipping
    stack = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(stack, gradients, strict=True):
        parameter.grad = gradient.clone()
    clip_each(stack, 0.5)
    for row in range(4):
        alone = [nn.Parameter(torch.zeros_like(gradient[row])) for gradient in gradients]
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient[row].clone()
        nn.utils.clip_grad_norm_(alone, 0.5)
        for mine, yours in zip(stack, alone, strict=True):
            assert mine.grad is not None
            assert yours.grad is not None
            torch.testing.assert_close(mine.grad[row], yours.grad)
    assert torch.equal(gradients[0][1], stack[0].grad[1])  # type: ignore[index]


def test_frozen_parameters_and_unused_ones_stay_as_they_were() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(2, 2)
            self.first.bias.requires_grad_(False)
            self.register_buffer("shift", torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.first(x + self.shift).relu())
            return result

    training = replace(SETTINGS, optimizer="adamw", weight_decay=0.1, learning_rate=0.01)
    method = method_for(traced(Partly(), vectors()), training)
    before = method.initial_state()
    loop, stack = (rounds(method, vectors(), together) for together in (1, 4))
    assert_alike(loop, stack)
    for name in ("first.bias", "shift", "unused.weight"):
        assert torch.equal(stack[-1].state[name], before[name])
    assert not torch.equal(stack[-1].state["first.weight"], before["first.weight"])


def test_only_those_who_can_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    whole = NarrowMethod.train_together

    def noting(self: NarrowMethod, tasks: list[Task], data: list[Batch]) -> list[Update]:
        asked.append([task.participant for task in tasks])
        return whole(self, tasks, data)

    monkeypatch.setattr(NarrowMethod, "train_together", noting)
    (result, _) = rounds(method_for(mlp(), ratios=(0.25, 0.5, 0.25, 0.5, 1.0)), vectors(), 2)
    assert len(result.participants) == 5
    assert sorted(asked[:2]) == [[0, 2], [3, 1]]  # the last is alone, and trained as ever
