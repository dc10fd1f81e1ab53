"""What split learning reports: bytes by kind. And what the loop of `rounds` and the one over a network have in common:
a ledger of each round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.federated.engine import threads_set
from msfusion.federated.participation import Attendance, RoundSettings
from msfusion.federated.results import LeftOut, ParticipantResult, RoundResult
from msfusion.federated.states import holding
from msfusion.methods.split.sides import Request
from msfusion.methods.split.wire import Message, Wire
from msfusion.objectives import evaluate
from msfusion.width.groups import State


@dataclass(frozen=True)
class SplitTraffic:
    """Bytes of one participant in one round: all that crosses, and its codecs' share of it.

    `activations` up and `gradients` down are what the codecs made of `plain_activations` and `plain_gradients`;
    `other_up` are the targets, masks and trained first layers, `other_down` the first layers that it received.
    """

    activations: int = 0
    gradients: int = 0
    plain_activations: int = 0
    plain_gradients: int = 0
    other_up: int = 0
    other_down: int = 0

    def plus(self, **more: int) -> SplitTraffic:
        """With more bytes of some kinds."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})


TRAFFIC = ("activations", "gradients", "plain_activations", "plain_gradients")
"""The kinds of bytes that a round's metrics tell, summed over the participants."""


def figures_of(traffic: Sequence[SplitTraffic]) -> dict[str, float | int]:
    """Those bytes, by the names that they have in the metrics."""
    return {f"{kind}_bytes": sum(getattr(each, kind) for each in traffic) for kind in TRAFFIC}


@dataclass(frozen=True)
class SplitRound(RoundResult):
    """A finished round; `traffic` has each participant's bytes by kind."""

    traffic: tuple[SplitTraffic, ...] = ()


class Ledger:
    """Every participant's bytes, losses and seconds in a round, step by step.

    `examples` are how many each has. Its first layers come at the start of a round and go at its end. `reasons` say
    why a participant is left out.
    """

    def __init__(
        self, wire: Wire, examples: Sequence[int], first_layers: int, reasons: Mapping[int, str]
    ) -> None:
        self._wire, self._examples, self._reasons = wire, examples, reasons
        self._first_layers = first_layers
        self.traffic = [SplitTraffic(other_down=first_layers) for _ in examples]
        self._losses, self._seen, self._seconds = (
            [0.0] * len(examples),
            [0] * len(examples),
            [0.0] * len(examples),
        )

    def count(
        self,
        participant: int,
        request: Request,
        down: Message,
        plain: int,
        loss: float,
        examples: int,
        seconds: float,
    ) -> None:
        """A mini-batch that went up and came down, with `plain` bytes of activations before any codec."""
        coded = self._wire.coded_bytes(request.message)
        self.traffic[participant] = self.traffic[participant].plus(
            activations=coded,
            gradients=sum(map(len, down)),
            plain_activations=plain,
            plain_gradients=plain,
            other_up=sum(map(len, request.message)) - coded + request.targets.nbytes,
        )
        self._losses[participant] += loss * examples
        self._seen[participant] += examples
        self._seconds[participant] += seconds

    def handed_in(self, participant: int) -> None:
        """The first layers went up at the end of the round."""
        self.traffic[participant] = self.traffic[participant].plus(other_up=self._first_layers)

    def results(self) -> tuple[ParticipantResult, ...]:
        """What each did whose work counts: its loss is the mean over its examples, as the server saw them."""
        return tuple(
            ParticipantResult(
                index,
                self._losses[index] / self._seen[index],
                own,
                traffic.gradients + traffic.other_down,
                traffic.activations + traffic.other_up,
                self._seconds[index],
            )
            for index, (own, traffic) in enumerate(zip(self._examples, self.traffic, strict=True))
            if index not in self._reasons
        )

    def left_out(self, round_index: int) -> tuple[LeftOut, ...]:
        """Whose work does not count, why, and what it moved."""
        return tuple(
            LeftOut(
                index,
                round_index,
                reason,
                self.traffic[index].gradients + self.traffic[index].other_down,
                self.traffic[index].activations + self.traffic[index].other_up,
            )
            for index, reason in sorted(self._reasons.items())
        )


def split_rounds(
    run: Callable[[State, int], tuple[dict[str, Tensor], Ledger]],
    whole: nn.Module,
    rounds: RoundSettings,
    *,
    participants: int,
    state: State,
    first_round: int,
    threads: int,
    test: Batch | None,
    language_modelling: bool,
    on_participant: Callable[[ParticipantResult], None] | None,
) -> Generator[SplitRound, None, None]:
    """Run the rounds first_round .. rounds.rounds - 1 and hand on each as it ends, evaluated where that is due.

    `run` makes a round's state of the model `whole`, and its ledger, from the state before it and its index.
    """
    current = dict(state)
    for round_index in range(first_round, rounds.rounds):
        begin = time.perf_counter()
        with threads_set(threads):
            current, ledger = run(current, round_index)
            evaluation = None
            last = round_index == rounds.rounds - 1
            if test is not None and (last or (round_index + 1) % rounds.evaluate_every == 0):
                with holding(whole, current) as joined:
                    evaluation = evaluate(joined, test, language_modelling=language_modelling)
        results = ledger.results()
        if on_participant is not None:
            for result in results:
                on_participant(result)
        yield SplitRound(
            round_index=round_index,
            state=current,
            participants=results,
            evaluation=evaluation,
            seconds=time.perf_counter() - begin,
            attendance=Attendance(tuple(range(participants))),
            left_out=ledger.left_out(round_index),
            server_figures=figures_of(ledger.traffic),
            traffic=tuple(ledger.traffic),
        )
