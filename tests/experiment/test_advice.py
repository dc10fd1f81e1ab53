"""What a run's figures advise: each rule where it must speak, and where it must not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from msfusion.batch import IGNORED, Batch
from msfusion.data.federated import FederatedData
from msfusion.experiment.advice import advice, constant_answer, costly_checkpoints

CONSTANT = {"accuracy": 0.25, "loss": math.log(4)}


def of(
    losses: list[float | None], accuracy: float | None = 0.6, training: float = 1.0, **more: Any
) -> list[str]:
    """The advice for a run whose test loss was that after each round."""
    metrics = [{"round": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    summary = {
        "rounds": len(losses),
        "accuracy": accuracy,
        "training_loss": training,
        "constant_answer": CONSTANT,
    }
    return advice(summary | more, metrics, [100, 100])


def test_a_run_that_went_well_is_left_in_peace() -> None:
    assert of([1.0, 0.6, 0.5, 0.5, 0.5, 0.5, 0.49, 0.49]) == []
    assert of([1.0]) == []
    assert advice({"rounds": 1}, [{"round": 1}], [100]) == []  # never evaluated


@pytest.mark.parametrize(
    ("losses", "accuracy", "training", "words"),
    [
        (
            [1.4, 1.39, 1.386],
            0.26,
            1.38,
            r"no better than one that always .* \(accuracy 26.0%, and 25.0% .* raise",
        ),
        ([1.4, 1.5, 1.6], 0.2, 0.3, r"participants learn their own data \(loss 0.3 in training\): lower"),
        ([1.0, 0.5, 0.4, 0.7], 0.8, 0.1, r"lowest in round 3 \(0.4\) and is 0.7 at the end"),
        ([1.0, None], 0.3, 1.0, "not finite at the end"),
        (
            [1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
            0.8,
            0.4,
            r"last quarter of the rounds \(0.6 to 0.4\): more rounds",
        ),
    ],
)
def test_what_is_wrong_is_said_once(
    losses: list[float | None], accuracy: float, training: float, words: str
) -> None:
    (told,) = of(losses, accuracy, training)
    assert re.search(words, told)


def test_a_loss_as_of_one_answer_with_a_better_accuracy_is_no_such_answer() -> None:
    assert of([1.4, 1.39, 1.386, 1.386], accuracy=0.5) == []


def test_numbers_that_are_no_better_than_their_mean() -> None:
    (told,) = of([9.0, 8.0, 7.9], accuracy=None, constant_answer={"loss": 8.0}, loss=7.9)
    assert "the mean of all targets (mean squared error 7.9, and 8 for that)" in told
    assert "bring targets to about -1 ... 1" in told
    known = {"constant_answer": {"loss": 8.0}, "loss": 7.9, "normalised_targets": True}
    (told,) = of([9.0, 8.0, 7.9], accuracy=None, **known)
    assert told.endswith("and 8 for that): raise training.learning_rate or rounds")
    assert of([9.0, 8.0, 3.0], accuracy=None, constant_answer={"loss": 8.0}) == []


def test_under_noise_more_rounds_are_no_remedy() -> None:
    (told,) = of([1.4, 1.39, 1.386], 0.26, privacy={"noise": 1.0})
    assert "the noise of method.privacy hides" in told
    assert of([1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 0.8, privacy={"noise": 1.0}) == []
    assert of([1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 0.99) == []


def test_few_examples_are_named() -> None:
    (told,) = advice({"rounds": 1}, [], [100, 3, 9, 10])
    assert told.startswith("participants 1, 2 have fewer than 10 examples")
    (told,) = advice({"rounds": 1}, [], [1] * 8)
    assert "participants 0, 1, 2, 3, 4 and 3 more have" in told


def data(targets: torch.Tensor, task: str = "classification") -> FederatedData:
    batch = Batch((torch.zeros(len(targets), 1),), targets)
    return FederatedData((batch,), batch, task, 4)


def test_the_constant_answer_by_hand() -> None:
    found = constant_answer(data(torch.tensor([0, 0, 0, 1])), "cross_entropy")
    assert found is not None
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    tokens = torch.tensor([[0, 1], [2, IGNORED]])
    found = constant_answer(data(tokens, "language_modelling"), "cross_entropy")
    assert found == {"accuracy": pytest.approx(1 / 3), "loss": pytest.approx(math.log(3))}
    assert constant_answer(data(torch.tensor([[1.0], [3.0]]), "regression"), "mse") == {"loss": 1.0}
    assert constant_answer(data(torch.zeros(3, 1), "regression"), "l1") is None
    assert constant_answer(data(torch.zeros(3, 1), "other"), "mse") is None


def test_checkpoints_that_take_long_are_named_with_how_seldom_they_do_not() -> None:
    (told,) = costly_checkpoints(saving=400.0, rounds=800.0, every=1)  # half a round's time each
    assert "33%" in told
    assert "run.checkpoint_every=10 " in told  # 0.5 / 10 is a twentieth
    (told,) = costly_checkpoints(saving=400.0, rounds=800.0, every=3)
    assert "run.checkpoint_every=30 " in told


@pytest.mark.parametrize(("saving", "rounds"), [(0.0, 0.0), (10.0, 5.0), (100.0, 1000.0)])
def test_checkpoints_that_take_little_are_not(saving: float, rounds: float) -> None:
    assert not list(costly_checkpoints(saving, rounds, every=1))
