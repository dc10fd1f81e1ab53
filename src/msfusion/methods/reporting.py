"""What participants say of models that only they have: scores, and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from msfusion.methods.base import Scalar, Task, Update
from msfusion.methods.outbound import Outbound
from msfusion.objectives import Evaluation

_SCORES = ("loss", "accuracy", "examples", "perplexity")
_OWN = "own_"

REPORTED = Outbound({}, frozenset([*_SCORES, *(_OWN + name for name in _SCORES)]))
"""What may leave a participant with a report."""


@dataclass(frozen=True)
class Report:
    """How good a participant's model is on the common test data, and (if it was asked) on its own examples."""

    participant: int
    test: Evaluation
    own: Evaluation | None = None


@dataclass(frozen=True)
class Spread:
    """How far participants lie apart: sample standard deviations of their test accuracy and test loss."""

    accuracy: float
    loss: float
    participants: int


def report_of(task: Task, test: Evaluation, own: Evaluation | None = None) -> Update:
    """A report as what travels."""
    figures = {**_figures(test, ""), **({} if own is None else _figures(own, _OWN))}
    return Update(task.participant, task.round_index, {}, test.examples, test.loss, figures)


def nothing_to_report(task: Task) -> Update:
    """The report of a participant that has no model yet."""
    return Update(task.participant, task.round_index, {}, 0, 0.0)


def reports_of(updates: Sequence[Update]) -> tuple[Report, ...]:
    """What those who have a model reported, by participant."""
    told = [update for update in updates if update.metadata]
    return tuple(
        Report(
            update.participant,
            _evaluation(update, ""),
            _evaluation(update, _OWN) if _OWN + "loss" in update.metadata else None,
        )
        for update in sorted(told, key=lambda update: update.participant)
    )


def mean_of(reports: Sequence[Report]) -> Evaluation | None:
    """The mean loss and accuracy of the participants' models on the test data; None without reports."""
    if not reports:
        return None
    loss = statistics.fmean(report.test.loss for report in reports)
    first = reports[0].test
    return Evaluation(
        loss,
        statistics.fmean(report.test.accuracy for report in reports),
        first.examples,
        None if first.perplexity is None else _exp(loss),
    )


def spread_of(reports: Sequence[Report]) -> Spread | None:
    """How far the participants lie apart; None where there are not two."""
    if len(reports) < 2:
        return None
    losses, accuracies = ([getattr(each.test, name) for each in reports] for name in ("loss", "accuracy"))
    finite = all(map(math.isfinite, losses))
    return Spread(
        statistics.stdev(accuracies), statistics.stdev(losses) if finite else math.nan, len(reports)
    )


def _figures(evaluation: Evaluation, prefix: str) -> dict[str, Scalar]:
    values = {name: getattr(evaluation, name) for name in _SCORES}
    return {prefix + name: value for name, value in values.items() if value is not None}


def _evaluation(update: Update, prefix: str) -> Evaluation:
    loss, accuracy, examples, perplexity = (update.metadata.get(prefix + name) for name in _SCORES)
    return Evaluation(
        float(loss or 0.0),
        float(accuracy or 0.0),
        int(examples or 0),
        None if perplexity is None else float(perplexity),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
