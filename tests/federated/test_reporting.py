"""What participants say of models that only they have: told as scores, and summed up."""

from __future__ import annotations

import math

import pytest

from msfusion.errors import UpdateError
from msfusion.federated.method import Task, Update
from msfusion.federated.reporting import (
    REPORTED,
    mean_of,
    nothing_to_report,
    report_of,
    reports_of,
    spread_of,
)
from msfusion.objectives import Evaluation


def test_reports_come_back_as_they_were_in_the_order_of_participants() -> None:
    test, own = Evaluation(0.5, 0.75, 8, perplexity=math.inf), Evaluation(0.25, 1.0, 3)
    updates = [report_of(Task(4, 2, {}), test, own), nothing_to_report(Task(3, 2, {}))]
    updates.append(report_of(Task(1, 2, {}), test))
    first, last = reports_of(updates)
    assert (first.participant, last.participant) == (1, 4)
    assert first.test == last.test == test
    assert first.own is None
    assert last.own is not None
    assert (last.own.loss, last.own.accuracy, last.own.examples) == (0.25, 1.0, 3)
    for update in updates:
        assert not update.tensors
        REPORTED.select(update.tensors, update.metadata, "")


def test_their_mean_and_how_far_they_lie_apart() -> None:
    evaluations = [
        Evaluation(loss, accuracy, 10, math.exp(loss)) for loss, accuracy in ((1.0, 0.5), (2.0, 0.9))
    ]
    reports = reports_of([report_of(Task(each, 0, {}), e) for each, e in enumerate(evaluations)])
    mean, spread = mean_of(reports), spread_of(reports)
    assert mean is not None
    assert (mean.loss, mean.accuracy, mean.examples) == (1.5, pytest.approx(0.7), 10)
    assert mean.perplexity == pytest.approx(math.exp(1.5))
    assert spread is not None
    assert (spread.loss, spread.accuracy) == (pytest.approx(0.5**0.5), pytest.approx(0.08**0.5))
    assert spread.participants == 2
    assert (mean_of(()), spread_of(reports[:1])) == (None, None)


@pytest.mark.parametrize("loss", [math.inf, math.nan, 1e30])
def test_a_loss_that_is_no_number_is_its_participants(loss: float) -> None:
    with pytest.raises(UpdateError, match="participant 4 in round 3") as caught:
        reports_of([report_of(Task(4, 2, {}), Evaluation(loss, 0.1, 1))])
    assert caught.value.participant == 4


@pytest.mark.parametrize("figures", [{"examples": math.inf}, {"accuracy": 2.0}, {"accuracy": math.nan}])
def test_scores_that_no_model_has_are_refused_in_a_sentence(figures: dict[str, float]) -> None:
    metadata = {"loss": 0.5, "accuracy": 0.5, "examples": 3, **figures}
    with pytest.raises(UpdateError, match=r"^participant 2 in round 6 reports an accuracy of"):
        reports_of([Update(2, 5, {}, 3, 0.5, metadata)])
