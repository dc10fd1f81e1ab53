"""Hostile peers of a server: participants with a valid token that send anything, and strangers with none of their own.

What a hostile participant says is an update only where `valid` names the round: then it is what it was sent, unchanged
(`echo`), so that a run in one process can say the same.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import torch
from peer import Peer

from msfusion.batch import Batch
from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.frames import (
    FORMAT,
    Done,
    Failed,
    Goodbye,
    Hello,
    Over,
    Ready,
    Send,
    Thanks,
    Welcome,
    Work,
)
from msfusion.engines.grpc.messages import Gathering, pieces_of, task_in
from msfusion.engines.grpc.packing import Agreement
from msfusion.experiment.config import load_config
from msfusion.experiment.remote import part_of
from msfusion.federated.messages import encode
from msfusion.federated.method import Kind, Method, Task, Update
from msfusion.width.groups import State

if TYPE_CHECKING:
    from chaos import Federation

KINDS = ("twice", "late", "old round", "nan", "shapes", "oversized", "truncated", "cut off", "noise")
"""What a hostile participant may do with a task. After "twice" and "old round" an update of it counts."""

LARGEST_TASK = 2**30
_OUTLINES = threading.Lock()  # a method is not made for several threads


def echo(method: Method, task: Task, examples: int) -> Update:
    """What was sent, as an update."""
    with _OUTLINES:
        names = method.outbound("train", task).tensors
    return Update(
        task.participant, task.round_index, {each: task.tensors[each] for each in names}, examples, 0.5
    )


@dataclass
class Hostile:
    """A hostile participant. `deadline` is the server's: whoever is "late" has its task for longer."""

    participant: int
    address: str
    access: Access
    agreement: Agreement
    method: Method
    data: Batch
    deadline: float
    draws: random.Random
    attacks: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    valid: set[int] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)
    _before: bytes = b"before"

    def start(self) -> threading.Thread:
        """Do this in a thread until the rounds are over."""
        thread = threading.Thread(target=self._attack_on, daemon=True)
        thread.start()
        return thread

    def _attack_on(self) -> None:
        while not self.over.is_set():
            peer = Peer(self.address, self.access, 600.0)
            with closing(peer):
                try:
                    self._converse(peer)
                except grpc.RpcError as error:
                    self.ends[error.code().name] += 1
                except StopIteration:
                    self.ends["ended"] += 1
            time.sleep(0.2)

    def _converse(self, peer: Peer) -> None:
        session = self.draws.randbytes(16)
        peer.say(Hello(FORMAT, self.participant, session, len(self.data), self.agreement))
        peer.heard(Welcome)
        while True:
            peer.say(Ready())
            work = peer.heard(Work, Over)
            if isinstance(work, Over):
                peer.say(Goodbye())
                self.over.set()
                return
            gathering = Gathering(work.size, LARGEST_TASK)
            while gathering.missing:
                gathering.add(peer.piece())
            kind, task, _ = task_in(gathering.message(), self.participant)
            self._attack(peer, work, kind, task)
            self._before = work.work

    def _attack(self, peer: Peer, work: Work, kind: Kind, task: Task) -> None:
        if kind != "train":
            peer.say(Failed(work.work))
            peer.heard(Thanks)
            return
        how = self.draws.choice(KINDS)
        self.attacks[how] += 1
        update = echo(self.method, task, len(self.data))
        if how in ("twice", "old round"):
            self._update(peer, work, how, task, update)
        elif how == "late":
            self.over.wait(1.2 * self.deadline)
            self._hand_in(peer, work, _message(update, update.tensors), task.round_index + 1)
        elif how == "oversized":
            peer.say(Done(work.work, 2**40))
            peer.heard(Thanks)  # the stream ends instead
        elif how == "cut off":
            message = _message(update, update.tensors)
            peer.say(Done(work.work, len(message)))
            peer.heard(Send)
            peer.say(message[: len(message) // 2])  # and then nothing: it goes
            raise StopIteration
        else:
            self._hand_in(peer, work, self._bad(how, update))

    def _update(self, peer: Peer, work: Work, how: str, task: Task, update: Update) -> None:
        """An update that counts, and another that does not: before it for an old round, after it for this one."""
        if how == "old round":
            self._hand_in(peer, Work(self._before, 0, 0, 0), self._bad("nan", update))
        self._hand_in(peer, work, _message(update, update.tensors), task.round_index + 1)
        if how == "twice":
            self._hand_in(peer, work, self._bad("nan", update))

    def _hand_in(self, peer: Peer, work: Work, message: bytes, valid: int | None = None) -> None:
        """Say that it is done, and send this if it is wanted; `valid` is the round for which it is an update."""
        peer.say(Done(work.work, len(message)))
        if isinstance(peer.heard(Send, Thanks), Thanks):
            return
        if valid is not None:
            self.valid.add(valid)  # before it is known whether it arrives
        for piece in pieces_of(message):
            peer.say(piece)
        peer.heard(Thanks)

    def _bad(self, how: str, update: Update) -> bytes:
        tensors = dict(update.tensors)
        if how == "noise":
            return self.draws.randbytes(1000)
        if how == "nan":
            changed = {each: torch.full_like(tensors[each], torch.nan) for each in _floating(tensors)}
            return _message(update, {**tensors, **changed})
        if how == "shapes":
            return _message(update, {each: torch.cat([tensors[each][None]] * 2) for each in tensors})
        message = _message(update, tensors)
        return message[: len(message) * 2 // 3]


def _floating(tensors: State) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.is_floating_point()]


def _message(update: Update, tensors: State) -> bytes:
    header = {
        "participant": update.participant,
        "round_index": update.round_index,
        "examples": update.examples,
        "loss": update.loss,
        "metadata": {},
        "seconds": 0.1,
        "remembers": False,
    }
    return encode(header, tensors)


@dataclass
class Strangers:
    """Peers with a wrong token, or another participant's, which claim to be anybody."""

    address: str
    accesses: list[Access]
    hello: Callable[[int], Hello]
    count: int
    draws: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        """Come again and again, in a thread."""
        thread = threading.Thread(target=self._come, daemon=True)
        thread.start()
        return thread

    def _come(self) -> None:
        while not self.over.wait(0.3):
            token = self.draws.randrange(len(self.accesses))
            who = self.draws.choice([each for each in range(self.count) if each != token])
            peer = Peer(self.address, self.accesses[token], 10.0)
            with closing(peer), suppress(StopIteration):
                try:
                    peer.say(self.hello(who))
                    peer.heard(Welcome)
                    self.ends["LET IN"] += 1
                except grpc.RpcError as error:
                    self.ends[error.code().name] += 1


def hostile_peers(
    options: argparse.Namespace, federation: Federation, honest: int, deadline: float
) -> tuple[list[Hostile], Strangers]:
    """Those with a token of their own, and strangers."""
    config, address = load_config(federation.folder / federation.job), f"127.0.0.1:{federation.port}"
    keys = federation.folder / federation.name
    part = part_of(config, 0, None)
    peers = []
    for who in range(honest, federation.count):
        own = part_of(config, who, None)
        access = Access.of_participant(keys / f"keys/participant-{who}")
        draws = random.Random(f"{options.seed} hostile {who}")
        assert not callable(own.method)
        about = address, access, own.agreement, own.method, own.data
        peers.append(Hostile(who, *about, deadline, draws))

    def hello(who: int) -> Hello:
        return Hello(FORMAT, who, b"a stranger", len(part.data), part.agreement)

    accesses = [Access.of_participant(keys / f"keys/participant-{who}") for who in range(2)]
    wrong = Access.of_participant(keys / "other-keys/participant-0")
    accesses.append(Access(wrong.token, accesses[0].authority))
    return peers, Strangers(address, accesses, hello, honest, random.Random(options.seed))


def end(peers: list[Hostile], strangers: Strangers, threads: list[threading.Thread]) -> None:
    """Have the hostile go."""
    for each in (*peers, strangers):
        each.over.set()
    for thread in threads:
        thread.join(20)
