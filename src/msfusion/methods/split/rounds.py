"""Split learning as one loop: the rounds of several participants and one server, all in this process.

It is the readable reference of the method (`method`), which engines carry out and which must end with the same bits.

What would cross a network is encoded, counted and decoded; nothing else is shared between the two sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import DataError, MsfusionError
from msfusion.federated.engine import threads_set
from msfusion.federated.participation import Attendance, RoundSettings
from msfusion.federated.results import LeftOut, ParticipantResult, RoundResult
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import holding, payload_bytes, state_of
from msfusion.federated.training import TrainingSettings, round_batches
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.results import SplitTraffic, figures_of
from msfusion.methods.split.sides import Participant, Request, draw_of, part_of, participant_of, server_of
from msfusion.methods.split.turnout import Turnout
from msfusion.methods.split.wire import Message, Wire
from msfusion.objectives import evaluate
from msfusion.width.cut import Cut
from msfusion.width.groups import State


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
        self._first_layers, self._told = first_layers, dict[int, dict[str, float]]()
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
        others = sum(map(len, request.message)) - self._wire.coded_bytes(request.message)
        crossed = self.traffic[participant].crossed(self._wire, request.message, down, plain)
        self.traffic[participant] = crossed.plus(other_up=others + request.targets.nbytes)
        self._losses[participant] += loss * examples
        self._seen[participant] += examples
        self._seconds[participant] += seconds

    def handed_in(self, participant: int, told: dict[str, float]) -> None:
        """The first layers went up at the end of the round, and the figures that the participant tells."""
        self._told[participant] = told
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
                self._told.get(index, {}),
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


def run_split_rounds(
    parts: Cut,
    whole: nn.Module,
    data: Sequence[Batch],
    settings: SplitSettings,
    training: TrainingSettings,
    rounds: RoundSettings,
    *,
    state: State,
    first_round: int = 0,
    threads: int = 1,
    test: Batch | None = None,
    language_modelling: bool = False,
    screening: Screening = DEFAULT,
    on_participant: Callable[[ParticipantResult], None] | None = None,
) -> Generator[SplitRound, None, None]:
    """Run the rounds first_round .. rounds.rounds - 1, each with all participants; hand on each as it ends.

    `parts` are those of the model `whole`, in which a round's result is evaluated. A round depends on the
    state before it and on (seed, round) alone, so a run that goes on from any round gives the same numbers;
    optimisers begin afresh in each. Both sides train with `training`, and each clips its own gradients.
    A participant whose activations, loss or gradients are not finite or absurd does no more steps in that round, and
    its first layers do not count (`screening`); what the server has learned from its steps before stays.
    Raises DataError at once; TrainingError for a bad participant that is to stop the run, or if all are.
    """
    if not data or any(len(own) == 0 for own in data):
        raise DataError("split learning needs participants that all have examples")
    screening.check_examples(map(len, data))

    current = dict(state)
    for round_index in range(first_round, rounds.rounds):
        begin = time.perf_counter()
        with threads_set(threads):
            with closing(Turnout(screening, len(data), round_index)) as turnout:
                made = _Round(parts, current, data, settings, training, rounds.seed, round_index, turnout)
                current, ledger = made.run(), made.ledger
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
            attendance=Attendance(tuple(range(len(data)))),
            left_out=ledger.left_out(round_index),
            server_figures=figures_of(ledger.traffic),
            traffic=tuple(ledger.traffic),
        )


class _Round:
    """One round in training."""

    def __init__(
        self,
        parts: Cut,
        state: State,
        data: Sequence[Batch],
        settings: SplitSettings,
        training: TrainingSettings,
        seed: int,
        round_index: int,
        turnout: Turnout,
    ) -> None:
        self.turnout = turnout
        self.parts, self.data, self.settings, self.training = parts, data, settings, training
        self.seed, self.round_index = seed, round_index
        self.wire = settings.wire(parts)
        self.client_state = part_of(state, parts.client)
        self.server = server_of(parts.server, state, self.wire, training, round_index)
        examples = [len(own) for own in data]
        self.ledger = Ledger(self.wire, examples, payload_bytes(self.client_state), turnout.reasons)
        self._steps = [0] * len(data)

    def run(self) -> dict[str, Tensor]:
        """The state of the whole model after the round. Raises TrainingError where nobody's work counts."""
        client = self._relayed() if self.settings.clients == "relayed" else self._together()
        return {**client, **state_of(self.parts.server)}

    def _relayed(self) -> dict[str, Tensor]:
        """One participant after the other; the first layers go from hand to hand, past those that are left out."""
        layers = self.client_state
        for index in range(len(self.data)):
            participant = self._participant(layers)
            for batch in self._mini_batches(index):
                self._exchange([(index, participant, batch)])
                if index in self.turnout.reasons:
                    break
            layers = self.turnout.relayed(index, self._handed_in(index, participant), layers)
        return layers

    def _together(self) -> dict[str, Tensor]:
        """All participants side by side, mini-batch by mini-batch; their first layers are averaged at the end."""
        everyone = [self._participant(self.client_state) for _ in self.data]
        batches = [self._mini_batches(index) for index in range(len(self.data))]
        while True:
            turn = [
                (index, everyone[index], batch)
                for index, own in enumerate(batches)
                if index not in self.turnout.reasons and (batch := next(own, None)) is not None
            ]
            if not turn:
                break
            for together in [turn] if self.settings.server_step == "joined" else [[each] for each in turn]:
                self._exchange(together)
        finished = (
            (index, self._handed_in(index, each), len(self.data[index]))
            for index, each in enumerate(everyone)
            if index not in self.turnout.reasons
        )
        return self.turnout.averaged(finished, self.client_state)

    def _handed_in(self, index: int, participant: Participant) -> dict[str, Tensor]:
        """A participant's first layers at the end of its round."""
        if index not in self.turnout.reasons:
            self.ledger.handed_in(index, participant.told)
        return state_of(participant.part)

    def _exchange(self, turn: Sequence[tuple[int, Participant, Batch]]) -> None:
        """Up, a step of the server, and down, for one mini-batch of each of these participants."""
        begin = time.perf_counter()
        sent: list[tuple[int, Participant, Batch, Request]] = []
        for index, participant, batch in turn:
            draw = draw_of(self.seed, self.round_index, index, self._steps[index])
            self._steps[index] += 1
            with self.turnout.screened(index):
                sent.append(
                    (index, participant, batch, Request(participant.send(batch, draw), batch.targets, draw))
                )
        for (index, participant, batch, request), (down, loss) in self._answered(sent):
            plain = participant.plain_bytes
            with self.turnout.screened(index):
                participant.receive(down)
            seconds = (time.perf_counter() - begin) / len(turn)
            self.ledger.count(index, request, down, plain, loss, len(batch), seconds)

    def _answered(
        self, sent: list[tuple[int, Participant, Batch, Request]]
    ) -> list[tuple[tuple[int, Participant, Batch, Request], tuple[Message, float]]]:
        """A step of the server on these mini-batches, without those that are no good; each with its answer."""
        found = []
        answers = self.server.step_on_good([each[3] for each in sent])
        for each, answer in zip(sent, answers, strict=True):
            if isinstance(answer, MsfusionError):
                self.turnout.leave_out(each[0], answer)
            else:
                found.append((each, answer))
        return found

    def _participant(self, state: Mapping[str, Tensor]) -> Participant:
        return participant_of(self.parts, state, self.wire, self.training, self.round_index)

    def _mini_batches(self, participant: int) -> Iterator[Batch]:
        return round_batches(
            self.data[participant],
            self.training,
            seed=self.seed,
            round_index=self.round_index,
            participant=participant,
        )
