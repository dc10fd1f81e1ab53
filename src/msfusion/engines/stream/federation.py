"""The rounds on the server: in the very order of the run in one process, so with the very same numbers.

Participants compute at the same time, but the server takes their mini-batches in a fixed order (turn by turn, in
each turn by number), from wherever they have come by then. See `engines.split` for the run that this one equals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.engines.calendar import RoundSettings
from msfusion.engines.messages import payload_bytes
from msfusion.engines.results import ParticipantResult
from msfusion.engines.split import SplitSettings, part_of, server_of
from msfusion.engines.split_results import Ledger, SplitRound, split_rounds
from msfusion.engines.stream.contract import Contract, layers_message
from msfusion.engines.stream.office import Office, serving
from msfusion.engines.stream.service import Listening
from msfusion.errors import CodecError, MsfusionError
from msfusion.methods.split import Forward, Request, averaged
from msfusion.methods.states import state_of
from msfusion.methods.training import TrainingSettings
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
    on_participant: Callable[[ParticipantResult], None] | None = None,
) -> Generator[SplitRound, None, None]:
    """As `run_split_rounds`, but the participants come over the network and bring their own data.

    A round that was handed on is taken for saved: only when the next is asked for do the participants hear of
    it. So a server that is killed begins its round anew, and a participant that is killed goes on where it was.
    Whoever sends what it should not is cut off, and the round waits for it to come back. Raises StreamError
    where the address cannot be had, and where a participant stays away longer than `listening.patience`;
    TrainingError for a joined step whose gradients are not finite.
    """
    contract = Contract(parts, settings, training, rounds, participants)
    with serving(listening, contract) as office:

        def run(before: State, round_index: int) -> tuple[dict[str, Tensor], Ledger]:
            federation = _Round(parts, before, settings, contract, office, round_index)
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
    ) -> None:
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
        self.ledger = Ledger(self.contract.wire, self.examples, payload_bytes(self.client_state))
        client = self._relayed() if relayed else self._together()
        return {**client, **state_of(self.parts.server)}

    def _relayed(self) -> dict[str, Tensor]:
        """One participant after the other; the first layers go from hand to hand."""
        layers: dict[str, Tensor] = {}
        for participant in range(self.contract.participants):
            if participant > 0:
                self.office.hand_out(participant, layers_message(layers))
            for step in range(self._steps(participant)):
                self._exchange([participant], step)
            layers = self.office.finished(participant)
        return layers

    def _together(self) -> dict[str, Tensor]:
        """All participants side by side, mini-batch by mini-batch; their first layers are averaged at the end."""
        everyone = range(self.contract.participants)
        for step in range(max(map(self._steps, everyone))):
            turn = [participant for participant in everyone if step < self._steps(participant)]
            for together in [turn] if self.settings.server_step == "joined" else [[each] for each in turn]:
                self._exchange(together, step)
        return averaged([(self.office.finished(each), float(self.examples[each])) for each in everyone])

    def _steps(self, participant: int) -> int:
        return self.contract.terms.steps(self.examples[participant])

    def _exchange(self, turn: Sequence[int], step: int) -> None:
        """Take a mini-batch of each of these participants, make a step of the server, and answer them."""
        begin = time.perf_counter()
        answers = None
        while answers is None:
            taken = [self._taken(participant, step) for participant in turn]
            try:
                answers = self.server.update([forward for _, forward in taken])
            except MsfusionError as error:
                if len(turn) > 1:
                    raise  # whose fault it was cannot be known
                self.office.refuse(turn[0], error)
        for participant, (request, forward), (down, loss) in zip(turn, taken, answers, strict=True):
            self.office.answer(participant, down, loss)
            plain = self.contract.plain_bytes(forward.examples)
            seconds = (time.perf_counter() - begin) / len(turn)
            self.ledger.count(participant, request, down, plain, loss, forward.examples, seconds)

    def _taken(self, participant: int, step: int) -> tuple[Request, Forward]:
        """A mini-batch and what the server part makes of it, however often it takes."""
        while True:
            request = self.office.request(participant, step)
            try:
                return request, self._forward(request)
            except MsfusionError as error:
                self.office.refuse(participant, error)

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
