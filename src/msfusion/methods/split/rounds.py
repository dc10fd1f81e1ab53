"""Split learning as one loop: the rounds of several participants and one server, all in this process.

It is the readable reference of the method (`method`), which engines carry out and which must end with the same bits.

What would cross a network is encoded, counted and decoded; nothing else is shared between the two sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import DataError, MsfusionError
from msfusion.federated.messages import payload_bytes
from msfusion.federated.participation import RoundSettings
from msfusion.federated.results import ParticipantResult
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, round_batches
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.results import Ledger, SplitRound, SplitTraffic, split_rounds
from msfusion.methods.split.sides import (
    Participant,
    Request,
    client_optimizer,
    draw_of,
    part_of,
    participant_of,
    server_of,
)
from msfusion.methods.split.turnout import Turnout
from msfusion.methods.split.wire import Message
from msfusion.width.cut import Cut
from msfusion.width.groups import State

__all__ = [
    "SplitRound",
    "SplitSettings",
    "SplitTraffic",
    "client_optimizer",
    "part_of",
    "run_split_rounds",
    "server_of",
]


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

    def run(before: State, round_index: int) -> tuple[dict[str, Tensor], Ledger]:
        with closing(Turnout(screening, len(data), round_index)) as turnout:
            federation = _Round(parts, before, data, settings, training, rounds.seed, round_index, turnout)
            return federation.run(), federation.ledger

    yield from split_rounds(
        run,
        whole,
        rounds,
        participants=len(data),
        state=state,
        first_round=first_round,
        threads=threads,
        test=test,
        language_modelling=language_modelling,
        on_participant=on_participant,
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
            self.ledger.handed_in(index)
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
