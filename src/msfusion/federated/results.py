"""What engines report: who did what in a round, and how good the model is after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from msfusion.federated.memory import Memories
from msfusion.federated.method import Evaluation
from msfusion.federated.participation import Attendance
from msfusion.federated.reporting import Report, Spread, own_mean_of, own_spread_of, spread_of
from msfusion.scoring import SCORES


@dataclass(frozen=True)
class ParticipantResult:
    """What a participant did in a round: mean training loss, examples, bytes of tensors moved, real seconds.

    `metrics` are the numbers that the method has participants report (`Method.metrics`), by name.
    """

    participant: int
    loss: float
    examples: int
    bytes_down: int
    bytes_up: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A participant whose work does not count in a round, and why. `round_index` is the round in which it began.

    `bytes_down` and `bytes_up` were moved nevertheless, and are no others' (0 where they are counted elsewhere).
    """

    participant: int
    round_index: int
    reason: str
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class RoundResult:
    """A finished round: the new global state, who did what, how good the model is (where evaluated), seconds.

    `participants` are those that were on time and count; `attendance` says who else was there. `late_bytes` went (down,
    up) between the server and those that were late. `measuring_bytes` counts what measuring the running
    statistics of BatchNorm, and asking participants how good their models are, moved besides training, down and
    up. `server_figures` are numbers that the server's side of a conversation has told, by name. `memories` is what each
    participant keeps for itself; a run that goes on from here needs it. `reports` are
    there where participants were asked, as their models differ or their own labels count: `evaluation` is then
    their mean. `left_out` are those whose work does not count, and why: they are not among `participants`, and late
    ones not among those that arrived.
    """

    round_index: int
    state: dict[str, Tensor]
    participants: tuple[ParticipantResult, ...]
    evaluation: Evaluation | None
    seconds: float
    measuring_bytes: int = 0
    memories: Memories = field(default_factory=dict)
    attendance: Attendance = field(default_factory=lambda: Attendance(()))
    late_bytes: tuple[int, int] = (0, 0)
    reports: tuple[Report, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    server_figures: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The round, counted from 1: how many are done."""
        return self.round_index + 1

    @property
    def training_loss(self) -> float | None:
        """The participants' mean loss, weighted by their examples; None where nobody's work counts."""
        examples = sum(each.examples for each in self.participants)
        losses = sum(each.loss * each.examples for each in self.participants)
        return losses / examples if examples else None

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """All bytes of tensors that went down to participants and came up from them in training."""
        moved: list[ParticipantResult | LeftOut] = [*self.participants, *self.left_out]
        late_down, late_up = self.late_bytes
        down = sum(each.bytes_down for each in moved) + late_down
        return down, sum(each.bytes_up for each in moved) + late_up

    def figures(self) -> dict[str, float | int]:
        """The round in numbers, by name: those that all methods have (`scoring.FIGURES`), and `own_figures`."""
        down, up = self.bytes_moved
        found: dict[str, float | int | None] = {"training_loss": self.training_loss}
        if self.evaluation is not None:
            for name in SCORES:
                found[name] = getattr(self.evaluation, name)
        found |= {"bytes_down": down, "bytes_up": up, "seconds": self.seconds, **self.own_figures()}
        return {name: value for name, value in found.items() if value is not None}

    def own_figures(self) -> dict[str, float | int]:
        """What was asked for beside the usual: metrics of the evaluation, of the participants, and of the server."""
        asked = {} if self.evaluation is None else self.evaluation.metrics
        return {**self.metrics, **self.server_figures, **asked}

    @property
    def metrics(self) -> dict[str, float]:
        """What participants reported, each number a mean over those that did, weighted by their examples."""
        names = dict.fromkeys(name for each in self.participants for name in each.metrics)
        found = {}
        for name in names:
            told = [(each.metrics[name], each.examples) for each in self.participants if name in each.metrics]
            examples = sum(count for _, count in told)
            found[name] = sum(value * count for value, count in told) / examples if examples else math.nan
        return found

    @property
    def spread(self) -> Spread | None:
        """How far the participants' models lie apart in the test data's scores, where they differ."""
        return spread_of(self.reports)

    @property
    def own_evaluation(self) -> Evaluation | None:
        """What the models are worth to the participants themselves, in the mean, where they were asked."""
        return own_mean_of(self.reports)

    @property
    def own_spread(self) -> Spread | None:
        """How far the participants lie apart in that."""
        return own_spread_of(self.reports)
