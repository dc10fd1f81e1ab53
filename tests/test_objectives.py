"""Cross-entropy and evaluation against torch's own, in every form in which a model may return its logits."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.errors import DataError, MsfusionError, TrainingError
from msfusion.objectives import (
    MOST_CLASSES,
    cross_entropy,
    evaluate,
    evaluate_for,
    logits_of,
    name_of_logits,
    require_classes,
)

SCORES = torch.arange(12.0).reshape(4, 3)


class Returns(nn.Module):
    """Returns what it was built with, whatever it is called with."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: Tensor) -> object:
        return self.answer


def labels(*values: int) -> Batch:
    return Batch((torch.zeros(len(values), 1),), torch.tensor(values))


@pytest.mark.parametrize(
    "output",
    [
        SCORES,
        {"logits": SCORES, "hidden": None},
        SimpleNamespace(logits=SCORES),
        (SCORES, "attention"),
        (None, SCORES, torch.zeros(1)),
    ],
)
def test_logits_are_found(output: object) -> None:
    assert logits_of(output) is SCORES


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ({"logits": SCORES}, "logits"),
        (SimpleNamespace(logits=SCORES), "logits"),
        (SCORES, None),
        ((SCORES, 1), None),
    ],
)
def test_what_counts_is_known_where_logits_have_a_name(output: object, name: str | None) -> None:
    model = Returns(output).train()
    assert name_of_logits(model, labels(0)) == name
    assert model.training


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ([1.0], "a list"),
        (None, "None"),
        ("text", "a str"),
        ({"scores": SCORES}, "a dict"),
        (("a", 3), r"a tuple of \(str, int\)"),
        (SimpleNamespace(logits=4), "a SimpleNamespace"),
    ],
)
def test_anything_else_is_refused_by_its_type(output: object, named: str) -> None:
    with pytest.raises(TrainingError, match=f"the model returned {named}, in which there are no logits"):
        logits_of(output)


def test_classification_is_torchs_cross_entropy() -> None:
    batch = labels(0, 1, 2, 2)
    assert torch.equal(cross_entropy(Returns(SCORES), batch), F.cross_entropy(SCORES, batch.targets))


def test_tokens_are_counted_one_by_one_and_ignored_ones_not_at_all() -> None:
    logits = torch.randn(2, 3, 5)
    batch = Batch((torch.zeros(2, 3),), torch.tensor([[1, IGNORED, 4], [0, 3, IGNORED]]))
    rows = [(0, 0), (0, 2), (1, 0), (1, 1)]
    expected = sum(-logits[row].log_softmax(-1)[batch.targets[row]] for row in rows) / 4
    torch.testing.assert_close(cross_entropy(Returns(logits), batch), expected)
    found = evaluate(Returns(logits), batch, batch_size=2, language_modelling=True)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert found.accuracy == sum(int(logits[row].argmax() == batch.targets[row]) for row in rows) / 4
    assert found.examples == 2


def test_each_class_is_told_apart_whatever_the_mini_batches() -> None:
    """Two of three examples of class 0 are right, none of class 2; class 1 has none, and one example has no label."""
    scores = torch.tensor([[3.0, 1, 0], [3, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 9]])
    batch = Batch((scores,), torch.tensor([0, 0, 0, 2, IGNORED]))
    for size in (1, 2, 5):
        assert evaluate(nn.Identity(), batch, batch_size=size).by_class == (2 / 3, None, 0.0)
    many = torch.zeros(2, MOST_CLASSES + 1)
    assert evaluate(nn.Identity(), Batch((many,), torch.tensor([0, 1]))).by_class is None
    tokens = Batch((torch.zeros(1, 3, 5),), torch.tensor([[1, 2, 3]]))
    assert evaluate(nn.Identity(), tokens, language_modelling=True).by_class is None


def test_a_batch_without_any_target_has_loss_zero_and_gradients() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = cross_entropy(Returns(logits), labels(IGNORED, IGNORED))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_sixteen_bit_logits_are_summed_in_float32() -> None:
    loss = cross_entropy(Returns(SCORES.bfloat16()), labels(0, 1, 2, 2))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "batch", "error", "sentence"),
    [
        (
            SCORES,
            labels(0, 1),
            TrainingError,
            r"shape \[4, 3\] where the targets of shape \[2\] need \[2, classes\]",
        ),
        (torch.zeros(2, 3, 4), labels(0, 1), TrainingError, r"shape \[2, 3, 4\].* need \[2, classes\]"),
        (
            torch.zeros(2, 3),
            Batch((torch.zeros(2),), torch.zeros(2, 4, dtype=torch.long)),
            TrainingError,
            r"need \[2, 4, vocabulary\]",
        ),
        (torch.zeros(2, 3, dtype=torch.long), labels(0, 1), TrainingError, "return scores before argmax"),
        (
            SCORES,
            labels(0, 1, 2, 3),
            DataError,
            "label 3 is out of range: the model has 3 classes, so labels are 0 to 2",
        ),
        (SCORES, labels(0, -1, 2, 2), DataError, "label -1 is out of range"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    logits: Tensor, batch: Batch, error: type[MsfusionError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        cross_entropy(Returns(logits), batch)
    with pytest.raises(error, match=sentence):
        evaluate(Returns(logits), batch)


def test_evaluation_is_the_same_for_any_batch_size_and_restores_each_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    model[3].eval()
    data = Batch((torch.randn(11, 4),), torch.randint(3, (11,)))
    one, many = evaluate(model, data, batch_size=3), evaluate(model, data, batch_size=100)
    assert one.accuracy == many.accuracy
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.perplexity is None
    assert model.training
    assert model[1].training
    assert not model[3].training


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate(Returns(SCORES), labels(IGNORED, IGNORED, IGNORED, IGNORED))
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate_for(Returns(SCORES), labels(IGNORED, IGNORED, IGNORED, IGNORED), torch.tensor([1]))


def test_a_diverged_model_has_infinite_perplexity() -> None:
    logits = torch.tensor([[0.0, 1e4]])
    assert evaluate(Returns(logits), labels(0), language_modelling=True).perplexity == math.inf


def test_what_a_classifier_is_worth_to_someone_by_hand() -> None:
    """Label 0 is right in one of two, label 1 always; the participant has three of label 1 and one of 0."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0]])
    model, data = Returns(logits), labels(0, 0, 1, 1)
    own = torch.tensor([1, 1, 0, 1, 2, IGNORED])  # nobody tests label 2
    plain, found = evaluate_for(model, data, own)
    assert (plain.accuracy, plain.loss) == (0.75, pytest.approx(evaluate(model, data).loss))
    assert found is not None
    right, wrong = (float(F.cross_entropy(logits[row : row + 1], torch.tensor([0]))) for row in (0, 1))
    assert found.accuracy == pytest.approx((1 * 0.5 + 3 * 1.0) / 4)
    assert found.loss == pytest.approx((1 * (right + wrong) / 2 + 3 * right) / 4)
    _, only = evaluate_for(model, data, torch.tensor([0]))
    assert only is not None
    assert (only.accuracy, only.examples) == (0.5, 4)
    for nobody_tests in ([2, 2], [IGNORED], []):
        assert evaluate_for(model, data, torch.tensor(nobody_tests, dtype=torch.long)) == (plain, None)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30), st.lists(st.integers(1, 3), min_size=5, max_size=5)
)
def test_weighing_labels_is_repeating_their_examples(values: list[int], times: list[int]) -> None:
    targets = torch.tensor([*values, IGNORED])
    data = Batch((torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(1)),), targets)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    repeated = data.take(torch.tensor([at for at, label in enumerate(values) for _ in range(times[label])]))
    for found, expected in zip(
        evaluate_for(model, data, repeated.targets, batch_size=7),
        map(partial(evaluate, model), (data, repeated)),
        strict=True,
    ):
        assert found is not None
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy)
        assert found.examples == len(data)


def test_a_label_that_the_model_does_not_know_is_named_by_holder_and_example() -> None:
    good = Batch((torch.zeros(4, 2),), torch.arange(4) % 3)
    odd = Batch((torch.zeros(4, 2),), torch.tensor([0, 1, 7, 2]))
    holders = {"participant 0": good, "participant 1": odd}
    with pytest.raises(DataError, match="label 7 is out of range in example 2 of participant 1"):
        require_classes(torch.nn.Linear(2, 3), good, holders)
