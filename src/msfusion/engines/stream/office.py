"""The round's side of the desk: what participants sent for it, looked at and ready to be trained on.

Streams and desk are in another process (`process`). What comes from there is only read when the round needs
something, so training is never held up by what it does not wait for.
"""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch import Tensor

from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream import process
from msfusion.engines.stream.contract import Contract
from msfusion.engines.stream.frames import Answer, Finish, Step
from msfusion.engines.stream.link import Link
from msfusion.errors import MsfusionError, StreamError
from msfusion.methods.split.sides import Request, draw_of
from msfusion.methods.split.wire import Message

T = TypeVar("T")

END_SECONDS = 10.0
"""How long the streams may take to end: they have two seconds to do so by themselves."""


MOST_REFUSALS = 16
"""So often a participant may send in a round what it should not, before the round goes on without it."""

ROOM = 2**22
"""The bytes on the way to the other process for which nobody waits, as far as the system allows."""


class Refused(StreamError):
    """A participant has sent what it should not, and did not come back in time with something better."""


@contextmanager
def serving(listening: Listening, contract: Contract) -> Iterator[Office]:
    """Streams are served, in a process of their own. Raises StreamError where the address cannot be had."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
    with theirs:
        streams = process.start(theirs)
    office = Office(contract, listening, Link(ours), streams)
    reason = StreamError("the server has stopped", "UNAVAILABLE")
    try:
        office.open()
        yield office
    except StreamError as error:
        reason = error
        raise
    except MsfusionError as error:
        reason = StreamError(f"the server has stopped: {error}", "ABORTED")
        raise
    finally:
        office.close(reason)


class Office:
    """What the streams have brought from each participant, and what goes back to it."""

    def __init__(
        self, contract: Contract, listening: Listening, link: Link, streams: subprocess.Popen[bytes]
    ) -> None:
        self.contract, self._listening, self._link, self._streams = contract, listening, link, streams
        self._round = -1
        self._answered = [0] * contract.participants
        self._draws: list[list[int]] = []
        self._examples: list[int] | None = None
        self._requests: dict[int, Request] = {}
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._left: dict[int, float] = {}
        self._refusals: dict[int, list[str]] = {}
        self._out: set[int] = set()  # of this round
        self._dropped: set[int] = set()  # in an earlier round, and not seen since
        self._listens = self._all_know = False
        self._calls: dict[str, Callable[..., None]] = {
            "listens": self._hear_address,
            "failed": self._fail,
            "say": listening.on_event,
            "came": self._hear_of_coming,
            "left": self._hear_of_leaving,
            "counted": self._hear_examples,
            "asked": self._take,
            "all_know": self._hear_that_all_know,
        }

    def open(self) -> None:
        """Listen. Raises StreamError where the address cannot be had."""
        where, scratch = self._listening, self._listening.scratch
        self._tell(
            "serve",
            dataclasses.asdict(self.contract.terms),
            dataclasses.asdict(where.access),
            where.address,
            where.deadline,
            None if scratch is None else str(scratch),
        )
        while not self._listens:
            self._hear()

    def open_round(self, round_index: int) -> None:
        """A round begins. Its participants get the first layers by `hand_out`."""
        self._round, self._answered = round_index, [0] * self.contract.participants
        self._draws = [[] for _ in range(self.contract.participants)]
        self._dropped |= self._out
        self._refusals, self._out = {}, set()
        self._requests, self._layers = {}, {}
        self._tell("open_round", round_index)

    def hand_out(self, participant: int, layers: bytes) -> None:
        """The participant begins the round with these first layers."""
        self._tell("hand_out", participant, layers)

    def examples(self) -> list[int]:
        """How many each has, from now on for good; waits for all. Raises StreamError as `request` does."""
        return self._wait(lambda: self._examples, range(self.contract.participants))

    def request(self, participant: int, step: int) -> Request:
        """The mini-batch of a step, once it has come. Raises StreamError where the participant stays away."""
        assert self._answered[participant] == step
        return self._wait(lambda: self._requests.pop(participant, None), (participant,))

    def answer(self, participant: int, down: Message, loss: float) -> None:
        """What a participant's step came to."""
        step = self._answered[participant]
        self._tell("answer", participant, pack(Answer(self._round, step, down, loss)))
        self._answered[participant] += 1

    def _draw(self, participant: int, step: int) -> int:
        """That of a step. Many are made at once, which takes a third of the time of one for each step."""
        drawn = self._draws[participant]
        if step == len(drawn):
            seed = self.contract.rounds.seed
            drawn += [draw_of(seed, self._round, participant, step + more) for more in range(64)]
        return drawn[step]

    def refuse(self, participant: int, error: MsfusionError) -> None:
        """What a participant sent is no good: its stream ends, and the round waits for another."""
        step = self._answered[participant]
        where = f"round {self._round}, participant {participant}, step {step}"
        status = error.status if isinstance(error, StreamError) else "INVALID_ARGUMENT"
        self._refusals.setdefault(participant, []).append(str(error))
        self._tell("refuse", participant, f"{error} ({where})", status)

    def leave_out(self, participant: int, error: MsfusionError) -> None:
        """The round goes on without a participant."""
        self._out.add(participant)
        self._requests.pop(participant, None)
        self._layers.pop(participant, None)
        self._tell("leave_out", participant, f"this round goes on without participant {participant}: {error}")

    def finished(self, participant: int) -> dict[str, Tensor]:
        """A participant's first layers after the round. Raises StreamError as `request` does."""
        return self._wait(lambda: self._layers.pop(participant, None), (participant,))

    def say_over(self, seconds: float) -> None:
        """Tell all participants that the rounds are done; wait so long for those that are not there."""
        self._tell("say_over")
        end = time.monotonic() + seconds
        with suppress(TimeoutError):
            while not self._all_know:
                self._hear(end - time.monotonic())

    def close(self, reason: StreamError) -> None:
        """End all streams for this reason, and their process."""
        with suppress(OSError):
            self._link.tell("end", str(reason), reason.status)
        try:
            self._ended(END_SECONDS)
        finally:
            self._link.close()

    def _wait(self, there: Callable[[], T | None], participants: Sequence[int]) -> T:
        """Hear what comes until something is there, which these participants bring.

        Raises StreamError when one of them has been away for as long as patience lasts; Refused where it was cut off,
        and bad participants are to be left out.
        """
        while (found := there()) is None:
            for each in participants:
                self._check_refusals(each)
            away = [
                (self._left[each] + self._patience(each), each) for each in participants if each in self._left
            ]
            try:
                self._hear(min(away)[0] - time.monotonic() if away else None)
            except TimeoutError:
                self._check_refusals(min(away)[1], away=True)
                patience = self._listening.patience
                raise StreamError(
                    f"participant {min(away)[1]} has been away for {patience:g} seconds; "
                    "the same command goes on from the last checkpoint",
                    "ABORTED",
                ) from None
        return found

    def _patience(self, participant: int) -> float:
        """How long to wait for a participant that is away: not as long for one that was cut off."""
        where = self._listening
        if self.contract.screening.bad_update == "stop" or participant not in self._refusals:
            return 0.0 if participant in self._dropped else where.patience
        return min(where.deadline, where.patience)

    def _check_refusals(self, participant: int, away: bool = False) -> None:
        """Refused, with the reason, for a participant for which nobody waits any longer."""
        if self.contract.screening.bad_update == "stop":
            return
        refusals = self._refusals.get(participant, [])
        if len(refusals) >= MOST_REFUSALS or (away and refusals):
            raise Refused(refusals[-1])
        if away and participant in self._dropped:
            raise Refused("it was left out before, and has not come back")

    def _tell(self, name: str, *values: Any) -> None:
        try:
            self._link.tell(name, *values)
        except OSError:
            raise self._death() from None

    def _hear(self, seconds: float | None = None) -> None:
        """Wait for the next call of the streams, and do it. Raises TimeoutError."""
        try:
            name, values = self._link.heard(seconds)
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise self._death() from None
        self._calls[name](*values)

    def _death(self) -> StreamError:
        code = self._ended(1.0)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return StreamError(
            f"the process of the streams {how}; the same command goes on from the last checkpoint", "ABORTED"
        )

    def _ended(self, seconds: float) -> int:
        """The exit code of the process of the streams, which may take so long to end by itself."""
        try:
            with suppress(subprocess.TimeoutExpired):
                return self._streams.wait(seconds)
        finally:
            self._streams.kill()
        return self._streams.wait()

    # What the streams call.

    def _hear_address(self, address: str) -> None:
        self._listens = True
        self._left = dict.fromkeys(range(self.contract.participants), time.monotonic())
        self._listening.on_listening(address)

    def _fail(self, why: str, status: str) -> None:
        raise StreamError(why, status)

    def _hear_of_coming(self, participant: int) -> None:
        self._left.pop(participant, None)
        self._dropped.discard(participant)

    def _hear_of_leaving(self, participant: int, when: float) -> None:
        self._left[participant] = when

    def _hear_examples(self, examples: list[int]) -> None:
        self._examples = examples

    def _hear_that_all_know(self) -> None:
        self._all_know = True

    def _take(self, participant: int, data: bytes) -> None:
        """A step or the first layers of a participant: kept where they are good, refused where they are not."""
        try:
            asked: Step | Finish = unpack(data, Step, Finish)
            if asked.round != self._round or participant in self._out:
                return  # it came while the round went on without this participant
            if isinstance(asked, Step):
                self._requests[participant] = self._request(participant, asked)
                return
            self._layers[participant] = self.contract.layers_of(asked.layers)
        except MsfusionError as error:
            self.refuse(participant, error)
        else:
            self._tell("accept", participant)

    def _request(self, participant: int, asked: Step) -> Request:
        """A mini-batch that has all the right sizes."""
        assert self._examples is not None
        assert asked.step == self._answered[participant]
        examples = self.contract.terms.examples_of(self._examples[participant], asked.step)
        self.contract.check_message(asked.pieces, examples)
        targets = self.contract.targets_of(asked.targets, examples)
        return Request(asked.pieces, targets, self._draw(participant, asked.step))
