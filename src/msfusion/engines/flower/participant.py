"""A participant's side: what it answers to each message. Nothing is remembered from one message to the next.

Nothing leaves but what the method declares (`perform` sees to it), how many examples there are, and digests of what
both sides must agree on. Flower would send to the server what a ClientApp raises, which may quote data: so nothing is
raised here, and why something failed is told on this machine alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from msfusion.batch import Batch
from msfusion.engines.flower.frames import (
    FORMAT,
    Done,
    Failed,
    Here,
    Lost,
    Meet,
    Over,
    Thanks,
    Work,
    excuse,
    told_here,
)
from msfusion.engines.flower.memory import keeping
from msfusion.engines.grpc.kept import sent_of
from msfusion.engines.grpc.messages import task_in
from msfusion.engines.grpc.packing import Agreement, pack, unpack
from msfusion.engines.grpc.sent import SentLog
from msfusion.errors import RunDirectoryError, StreamError
from msfusion.federated.engine import threads_set
from msfusion.federated.method import Method
from msfusion.federated.protected import as_run
from msfusion.federated.work import perform
from msfusion.files import digest_of_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Participant:
    """One participant, with what it is and has on this machine.

    `method` makes the method; where participants have data of their own, of how many examples each has. `test` is the
    common test data. What the method has it keep goes to a folder of its own in `folder`, with a log of what has left
    it, or without one to Flower's context. It trains with so many threads.
    """

    number: int
    data: Batch
    agreement: Agreement
    method: Callable[[Sequence[int]], Method]
    test: Batch | None = None
    folder: Path | None = None
    threads: int = 1

    def run(self, run: str) -> str:
        """A digest of the participant and one of the server's runs."""
        return digest_of_json([self.agreement, self.number, run])

    def own_folder(self, run: str) -> Path | None:
        """The folder of this participant in one of the server's runs."""
        return None if self.folder is None else self.folder / f"{self._name}-{self.run(run)[:8]}"

    @property
    def log(self) -> SentLog:
        """What has left it is told here."""
        return SentLog(None if self.folder is None else self.folder / f"{self._name}.sent.jsonl")

    @property
    def _name(self) -> str:
        return f"participant-{self.number}-{digest_of_json(self.agreement)[:8]}"


class Spare(StreamError):
    """A node that nobody needs: there are not so many participants."""


def respond(
    frame: bytes, body: bytes, memory: dict[int, bytes], present: Callable[[], Participant], say: Say
) -> tuple[bytes, bytes]:
    """What a participant answers to a message, a frame and a body as well.

    `memory` is what it has kept, by round, if it has no folder for that; it is changed. `present` loads what is here,
    `say` tells this machine's user what happens. Of what `present` raises the server is told only a StreamError. Raises
    nothing.
    """
    try:
        asked = unpack(frame, Meet, Work, Over)
        answer, update = _answer(asked, body, present(), memory, say)
    except StreamError as error:
        say(str(error))
        answer, update = excuse(frame, str(error), spare=isinstance(error, Spare)), b""
    except Exception as error:
        say(told_here(error))
        answer, update = excuse(frame), b""
    return pack(answer), update


def _answer(
    asked: Meet | Work | Over, body: bytes, who: Participant, memory: dict[int, bytes], say: Say
) -> tuple[object, bytes]:
    """The answer, and the update that it has. Raises MsfusionError."""
    if isinstance(asked, Meet):
        if asked.format != FORMAT:
            raise StreamError("the server speaks another version: both need the same msfusion")
        say(f"this is participant {who.number}, with {len(who.data)} examples")
        who.log.hello(len(who.data), who.agreement)
        return Here(FORMAT, who.number, len(who.data), who.agreement), b""
    if asked.participant != who.number:
        raise StreamError(
            f"the server takes this participant {who.number} for participant {asked.participant}"
        )
    if isinstance(asked, Over):
        _forget(asked.run, who, memory)
        say(f"all {asked.rounds} rounds are done")
        return Thanks(), b""
    if asked.agreement != digest_of_json(who.agreement) or asked.examples != len(who.data):
        raise StreamError(
            "this participant's data, model or version of msfusion has changed since the run began"
        )
    return _done(asked, body, who, memory, say)


def _forget(run: str, who: Participant, memory: dict[int, bytes]) -> None:
    """Nobody goes on from what was kept in this run."""
    folder = who.own_folder(run)
    with keeping(memory, folder, who.run(run), 0) as kept:
        kept.clear()
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()


def _done(
    asked: Work, body: bytes, who: Participant, memory: dict[int, bytes], say: Say
) -> tuple[object, bytes]:
    """A task, done. It may be one that was done before: it goes on from the same memory, so the same comes of it."""
    kind, task, _ = task_in(body, who.number)
    method = as_run(who.method(asked.everybodys))
    folder, run = who.own_folder(asked.run), who.run(asked.run)
    with keeping(memory, folder, run, asked.rounds_kept) as kept, threads_set(who.threads):
        try:
            task = replace(task, memory=kept.load(asked.kept, method.first_memory))
        except RunDirectoryError as error:
            say(str(error))
            return Lost(asked.kept), b""
        everybody = [who.data] * (who.number + 1)  # nobody else's place is looked at
        (answer,), seconds = perform(method, kind, [task], everybody, test=who.test)
        update = sent_of(kind, task, answer, seconds, len(who.data), kept, say, method.tells_losses)
    if update is None:
        return Failed(), b""
    who.log.message("update", update)
    return Done(), update
