"""The rounds on the server: in the very order of the run in one process, so with the very same numbers.

Participants compute at the same time, but the server takes their mini-batches in a fixed order (turn by turn, in
each turn by number), from wherever they have come by then. See `engines.split` for the run that this one equals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.stream.contract import Contract, layers_message
from msfusion.engines.stream.office import Office, Refused, serving
from msfusion.errors import CodecError, MsfusionError
from msfusion.federated.messages import payload_bytes
from msfusion.federated.participation import RoundSettings
from msfusion.federated.results import ParticipantResult
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.results import Ledger, SplitRound, split_rounds
from msfusion.methods.split.rounds import SplitSettings, part_of, server_of
from msfusion.methods.split.sides import Forward, Request
from msfusion.methods.split.turnout import Turnout
from msfusion.width.cut import Cut
from msfusion.width.groups import State


def serve_split_rounds(
    parts: Cut,
    whole: nn.Module,
    settings: SplitSettings,
    training: TrainingSettings,
    rounds: RoundSettings,
    listening: Listening,
    *,
    participants: int,
    state: State,
    first_round: int = 0,
    threads: int = 1,
    test: Batch | None = None,
    language_modelling: bool = False,
    screening: Screening = DEFAULT,
    meaning: Agreement | None = None,
    on_participant: Callable[[ParticipantResult], None] | None = None,
) -> Generator[SplitRound, None, None]:
    """As `run_split_rounds`, but the participants come over the network and bring their own data.

    A round that was handed on is taken for saved: only when the next is asked for do the participants hear of
    it. So a server that is killed begins its round anew, and a participant that is killed goes on where it was.
    Whoever sends what it should not is cut off, and the round waits `listening.deadline` seconds for it to come back;
    then, or after sixteen such messages, it goes on without it (`screening`). `meaning` is what the data's labels and
    tokens stand for, which participants must agree on. Raises StreamError where the address cannot be had, and where a
    participant stays away longer than `listening.patience`; TrainingError where everybody is left out.
    """
    contract = Contract(parts, settings, training, rounds, participants, screening=screening, meaning=meaning)
    with serving(listening, contract) as office:

        def run(before: State, round_index: int) -> tuple[dict[str, Tensor], Ledger]:
            with closing(Turnout(screening, participants, round_index)) as turnout:
                federation = _Round(parts, before, settings, contract, office, round_index, turnout)
                return federation.run(), federation.ledger

        yield from split_rounds(
            run,
            whole,
            rounds,
            participants=participants,
            state=state,
            first_round=first_round,
            threads=threads,
            test=test,
            language_modelling=language_modelling,
            on_participant=on_participant,
        )
        office.say_over(listening.farewell)


class _Round:
    """One round in training."""

    def __init__(
        self,
        parts: Cut,
        state: State,
        settings: SplitSettings,
        contract: Contract,
        office: Office,
        round_index: int,
        turnout: Turnout,
    ) -> None:
        self.turnout = turnout
        self._again: dict[int, Request] = {}  # good mini-batches of a step that failed for another's
        self.parts, self.settings, self.contract, self.office = parts, settings, contract, office
        self.round_index = round_index
        self.client_state = part_of(state, parts.client)
        self.server = server_of(parts, state, contract.wire, contract.training, round_index)
        self.ledger: Ledger

    def run(self) -> dict[str, Tensor]:
        """The state of the whole model after the round."""
        everyone = range(self.contract.participants)
        relayed = self.settings.clients == "relayed"
        self.office.open_round(self.round_index)
        for participant in everyone[:1] if relayed else everyone:
            self.office.hand_out(participant, layers_message(self.client_state))
        self.examples = self.office.examples()
        self.ledger = Ledger(
            self.contract.wire, self.examples, payload_bytes(self.client_state), self.turnout.reasons
        )
        client = self._relayed() if relayed else self._together()
        return {**client, **state_of(self.parts.server)}

    def _relayed(self) -> dict[str, Tensor]:
        """One participant after the other; the first layers go from hand to hand, past those that are left out."""
        layers = self.client_state
        for participant in range(self.contract.participants):
            if participant > 0:
                self.office.hand_out(participant, layers_message(layers))
            for step in range(self._steps(participant)):
                self._exchange([participant], step)
                if participant in self.turnout.reasons:
                    break
            layers = self.turnout.relayed(participant, self._finished(participant) or {}, layers)
        return layers

    def _together(self) -> dict[str, Tensor]:
        """All participants side by side, mini-batch by mini-batch; their first layers are averaged at the end."""
        everyone = range(self.contract.participants)
        for step in range(max(map(self._steps, everyone))):
            turn = [
                each for each in everyone if step < self._steps(each) and each not in self.turnout.reasons
            ]
            for together in [turn] if self.settings.server_step == "joined" else [[each] for each in turn]:
                self._exchange(together, step)
        finished = (
            (each, layers, self.examples[each])
            for each in everyone
            if (layers := self._finished(each)) is not None
        )
        return self.turnout.averaged(finished, self.client_state)

    def _finished(self, participant: int) -> dict[str, Tensor] | None:
        """A participant's first layers after the round; None where it is left out."""
        if participant in self.turnout.reasons:
            return None
        try:
            layers = self.office.finished(participant)
        except Refused as error:
            self._leave_out(participant, error)
            return None
        self.ledger.handed_in(participant)
        return layers

    def _leave_out(self, participant: int, error: MsfusionError) -> None:
        self.office.leave_out(participant, error)
        self.turnout.leave_out(participant, error)

    def _steps(self, participant: int) -> int:
        return self.contract.terms.steps(self.examples[participant])

    def _exchange(self, turn: Sequence[int], step: int) -> None:
        """Take a mini-batch of each of these participants, make a step of the server, and answer them."""
        begin = time.perf_counter()
        taken: dict[int, tuple[Request, Forward]] = {}
        answers = None
        while answers is None:
            for participant in turn:
                if participant not in self.turnout.reasons:
                    self._take(participant, step, taken)
            if not taken:
                return
            try:
                answers = self.server.update([forward for _, forward in taken.values()])
            except MsfusionError as error:
                self._refuse_the_bad(taken, error)
        for (participant, (request, forward)), (down, loss) in zip(taken.items(), answers, strict=True):
            self.office.answer(participant, down, loss)
            plain = self.contract.plain_bytes(forward.examples)
            seconds = (time.perf_counter() - begin) / len(turn)
            self.ledger.count(participant, request, down, plain, loss, forward.examples, seconds)

    def _take(self, participant: int, step: int, taken: dict[int, tuple[Request, Forward]]) -> None:
        """A mini-batch and what the server part makes of it, however often it takes; nothing if it is left out."""
        try:
            while participant not in taken:
                request = self._again.pop(participant, None) or self.office.request(participant, step)
                try:
                    taken[participant] = request, self._forward(request)
                except MsfusionError as error:
                    self.office.refuse(participant, error)
        except Refused as error:
            self._leave_out(participant, error)

    def _refuse_the_bad(self, taken: dict[int, tuple[Request, Forward]], error: MsfusionError) -> None:
        """Refuse the mini-batches that are no good by themselves; the others are taken again, each in its turn."""
        faults = {each: self.server.fault_of(request) for each, (request, _) in taken.items()}
        bad = {each: fault for each, fault in faults.items() if fault is not None}
        if len(taken) == 1:
            bad = dict.fromkeys(taken, error)
        if not bad:
            raise error  # only together are they no good: nobody's fault
        for participant, fault in bad.items():
            self.office.refuse(participant, fault)
        self._again = {each: request for each, (request, _) in taken.items() if each not in bad}
        taken.clear()

    def _forward(self, request: Request) -> Forward:
        try:
            received = self.contract.wire.received(request.message)
            self.contract.check_received(received, len(request.targets))
            return self.server.forward(request, received)
        except (
            RuntimeError,
            IndexError,
        ) as error:  # tensors that cross may be indices of the rest of the model
            reason = str(error).strip().partition("\n")[0][:200]
            raise CodecError(f"the rest of the model cannot go on with this mini-batch: {reason}") from error
