"""What participants say of models that only they have: scores, and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from msfusion.errors import UpdateError
from msfusion.federated.method import ABSURD, Scalar, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.objectives import Evaluation

_SCORES = ("loss", "accuracy", "examples", "perplexity")
_OWN = "own_"

REPORTED = Outbound({}, frozenset([*_SCORES, *(_OWN + name for name in _SCORES)]))
"""What may leave a participant with a report."""


@dataclass(frozen=True)
class Report:
    """How good a participant's model is on the common test data, and (if asked) in its own proportions of labels."""

    participant: int
    test: Evaluation
    own: Evaluation | None = None


@dataclass(frozen=True)
class Spread:
    """How far participants lie apart: sample standard deviations of their accuracy and loss."""

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
    return _mean([report.test for report in reports])


def own_mean_of(reports: Sequence[Report]) -> Evaluation | None:
    """The mean of what the models are worth to the participants themselves; None where they were not asked."""
    return _mean([report.own for report in reports if report.own is not None])


def spread_of(reports: Sequence[Report]) -> Spread | None:
    """How far the participants lie apart on the test data; None where there are not two."""
    return _spread([report.test for report in reports])


def own_spread_of(reports: Sequence[Report]) -> Spread | None:
    """How far they lie apart in what the models are worth to themselves; None where not two were asked."""
    return _spread([report.own for report in reports if report.own is not None])


def _mean(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    if not evaluations:
        return None
    loss = statistics.fmean(each.loss for each in evaluations)
    first = evaluations[0]
    return Evaluation(
        loss,
        statistics.fmean(_accuracies(evaluations)),
        first.examples,
        None if first.perplexity is None else _exp(loss),
    )


def _spread(evaluations: Sequence[Evaluation]) -> Spread | None:
    if len(evaluations) < 2:
        return None
    losses = [each.loss for each in evaluations]
    accuracy = statistics.stdev(_accuracies(evaluations))
    loss = statistics.stdev(losses) if all(map(math.isfinite, losses)) else math.nan
    return Spread(accuracy, loss, len(evaluations))


def _accuracies(evaluations: Sequence[Evaluation]) -> list[float]:
    """Of models that tell classes apart, which alone are reported on."""
    return [each.accuracy for each in evaluations if each.accuracy is not None]


def _figures(evaluation: Evaluation, prefix: str) -> dict[str, Scalar]:
    values = {name: getattr(evaluation, name) for name in _SCORES}
    return {prefix + name: value for name, value in values.items() if value is not None}


def _evaluation(update: Update, prefix: str) -> Evaluation:
    """The scores in a report. Raises UpdateError where they cannot be those of any model."""
    loss, accuracy, examples, perplexity = (update.metadata.get(prefix + name) for name in _SCORES)
    source = f"participant {update.participant} in round {update.round_index + 1}"
    if not isinstance(examples, int) or not isinstance(accuracy, float) or not 0 <= accuracy < 1.001:
        raise UpdateError(
            f"{source} reports an accuracy of {accuracy} on {examples} examples: it must be from 0 to 1, on a whole "
            "number of them",
            update.participant,
        )
    if not isinstance(loss, float) or not abs(loss) < ABSURD:
        raise UpdateError(
            f"{source} reports a loss of {loss}: it must be a finite number", update.participant
        )
    return Evaluation(
        loss,
        accuracy,
        examples,
        None if perplexity is None else float(perplexity),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
