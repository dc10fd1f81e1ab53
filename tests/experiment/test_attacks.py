"""Attacks on updates that were made by hand, or by a few steps whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from msfusion.experiment.attacks import (
    Hits,
    changed_rows,
    known_scale,
    label_shares,
    label_shares_of_weight,
    present_classes,
    total_variation,
    untouched,
)
from msfusion.federated.training import TrainingSettings

LABELS = torch.tensor([0, 0, 0, 2, 2, 3, 0, 0])
SHARES = torch.tensor([5, 0, 2, 1, 0], dtype=torch.float64) / 8


def changes_of_layer(settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """What a step on all examples at once makes of the weight and bias of an output layer that was zero."""
    layer = nn.Linear(3, 5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    optimizer = settings.optimizer_for([*layer.parameters()], settings.learning_rate_in(0))
    cross_entropy(layer(torch.ones(len(LABELS), 3)), LABELS).backward()
    optimizer.step()
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_one_step_of_sgd_tells_the_shares_of_all_classes(rate: float) -> None:
    settings = TrainingSettings("sgd", rate, momentum=0.9)
    weight, bias = changes_of_layer(settings)
    shares = label_shares(bias, known_scale(settings, 0, 1))
    torch.testing.assert_close(label_shares(bias), SHARES, atol=1e-5, rtol=0)  # two classes are absent
    torch.testing.assert_close(shares, SHARES, atol=1e-5, rtol=0)
    assert present_classes(shares, len(LABELS)).tolist() == [True, False, True, True, False]
    torch.testing.assert_close(label_shares_of_weight(weight), SHARES, atol=1e-5, rtol=0)


def test_shares_of_changes_made_by_hand() -> None:
    change = torch.tensor([0.25, -0.25, 0.0, -0.5])  # 1/4 + change / 1 = 1/2, 0, 1/4, and below zero
    torch.testing.assert_close(label_shares(change, 1.0), torch.tensor([2, 0, 1, 0]).double() / 3)
    torch.testing.assert_close(label_shares(change), torch.tensor([3, 1, 2, 0]).double() / 6)
    assert label_shares(torch.zeros(4), 0.1).tolist() == [0.25] * 4
    assert label_shares(torch.zeros(4)).tolist() == [0.25] * 4
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    torch.testing.assert_close(label_shares_of_weight(rows), torch.tensor([2, 0, 1]).double() / 3)
    assert label_shares_of_weight(torch.zeros(4, 2)).tolist() == [0.25] * 4


def test_the_scale_is_known_of_one_plain_step_alone() -> None:
    falling = {"learning_rate_schedule": "cosine", "rounds": 2}
    settings = TrainingSettings("sgd", 0.1, **falling)  # type: ignore[arg-type]
    assert known_scale(settings, 0, 1) == pytest.approx(0.1)
    assert known_scale(settings, 1, 1) == pytest.approx(0.05)
    assert known_scale(settings, 0, 2) is None
    assert known_scale(TrainingSettings("adamw"), 0, 1) is None
    assert known_scale(TrainingSettings("sgd", clip_norm=1.0), 0, 1) is None


def test_with_a_known_scale_a_class_need_not_be_absent() -> None:
    layer = nn.Linear(1, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    cross_entropy(layer(torch.ones(6, 1)), torch.tensor([0, 1, 1, 2, 2, 2])).backward()
    assert layer.bias.grad is not None
    change = -0.2 * layer.bias.grad
    torch.testing.assert_close(
        label_shares(change, 0.2), torch.tensor([1, 2, 3]).double() / 6, atol=1e-6, rtol=0
    )


def trained_table(settings: TrainingSettings, steps: int) -> tuple[Tensor, Tensor]:
    """A table of embeddings before and after steps on the tokens 1, 4 and 5."""
    torch.manual_seed(0)
    table = nn.Embedding(8, 3)
    before = table.weight.detach().clone()
    optimizer = settings.optimizer_for([*table.parameters()], settings.learning_rate_in(0))
    for step in range(steps):
        optimizer.zero_grad()
        table(torch.tensor([1, 4] if step % 2 else [5])).square().sum().backward()
        optimizer.step()
    return before, table.weight.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_rows_of_the_tokens_are_told_from_those_that_only_decay(optimizer: str, decay: float) -> None:
    settings = TrainingSettings(optimizer, 0.05, weight_decay=decay)  # type: ignore[arg-type]
    before, after = trained_table(settings, 5)
    assert changed_rows(before, after, settings, 0, {5: 1.0}).nonzero().flatten().tolist() == [1, 4, 5]
    if decay:
        assert bool((after != before).any(1).all())  # so just looking what has changed finds nothing


def test_a_row_of_which_a_codec_said_nothing_is_not_named() -> None:
    settings = TrainingSettings("adamw", 0.05, weight_decay=0.1)
    before, after = trained_table(settings, 5)
    after[4], after[7] = before[4], before[7]
    assert changed_rows(before, after, settings, 0, {5: 1.0}).nonzero().flatten().tolist() == [1, 5]


def test_what_is_left_alone_decays() -> None:
    settings = TrainingSettings("adamw", 0.1, weight_decay=0.5)
    torch.testing.assert_close(untouched(torch.ones(2, 2), settings, 0, 3), torch.full((2, 2), 0.95**3))


def test_hits_and_distances() -> None:
    named, true = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool()
    assert Hits.of(named, true) == Hits(1 / 2, 1 / 3, 3 / 4)
    assert Hits.of(torch.zeros(4).bool(), true) == Hits(1.0, 0.0, 3 / 4)
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])) == 0.75
